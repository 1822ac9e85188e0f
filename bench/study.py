"""Does a method help on real images? Paired students on Fashion-MNIST, and intervals of their differences to KD.

    python bench/study.py --method lkd               # or cckd, icct, semckd
    python bench/study.py --method lkd --shares 0.05 --seeds 3 --minutes 60
    python bench/study.py --tables                   # tables and figures from the finished runs, without training
    python bench/study.py --method lkd --cost        # time and memory of the loss, on a machine that does nothing else

One teacher sees 12,000 training images of 16 x 16 pixels. Students of a few thousand parameters see 100, 20, 5 or 1 %
of them with their labels. Compared are cross-entropy (CE), KD, SP, AT and RKD, and the method without and with KD. A
term other than KD is added to cross-entropy with a weight.

Every method has eight trials at every share: eight weights, or for KD two temperatures and four weights, and for CE
four learning rates and two weight decays. A trial is one student, measured on 3,000 images that no network trains on.
The best trial's settings train ten students with new seeds, which are measured once, on the 10,000 test images.
Students of one seed see the same images in the same batches and start from the same weights, so differences are taken
seed by seed.

Every finished run is appended to one JSON per method under bench/results/studies; the runs that methods share are in
shared.json. The same command goes on from there. The teacher's weights lie beside, so that another machine trains
against the same teacher. Another machine or PyTorch rounds otherwise, and a student's accuracy then differs by up to a
few tenths of a percent. On the same machine a rerun gives the same numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "examples")]

import measure  # noqa: E402
import results  # noqa: E402
from common import data, figures, networks, training  # noqa: E402
from common.data import Batches, Dataset, Images  # noqa: E402
from common.networks import StagedNetwork  # noqa: E402
from common.results import compare  # noqa: E402
from common.training import Schedule  # noqa: E402

import kdkernels  # noqa: E402
from kdkernels.nn import SemanticCalibration, SemCKDLoss  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "studies"
FIGURES = RESULTS.parent.parent.parent / "docs" / "figures" / "studies"
CPU = torch.device("cpu")
TRAIN, HELD_OUT, SIDE = 12_000, 3_000, 16
BATCH, SEEDS, TRIAL_SEED = 64, 10, 1000
STEPS = {1.0: 2000, 0.2: 1200, 0.05: 800, 0.01: 500}  # by the share of the labels
TEACHER, STUDENT = "resnet14-half", "resnet8-quarter"
LR, WEIGHT_DECAY = 0.1, 5e-4

Run = dict[str, Any]
Settings = dict[str, float]


class Seen(NamedTuple):
    """What a network makes of a batch."""

    logits: Tensor
    embedding: Tensor  # the pooled last map
    stages: list[Tensor]


Term = Callable[[Seen, Seen], Tensor]


class Transfer(NamedTuple):
    """A term beside cross-entropy, and the weights that its trials try."""

    term: Term
    weights: tuple[float, ...]


def weights(middle: float) -> tuple[float, ...]:
    """Eight weights, three and a half decades wide."""
    return tuple(middle * factor for factor in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0))


# The middle weight makes a term's gradient about as large as KD's (bench/gradients.py).
TRANSFERS = {
    "SP": Transfer(lambda s, t: kdkernels.similarity_preserving_loss(s.stages[-1], t.stages[-1]), weights(300.0)),
    "AT": Transfer(lambda s, t: kdkernels.attention_transfer_loss(s.stages, t.stages), weights(100.0)),
    "RKD": Transfer(lambda s, t: kdkernels.relational_kd_loss(s.embedding, t.embedding), weights(1.0)),
    "LKD": Transfer(lambda s, t: kdkernels.local_correlation_loss(s.stages, t.stages, 4), weights(0.1)),
    "CCKD": Transfer(lambda s, t: kdkernels.correlation_congruence_loss(s.embedding, t.embedding), weights(30.0)),
    "ICCT": Transfer(lambda s, t: kdkernels.inter_class_correlation_loss(s.logits, t.logits), weights(3.0)),
    "SemCKD": Transfer(lambda s, t: torch.zeros(()), weights(30.0)),  # has layers of its own: see Student
}
SHARED = ("CE", "KD", "SP", "AT", "RKD")
STUDIES = {"lkd": "LKD", "cckd": "CCKD", "icct": "ICCT", "semckd": "SemCKD"}


def variants(method: str) -> tuple[str, ...]:
    """Return the method without KD, and with KD."""
    return (method, f"KD + {method}")


def trials(variant: str, kd: Settings) -> list[Settings]:
    """Eight settings of a variant; ``kd`` are the best of KD's, which stay as they are on top of it."""
    if variant == "CE":
        return [{"lr": lr, "weight_decay": decay} for lr in (0.03, 0.1, 0.2, 0.4) for decay in (5e-4, 5e-3)]
    if variant == "KD":
        return [{"temperature": t, "kd": share} for t in (2.0, 4.0) for share in (0.3, 0.6, 0.9, 1.0)]
    own = [{"weight": weight} for weight in TRANSFERS[variant.removeprefix("KD + ")].weights]
    return [kd | settings for settings in own] if variant.startswith("KD + ") else own


