"""The papers' result tables: the published numbers, and the training behind each of them.

A module per paper has its tables, and trains one student of a table with the paper's example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

Number = float | tuple[float, float]  # a mean, or a mean and its standard deviation
Record = Mapping[str, float]  # numbers measured after an epoch

TEACHER = "teacher"


@dataclass(frozen=True)
class Cell:
    """A student, or its teacher with the method ``TEACHER``, and the numbers that the paper prints.

    Args:
        column: the table's.
        published: in percent, by name in the records of the example.
        teacher, student: names of networks.
        method: the example's name of the method.
        settings: fields of the example's recipe, and other settings of the table that do not depend on the data.
    """

    column: str
    published: Mapping[str, Number]
    teacher: str
    student: str
    method: object
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Return the folder of all cells whose students differ only in their method."""
        shown = (f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in self.settings.values())
        return "-".join([self.teacher, self.student, *map("".join, zip(self.settings, shown, strict=True))])

    def on_digits(self) -> Cell:
        """Return the cell with networks of the same kind that are small enough for digits."""
        return replace(self, teacher=STAND_INS[self.teacher], student=STAND_INS[self.student])


@dataclass(frozen=True)
class Table:
    """The rows of a printed table, from the top.

    Args:
        data: the data set of the paper.
        rows: the rows, by their label.
        recipe: fields of the example's recipe at the paper's scale, if they differ from those for CIFAR-100.
        arguments: arguments of the example's command line.
        errors: whether the table prints error rates in place of accuracies.
        note: what the paper leaves open, and the choice made here.
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
    """A paper's tables by number, and the training of a cell.

    Args:
        recipes: the example's, "demo" and "paper".
        parser: the example's.
        experiment: the example's class.
        train: returns a cell's records after the last epoch, one per seed. It takes the cell, its recipe, and a
            function that opens the experiment for a recipe in a folder.
    """

    name: str
    tables: Mapping[int, Table]
    recipes: Mapping[str, Any]
    parser: Callable[[], Any]
    experiment: Callable[..., Any]
    train: Callable[[Cell, Any, Callable[..., Any]], Sequence[Record]]


def differing(recipes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields in which a recipe differs from the recipe "paper"."""
    return {
        field.name: getattr(recipes[name], field.name)
        for field in fields(recipes[name])
        if getattr(recipes[name], field.name) != getattr(recipes["paper"], field.name)
    }


def printed(text: str) -> dict[str, list[Number | None]]:
    """Return the rows of printed lines: a label, "|", and numbers, "mean±deviation" or "-"."""
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


# Networks of the same kind, with the same order of sizes where the direction of teaching matters.
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
    "shufflenetv2-half-224": "shufflenetv2-quarter",
    "resnet34-224": "resnet14-half",
    "resnet50-224": "resnet14-half",
    "resnext101-224": "resnext11-small",
    "wrn-18-2-224": "wrn-10-1",
    "wrn-34-2-224": "wrn-16-1",
}
