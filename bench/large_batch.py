"""What do sixteen times more images in a relation buy? LKD of single pixels, in a batch that only fused code holds.

    python bench/large_batch.py               # trains what is missing, and writes the table
    python bench/large_batch.py --minutes 60  # starts no run after these

A map of 16 x 16 pixels has 256 patches of one pixel, so LKD of 128 images compares 32,768 patches. The textbook's
matrices of that size fill the memory of a machine with 24 GiB. The experiment compares students that train on batches
of 2,048 images, with images and teacher of bench/study.py:

- KD,
- KD and LKD in sixteen pieces of 128 images, which the textbook can hold one after the other,
- KD and LKD of the whole batch: 524,288 patches, whose matrices would have 2.7e11 entries.

Each has four trials on the held-out images: KD two temperatures and two weights, the others four weights of LKD on top
of the best KD. The best trial's settings train students with new seeds, which are measured once on the test images.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import measure
import numpy as np
import results
import study
import torch
import torch.nn.functional as F
from study import CPU, STUDENT, Run, Settings, World
from torch import Tensor
from tqdm import tqdm

sys.path[:0] = [str(study.RESULTS.parents[2] / "examples")]

from common import networks, training  # noqa: E402
from common.results import compare  # noqa: E402

import kdkernels  # noqa: E402

FILE = study.RESULTS / "large-batch.json"
BATCH, PIECES, SIDE = 2048, 16, 16
STEPS, LR, SEEDS = 120, 0.4, 10
VARIANTS = {"KD": 0, "KD + LKD in 16 pieces": PIECES, "KD + LKD of the whole batch": 1}


def relation(student: Tensor, teacher: Tensor, pieces: int) -> Tensor:
    """Return the mean over the pieces of a batch of LKD between all their pixels."""
    losses = [
        kdkernels.local_correlation_loss(own, theirs, SIDE)
        for own, theirs in zip(student.chunk(pieces), teacher.chunk(pieces), strict=True)
    ]
    return torch.stack(losses).mean()


def trials(variant: str, kd: Settings) -> list[Settings]:
    if variant == "KD":
        return [{"lr": LR, "temperature": t, "kd": share} for t in (2.0, 4.0) for share in (0.6, 0.9)]
    # At 5e-5 the gradient of LKD is as large as KD's, at the start and after 40 steps.
    return [kd | {"weight": weight} for weight in (5e-6, 3e-5, 2e-4, 1e-3)]


def train(world: World, run: Run) -> networks.StagedNetwork:
    settings, pieces = run["settings"], VARIANTS[run["variant"]]
    torch.manual_seed(run["seed"])
    student = networks.build(STUDENT, world.dataset.channels, world.dataset.num_classes)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        own = study.seen(student, images)
        with torch.no_grad():
            theirs = study.seen(world.teacher, images)
        share = settings["kd"]
        total = (1 - share) * F.cross_entropy(own.logits, labels)
        total = total + share * kdkernels.kd_loss(own.logits, theirs.logits, temperature=settings["temperature"])
        if pieces:
            total = total + settings["weight"] * relation(own.stages[0], theirs.stages[0], pieces)
        return total

    batches = world.dataset.batches(BATCH, run["seed"], CPU)
    study.descend(student, loss, batches, STEPS, settings)
    return student.eval()


# ----- runs


def conduct(world: World, run: Run) -> Run:
    network = train(world, run)
    dataset = replace(world.dataset, test=world.test) if run["phase"] == "final" else world.dataset
    return run | {"accuracy": study.accuracy(network, dataset)}


def todo(finished: list[Run], variant: str, seeds: int) -> Iterator[Run]:
    """Yield the missing runs of a variant, in their order."""
    kd = {} if variant == "KD" else best(finished, "KD", {})
    for settings in trials(variant, kd):
        yield from missing(finished, {"variant": variant, "phase": "trial", "settings": settings, "seed": 1000})
    settings = best(finished, variant, kd)
    for seed in range(seeds):
        yield from missing(finished, {"variant": variant, "phase": "final", "settings": settings, "seed": seed})


def missing(finished: list[Run], run: Run) -> Iterator[Run]:
    if not any(all(run[key] == other[key] for key in run) for other in finished):
        yield run


def best(finished: list[Run], variant: str, kd: Settings) -> Settings:
    """Return the settings of the best trial. Of equal trials the first counts."""
    found = {str(r["settings"]): r["accuracy"] for r in finished if r["variant"] == variant and r["phase"] == "trial"}
    return max(trials(variant, kd), key=lambda settings: found[str(settings)])


def work(arguments: argparse.Namespace) -> None:
    world = study.load(arguments.root)
    content = results.read(FILE) if FILE.exists() else {**measure.provenance(), "runs": []}
    end = time.monotonic() + 60 * arguments.minutes
    with tqdm(total=len(VARIANTS) * (4 + arguments.seeds), disable=None, initial=len(content["runs"])) as bar:
        for variant in VARIANTS:
            bar.set_description(variant)
            for run in todo(content["runs"], variant, arguments.seeds):
                if time.monotonic() > end:
                    print("The minutes are over. The same command goes on from here.")
                    return
                content["runs"].append(conduct(world, run))
                training.replace_file(FILE, lambda path: results.write(path, content))
                bar.update()


# ----- memory


def maps(images: int) -> tuple[Tensor, Tensor]:
    """Return the first stage's maps of both networks."""
    return torch.randn(images, 4, SIDE, SIDE, requires_grad=True), torch.randn(images, 8, SIDE, SIDE)


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return relation(student, teacher, 1)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    with kdkernels.use_backend("reference"):
        return relation(student, teacher, 1)


