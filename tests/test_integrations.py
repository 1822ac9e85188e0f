"""The drop-ins against the formulas of their hosts, and inside stand-ins of the hosts' interfaces."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor, nn

from kdkernels import kd_loss
from kdkernels.integrations import mdistiller, repdistiller
from kdkernels.integrations.dist_kd import DIST
from kdkernels.nn import FeatureCapture, LocalCorrelationLoss


def maps(*shape: int) -> Tensor:
    return torch.randn(shape).relu()


# The originals' formulas ----------------------------------------------------------------------------------------------


def original_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    return F.kl_div((s / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean")


def original_attention(s: Tensor, t: Tensor, power: int = 2) -> Tensor:
    size = min(s.shape[2], t.shape[2])
    s, t = (F.normalize(F.adaptive_avg_pool2d(f, size).pow(power).mean(1).flatten(1)) for f in (s, t))
    return (s - t).square().mean()


def original_similarity(s: Tensor, t: Tensor, p: float = 2) -> Tensor:
    s, t = (F.normalize(f.flatten(1) @ f.flatten(1).T, p=p) for f in (s, t))
    return (s - t).square().sum() / len(s) ** 2


def original_relations(s: Tensor, t: Tensor, distance: float, angle: float) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        d = (x[:, None] - x).square().sum(2).clamp(min=1e-12).sqrt() * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    def angles(x: Tensor) -> Tensor:
        directions = F.normalize(x - x[:, None], dim=2)
        return directions @ directions.mT

    t = t.detach()
    return distance * F.smooth_l1_loss(distances(s), distances(t)) + angle * F.smooth_l1_loss(angles(s), angles(t))


def original_probabilities(s: Tensor, t: Tensor, eps: float = 1e-7) -> Tensor:
    def conditional(x: Tensor) -> Tensor:
        x = x / (x.square().sum(1, keepdim=True).sqrt() + eps)
        affinity = (x @ x.T + 1) / 2
        return affinity / affinity.sum(1, keepdim=True)

    q, p = conditional(s), conditional(t)
    return (p * ((p + eps) / (q + eps)).log()).mean()


def original_congruence(s: Tensor, t: Tensor, kernel) -> Tensor:
    return (kernel(s @ s.T) - kernel(t @ t.T)).square().sum().sqrt() / len(s) ** 2


def taylor(gamma: float, order: int):
    return lambda g: math.exp(-2 * gamma) * sum((2 * gamma) ** p / math.factorial(p) * g**p for p in range(order + 1))


# RepDistiller and SemCKD's trainer ------------------------------------------------------------------------------------


def test_distill_kl():
    assert_matches(
        repdistiller.DistillKL(4.0),
        lambda s, t: 16 * original_kl(s, t, 4.0),
        torch.randn(7, 13, requires_grad=True),
        torch.randn(7, 13, requires_grad=True),
    )


@pytest.mark.parametrize("shape", [(3, 5, 6, 2), (3, 5, 4), (3, 2, 5, 2, 2)], ids=["pixels", "tokens", "voxels"])
def test_logits_of_pixels_and_tokens(shape):
    assert_matches(
        repdistiller.DistillKL(4.0),
        lambda s, t: 16 * original_kl(s, t, 4.0),
        torch.randn(shape, requires_grad=True),
        torch.randn(shape, requires_grad=True),
    )


def test_hint():
    for shape in ((3, 5, 4, 4), (3, 5), (3, 7, 5), (3,), (2, 3, 2, 4, 4)):
        assert_matches(repdistiller.HintLoss(), F.mse_loss, maps(*shape).requires_grad_(), maps(*shape))
    channels_last = maps(3, 5, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert_matches(repdistiller.HintLoss(), F.mse_loss, channels_last, maps(3, 5, 4, 4))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_hints_of_shapes_that_differ_are_broadcast_or_refused():
    student = maps(3, 5, 4, 4).requires_grad_()
    assert_matches(repdistiller.HintLoss(), F.mse_loss, student, maps(3, 5, 1, 1))
    with pytest.raises(RuntimeError, match="must match"):
        repdistiller.HintLoss()(student, maps(3, 5, 2, 2))


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("sizes", [(8, 8), (8, 4), (4, 8), (7, 3)])
def test_attention(power, sizes):
    assert_matches(
        lambda s, t: sum(repdistiller.Attention(power)([s], [t])),
        lambda s, t: original_attention(s, t, power),
        maps(4, 6, sizes[0], sizes[0]).requires_grad_(),
        maps(4, 9, sizes[1], sizes[1]),
    )


@pytest.mark.parametrize(
    "shapes", [((4, 6, 9), (4, 5, 9)), ((4, 3, 2, 4, 4), (4, 2, 2, 4, 4)), ((4, 6, 3, 3), (4, 7, 9))]
)
@pytest.mark.parametrize("power", [2, 4])
def test_attention_of_tokens_and_voxels(shapes, power):
    def original(s: Tensor, t: Tensor) -> Tensor:
        s, t = (F.normalize(f.pow(power).mean(1).flatten(1)) for f in (s, t))
        return (s - t).square().mean()

    student, teacher = (maps(*shape) for shape in shapes)
    if shapes[0][2] == shapes[1][2]:  # different sizes are pooled first
        assert_matches(
            lambda s, t: repdistiller.Attention(power).at_loss(s, t), original, student.requires_grad_(), teacher
        )
    assert_matches(
        lambda s, t: repdistiller.attention_error(s, t, power), original, student.detach().requires_grad_(), teacher
    )


def test_similarity():
    student, teacher = maps(6, 4, 5, 5).requires_grad_(), maps(6, 8, 3, 3)
    assert_matches(lambda s, t: sum(repdistiller.Similarity()([s], [t])).sum(), original_similarity, student, teacher)
    (loss,) = repdistiller.Similarity()([student], [teacher])
    assert loss.shape == (1,)


def test_relations():
    assert_matches(
        repdistiller.RKDLoss(),
        lambda s, t: original_relations(s, t, 25, 50),
        torch.randn(9, 5, requires_grad=True),
        torch.randn(9, 12),
    )


def test_probabilities():
    # In float64, which shows the effect of the eps in the logarithms.
    student, teacher = (torch.randn(9, d, dtype=torch.float64, requires_grad=True) for d in (5, 12))
    assert_matches(repdistiller.PKT(), original_probabilities, student, teacher)


def test_probabilities_of_networks_that_nearly_agree():
    teacher = torch.randn(16, 24)
    student = (teacher + 1e-3 * torch.randn(16, 24)).requires_grad_()
    loss, (gradient, _) = loss_and_gradients(repdistiller.PKT(), student, teacher)
    expected, (correct, _) = loss_and_gradients(original_probabilities, *exactly(student, teacher))
    assert_close(loss, expected, "loss")
    assert_close(gradient, correct, "gradient")


def test_dead_rows_have_gradients():
    student, teacher = torch.randn(6, 5), torch.randn(6, 4)
    student[2] = 0
    student[4] = student[3]
    for loss in (repdistiller.PKT(), repdistiller.RKDLoss()):
        _, (gradient, _) = loss_and_gradients(loss, student.requires_grad_(), teacher)
        assert gradient.isfinite().all()


def semckd(attention: repdistiller.SelfA, feat_s: list[Tensor], feat_t: list[Tensor]) -> Tensor:
    """Return SemCKD's attention and loss by its formulas, with the parameters of ``attention``."""

    def embed(name: str, f: Tensor) -> Tensor:
        mlp = getattr(attention, name)
        x = mlp.linear2(mlp.linear1(f.flatten(1) @ f.flatten(1).T).relu())
        return x / x.square().sum(1, keepdim=True).sqrt()

    queries = torch.stack([embed(f"query_weight{i}", f) for i, f in enumerate(feat_s)], 1)
    keys = torch.stack([embed(f"key_weight{j}", f) for j, f in enumerate(feat_t)], 1)
    weight = torch.einsum("bse,bte->bst", queries, keys).softmax(2)
    loss = 0.0
    for i, s in enumerate(feat_s):
        for j, t in enumerate(feat_t):
            size = min(s.shape[2], t.shape[2])
            projected = getattr(attention, f"regressor{i}{j}")(F.adaptive_avg_pool2d(s, size))
            errors = (projected - F.adaptive_avg_pool2d(t, size)).square().flatten(1).mean(1)
            loss = loss + (weight[:, i, j] * errors).sum()
    return loss / (len(weight) * len(feat_s))


