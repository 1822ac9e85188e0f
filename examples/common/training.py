"""Training that survives being killed: every epoch ends with a checkpoint, and a rerun goes on from it, bit for bit."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import parallel
from .data import Batches, Dataset

Losses = dict[str, Tensor]
History = list[dict[str, float]]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or belongs to other settings."""


# What PyTorch raises where a file holds the state of something else.
MISFITS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum, or Adam; the learning rate is multiplied by ``decay`` at each milestone, in epochs, or follows
    half a ``cosine`` down to 0."""

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
        """The same shape in another number of epochs."""
        scaled = tuple(round(milestone * epochs / self.epochs) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=scaled)


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Losses],
    batches: Batches,
    schedule: Schedule,
    evaluate: Callable[[], dict[str, float]],
    checkpoint: Path,
    settings: dict[str, object],
) -> History:
    """Train ``module`` in place to the end of ``schedule``, starting where ``checkpoint`` left off if it exists.

    Args:
        name: what the progress bar says.
        module: holds every parameter to train; seed torch before building it.
        loss: maps images and labels to named scalars; the one named "loss" is minimised, all are recorded.
        evaluate: called after every epoch in evaluation mode; its numbers are recorded too.
        checkpoint: file replaced after every epoch; the history lies beside it as JSON.
        settings: what the result depends on beside the schedule. A checkpoint of other settings is refused.

    Returns:
        One dictionary of numbers per epoch: means of the losses over the epoch, and what ``evaluate`` gave after it.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = schedule.build(parameters)
    scheduler = schedule.anneal(optimizer)
    state = {"module": module, "optimizer": optimizer, "scheduler": scheduler}
    settings = settings | asdict(schedule)
    if parallel.world_size() > 1:
        settings["processes"] = parallel.world_size()
    history = restore(checkpoint, state, settings) if checkpoint.exists() else []
    done, started = len(history), perf_counter()

    bar = tqdm(
        total=schedule.epochs * len(batches),
        initial=len(history) * len(batches),
        desc=name,
        leave=False,
        disable=parallel.rank() > 0 or None,
    )
    with bar:
        for epoch in range(len(history), schedule.epochs):
            module.train()
            sums: Losses = {}
            for images, labels in batches.epoch(epoch):
                losses = loss(images, labels)
                optimizer.zero_grad()
                losses["loss"].backward()
                parallel.average([p.grad for p in parameters if p.grad is not None])
                optimizer.step()
                # Kept on the device: reading a number every step would wait for it.
                sums = {key: sums.get(key, 0) + value.detach() for key, value in losses.items()}
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
            bar.set_postfix({key: f"{value:.4g}" for key, value in record.items() if isinstance(value, float)})
    module.eval()
    accuracies = {key.replace("_", " "): value for key, value in history[-1].items() if "accuracy" in key}
    measured = ", ".join(f"{key} {value:.2f} %" for key, value in accuracies.items())
    origin = f"epochs {done + 1} to {schedule.epochs} in {perf_counter() - started:.1f} s"
    print(f"{name}: {measured} ({origin if done < schedule.epochs else 'finished before'})", flush=True)
    return history


def save(checkpoint: Path, state: dict[str, object], settings: dict[str, object], history: History) -> None:
    if parallel.rank():
        return
    content = {key: value.state_dict() for key, value in state.items()}
    content |= {"settings": settings, "history": history, "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        content["cuda_rng"] = torch.cuda.get_rng_state_all()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # The JSON first: if only it is written, the epoch is trained again and writes the same.
    write_json(checkpoint.with_suffix(".json"), {"settings": settings, "history": history})
    replace_file(checkpoint, lambda path: torch.save(content, path))


def restore(checkpoint: Path, state: dict[str, object], settings: dict[str, object]) -> History:
    """Put everything back as ``save`` found it.

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
    """A checkpoint's content by name: tensors and plain values, nothing that runs.

    Raises:
        CheckpointError: if it is truncated or corrupt, or holds anything else.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # PyTorch writes checksums, but does not read them
            if damaged is not None:
                raise ValueError(f"{damaged} does not have the checksum it was written with")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def load_weights(module: nn.Module, path: Path) -> None:
    """Weights from a checkpoint of ``fit``, or from a file holding a state dictionary."""
    content = read(path)
    try:
        module.load_state_dict(content.get("module", content))
    except MISFITS as error:
        raise CheckpointError(f"{path} does not hold this network's weights: {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path`` and rename: whoever is killed in between leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: object) -> None:
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1)))


def fingerprint(module: nn.Module) -> str:
    """A checksum of a network's weights: what is trained against them depends on them."""
    checksum = 0
    for value in module.state_dict().values():
        checksum = zlib.crc32(value.cpu().contiguous().numpy().tobytes(), checksum)
    return f"{checksum:08x}"


@torch.no_grad()
def measure(classify: Callable[[Tensor], Tensor], dataset: Dataset, device: torch.device) -> dict:
    """Accuracy, how often the class is among the first five, both in percent, and cross-entropy on the test images.

    Args:
        classify: maps images to logits, b x K, or L x b x K of several classifiers, whose numbers are then lists.
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
