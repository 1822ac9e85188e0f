"""How large the gradient of each method is beside the gradient of KD, under each reading of its paper.

    python bench/gradients.py

A published weight means something only if the weighted loss moves the student. For every method and recipe, the program
prints ``weight · ‖∇ method‖ / ‖∇ KD‖`` on the student's parameters, at both ends of the published range. It measures at
the start, and again after one epoch of training with only KD. A ratio of 0.1 to 10 moves training. Below it the method
is inert. Above it KD is inert.

The demo's recipes run on digits with their own networks. The papers' recipes run on Fashion-MNIST with networks of the
same kind that a CPU can train. Every number is written as JSON; ``python bench/report.py`` puts the table into docs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "examples")]

import measure  # noqa: E402
import results  # noqa: E402
from common import data, training  # noqa: E402
from common.data import Dataset  # noqa: E402
from common.experiment import Experiment  # noqa: E402
from convergence import EXAMPLES, schedule_of, student_of  # noqa: E402

import kdkernels  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
KD = "kd"


@dataclass(frozen=True)
class Reading:
    """One way to read a paper: fields of the recipe, and the weights that the paper names with it."""

    name: str
    weights: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """The name of the method's term among the losses of its example, and the readings of its weight."""

    term: str
    readings: tuple[Reading, ...]


RANGE = (0.001, 0.1)  # of LKD's beta on CIFAR-100
METHODS = {
    "LKD": Method(
        "lkd",
        (
            Reading("sum over n² (Eq. 2)", RANGE),
            Reading(
                "sum over n² (Eq. 2), the ImageNet recipe", (0.5,), {"k": 3, "last_stage": True, "temperature": 2.0}
            ),
            Reading("sum (Eqs. 4-7)", RANGE, {"reduction": "sum"}),
            Reading("mean of each relation", RANGE, {"reduction": "mean"}),
        ),
    ),
    "CCKD": Method(
        "cc",
        (
            Reading("unit rows, mean over n²", (0.003,), {"normalize": True, "reduction": "mean"}),
            Reading("unit rows, sum over n²", (0.003,), {"normalize": True, "reduction": "sum"}),
            Reading("raw rows, mean over n²", (0.003,), {"normalize": False, "reduction": "mean"}),
            Reading("raw rows, sum over n²", (0.003,), {"normalize": False, "reduction": "sum"}),
        ),
    ),
    "ICCT": Method(
        "icct",
        (
            Reading("mean over the K rows", (1.0,), {"reduction": "mean"}),
            Reading("sum over the K rows (Eq. 7)", (1.0,), {"reduction": "sum"}),
        ),
    ),
    "SemCKD": Method(
        "transfer",
        (
            Reading("mean over batch and student layers", (400.0,), {"reduction": "mean"}),
            Reading("sum (Eq. 7)", (400.0,), {"reduction": "sum"}),
        ),
    ),
}
# The papers' students, or as close as a CPU can train in minutes, each with a teacher.
NETWORKS = {"LKD": ("resnet20", "resnet14"), "CCKD": ("resnet20", "resnet14"), "ICCT": ("resnet20", "cnn5")}
NETWORKS |= {"SemCKD": ("resnet20", "vgg8-eighth")}


def experiment(method: str, recipe_name: str, dataset: Dataset, out: Path, *, epochs: int) -> Experiment:
    """Return the method's example with a recipe, with the networks of ``NETWORKS`` in place of its paper's."""
    example, kind = EXAMPLES[method]
    flags = ["--recipe", recipe_name, "--out", str(out), "--threads", str(torch.get_num_threads())]
    if recipe_name == "paper":
        roles = ("--strong", "--weak") if method == "ICCT" else ("--teacher", "--student")
        flags += [word for pair in zip(roles, NETWORKS[method], strict=True) for word in pair]
    arguments = example.build_parser().parse_args(flags)
    recipe = example.recipe_of(arguments)
    if recipe_name == "paper" and method != "ICCT":
        recipe = replace(recipe, teacher_schedule=recipe.teacher_schedule.lasting(epochs))
    if recipe_name == "paper" and method == "ICCT":
        recipe = replace(recipe, schedule=recipe.schedule.lasting(epochs))
    return kind(arguments, replace(recipe, share=1.0), dataset)


def teacher_of(method: str, recipe_name: str, dataset: Dataset, out: Path, *, epochs: int) -> nn.Module:
    """Return a trained, frozen teacher. CCKD's has an embedding, and the others share ICCT's."""
    own = "CCKD" if method == "CCKD" else "ICCT"
    study = experiment(own, recipe_name, dataset, out / f"{own}-{recipe_name}", epochs=epochs)
    return study.teacher()[0] if own == "CCKD" else study.teacher(study.recipe.strong)[0]


def norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt().item()


def ratios(
    method: str, study: Experiment, teacher: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], state: dict | None
) -> float:
    """Return the median over batches of the gradient norm of the method's term over KD's, for a weight of 1.

    ``state`` is the student's; None is the student before training.
    """
    term = METHODS[method].term
    found = []
    with student_of(method, study, teacher, 0) as (student, trained, loss_of):
        if state is not None:
            student.load_state_dict(state)
        trained.train()
        parameters = list(student.parameters())
        for images, labels in batches:
            losses = loss_of(images, labels)
            kd = losses[KD] if KD in losses else _kd(study, student, teacher, images)
            found.append(norm(losses[term], parameters) / norm(kd, parameters))
    return median(found)