class World(NamedTuple):
    """The images and the teacher: everything that does not depend on a run."""

    dataset: Dataset  # its test images are the held-out ones
    test: Images
    teacher: StagedNetwork


def load(root: Path | None) -> World:
    """Fashion-MNIST halved to 16 x 16 pixels, and the teacher, which is trained if its file does not exist."""
    whole = data.load("fashion-mnist", root)
    small = Dataset(*map(halved, (whole.train, whole.test)), whole.class_names, whole.mean, whole.std, 1, flip=True)
    used, _ = data.split(small.train.labels, (TRAIN + HELD_OUT) / len(small.train))
    train, held_out = data.split(small.train.labels[used], TRAIN / (TRAIN + HELD_OUT))
    dataset = replace(small, train=small.train[used[train]], test=small.train[used[held_out]])
    return World(dataset, small.test, teacher_of(dataset))


def halved(images: Images) -> Images:
    return Images(F.avg_pool2d(images.pixels.float(), 2).round().to(torch.uint8), images.labels)


def teacher_of(dataset: Dataset) -> StagedNetwork:
    torch.manual_seed(0)
    teacher = networks.build(TEACHER, dataset.channels, dataset.num_classes)
    file = RESULTS / "teacher.pt"
    if file.exists():
        training.load_weights(teacher, file)
    else:
        schedule = Schedule(epochs=20, lr=LR, milestones=(), cosine=True, batch_size=BATCH)
        evaluate = lambda: training.measure(lambda images: teacher(images)[0], dataset, CPU)  # noqa: E731
        loss = lambda images, labels: {"loss": F.cross_entropy(teacher(images)[0], labels)}  # noqa: E731
        batches = dataset.batches(BATCH, 0, CPU)
        training.fit("teacher", teacher, loss, batches, schedule, evaluate, Path("runs/study/teacher.pt"), {})
        RESULTS.mkdir(parents=True, exist_ok=True)
        training.replace_file(file, lambda path: torch.save(teacher.state_dict(), path))
    return teacher.requires_grad_(False).eval()


class Student(nn.Module):
    """The student, and SemCKD's own layers where the variant has them."""

    def __init__(self, variant: str, teacher: StagedNetwork, channels: int, classes: int) -> None:
        super().__init__()
        self.variant = variant
        self.network = networks.build(STUDENT, channels, classes)
        self.calibration = None
        if variant.endswith("SemCKD"):
            self.calibration = SemanticCalibration(self.network.channels, teacher.channels, BATCH)
            self.error = SemCKDLoss()

    def transfer(self, own: Seen, theirs: Seen) -> Tensor:
        if self.calibration is not None:
            return self.error(*self.calibration(own.stages, theirs.stages))
        return TRANSFERS[self.variant.removeprefix("KD + ")].term(own, theirs)


def seen(network: StagedNetwork, images: Tensor) -> Seen:
    logits, stages = network(images)
    return Seen(logits, stages[-1].mean((2, 3)), stages)


def loss_of(student: Student, teacher: StagedNetwork, settings: Settings) -> Callable[..., Tensor]:
    """``(1 - kd)·CE + kd·KD + weight·term``, with the parts that the variant has."""

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        own = seen(student.network, images)
        share = settings.get("kd", 0.0)
        total = (1 - share) * F.cross_entropy(own.logits, labels)
        if student.variant == "CE":
            return total
        with torch.no_grad():
            theirs = seen(teacher, images)
        if share:
            temperature = settings["temperature"]
            total = total + share * kdkernels.kd_loss(own.logits, theirs.logits, temperature=temperature)
        if "weight" in settings:
            total = total + settings["weight"] * student.transfer(own, theirs)
        return total

    return loss


def train(world: World, variant: str, share: float, settings: Settings, seed: int) -> StagedNetwork:
    """Return a trained student. A seed fixes its images, its first weights and its batches."""
    torch.manual_seed(seed)
    labelled, _ = data.split(world.dataset.train.labels, share, seed)
    dataset = replace(world.dataset, train=world.dataset.train[labelled])
    student = Student(variant, world.teacher, dataset.channels, dataset.num_classes)
    loss = loss_of(student, world.teacher, settings)
    descend(student, loss, dataset.batches(BATCH, seed, CPU), STEPS[share], settings)
    return student.network.eval()


