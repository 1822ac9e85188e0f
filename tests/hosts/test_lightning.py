"""The callback in PyTorch Lightning's own Trainer, against modules that add the term themselves."""

from __future__ import annotations

import operator
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdkernels.nn import (
    CorrelationCongruenceLoss,
    FeatureCapture,
    LocalCorrelationLoss,
    SemanticCalibration,
    SemCKDLoss,
)

lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make test-hosts")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from kdkernels.integrations.lightning import Distillation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHT = 3.0


class Images(Dataset):
    def __init__(self, kind: str = "tuple") -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(32, 3, 8, 8, generator=generator)
        self.labels = torch.randint(5, (32,), generator=generator)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], self.labels[index]
        return (image, label) if self.kind == "tuple" else {"image": image, "label": label}


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(16 * width, 5)
    )


def teacher() -> nn.Sequential:
    torch.manual_seed(3)
    return network(8)


class Module(lightning.LightningModule):
    """What users have: nothing of distillation in it."""

    def __init__(self, output: str = "loss") -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = network(4)
        self.output = output

    def hard(self, batch: Any) -> Tensor:
        images, labels = batch if not isinstance(batch, dict) else (batch["image"], batch["label"])
        return F.cross_entropy(self.net(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.hard(batch)
        return {"loss": loss, "more": 1} if self.output == "dict" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), 0.1)


class ByHand(Module):
    """The same with the term written out."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.compare = [loss]
        self.teacher = [teacher()]
        self.terms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (teacher,) = self.teacher
        teacher.to(dtype=self.net[0].weight.dtype)
        with FeatureCapture(self.net, "2") as ours, FeatureCapture(teacher, "2") as theirs:
            hard = self.hard(batch)
            with torch.no_grad():
                teacher(batch[0])
            term = WEIGHT * self.compare[0](*ours.features, *theirs.features)
        self.terms.append(term.item())
        return hard + term


def trainer(callbacks: list[Any] | None = None, **settings: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"max_steps": 4, "accelerator": "cpu", "devices": 1, **quiet, **settings}
    return lightning.Trainer(callbacks=callbacks, **settings)


def loader(kind: str = "tuple") -> DataLoader:
    return DataLoader(Images(kind), batch_size=8)


def distillation(loss: Any = None, **settings: Any) -> Distillation:
    loss = LocalCorrelationLoss(k=2, reduction="mean") if loss is None else loss
    return Distillation(teacher(), loss, {"net.2": "2"}, weight=WEIGHT, **settings)


def fitted(module: Module, callbacks: list[Any] | None = None, **settings: Any) -> list[Tensor]:
    if isinstance(scale := settings.pop("scale", None), float):
        settings["plugins"] = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    trainer(callbacks, **settings).fit(module, loader())
    return [parameter.detach().clone() for parameter in module.net.parameters()]


class Scaled(MixedPrecision):
    """Lightning's 16-mixed with its scaler, but with the arithmetic of float32, so that results can be compared."""

    def forward_context(self) -> Any:
        return nullcontext()


