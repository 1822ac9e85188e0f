"""Training that survives a kill. Every epoch ends with a checkpoint, and a rerun continues from it, bit by bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel, photographs
from .data import Batches, Dataset
from .networks import StagedNetwork
from .networks.staged import ChannelShuffle

Losses = dict[str, Tensor]
History = list[dict[str, float]]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or belongs to other settings."""


# PyTorch raises these if a file has the state of another module.
MISFITS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum, or Adam. The learning rate is multiplied by ``decay`` at each milestone, in epochs, or follows
    half a ``cosine`` down to 0.
    """

    epochs: int
    lr: float
    milestones: tuple[int, ...]
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    decay: float = 0.1
    optimizer: str = "sgd"
    cosine: bool = False

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def anneal(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        if self.cosine:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.milestones), self.decay)

    def lasting(self, epochs: int) -> Schedule:
        """Return the schedule scaled to another number of epochs."""
        scaled = tuple(round(milestone * epochs / self.epochs) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=scaled)


@dataclass(frozen=True)
class Engine:
    """How a training is computed. The command line sets it, and no recipe depends on it.

    Args:
        amp: the type of the networks' products under autocast, "bf16" or "fp16", or "off".
        accumulate: the parts of a batch that are computed one after the other. Their gradients are added.
        compile: whether ``torch.compile`` compiles the networks.
        cuda_graphs: whether the compiled networks are recorded as CUDA graphs.
        channels_last: whether images and weights have the memory format channels_last.
        tf32: whether products of float32 may be rounded to TF32.
        workers: the processes that read photographs. None leaves their number as it is.
    """

    amp: str = "off"
    accumulate: int = 1
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    tf32: bool = False
    workers: int | None = None

    def begin(self) -> None:
        """Set PyTorch's global settings in this process."""
        torch.backends.cudnn.deterministic = True  # convolutions on a GPU repeat bit by bit, as on a CPU
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        photographs.WORKERS = photographs.WORKERS if self.workers is None else self.workers

    def prepare(self, network: nn.Module) -> None:
        """Change the memory format of a network, and compile it, if asked to."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)
        if self.compile or self.cuda_graphs:
            network.compile(mode="reduce-overhead" if self.cuda_graphs else None)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.amp])

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Return the scaler of the loss, without which gradients in float16 would be rounded to 0."""
        return torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def parts(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield the parts of a batch and the share of each."""
        for some, theirs in zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True):
            some = some.contiguous(memory_format=torch.channels_last) if self.channels_last else some
            yield some, theirs, len(theirs) / len(labels)

    def settings(self) -> dict[str, object]:
        """Return what changes the numbers of a training and is not the default."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default and field.name != "workers"
        }


