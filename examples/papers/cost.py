"""What a table would cost on one GPU: an estimate from the networks' multiply-adds.

A training of E epochs over I images in batches of B takes

    E * I * (3 * student + teacher) * 2 / RATE  +  E * I / B * STEP

seconds, where student and teacher are the multiply-adds of a forward pass. The backward pass counts twice. The losses
and SemCKD's projections are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from common import networks
from common.training import Schedule
from torch.utils.flop_counter import FlopCounterMode

from . import TEACHER, Cell

# Assumptions, not measurements: floating-point operations per second of a GPU with TF32, and the seconds per step in
# which it waits for launches and the loader. Small networks on small images are bound by the latter.
RATE, STEP = 20e12, 0.02
# Training images, and their area in parts of 32 x 32 or 224 x 224 pixels, for which multiply-adds are counted.
IMAGES = {
    "CIFAR-100": (50_000, 1.0),
    "ImageNet": (1_281_167, 1.0),
    "MSMT17": (32_621, 256 * 128 / 224**2),
    "MegaFace": (5_100_000, (112 / 224) ** 2),  # MS-Celeb-1M without wrong labels; the paper prints no number
}
METHOD = (
    f"{RATE / 1e12:g} TFLOP/s and {STEP * 1000:g} ms per step are assumed. A training counts three forward passes of "
    "the student and one of the teacher per image, by the networks' multiply-adds, for every epoch and seed of the "
    "paper. Losses and projections are not counted. Trainings that cells share count once per table."
)


class Training(NamedTuple):
    network: str
    teacher: str
    schedule: Schedule
    passes: int = 1  # of the teacher, for each image
    share: float = 1.0  # of the training images
    kind: object = None  # tells trainings of the same networks apart


@functools.cache
def multiply_adds(name: str) -> float:
    """Return the multiply-adds of a forward pass for one image, from shapes without memory."""
    photographs = name.endswith("-224")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = networks.build(name, 3, 1000 if photographs else 100).eval()
        network(torch.empty(1, 3, *[224 if photographs else 32] * 2))
    return counter.get_total_flops() / 2


def hours(data: str, recipe: Any, cells: Sequence[Cell]) -> float:
    """Return the hours of all trainings behind some cells at full scale. Equal trainings count once."""
    return sum(seconds(*IMAGES[data], training) for training in set(trainings(recipe, cells))) / 3600


def trainings(recipe: Any, cells: Sequence[Cell]) -> Iterator[Training]:
    for cell in cells:
        if cell.teacher != cell.student:  # a network that is born again has no other teacher
            yield Training(cell.teacher, cell.teacher, _schedule(recipe, cell.teacher, "teacher_schedule"), 0)
        if cell.method == TEACHER:
            continue
        if "CAAT" in str(cell.method):
            yield Training("caat", cell.teacher, recipe.caat_schedule)
        auxiliary = networks.DOUBLES[cell.student] if cell.method == "HKD" else None
        schedule, share = _schedule(recipe, cell.student, "student_schedule"), cell.settings.get("share", 1.0)
        for seed in range(recipe.seeds):
            rest = (_passes(cell.method), recipe.share * share, (str(cell.method), str(cell.settings), seed))
            if auxiliary:
                yield Training(auxiliary, cell.teacher, schedule, *rest)
            yield Training(cell.student, auxiliary or cell.teacher, schedule, *rest)


def _passes(method: object) -> int:
    """Return how often the teacher sees an image: never, once, or three times if it learns too (DML)."""
    name = str(getattr(method, "loss", method)).lower()
    return {"ce": 0, "dml": 3}.get(name, 1)


def _schedule(recipe: Any, network: str, field: str) -> Schedule:
    if hasattr(recipe, "schedules"):
        return recipe.schedules.get(network, recipe.schedule)
    return getattr(recipe, field)


def seconds(images: int, area: float, training: Training) -> float:
    own = 0 if training.network == "caat" else 3 * multiply_adds(training.network)
    work = own + (training.passes * multiply_adds(training.teacher) if training.passes else 0)
    seen = training.schedule.epochs * images * training.share
    return seen * area * 2 * work / RATE + seen / training.schedule.batch_size * STEP


def shown(hours: float) -> str:
    return "" if hours == 0 else f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h"