# The two silent ones first --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0, 65536.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
    ],
)
def test_equal_to_the_term_written_out_at_any_scale(scale, settings):
    ours = fitted(Module(), [distillation()], scale=scale, **settings)
    expected = fitted(ByHand(LocalCorrelationLoss(k=2, reduction="mean")), **settings)
    alone = fitted(Module(), **settings)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not all(torch.allclose(one, without) for one, without in zip(ours, alone, strict=True))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_every_precision(precision):
    settings = {"precision": precision}
    if precision == "16-mixed":  # on a CPU, Lightning takes it only as a plugin
        settings = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))}
    ours = fitted(Module(), [distillation()], **settings)
    if precision == "16-mixed":
        settings = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))}
    expected = fitted(ByHand(LocalCorrelationLoss(k=2, reduction="mean")), **settings)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_teacher_runs_under_the_trainers_autocast():
    seen: list[torch.dtype] = []
    callback = distillation()
    callback.teacher[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    fitted(Module(), [callback], precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}


# A loss with parameters -----------------------------------------------------------------------------------------------


class Calibrated(nn.Module):
    """SemCKD's modules as one loss of two maps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.calibration = SemanticCalibration((4,), (8,), batch_size=8)
        self.loss = SemCKDLoss()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(*self.calibration([student], [teacher]))


class Everything(Module):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("kind", [Module, Everything])
def test_modules_of_the_loss_are_trained(kind):
    loss, module = Calibrated(), kind()
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    names = set(module.state_dict())
    fitted(module, [distillation(loss)], max_steps=6)
    projections = {name for name in before if "projections" in name}
    moved = {name for name, parameter in loss.named_parameters() if not torch.equal(parameter, before[name])}
    assert projections <= moved
    assert set(module.state_dict()) == names
    assert "distillation_loss" not in dict(module.named_children())


def test_modules_of_the_loss_take_the_trainers_precision():
    """Lightning moves them to its device in the same call."""
    seen: set[torch.dtype] = set()
    loss = Calibrated()
    loss.loss.register_forward_hook(lambda *_: seen.update(parameter.dtype for parameter in loss.parameters()))
    fitted(Module(), [distillation(loss)], precision="64-true")
    assert seen == {torch.float64}


def test_modules_inside_a_function_are_an_error():
    loss = Calibrated()
    with pytest.raises(ValueError, match="loss has parameters that no optimiser trains: pass a module"):
        fitted(Module(), [distillation(lambda s, t: loss(s, t))])


class TwoOptimizers(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)]


def test_several_optimisers_must_be_told():
    with pytest.raises(ValueError, match="there are several optimisers: give loss"):
        fitted(TwoOptimizers(), [distillation(Calibrated())])


def test_a_loss_with_modules_is_saved_and_goes_on(tmp_path: Path):
    def run(steps: int, ckpt: Path | None = None) -> tuple[Any, Calibrated]:
        loss = Calibrated()
        fit = trainer([distillation(loss)], max_steps=steps)
        fit.fit(module := Module(), loader(), ckpt_path=ckpt)
        return fit, module, loss

    saved = tmp_path / "half.ckpt"

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(saved)

    loss = Calibrated()
    trainer([distillation(loss), Save()], max_steps=8).fit(whole := Module(), loader())
    state = torch.load(saved, weights_only=False)
    assert set(state["state_dict"]) == set(Module().state_dict())
    _, module, resumed = run(8, saved)
    for one, other in zip(resumed.parameters(), loss.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    alone = Module.load_from_checkpoint(saved)
    assert set(alone.state_dict()) == set(Module().state_dict())


# What modules return, take and do -------------------------------------------------------------------------------------


def test_a_dict_with_the_loss():
    ours = fitted(Module("dict"), [distillation()])
    for one, other in zip(ours, fitted(Module(), [distillation()]), strict=True):
        assert torch.equal(one, other)


class Skipping(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_a_skipped_batch_is_skipped():
    fit = trainer([distillation()], max_epochs=1, max_steps=-1)
    fit.fit(Skipping(), loader())
    assert fit.global_step == 4


class Wrong(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"lost": super().training_step(batch, batch_idx)}


def test_a_dict_without_the_loss():
    with pytest.raises(TypeError, match="training_step must return the loss, a dict with the key 'loss', or None"):
        fitted(Wrong(), [distillation()])


class WithoutNumber(Module):
    def training_step(self, batch: Any) -> Tensor:
        return self.hard(batch)


def test_a_step_that_does_not_take_the_number_of_the_batch():
    for one, other in zip(fitted(WithoutNumber(), [distillation()]), fitted(Module(), [distillation()]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "inputs",
    ["image", operator.itemgetter("image"), lambda batch: (batch["image"],), lambda batch: {"input": batch["image"]}],
)
def test_a_batch_that_is_a_dict(inputs):
    module = Module()
    trainer([distillation(inputs=inputs)]).fit(module, loader("dict"))
    for one, other in zip(module.net.parameters(), fitted(Module(), [distillation()]), strict=True):
        assert torch.equal(one, other)


def test_a_batch_that_is_a_dict_without_a_word():
    with pytest.raises(TypeError, match=r"a batch, which is a dict with the keys 'image', 'label': pass inputs=key"):
        trainer([distillation()]).fit(Module(), loader("dict"))


class Manual(Module):
    """Two backward passes a step."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.told = told

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.hard(batch)
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss + (self.trainer.callbacks[0].term() if self.told else 0))
        optimizer.step()