def descend(
    student: nn.Module, loss: Callable[..., Tensor], batches: Batches, steps: int, settings: Mapping[str, float]
) -> None:
    """Train for a number of steps, by SGD with a cosine schedule."""
    optimizer = torch.optim.SGD(
        student.parameters(),
        settings.get("lr", LR),
        momentum=0.9,
        weight_decay=settings.get("weight_decay", WEIGHT_DECAY),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    student.train()
    endless = itertools.chain.from_iterable(batches.epoch(number) for number in itertools.count())
    for images, labels in itertools.islice(endless, steps):
        optimizer.zero_grad()
        loss(images, labels).backward()
        optimizer.step()
        schedule.step()


def accuracy(network: StagedNetwork, dataset: Dataset) -> float:
    """In percent."""
    return training.measure(lambda images: network(images)[0], dataset, CPU)["test_accuracy"]


# ----- runs, finished and to do


def file_of(variant: str) -> Path:
    method = variant.removeprefix("KD + ")
    return RESULTS / f"{'shared' if variant in SHARED else method.lower()}.json"


def read(variant: str) -> list[Run]:
    file = file_of(variant)
    return [run for run in results.read(file)["runs"] if run["variant"] == variant] if file.exists() else []


def append(run: Run, origin: Mapping[str, str]) -> None:
    """Add a run to its file. Two programs may do so at once."""
    file = file_of(run["variant"])
    file.parent.mkdir(parents=True, exist_ok=True)
    with (RESULTS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = results.read(file) if file.exists() else {**origin, "runs": []}
        if not any(same(run, other) for other in content["runs"]):
            content["runs"].append(run)
        training.replace_file(file, lambda path: results.write(path, content))


def same(run: Run, other: Run) -> bool:
    return all(run[key] == other[key] for key in ("variant", "share", "phase", "settings", "seed"))


def best_trial(variant: str, share: float, kd: Settings) -> Settings | None:
    """Return the settings of the best trial, or None if one is missing. Of equal trials the first counts."""
    found = {
        str(run["settings"]): run["accuracy"]
        for run in read(variant)
        if run["phase"] == "trial" and run["share"] == share
    }
    tried = trials(variant, kd)
    if any(str(settings) not in found for settings in tried):
        return None
    return max(tried, key=lambda settings: found[str(settings)])


def todo(variant: str, share: float, seeds: int) -> Iterator[Run]:
    """Yield the missing runs in their order. The trials come first, because they decide the settings of the others."""
    kd = {}
    if variant.startswith("KD + "):
        kd = best_trial("KD", share, {})
        assert kd is not None, "KD's trials come first"
    finished = read(variant)
    run = {"variant": variant, "share": share}
    for settings in trials(variant, kd):
        trial = run | {"phase": "trial", "settings": settings, "seed": TRIAL_SEED}
        if not any(same(trial, other) for other in finished):
            yield trial
    best = best_trial(variant, share, kd)
    assert best is not None
    for seed in range(seeds):
        final = run | {"phase": "final", "settings": best, "seed": seed}
        if not any(same(final, other) for other in finished):
            yield final


def conduct(world: World, run: Run) -> Run:
    network = train(world, run["variant"], run["share"], run["settings"], run["seed"])
    dataset = replace(world.dataset, test=world.test) if run["phase"] == "final" else world.dataset
    return run | {"accuracy": accuracy(network, dataset)}


def work(arguments: argparse.Namespace) -> bool:
    """Train what is missing. Return whether everything is finished before the minutes are over."""
    world, origin = load(arguments.root), measure.provenance()
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [*SHARED, *(v for method in arguments.method for v in variants(STUDIES[method]))]
    total = len(chosen) * len(arguments.shares) * (8 + arguments.seeds)
    with tqdm(total=total, disable=None) as bar:
        for share, variant in itertools.product(arguments.shares, chosen):
            bar.set_description(f"{variant}, {share:.0%} of the labels")
            done = 0
            for run in todo(variant, share, arguments.seeds):
                if time.monotonic() > end:
                    return False
                append(conduct(world, run), origin)
                done += 1
                bar.update()
            bar.update(8 + arguments.seeds - done)
    return True


# ----- cost


def inputs(method: str) -> tuple[Student, Seen, Seen]:
    """Return the student, and what it and the teacher make of a batch. The student's maps learn."""
    torch.manual_seed(0)
    images = torch.rand(BATCH, 1, SIDE, SIDE)
    teacher = networks.build(TEACHER, 1, 10).requires_grad_(False).eval()
    student = Student(method, teacher, images.shape[1], 10)
    with torch.no_grad():
        own, theirs = seen(student.network, images), seen(teacher, images)
    leaves = [maps.requires_grad_() for maps in own.stages]
    return student, Seen(own.logits.requires_grad_(), own.embedding.requires_grad_(), leaves), theirs


def fused(student: Student, own: Seen, theirs: Seen) -> Tensor:
    return student.transfer(own, theirs)


def textbook(student: Student, own: Seen, theirs: Seen) -> Tensor:
    """Return the same equations line by line in PyTorch."""
    with kdkernels.use_backend("reference"):
        return fused(student, own, theirs)


def cost(method: str, origin: Mapping[str, str]) -> dict[str, Any]:
    """Seconds and extra bytes of the loss with its gradient, in the study's shapes."""
    losses = {"fused": fused, "textbook": textbook}
    seconds, peaks = measure.medians(losses, inputs(method)), measure.peaks(losses, inputs, method)
    return {"date": origin["date"], "commit": origin["commit"], "seconds": seconds, "peak extra bytes": peaks}


# ----- statistics, tables, figures


def finals(variant: str, share: float) -> dict[int, float]:
    """Return the test accuracy of every seed."""
    return {r["seed"]: r["accuracy"] for r in read(variant) if r["phase"] == "final" and r["share"] == share}


def rows(method: str, share: float) -> list[list[str]]:
    """Return a row per variant that has finished runs."""
    lines, baseline = [], finals("KD", share)
    for variant in (*SHARED, *variants(method)):
        own = finals(variant, share)
        paired = sorted(own.keys() & baseline.keys())
        if not own:
            continue
        difference = p = ""
        if variant != "KD" and len(paired) > 1:
            c = compare([own[seed] for seed in paired], [baseline[seed] for seed in paired])
            difference, p = str(c), f"{c.p:.2g}"
        values = list(own.values())
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        lines.append([f"{share:.0%}", variant, str(len(own)), f"{np.mean(values):.2f}{spread}", difference, p])
    return lines


def write_tables(method: str) -> None:
    """Put the table into the method's file, and draw its figure."""
    file = RESULTS / f"{method}.json"
    if not file.exists():
        return
    name = STUDIES[method]
    header = ["labels", "trained by", "seeds", "test accuracy, %", "difference to KD [95 % interval]", "p"]
    lines = [row for share in STEPS for row in rows(name, share)]
    table = {"title": "", "header": header, "rows": lines}
    content = results.read(file)
    tables = [table] + ([cost_table(content["cost"])] if "cost" in content else [])
    results.write(file, content | {"tables": tables})
    if lines:
        figures.save_variants(lambda: draw(name), FIGURES / f"{method}.svg")


def cost_table(measured: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        [name, f"{1e3 * measured['seconds'][name]:.2f}", f"{measured['peak extra bytes'][name] / 2**20:.2f}"]
        for name in ("fused", "textbook")
    ]
    title = f"The loss and its gradient at batch {BATCH}, measured {measured['date'][:10]}"
    return {"title": title, "header": ["", "ms", "peak memory beside the gradients, MiB"], "rows": rows}


def draw(method: str) -> Figure:
    """Return each variant's difference to KD with its interval, a panel per share of the labels."""
    shares = [share for share in STEPS if len(finals("KD", share)) > 1]
    figure = Figure(figsize=(3.2 * max(len(shares), 1), 3.2))
    axes = figure.subplots(1, max(len(shares), 1), squeeze=False, sharey=True)[0]
    names = [variant for variant in (*SHARED, *variants(method)) if variant != "KD"]
    for axis, share in zip(axes, shares, strict=False):
        baseline = finals("KD", share)
        for height, variant in enumerate(reversed(names)):
            own = finals(variant, share)
            paired = sorted(own.keys() & baseline.keys())
            if len(paired) > 1:
                c = compare([own[seed] for seed in paired], [baseline[seed] for seed in paired])
                error = [[c.mean - c.low], [c.high - c.mean]]
                color = "C0" if variant in variants(method) else "C7"
                axis.errorbar(c.mean, height, xerr=error, fmt="o", color=color, capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(names)), reversed(names))
        axis.set_title(f"{share:.0%} of the labels")
        axis.set_xlabel("difference to KD, points")
    return figure


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="*", choices=STUDIES, default=[], help="default: only the shared runs")
    parser.add_argument("--shares", nargs="+", type=float, choices=STEPS, default=list(STEPS), metavar="SHARE")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="final students of each variant; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after these")
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST, where Debian's package is not installed")
    parser.add_argument("--cost", action="store_true", help="measure time and memory of the methods' losses")
    parser.add_argument("--tables", action="store_true", help="write tables and figures of the finished runs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)
    for method in arguments.method if arguments.cost else []:
        file, origin = RESULTS / f"{method}.json", measure.provenance()
        content = results.read(file) if file.exists() else {**origin, "runs": []}
        results.write(file, content | {"cost": cost(STUDIES[method], origin)})
    if not arguments.tables and not arguments.cost:
        with contextlib.suppress(KeyboardInterrupt):
            complete = work(arguments)
            print("finished" if complete else "The minutes are over. The same command goes on from here.")
    for method in STUDIES:
        write_tables(method)


if __name__ == "__main__":
    main()