def _kd(study: Experiment, student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """KD where the method has none beside it (ICCT)."""
    with torch.no_grad():
        logits = teacher(images)[0]
    return kdkernels.kd_loss(student(images)[0], logits, temperature=study.recipe.temperature)


def trained_by_kd(method: str, study: Experiment, teacher: nn.Module) -> dict:
    """Return the state of a student after one epoch with only KD."""
    schedule = schedule_of(study)
    with student_of(method, study, teacher, 0) as (student, _, loss_of):
        optimizer = schedule.build(list(student.parameters()))
        student.train()
        for images, labels in study.dataset.batches(schedule.batch_size, 0, study.device).epoch(0):
            losses = loss_of(images, labels)
            optimizer.zero_grad()
            (losses[KD] if KD in losses else _kd(study, student, teacher, images)).backward()
            optimizer.step()
        return {name: value.clone() for name, value in student.state_dict().items()}


def rows_of(
    method: str, recipe_name: str, dataset: Dataset, out: Path, *, epochs: int, batches: int
) -> Iterator[dict[str, Any]]:
    """Yield a row per reading of a method's recipe."""
    study = experiment(method, recipe_name, dataset, out / f"{method}-{recipe_name}", epochs=epochs)
    teacher, recipe = teacher_of(method, recipe_name, dataset, out, epochs=epochs), study.recipe
    after = trained_by_kd(method, study, teacher)
    seen = list(islice(study.dataset.batches(schedule_of(study).batch_size, 1, study.device).epoch(1), batches))
    own = Reading("as in the recipe", (recipe.icct if method == "ICCT" else recipe.beta,))
    for reading in METHODS[method].readings if recipe_name == "paper" else (own,):
        study.recipe = replace(recipe, **reading.settings)
        start, later = (ratios(method, study, teacher, seen, state) for state in (None, after))
        yield {
            "method": method,
            "recipe": recipe_name,
            "reading": reading.name,
            "weights": list(reading.weights),
            "batch": schedule_of(study).batch_size,
            "ratio for a weight of 1": {"start": start, "after one epoch": later},
        }


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows for docs: ratios at the ends of the published range."""
    header = ["method", "recipe", "reading", "weight", "ratio at the start", "after one epoch", "moves training"]
    return {"title": "", "header": header, "rows": [_row(row) for row in rows]}


def _row(row: Mapping[str, Any]) -> list[str]:
    ratio = row["ratio for a weight of 1"]
    weighted = {when: [weight * value for weight in row["weights"]] for when, value in ratio.items()}
    ends = [value for values in weighted.values() for value in values]
    reading = f"**{row['reading']}**" if is_default(row) else row["reading"]
    moves = "yes" if all(0.1 <= value <= 10 for value in ends) else "no"
    if moves == "no" and any(0.1 <= value <= 10 for value in ends):
        moves = "in part"
    weights = " to ".join(f"{weight:g}" for weight in row["weights"])
    return [row["method"], row["recipe"], reading, weights, *(_spread(values) for values in weighted.values()), moves]


def is_default(row: Mapping[str, Any]) -> bool:
    """Return whether the recipe reads its paper so."""
    recipe = EXAMPLES[row["method"]][0].RECIPES[row["recipe"]]
    settings = {reading.name: reading.settings for reading in METHODS[row["method"]].readings}.get(row["reading"], {})
    return all(getattr(recipe, name) == value for name, value in settings.items())


def _spread(values: list[float]) -> str:
    return " to ".join(f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="none of them only writes the table anew"
    )
    parser.add_argument("--recipes", nargs="+", choices=["demo", "paper"], default=["demo", "paper"])
    parser.add_argument("--images", type=int, default=6000, help="of Fashion-MNIST; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=4, help="of a paper's teacher; default: %(default)s")
    parser.add_argument("--batches", type=int, default=8, help="repeats per median; default: %(default)s")
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST, where Debian's package is not installed")
    parser.add_argument("--out", type=Path, default=Path("runs/gradients"), help="teachers; default: %(default)s")
    arguments = parser.parse_args()
    origin = measure.provenance()
    torch.set_num_threads(1)
    file = RESULTS / "gradients.json"
    datasets = {}
    for recipe in arguments.recipes:
        for method in tqdm(arguments.methods, desc=recipe, disable=None):
            if recipe not in datasets:
                datasets[recipe] = data.load("digits")
                if recipe == "paper":
                    whole = data.load("fashion-mnist", arguments.root)
                    datasets[recipe] = whole.only(arguments.images / len(whole.train))
            sizes = {"epochs": arguments.epochs, "batches": arguments.batches}
            rows = list(rows_of(method, recipe, datasets[recipe], arguments.out, **sizes))
            kept = results.read(file)["rows"] if file.exists() else []
            kept = [row for row in kept if (row["method"], row["recipe"]) != (method, recipe)] + rows
            order = [(name, which) for which in ("paper", "demo") for name in METHODS]
            kept.sort(key=lambda row: order.index((row["method"], row["recipe"])))
            training.write_json(file, origin | {"rows": kept, "tables": [table(kept)]})
            print(measure.table(table(rows)["header"], table(rows)["rows"]), flush=True)
    content = results.read(file)
    results.write(file, content | {"tables": [table(content["rows"])]})


if __name__ == "__main__":
    main()