DEFAULT_ENGINE = Engine()


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Losses],
    batches: Batches,
    schedule: Schedule,
    evaluate: Callable[[], dict[str, float]],
    checkpoint: Path,
    settings: dict[str, object],
    *,
    engine: Engine = DEFAULT_ENGINE,
    log: Path | None = None,
    before_epoch: Callable[[int], None] | None = None,
) -> History:
    """Train ``module`` in place to the end of ``schedule``. Continue from ``checkpoint`` if it exists.

    Args:
        name: the label of the progress bar.
        module: has every parameter to train. Seed torch before you build it.
        loss: maps images and labels to named scalars. "loss" is minimised, and all are recorded.
        evaluate: called after every epoch in evaluation mode. Its numbers are recorded too.
        checkpoint: a file that is replaced after every epoch. The history is beside it as JSON.
        settings: the settings of the result, without the schedule. A checkpoint of other settings raises an error.
        engine: how it is computed. ``evaluate`` runs in float32.
        log: a file that receives a line of JSON after every epoch.
        before_epoch: called with the number of the epoch, from 0.

    Returns:
        One dictionary of numbers per epoch: the mean losses of the epoch, and the numbers of ``evaluate``.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = schedule.build(parameters)
    scheduler = schedule.anneal(optimizer)
    scaler = engine.scaler(parameters[0].device)
    state = {"module": module, "optimizer": optimizer, "scheduler": scheduler}
    if scaler.is_enabled():
        state["scaler"] = scaler
    settings = settings | asdict(schedule) | engine.settings()
    if parallel.world_size() > 1:
        settings["processes"] = parallel.world_size()
    history = restore(checkpoint, state, settings) if checkpoint.exists() else []
    done, started = len(history), perf_counter()

    bar = tqdm(
        total=schedule.epochs * len(batches),
        initial=len(history) * len(batches),
        desc=name,
        leave=False,
        disable=parallel.rank() > 0 or multiprocessing.parent_process() is not None or None,
    )
    with bar:
        for epoch in range(len(history), schedule.epochs):
            if before_epoch is not None:
                before_epoch(epoch)
            module.train()
            sums: Losses = {}
            begun = perf_counter()
            for images, labels in batches.epoch(epoch):
                optimizer.zero_grad()
                for part, theirs, share in engine.parts(images, labels):
                    if engine.cuda_graphs:
                        torch.compiler.cudagraph_mark_step_begin()
                    with engine.autocast(images.device):
                        losses = loss(part, theirs)
                    scaler.scale(share * losses["loss"]).backward()
                    # Kept on the device, because reading a number in every step would synchronise.
                    sums = {key: sums.get(key, 0) + share * value.detach() for key, value in losses.items()}
                # An overflow on one process becomes the average, so that all processes skip the step together.
                parallel.average([p.grad for p in parameters if p.grad is not None])
                scaler.step(optimizer)
                scaler.update()
                bar.update()
            parallel.average(list(sums.values()))
            parallel.share_buffers(module)
            record = {"epoch": epoch + 1, "lr": scheduler.get_last_lr()[0]}
            record |= {key: value.item() / len(batches) for key, value in sums.items()}
            scheduler.step()
            module.eval()
            with torch.no_grad():
                record |= evaluate()
            history.append(record)
            save(checkpoint, state, settings, history)
            if log is not None:
                append(log, {"network": checkpoint.stem, **record, "seconds": round(perf_counter() - begun, 3)})
            bar.set_postfix({key: f"{value:.4g}" for key, value in record.items() if isinstance(value, float)})
    module.eval()
    accuracies = {key.replace("_", " "): value for key, value in history[-1].items() if "accuracy" in key}
    measured = ", ".join(f"{key} {value:.2f} %" for key, value in accuracies.items())
    origin = f"epochs {done + 1} to {schedule.epochs} in {perf_counter() - started:.1f} s"
    print(f"{name}: {measured} ({origin if done < schedule.epochs else 'finished before'})", flush=True)
    return history


def append(log: Path, line: dict[str, object]) -> None:
    """Append a line of JSON. Processes side by side append whole lines, because each is written at once."""
    if parallel.rank() == 0:
        with log.open("a") as file:
            file.write(json.dumps({"time": datetime.now(timezone.utc).isoformat(timespec="seconds")} | line) + "\n")


def save(checkpoint: Path, state: dict[str, object], settings: dict[str, object], history: History) -> None:
    if parallel.rank():
        return
    content = {key: value.state_dict() for key, value in state.items()}
    content |= {"settings": settings, "history": history, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state_all()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # The JSON comes first. If only the JSON is written, the epoch is trained again and writes the same numbers.
    write_json(checkpoint.with_suffix(".json"), {"settings": settings, "history": history})
    replace_file(checkpoint, lambda path: torch.save(content, path))


def restore(checkpoint: Path, state: dict[str, object], settings: dict[str, object]) -> History:
    """Restore everything that ``save`` saved.

    Raises:
        CheckpointError: if it cannot be read or belongs to other settings.
    """
    content = read(checkpoint)
    missing = {*state, "settings", "history", "rng"} - content.keys()
    if missing:
        raise CheckpointError(f"{checkpoint} is no checkpoint of this training: it has no {', '.join(sorted(missing))}")
    differences = [
        f"{key}={content['settings'].get(key)!r} (now {settings.get(key)!r})"
        for key in sorted(content["settings"].keys() | settings.keys())
        if content["settings"].get(key) != settings.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{checkpoint} was trained with {', '.join(differences)}: give another --out, or start over with --fresh"
        )
    try:
        for key, value in state.items():
            value.load_state_dict(content[key])
        torch.set_rng_state(content["rng"])
    except MISFITS as error:
        raise CheckpointError(f"{checkpoint} does not hold what this training saves: {error}") from error
    if "cuda_rng" in content and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["cuda_rng"])
    return content["history"]


def read(path: Path) -> dict:
    """Return the content of a checkpoint by name: tensors and plain values, without code.

    Raises:
        CheckpointError: if it is truncated or corrupt, or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # PyTorch writes checksums, but does not check them
            if damaged is not None:
                raise ValueError(f"{damaged} does not have the checksum it was written with")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint of ``fit``, of another program, or of a file with a state dictionary.

    Another program's names are mapped in the order of its layers. The ResNets of torchvision and timm, and the networks
    of RepDistiller and SemCKD except the ShuffleNets, have the order of the networks here.

    Raises:
        CheckpointError: if the file cannot be read, or its layers are others. The message lists what does not fit.
    """
    own, state = module.state_dict(), _state(path)
    if state.keys() != own.keys():
        if any(isinstance(part, ChannelShuffle) for part in module.modules()):
            raise CheckpointError(
                f"{path} has other names than this ShuffleNet, and other programs shuffle channels in another order: "
                "its weights cannot be mapped"
            )
        state = _renamed(state, own, path)
    try:
        module.load_state_dict(state)
    except MISFITS as error:
        raise CheckpointError(f"{path} does not hold this network's weights: {error}") from error


def load_trunk(network: StagedNetwork, path: Path) -> None:
    """Load all weights except the classifier's, see ``load_weights``. The file may have another number of classes."""
    classifier, last = network.classifier, next(reversed(_state(path).values()), None)
    classes = len(last) if isinstance(last, Tensor) and last.dim() else classifier.out_features
    network.classifier = nn.Linear(classifier.in_features, classes)
    try:
        load_weights(network, path)
    finally:
        network.classifier = classifier