def memory() -> dict[str, Any]:
    """Peak extra bytes: measured, and for the textbook's large batch in proportion to the matrices' entries."""
    small = measure.peak_extra_memory(textbook, maps, 32)
    large = measure.peak_extra_memory(fused, maps, BATCH)
    return {"textbook, 32 images": small, f"fused, {BATCH} images": large}


# ----- the table


def rows(finished: list[Run]) -> list[list[str]]:
    accuracies = {
        variant: {r["seed"]: r["accuracy"] for r in finished if r["variant"] == variant and r["phase"] == "final"}
        for variant in VARIANTS
    }
    baseline, lines = accuracies["KD"], []
    for variant, own in accuracies.items():
        if len(own) < 2:
            continue
        paired = sorted(own.keys() & baseline.keys())
        difference = p = ""
        if variant != "KD" and len(paired) > 1:
            c = compare([own[seed] for seed in paired], [baseline[seed] for seed in paired])
            difference, p = str(c), f"{c.p:.2g}"
        values = list(own.values())
        lines.append([variant, str(len(own)), f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}", difference, p])
    return lines


def write_tables() -> None:
    content = results.read(FILE)
    if "memory" not in content:
        content["memory"] = memory()
    small, large = content["memory"].values()
    whole = small * (BATCH / 32) ** 2
    header = ["trained by", "seeds", "test accuracy, %", "difference to KD [95 % interval]", "p"]
    accuracy = {"title": "", "header": header, "rows": rows(content["runs"])}
    costs = [
        ["textbook, 32 images (measured)", f"{small / 2**30:,.2f}"],
        ["textbook, 128 images (from 32)", f"{small * 16 / 2**30:,.1f}"],
        [f"textbook, {BATCH:,} images (from 32)", f"{whole / 2**30:,.0f}"],
        [f"fused, {BATCH:,} images (measured)", f"{large / 2**30:,.2f}"],
    ]
    cost = {"title": "Memory of the loss and its gradient", "header": ["", "peak, GiB"], "rows": costs}
    training.replace_file(FILE, lambda path: results.write(path, content | {"tables": [accuracy, cost]}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="final students of each variant; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after these")
    parser.add_argument("--root", type=study.Path, help="folder of Fashion-MNIST, where Debian's package is missing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with contextlib.suppress(KeyboardInterrupt):
        work(arguments)
    if FILE.exists():
        write_tables()


if __name__ == "__main__":
    main()
