"""Train students with the fused kernels and with the references, and compare their loss curves.

    python bench/convergence.py

For every method, seed and precision (float32, and bfloat16 by autocast), two students start from the same weights and
see the same batches of digits. They differ only in the backend of their losses, so only rounding drives them apart. A
third student shows how far rounding drives a run: the reference trains it from weights that differ in their last bit.
After many steps, these students are as far apart as two seeds, but not farther, and without a bias.

The program writes every number as JSON and draws a figure. It keeps every finished run: after an interruption, the same
command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "examples")]

import measure  # noqa: E402
import results  # noqa: E402
import train_cckd  # noqa: E402
import train_icct  # noqa: E402
import train_lkd  # noqa: E402
import train_semckd  # noqa: E402
from common import data, figures, training  # noqa: E402
from common.data import Dataset  # noqa: E402
from common.experiment import Experiment  # noqa: E402
from common.training import Losses, Schedule  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
FIGURES = RESULTS.parent.parent / "docs" / "figures"
EXAMPLES = {
    "LKD": (train_lkd, train_lkd.LocalCorrelation),
    "CCKD": (train_cckd, train_cckd.CorrelationCongruence),
    "ICCT": (train_icct, train_icct.InterClassCorrelation),
    "SemCKD": (train_semckd, train_semckd.CrossLayer),
}
BATCH = 32
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUDGED = "reference, nudged"
QUANTITIES = {"loss": "training loss", "test_accuracy": "test accuracy, %"}

Curve = list[float]
Runs = dict[str, dict[str, list[Curve]]]  # of one quantity, by backend and seed


def experiment(method: str, backend: str, out: Path, dataset: Dataset) -> Experiment:
    """Return the method's example with the recipe of its demo, in small batches."""
    example, kind = EXAMPLES[method]
    name = "reference" if backend == NUDGED else backend
    flags = ["--out", str(out), "--backend", name, "--threads", "1", "--batch-size", str(BATCH)]
    arguments = example.build_parser().parse_args(flags)
    return kind(arguments, example.recipe_of(arguments), dataset)


def teacher_of(method: str, out: Path, dataset: Dataset, epochs: int) -> nn.Module:
    """Return a trained, frozen teacher. CCKD's has an embedding. The other methods share one teacher."""
    own = method if method == "CCKD" else "LKD"
    study = experiment(own, "reference", out / own, dataset)
    schedule = study.recipe.teacher_schedule.lasting(epochs)
    study.recipe = replace(study.recipe, teacher_schedule=schedule)
    teacher = study.teacher()
    return teacher[0] if own == "CCKD" else teacher


@contextlib.contextmanager
def student_of(
    method: str, study: Experiment, teacher: nn.Module, seed: int
) -> Iterator[tuple[nn.Module, nn.Module, Callable[..., Losses]]]:
    """Return a student, everything that is trained with it, and the method's whole loss."""
    torch.manual_seed(seed)
    recipe = study.recipe
    if method == "CCKD":
        student = study.embedder(recipe.student)
        yield student, student, study.loss(train_cckd.Variant(), student, teacher)
        return
    student = study.network(recipe.weak if method == "ICCT" else recipe.student)
    if method == "LKD":
        yield student, student, study.student_loss(train_lkd.METHODS["LKD"], student, teacher, None)
    elif method == "ICCT":
        yield student, student, study.loss(train_icct.METHODS["ICCT"], student, teacher)
    else:
        semckd = train_semckd.METHODS["SemCKD"]
        with train_semckd.capture(student, semckd) as own, train_semckd.capture(teacher, semckd) as theirs:
            transfer = study.transfer(semckd, student, teacher, own, theirs)
            setting = train_semckd.Setting("SemCKD", recipe.share)
            loss = study.student_loss(setting, student, teacher, own, theirs, transfer)
            yield student, nn.ModuleList([student, transfer.module]), loss


@torch.no_grad()
def nudge(module: nn.Module) -> None:
    """Change every weight by one unit in the last place."""
    for parameter in module.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))


def schedule_of(study: Experiment) -> Schedule:
    recipe = study.recipe
    return recipe.schedules[recipe.weak] if hasattr(recipe, "schedules") else recipe.student_schedule


def train(
    method: str,
    study: Experiment,
    teacher: nn.Module,
    seed: int,
    precision: torch.dtype,
    steps: int,
    every: int,
    *,
    nudged: bool = False,
) -> dict[str, Curve]:
    """Train, and return the mean loss over every ``every`` steps, and the test accuracy after them."""
    curves: dict[str, Curve] = {name: [] for name in QUANTITIES}
    schedule, device = schedule_of(study), study.device
    batches = study.dataset.only(study.recipe.share).batches(schedule.batch_size, seed, device)
    endless = (batch for epoch in itertools.count() for batch in batches.epoch(epoch))
    with student_of(method, study, teacher, seed) as (student, trained, loss_of):
        if nudged:
            nudge(student)
        optimizer = schedule.build(list(trained.parameters()))
        losses = []
        for step, (images, labels) in enumerate(itertools.islice(endless, steps), 1):
            trained.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = loss_of(images, labels)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % every == 0:
                trained.eval()
                with torch.no_grad():
                    accuracy = study.measure(lambda images: student(images)[0])["test_accuracy"]
                curves["loss"].append(float(np.mean(losses[-every:])))
                curves["test_accuracy"].append(accuracy)
    return curves