def _state(path: Path) -> dict[str, Tensor]:
    """Return the state dictionary in a file."""
    content = read(path)
    state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    return {key.removeprefix("module."): value for key, value in state.items()}


# Under which key programs save a state dictionary: ours, RepDistiller and SemCKD, Lightning and timm, others.
WRAPPERS = ("module", "model", "state_dict", "net")
COUNTERS = "num_batches_tracked"  # older versions of PyTorch do not save it


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return ``state`` under the names of ``own``. Both must have the same layers in the same order."""
    theirs, ours = ([name for name in names if not name.endswith(COUNTERS)] for names in (state, own))
    lines = []
    for there, here in itertools.zip_longest(theirs, ours):
        found = "nothing" if there is None else f"{there} {tuple(getattr(state[there], 'shape', ()))}"
        expected = "nothing" if here is None else f"{here} {tuple(own[here].shape)}"
        same_kind = there is not None and here is not None and there.rpartition(".")[2] == here.rpartition(".")[2]
        if not same_kind or state[there].shape != own[here].shape:
            lines.append(f"  expected {expected}, got {found}")
    if lines:
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError("\n".join([f"{path} does not fit this network:", *lines[:10], *more]))
    counters = {name: value for name, value in own.items() if name.endswith(COUNTERS)}
    return {here: state[there] for there, here in zip(theirs, ours, strict=True)} | counters


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and rename, so that a killed process leaves the old file intact."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: object) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))


def fingerprint(module: nn.Module) -> str:
    """Return a checksum of a network's weights, because students depend on the weights of their teacher."""
    checksum = 0
    for value in module.state_dict().values():
        checksum = zlib.crc32(value.cpu().contiguous().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


@torch.no_grad()
def measure(classify: Callable[[Tensor], Tensor], dataset: Dataset, device: torch.device) -> dict:
    """Return top-1 and top-5 accuracy in percent, and cross-entropy, on the test images.

    Args:
        classify: maps images to b x K logits, or to L x b x K logits of several classifiers. Then the numbers are
            lists.
    """
    hits, hits_of_5, loss = 0, 0, 0
    for images, labels in dataset.test_batches(device):
        logits = classify(images)
        labels = labels.expand(logits.shape[:-1])
        hits = hits + (logits.argmax(-1) == labels).sum(-1)
        hits_of_5 = hits_of_5 + (logits.topk(min(5, logits.shape[-1])).indices == labels[..., None]).any(-1).sum(-1)
        loss = loss - logits.log_softmax(-1).gather(-1, labels[..., None]).sum((-2, -1))
    count = len(dataset.test)
    return {
        "test_accuracy": (100 * hits / count).tolist(),
        "test_top_5": (100 * hits_of_5 / count).tolist(),
        "test_loss": (loss / count).tolist(),
    }
