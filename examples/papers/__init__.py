"""The papers' result tables: what was trained for each number, how, and the number.

A module per paper holds its tables, and trains one student of them by the paper's example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Number = float | tuple[float, float]  # or a mean and its deviation
Record = Mapping[str, float]  # what was measured after an epoch

TEACHER = "teacher"


@dataclass(frozen=True)
class Cell:
    """A student, or with the method ``TEACHER`` its teacher, and what its paper prints of it.

    Args:
        column: the table's.
        published: by the name that the number has in the example's records; in percent.
        teacher, student: names of networks.
        method: as the example calls it; None: kdkernels does not have it.
        settings: fields of the example's recipe, and what else belongs to the table whatever the data.
    """

    column: str
    published: Mapping[str, Number]
    teacher: str
    student: str
    method: object
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """One for all cells whose students differ in their method alone."""
        return "-".join([self.teacher, self.student, *(f"{name}{value:g}" for name, value in self.settings.items())])

    def on_digits(self) -> Cell:
        """With networks of the same kind, small enough for digits."""
        return replace(self, teacher=STAND_INS[self.teacher], student=STAND_INS[self.student])


@dataclass(frozen=True)
class Table:
    """Rows as they are printed, from the top.

    Args:
        data: what the paper measured on.
        rows: by what stands before each.
        recipe: fields of the example's recipe at the paper's scale, where they are not CIFAR-100's.
        arguments: of the example's command line.
        errors: error rates are printed, not accuracies.
        note: what the paper leaves open, and what is done here.
    """

    title: str
    data: str
    rows: Mapping[str, Sequence[Cell]]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    errors: bool = False
    note: str = ""


@dataclass(frozen=True)
class Paper:
    """A paper's tables by number, and how one of their cells is trained.

    Args:
        recipes: the example's, "demo" and "paper".
        parser: the example's.
        experiment: the example's class.
        train: a cell's records after the last epoch, one per seed, given the cell, its recipe, and a function that
            opens the experiment for a recipe in a folder.
    """

    name: str
    tables: Mapping[int, Table]
    recipes: Mapping[str, Any]
    parser: Callable[[], Any]
    experiment: Callable[..., Any]
    train: Callable[[Cell, Any, Callable[..., Any]], Sequence[Record]]


def printed(text: str) -> dict[str, list[Number | None]]:
    """Lines of a label, "|" and numbers, "mean±deviation" or "-" as a paper prints them."""
    rows = {}
    for line in text.strip().splitlines():
        label, numbers = line.split("|")
        rows[label.strip()] = [number(word) for word in numbers.split()]
    return rows


def number(word: str) -> Number | None:
    if word == "-":
        return None
    mean, _, deviation = word.partition("±")
    return (float(mean), float(deviation)) if deviation else float(mean)


# Of the same kind and in the same order of size where it matters who teaches whom.
STAND_INS = {
    "cnn5": "cnn5-quarter",
    "mobilenetv2": "mobilenetv2-eighth",
    "mobilenetv2-full": "mobilenetv2-eighth",
    "resnet8x4": "resnet8-half",
    "resnet14": "resnet8-half",
    "resnet18": "resnet8-half",
    "resnet20": "resnet8-half",
    "resnet32x4": "resnet14-half",
    "resnet50": "resnet14-half",
    "resnet101": "resnet14-half",
    "resnet110": "resnet14-half",
    "resnext29": "resnext11-small",
    "shufflenetv1": "shufflenetv1-quarter",
    "shufflenetv2": "shufflenetv2-quarter",
    "vgg8": "vgg8-eighth",
    "vgg13": "vgg13-eighth",
    "wrn-16-1": "wrn-10-1",
    "wrn-16-2": "wrn-10-1",
    "wrn-16-10": "wrn-10-1",
    "wrn-28-2": "wrn-10-1",
    "wrn-28-10": "wrn-16-1",
    "wrn-40-2": "wrn-16-1",
    "mobilenetv2-224": "mobilenetv2-eighth",
    "mobilenetv2-full-224": "mobilenetv2-eighth",
    "resnet18-224": "resnet8-half",
    "resnet34-224": "resnet14-half",
    "resnet50-224": "resnet14-half",
    "resnext101-224": "resnext11-small",
    "wrn-18-2-224": "wrn-10-1",
    "wrn-34-2-224": "wrn-16-1",
}