def parity(reference: Sequence[Curve], fused: Sequence[Curve]) -> dict[str, float]:
    """Return how far the backends are apart, relative to how far seeds are apart.

    Returns:
        "distance": the mean difference of two runs of one seed, divided by the mean difference of two references of
            different seeds.
        "bias": the mean of the signed differences, divided by the standard deviation of the references over seeds.
    """
    own, other = np.array(reference), np.array(fused)
    pairs = itertools.combinations(own, 2)
    return {
        "distance": float(np.abs(other - own).mean() / np.mean([np.abs(a - b).mean() for a, b in pairs])),
        "bias": float((other - own).mean() / own.std(0, ddof=1).mean()),
    }


def run_all(
    methods: Sequence[str], backends: Sequence[str], seeds: int, steps: int, every: int, out: Path
) -> dict[str, dict[str, Runs]]:
    """By method and precision."""
    dataset = data.load("digits")
    teachers = {method: teacher_of(method, out / "teachers", dataset, epochs=10) for method in methods}
    combinations = list(itertools.product(methods, PRECISIONS, backends, range(seeds)))
    curves: dict[str, dict[str, Runs]] = {
        method: {precision: {q: {b: [] for b in backends} for q in QUANTITIES} for precision in PRECISIONS}
        for method in methods
    }
    for method, precision, backend, seed in tqdm(combinations, desc="students", disable=None):
        name = f"{method}-{precision}-{backend}-seed{seed}-{steps}x{every}".replace(", ", "-")
        file = out / f"{name}.json"
        if not file.exists():
            study = experiment(method, backend, out, dataset)
            nudged = backend == NUDGED
            run = train(method, study, teachers[method], seed, PRECISIONS[precision], steps, every, nudged=nudged)
            training.write_json(file, run)
        for quantity, curve in results.read(file).items():
            curves[method][precision][quantity][backend].append(curve)
    return curves


def summary(curves: Mapping[str, Mapping[str, Runs]]) -> list[dict]:
    """Return the parity of every other kind of run with the reference."""
    return [
        {
            "method": method,
            "precision": precision,
            "quantity": quantity,
            "runs": name,
            **parity(runs["reference"], other),
        }
        for method, of_method in curves.items()
        for precision, of_precision in of_method.items()
        for quantity, runs in of_precision.items()
        for name, other in runs.items()
        if name != "reference"
    ]


def draw(path: Path, curves: Mapping[str, Mapping[str, Runs]], every: int) -> None:
    """Draw loss and accuracy, mean and range over seeds, and the distances of backends, nudged runs and seeds."""
    figures.save_variants(lambda: panels(curves, every), path)


def panels(curves: Mapping[str, Mapping[str, Runs]], every: int) -> Figure:
    figure = Figure(figsize=(3.6 * len(curves), 15))
    axes = figure.subplots(6, len(curves), sharex=True)
    for column, (method, of_method) in zip(axes.T, curves.items(), strict=True):
        for three, (precision, of_precision) in zip((column[:3], column[3:]), of_method.items(), strict=True):
            three[0].set_title(f"{method}, {precision}")
            draw_courses(three, of_precision, every)
        column[-1].set_xlabel("steps")
    for axis, label in zip(axes[:, 0], 2 * (*QUANTITIES.values(), "difference of losses"), strict=True):
        axis.set_ylabel(label)
        axis.legend()
    return figure


def draw_courses(axes: Sequence[Any], runs: Mapping[str, Mapping[str, list[Curve]]], every: int) -> None:
    """Draw three panels: one method in one precision."""
    for axis, (quantity, courses) in zip(axes[:2], runs.items(), strict=True):
        for (name, values), color, style in zip(courses.items(), ("C1", "C0"), ("-", "--"), strict=False):
            values = np.array(values)
            steps = every * np.arange(1, values.shape[1] + 1)
            axis.plot(steps, values.mean(0), style, color=color, label=name)
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axis.set_yscale("log" if quantity == "loss" else "linear")
    reference, *others = (np.array(values) for values in runs["loss"].values())
    seeds = np.mean([np.abs(a - b) for a, b in itertools.combinations(reference, 2)], axis=0)
    axes[2].plot(steps, seeds, color="C2", label="seeds")
    for other, color, style, name in zip(others, ("C0", "C3"), ("--", ":"), ("backends", "a nudge"), strict=True):
        axes[2].plot(steps, np.abs(other - reference).mean(0), style, color=color, label=name)
    distances = [parity(reference, other)["distance"] for other in others]
    axes[2].set_yscale("log")
    axes[2].set_title("backends {:.2g}, nudge {:.2g} of seeds".format(*distances), fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=EXAMPLES, default=list(EXAMPLES))
    parser.add_argument("--backend", choices=["native", "triton"], default="native", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=6, help="steps per point of a curve")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/convergence"), help="finished runs; default: %(default)s"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be 2 or more: between seeds lies the noise")
    backends = ("reference", arguments.backend, NUDGED)
    curves = run_all(arguments.methods, backends, arguments.seeds, arguments.steps, arguments.every, arguments.out)
    rows = summary(curves)
    date = datetime.date.today().isoformat()
    file = RESULTS / f"convergence-cpu-{date}.json"
    content = {**measure.provenance(), "steps per point": arguments.every, "results": rows, "curves": curves}
    training.write_json(file, content)
    figure = FIGURES / f"{file.stem}.svg"
    draw(figure, curves, arguments.every)
    header = ("method", "precision", "quantity", "reference and", "distance / seeds", "bias / seeds")
    table = [
        (r["method"], r["precision"], r["quantity"], r["runs"], f"{r['distance']:.3f}", f"{r['bias']:+.2f}")
        for r in rows
    ]
    print(measure.table(header, table))
    print(f"wrote {file} and {figure}")


if __name__ == "__main__":
    main()