def test_semantic_calibration():
    batch = 8
    attention = repdistiller.SelfA(2, 3, batch, [4, 6], [5, 7, 9]).double()
    feat_s = [torch.randn(batch, c, h, h, dtype=torch.double) for c, h in ((4, 8), (6, 4))]
    feat_t = [torch.randn(batch, c, h, h, dtype=torch.double) for c, h in ((5, 8), (7, 4), (9, 2))]
    projected, targets, weight = attention(feat_s, feat_t)
    assert weight.shape == (batch, 2, 3)
    assert all(
        p.shape == t.shape for ps, ts in zip(projected, targets, strict=True) for p, t in zip(ps, ts, strict=True)
    )
    parameters = list(attention.parameters())
    loss = repdistiller.SemCKDLoss()(projected, targets, weight)
    expected = semckd(attention, feat_s, feat_t)
    assert_close(loss, expected)
    for got, exact in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-10)


def test_cross_layer_error_of_embeddings_and_tokens():
    """The original takes everything that its mean squared error takes."""
    for shape in ((4, 5), (4, 6, 5)):
        values, target, weight = torch.randn(shape, requires_grad=True), torch.randn(shape), torch.rand(4, 1, 2)
        assert_matches(
            lambda s, t, w: repdistiller.SemCKDLoss()([[s, 2 * s]], [[t, t]], w),
            lambda s, t, w: sum(
                (w[:, 0, j] * (x - t).square().flatten(1).mean(1)).sum() / 4 for j, x in enumerate((s, 2 * s))
            ),
            values,
            target,
            weight,
        )