def test_manual_optimisation():
    for one, other in zip(fitted(Manual(True), [distillation()]), fitted(Module(), [distillation()]), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(RuntimeError, match=r"add the callback's term\(\) to one of them"):
        fitted(Manual(False), [distillation()])


def test_compiled_modules():
    torch.compiler.reset()
    compiled = torch.compile(Module(), backend="eager")
    trainer([distillation()]).fit(compiled, loader())
    for one, other in zip(compiled.net.parameters(), fitted(Module(), [distillation()]), strict=True):
        torch.testing.assert_close(one, other)


# The trainer's own affairs --------------------------------------------------------------------------------------------


def test_the_term_is_logged_times_its_weight():
    fit, reference = trainer([distillation()], max_steps=1), ByHand(LocalCorrelationLoss(k=2, reduction="mean"))
    fit.fit(Module(), loader())
    fitted(reference, max_steps=1)
    assert fit.callback_metrics["distillation"].item() == pytest.approx(reference.terms[0])


def test_two_callbacks():
    class Names(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.metrics = set(trainer.callback_metrics)

    names = Names()
    both = [
        distillation(),
        Distillation(teacher(), CorrelationCongruenceLoss(), {"net.4": "4"}, name="congruence"),
        names,
    ]
    fitted(Module(), both)
    assert {"distillation", "congruence"} <= names.metrics


class Failing(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise KeyError("from the module")
        return super().training_step(batch, batch_idx)


def hooks(*networks: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    return sum(len(getattr(m, kind)) for network in networks for m in network.modules() for kind in kinds)


@pytest.mark.parametrize("kind", [Module, Failing])
def test_networks_are_left_as_they_were_found(kind):
    module, callback = kind(), distillation(Calibrated())
    if kind is Failing:
        with pytest.raises(KeyError, match="from the module"):
            fitted(module, [callback])
    else:
        fitted(module, [callback])
    assert not hooks(module, callback.teacher, callback.loss)
    assert "training_step" not in vars(module)
    assert [name for name, _ in module.named_children()] == ["net"]


def test_a_layer_that_does_not_exist():
    module = Module()
    callback = Distillation(teacher(), LocalCorrelationLoss(k=2), {"net.2": "22"})
    with pytest.raises(ValueError, match="no module '22'"):
        fitted(module, [callback])
    assert not hooks(module, callback.teacher)


def test_pickling():
    callback = distillation()
    fitted(Module(), [callback])
    copy = pickle.loads(pickle.dumps(callback))
    for one, other in zip(fitted(Module(), [copy]), fitted(Module(), [callback]), strict=True):
        assert torch.equal(one, other)


# Two processes --------------------------------------------------------------------------------------------------------


class Recording(Module):
    """Keeps what every rank logged, and its parameters."""

    def on_train_end(self) -> None:
        found = {
            "term": self.trainer.callback_metrics["distillation"],
            "net": [p.detach() for p in self.net.parameters()],
            "loss": [p.detach() for p in getattr(self, "distillation_loss", nn.Module()).parameters()],
        }
        torch.save(found, Path(self.folder) / f"{self.trainer.global_rank}.pt")


@pytest.mark.parametrize("case", ["congruence", "calibrated"])
def test_two_processes(tmp_path: Path, case: str):
    """A loss that is built before there is a process group sees all samples; the loss's parameters are averaged."""
    loss = CorrelationCongruenceLoss(group="world") if case == "congruence" else Calibrated()
    layers = {"net.4": "4"} if case == "congruence" else {"net.2": "2"}
    module = Recording()
    module.folder = str(tmp_path)
    callback = Distillation(teacher(), loss, layers, weight=WEIGHT)
    # Not forked: threads of OpenMP do not survive it, and a convolution in the child would wait for them.
    trainer([callback], devices=2, strategy="ddp_spawn", max_steps=2).fit(module, loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("net", "loss"):
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one, other)
    if case == "congruence":
        assert torch.equal(first["term"], second["term"])