def test_semantic_calibration_with_a_smaller_last_batch():
    attention = repdistiller.SelfA(1, 1, 8, [4], [5])
    _, _, weight = attention([maps(3, 4, 4, 4)], [maps(3, 5, 4, 4)])
    assert weight.shape == (3, 1, 1)


def test_checkpoints_of_the_original_load():
    names = {name for name, _ in repdistiller.SelfA(1, 2, 8, [4], [5, 6]).named_parameters()}
    for module in ("key_weight1.linear2", "query_weight0.linear1", "regressor01.regressor.3"):
        assert f"{module}.weight" in names


# mdistiller -----------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """mdistiller's networks return logits and a dictionary of features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, padding=1)])
        self.head = nn.Linear(width, 5)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, object]]:
        feats = [self.body[0](image).relu()]
        feats.append(self.body[1](feats[0]).relu())
        pooled = feats[-1].mean((2, 3))
        return self.head(pooled), {"feats": feats, "pooled_feat": pooled}


class Configuration(SimpleNamespace):
    def __getitem__(self, name: str):
        return getattr(self, name)


def configuration() -> Configuration:
    feature = SimpleNamespace(CE_WEIGHT=0.7, FEAT_WEIGHT=30.0)
    return Configuration(
        KD=SimpleNamespace(TEMPERATURE=3.0, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
        AT=SimpleNamespace(P=2, LOSS=feature),
        SP=SimpleNamespace(LOSS=feature),
        RKD=SimpleNamespace(
            DISTANCE_WEIGHT=25, ANGLE_WEIGHT=50, LOSS=feature, PDIST=SimpleNamespace(EPSILON=1e-12, SQUARED=False)
        ),
        PKT=SimpleNamespace(LOSS=feature),
    )


EXPECTED = {
    "KD": lambda s, t: 0.9 * 9 * original_kl(s[0], t[0], 3.0),
    "AT": lambda s, t: 30 * original_attention(s[1]["feats"][1], t[1]["feats"][1]),
    "SP": lambda s, t: 30 * original_similarity(s[1]["feats"][-1], t[1]["feats"][-1]).view(1),  # its shape
    "RKD": lambda s, t: 30 * original_relations(s[1]["pooled_feat"], t[1]["pooled_feat"], 25, 50),
    "PKT": lambda s, t: 30 * original_probabilities(s[1]["pooled_feat"], t[1]["pooled_feat"]),
}


@pytest.mark.parametrize("name", [name for name in mdistiller.distillers if name != "DKD"])
def test_mdistiller(name):
    cfg, student, teacher = configuration(), Backbone(4).double(), Backbone(6).double()
    distiller = mdistiller.distillers[name](student, teacher, cfg).train()
    assert student.training
    assert not teacher.training
    image, target = torch.randn(6, 3, 8, 8, dtype=torch.double), torch.randint(5, (6,))
    logits, losses = distiller(image=image, target=target, epoch=1)
    assert torch.equal(logits, student(image)[0])
    assert_close(losses["loss_ce"], cfg[name].LOSS.CE_WEIGHT * F.cross_entropy(logits, target))
    # In float32, because PKT's networks may agree by chance, and then float64 has few digits left.
    assert_close(losses["loss_kd"].float(), EXPECTED[name](student(image), teacher(image)))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.get_learnable_parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(distiller.eval()(image=image), student(image)[0])


class Logits(nn.Module):
    """A network that returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, object]]:
        return 1 * self.logits, {}


def recorded(name: str = "decoupled") -> dict[str, Tensor]:
    """Return what the authors' programs compute, such as DKD and DIST. tests/recorded has a program of each name."""
    with np.load(Path(__file__).with_name("recorded") / f"{name}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize("name", ["dkd", "dkd_standardised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mdistillers_decoupled_distillation(name, dtype):
    """The weight grows in the first epochs."""
    arrays = recorded()
    settings = SimpleNamespace(CE_WEIGHT=0.5, ALPHA=1.0, BETA=8.0, T=4.0, WARMUP=20)
    cfg = Configuration(DKD=settings, EXPERIMENT=SimpleNamespace(LOGIT_STAND=name == "dkd_standardised"))
    student, teacher = (Logits(arrays[network].to(dtype)) for network in ("student", "teacher"))
    distiller = mdistiller.DKD(student, teacher, cfg).train()
    for epoch, weight in ((5, 0.25), (60, 1.0)):
        logits, losses = distiller(image=torch.empty(0), target=arrays["labels"], epoch=epoch)
        assert_close(losses["loss_ce"], 0.5 * F.cross_entropy(logits.double(), arrays["labels"]))
        assert_close(losses["loss_kd"], weight * arrays[name])
        (gradient,) = torch.autograd.grad(losses["loss_kd"], student.logits)
        assert_close(gradient, weight * arrays[f"{name}_student"])
    assert len(distiller.get_learnable_parameters()) == 1
    assert torch.equal(distiller.eval()(image=torch.empty(0)), student.logits)


@pytest.mark.parametrize("standardised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mdistillers_logit_standardisation(standardised, dtype):
    """tests/recorded/standardised.py has the authors' numbers and their origin."""
    arrays, name = recorded("standardised"), "kd_standardised" if standardised else "kd"
    settings = SimpleNamespace(TEMPERATURE=2.0, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=9.0))
    cfg = Configuration(KD=settings, EXPERIMENT=SimpleNamespace(LOGIT_STAND=standardised))
    student, teacher = (Logits(arrays[network].to(dtype)) for network in ("student", "teacher"))
    distiller = mdistiller.KD(student, teacher, cfg).train()
    _, losses = distiller(image=torch.empty(0), target=torch.arange(7))
    assert_close(losses["loss_kd"], 9 * arrays[name])
    (gradient,) = torch.autograd.grad(losses["loss_kd"], student.logits)
    assert_close(gradient, 9 * arrays[f"{name}_student"])
    leaves = [arrays[network].to(dtype).requires_grad_() for network in ("student", "teacher")]
    kd_loss(*leaves, temperature=2.0, standardize=standardised).backward()
    for leaf, network in zip(leaves, ("student", "teacher"), strict=True):
        assert_close(leaf.grad, arrays[f"{name}_{network}"])


@pytest.mark.parametrize("name", ["dist", "dist_of_pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist(name, dtype):
    arrays = recorded()
    networks = ("student", "teacher") if name == "dist" else ("student_pixels", "teacher_pixels")
    leaves = [arrays[network].to(dtype).requires_grad_() for network in networks]
    loss = DIST(beta=2.0, gamma=1.5, tau=4.0) if name == "dist" else DIST(2.0, 1.5)
    value = loss(*leaves)
    assert_close(value.detach(), arrays[name])
    for network, gradient in zip(("student", "teacher"), torch.autograd.grad(value, leaves), strict=True):
        assert_close(gradient, arrays[f"{name}_{network}"])
    with pytest.raises(ValueError, match="tau must be a positive number, got 0"):
        DIST(tau=0)


class Segmenter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 5, width, padding=width // 2)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, object]]:
        return self.head(image), {}


def test_mdistiller_of_pixels():
    cfg, student, teacher = configuration(), Segmenter(3).double(), Segmenter(1).double()
    image, target = torch.randn(4, 3, 6, 7, dtype=torch.double), torch.randint(5, (4, 6, 7))
    _, losses = mdistiller.distillers["KD"](student, teacher, cfg).train()(image=image, target=target)
    s, t = student(image)[0] / 3, teacher(image)[0] / 3
    expected = 0.9 * 9 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="none").sum(1).mean()
    assert_close(losses["loss_kd"], expected.detach())


# torchdistill ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Return the mid-level losses, registered with a stand-in for torchdistill."""
    registered: dict[str, type] = {}
    module = ModuleType("torchdistill.losses.registry")
    module.register_mid_level_loss = lambda cls: registered.setdefault(cls.__name__, cls)
    for name in ("torchdistill", "torchdistill.losses"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.torchdistill", raising=False)
    import_module("kdkernels.integrations.torchdistill")
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.torchdistill")
    return registered


def io(x: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"layer": {"output": x, "input": -x}}


PLACES = {
    "student_module_path": "layer",
    "student_module_io": "output",
    "teacher_module_path": "layer",
    "teacher_module_io": "output",
}
OUTPUTS = {"student_output_path": "layer", "teacher_output_path": "layer"}
LINEAR = {"student_linear_path": "layer", "teacher_linear_path": "layer"}
PAIR = {"at_pairs": {"one": {role: {"io": "output", "path": "layer"} for role in ("student", "teacher")}}}


def unit(kernel):
    return lambda s, t: original_congruence(F.normalize(s), F.normalize(t), kernel)


@pytest.mark.parametrize(
    ("name", "settings", "original", "shape"),
    [
        ("KDLoss", {**PLACES, "temperature": 4.0}, lambda s, t: original_kl(s, t, 4.0), (7, 9)),
        (
            "KDLoss",
            {**PLACES, "temperature": 2.0, "reduction": "sum"},
            lambda s, t: 7 * original_kl(s, t, 2.0),
            (7, 9),
        ),
        (
            "KDLoss",
            {**PLACES, "temperature": 2.0, "reduction": "mean"},
            lambda s, t: original_kl(s, t, 2.0) / 9,
            (7, 9),
        ),
        ("ATLoss", PAIR, original_attention, (5, 6, 4, 4)),
        (  # tokens
            "ATLoss",
            PAIR,
            lambda s, t: (F.normalize(s.square().mean(1)) - F.normalize(t.square().mean(1))).square().mean(),
            (5, 6, 9),
        ),
        (
            "ATLoss",
            {**PAIR, "mode": "paper"},
            lambda s, t: (
                sum(
                    (F.normalize(a.square().sum(0).view(1, -1)) - F.normalize(b.square().sum(0).view(1, -1))).norm()
                    for a, b in zip(s, t, strict=True)
                )
                / len(s)
            ),
            (5, 6, 4, 4),
        ),
        ("PKTLoss", PLACES, original_probabilities, (7, 9)),
        (
            "RKDLoss",
            {**OUTPUTS, "dist_factor": 1.0, "angle_factor": 2.0, "reduction": "mean"},
            lambda s, t: original_relations(s, t, 1, 2),
            (7, 9),
        ),
        (
            "RKDLoss",
            {**OUTPUTS, "dist_factor": 1.0, "angle_factor": 2.0, "reduction": "sum"},
            lambda s, t: original_relations(s, t, 7**2, 2 * 7**3),
            (7, 9),
        ),
        (
            "CCKDLoss",
            {**LINEAR, "kernel_config": {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "reduction": "batchmean"},
            lambda s, t: original_congruence(s, t, taylor(0.4, 2)),
            (7, 9),
        ),
        (  # as in torchdistill's configurations
            "CCKDLoss",
            {**LINEAR, "kernel_params": {"key": "gaussian", "gamma": 0.4, "max_p": 2}, "reduction": "batchmean"},
            lambda s, t: original_congruence(s, t, taylor(0.4, 2)),
            (7, 9),
        ),
        (
            "CCKDLoss",
            {**LINEAR, "kernel_config": {"type": "bilinear"}, "reduction": "sum"},
            lambda s, t: 49 * original_congruence(s, t, lambda g: g),
            (7, 9),
        ),
        (
            "CCKDLoss",
            {**LINEAR, "kernel_config": {"type": "bilinear"}, "reduction": "batchmean", "paper": True},
            lambda s, t: (7 * unit(lambda g: g)(s, t)) ** 2,
            (7, 9),
        ),
        (
            "SPKDLoss",
            {**OUTPUTS, "reduction": "batchmean"},
            lambda s, t: original_similarity(s, t, p=1),
            (5, 6, 4, 4),
        ),
        (
            "SPKDLoss",
            {**OUTPUTS, "reduction": "sum"},
            lambda s, t: 25 * original_similarity(s, t, p=1),
            (5, 6, 4, 4),
        ),
        (
            "SPKDLoss",
            {**OUTPUTS, "reduction": "batchmean", "paper": True},
            original_similarity,
            (5, 6, 4, 4),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torchdistill(registry, name, settings, original, shape):
    loss = registry[name](**settings)
    student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
    assert_matches(lambda s, t: loss(io(s), io(t), None), original, student, teacher)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (3, 5, 4, 6)])
def test_torchdistill_of_pixels_and_tokens(registry, reduction, shape):
    loss = registry["KDLoss"](**PLACES, temperature=2.0, reduction=reduction)
    student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.rand(shape)

    def original(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div((s / 2).log_softmax(1), (t / 2).softmax(1), reduction=reduction)

    def weighted(value: Tensor) -> Tensor:
        return (value * weight.to(value)).sum() if reduction == "none" else value

    assert_matches(lambda s, t: weighted(loss(io(s), io(t))), lambda s, t: weighted(original(s, t)), student, teacher)


def test_torchdistill_of_segmentation_with_labels(registry):
    loss = registry["KDLoss"](**PLACES, temperature=4.0, alpha=0.3, ignore_index=255)
    student, teacher = torch.randn(3, 5, 4, 6, requires_grad=True), torch.randn(3, 5, 4, 6)
    labels = torch.randint(5, (3, 4, 6)).masked_fill(torch.rand(3, 4, 6) < 0.2, 255)
    hard = F.cross_entropy(student, labels, ignore_index=255)
    expected = 0.3 * hard + 0.7 * 16 * original_kl(student, teacher, 4.0)
    assert_close(loss(io(student), io(teacher), labels), expected.double())


def test_torchdistill_with_labels(registry):
    loss = registry["KDLoss"](**PLACES, temperature=4.0, alpha=0.3)
    student, teacher, labels = torch.randn(7, 9, requires_grad=True), torch.randn(7, 9), torch.randint(9, (7,))
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * 16 * original_kl(student, teacher, 4.0)
    assert_close(loss(io(student), io(teacher), labels), expected.double())


def test_torchdistill_meets_losses_of_its_own(registry):
    both = {"student_module_path": "layer", "teacher_module_path": "layer"}
    student, teacher = maps(4, 3, 4, 4), maps(4, 6, 4, 4)
    assert registry["LocalCorrelationLoss"](**both, k=2)(io(student), io(teacher)) > 0
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    assert registry["CorrelationCongruenceLoss"](**both, order=3)(io(student), io(teacher)) > 0
    assert registry["InterClassCorrelationLoss"](**both)(io(student), io(teacher)) > 0


def test_a_matching_student_has_gradient_zero(registry):
    """There, the Frobenius norm has no derivative."""
    compare = registry["CCKDLoss"](**LINEAR, kernel_config={"type": "bilinear"}, reduction="sum")
    student = torch.randint(-3, 4, (5, 4)).float().requires_grad_()  # their products are exact
    loss, (gradient,) = loss_and_gradients(lambda s: compare(io(s), io(student.detach())), student)
    assert loss == 0
    assert not gradient.any()


# PyTorch Lightning: the callback's own arithmetic. The real trainer is in tests/hosts. -------------------------------


class Module(nn.Module):
    """The parts of a LightningModule that the callback uses."""

    device = torch.device("cpu")
    automatic_optimization = True

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 5))
        self.logged: dict[str, Tensor] = {}

    def log(self, name: str, value: Tensor) -> None:
        self.logged[name] = value

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("layers", [{"net.2": "2"}, {"net.0": "0", "net.2": "2"}], ids=["one", "two"])
def test_lightning(monkeypatch: pytest.MonkeyPatch, layers):
    host = ModuleType("lightning.pytorch")
    host.Callback = object
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", host)
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.lightning", raising=False)
    callbacks = import_module("kdkernels.integrations.lightning")
    monkeypatch.delitem(sys.modules, "kdkernels.integrations.lightning")

    module, teacher = Module(), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    batch = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    compare = LocalCorrelationLoss(k=2)
    callback = callbacks.Distillation(teacher, compare, layers, weight=0.3)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    trainer = SimpleNamespace(optimizers=[optimizer], precision_plugin=SimpleNamespace(convert_module=lambda m: m))
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    callback.on_train_batch_start(trainer, module, batch, 0)
    loss = module.training_step(batch)
    loss.backward()
    callback.on_train_batch_end(trainer, module, loss, batch, 0)
    callback.teardown(trainer, module, "fit")
    gradient = module.net[0].weight.grad.clone()

    module.zero_grad()
    with FeatureCapture(module.net, [name[4:] for name in layers]) as student:
        hard = module.training_step(batch)
        with FeatureCapture(teacher, list(layers.values())) as target:
            teacher(batch[0])
            soft = compare(student.features, target.features)
    expected = hard + 0.3 * soft
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, module.net[0].weight.grad)
    torch.testing.assert_close(module.logged["distillation"], 0.3 * soft.detach())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not module._forward_pre_hooks
    assert "training_step" not in vars(module)
