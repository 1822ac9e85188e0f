"""The papers' result tables, row by row: what was published beside what is measured here.

A configuration is a row of a table, for instance lkd-table1-row2; the name of a table stands for all its rows. It knows
the networks, the schedules and the hyper-parameters, and trains by the paper's example (train_lkd.py, ...). On
CIFAR-100 or ImageNet, whichever its paper measured on, it runs at full scale:

    python examples/reproduce.py lkd-table1-row2 --data cifar100 --root DIR
    python examples/reproduce.py icct-table5-row1 --data imagenet --root DIR

By default it runs the same methods on small networks of the same kind and scikit-learn's digits: a stand-in, whose
numbers are not to be compared with the published ones. --list tells all configurations. Rows share their teachers and
students. Every epoch ends with a checkpoint: however a run was interrupted, the same command goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from common import options, parallel, results, training
from common.data import DataError, Dataset
from common.training import Schedule
from papers import TEACHER, Cell, Number, Paper, Record, Table, cckd, icct, lkd, semckd

PAPERS = {paper.name.lower(): paper for paper in (lkd.PAPER, cckd.PAPER, icct.PAPER, semckd.PAPER)}
ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII")
MEASURES = {"test_accuracy": "", "test_top_5": "top-5", "rank_1": "rank-1", "rank_5": "rank-5", "map": "mAP"}
SCALES = {"CIFAR-100": "cifar100", "ImageNet": "imagenet", "MSMT17": "cifar100"}  # --data that a table runs on


@dataclass(frozen=True)
class Configuration:
    """A row of a table."""

    name: str
    paper: Paper
    number: int
    table: Table
    label: str
    cells: Sequence[Cell]

    @property
    def title(self) -> str:
        number = ROMAN[self.number] if self.paper.name == "ICCT" else self.number
        return f"{self.paper.name} Table {number} ({self.table.title}): {self.label}"


def configurations() -> dict[str, Configuration]:
    """All of them by name."""
    return {
        (name := f"{key}-table{number}-row{row}"): Configuration(name, paper, number, table, label, cells)
        for key, paper in PAPERS.items()
        for number, table in paper.tables.items()
        for row, (label, cells) in enumerate(table.rows.items(), 1)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(catalogue())
        return
    chosen = list(choose(parser, arguments))
    dataset = options.load_data(parser, arguments)
    try:
        with parallel.processes():
            if arguments.fresh:
                for folder in arguments.out.glob(f"{arguments.data}/*/**/checkpoints"):
                    options.forget(folder.parent)
            for configuration in chosen:
                Reproduction(configuration, arguments, dataset).run()
    except (training.CheckpointError, DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. The same command goes on after the last finished epoch.") from None


def choose(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[Configuration]:
    """The rows that are asked for, if they can run on the data."""
    known = configurations()
    if not arguments.names:
        parser.error("name a configuration, for instance lkd-table1-row2; --list tells all of them")
    for asked in arguments.names:
        found = [known[name] for name in known if asked == name or name.startswith(f"{asked}-row")]
        if not found:
            parser.error(f"there is no configuration {asked!r}; --list tells all of them")
        for configuration in found:
            scale = SCALES[configuration.table.data]
            if arguments.data not in ("digits", scale):
                parser.error(
                    f"{configuration.name} is of {configuration.table.data}: give --data {scale} and --root, or "
                    f"--data digits for its stand-in, got --data {arguments.data}"
                )
            recipe = vars(configuration.paper.recipes["demo"])
            numbers = sorted(name for name, value in recipe.items() if isinstance(value, (int, float)))
            for name, _ in arguments.set:
                if name not in numbers:
                    parser.error(f"--set {name}: the numbers of {configuration.paper.name}'s recipe are {numbers}")
            yield configuration


def catalogue() -> str:
    rows = [
        [name, f"{c.paper.name}, {c.table.title}: {c.label}", f"--data {SCALES[c.table.data]}"]
        for name, c in configurations().items()
    ]
    return results.markdown(["configuration", "row", "at full scale"], rows)


class Reproduction:
    """A configuration on a data set."""

    def __init__(self, configuration: Configuration, arguments: argparse.Namespace, dataset: Dataset) -> None:
        self.configuration = configuration
        self.arguments = arguments
        self.dataset = dataset
        self.small = arguments.data == "digits"
        table = configuration.table
        self.task = table.arguments.get("task", "")
        self.out: Path = arguments.out / arguments.data / "-".join(filter(None, [configuration.paper.name, self.task]))

    def run(self) -> None:
        """Train what is not trained yet, print the published numbers beside the measured, write both."""
        print(f"\n{self.configuration.name}: {self.configuration.title}\n{self.explanation()}")
        rows, content = [], []
        for cell in self.configuration.cells:
            trained = cell.on_digits() if self.small else cell
            recipe = self.recipe(cell)
            records = [] if cell.method is None else self.configuration.paper.train(trained, recipe, self.open_in)
            rows += [self.row(cell, measure, records) for measure in cell.published]
            content.append(self.content(cell, trained, recipe, records))
        if parallel.rank() == 0:
            training.write_json(
                self.out.parent / f"{self.configuration.name}.json",
                {"title": self.configuration.title, "data": self.arguments.data, "cells": content},
            )
        what = "error, %" if self.configuration.table.errors else "accuracy, %"
        measured = "on digits (stand-in)" if self.small else "measured"
        print(f"\n{results.markdown(['', f'published {what}', f'{measured}, {what}', 'trained'], rows)}")
        print(f"Mean ± standard deviation over seeds. Numbers: {self.out.parent / self.configuration.name}.json")

    def explanation(self) -> str:
        """What runs in whose place, the recipe, and what the paper leaves open."""
        table = self.configuration.table
        lines = []
        if self.small:
            lines.append(f"Stand-in: digits for {table.data}, small networks for the paper's. Compare methods only.")
        elif table.data == "MSMT17":
            lines.append("Stand-in: CIFAR-100 for MSMT17. Compare methods only.")
        if table.note:
            lines.append(table.note)
        recipe = self.recipe(self.configuration.cells[0])
        names = {"teacher", "student", "strong", "weak", "again"}  # each cell has its own
        shown = ((field.name, getattr(recipe, field.name)) for field in fields(recipe) if field.name not in names)
        lines.append("Recipe: " + "; ".join(f"{name} {described(value)}" for name, value in shown))
        return "\n".join(lines)

    def recipe(self, cell: Cell) -> Any:
        """The example's, with what the table and the command line say otherwise."""
        paper, table = self.configuration.paper, self.configuration.table
        recipe = paper.recipes["demo" if self.small else "paper"]
        # A share of the images is one of the recipe's.
        known = {field.name for field in fields(recipe)} - {"share"}
        settings = {name: value for name, value in cell.settings.items() if name in known}
        recipe = replace(recipe, **(settings if self.small else dict(table.recipe) | settings))
        given = {name: type(getattr(recipe, name))(value) for name, value in self.arguments.set}
        recipe = replace(recipe, seeds=self.arguments.seeds or recipe.seeds, **given)
        return lasting(recipe, self.arguments.epochs) if self.arguments.epochs else recipe

    def open_in(self, recipe: Any, *folder: str) -> Any:
        """The paper's experiment with its files in a folder."""
        paper, table = self.configuration.paper, self.configuration.table
        defaults = vars(paper.parser().parse_args([]))
        arguments = argparse.Namespace(**defaults | vars(self.arguments) | dict(table.arguments))
        arguments.out = self.out.joinpath(*folder)
        return paper.experiment(arguments, recipe, self.dataset)

    def row(self, cell: Cell, measure: str, records: Sequence[Record]) -> list[str]:
        errors = self.configuration.table.errors
        values = [100 - record[measure] if errors else record[measure] for record in records]
        who = cell.on_digits() if self.small else cell
        trained = who.teacher if cell.method == TEACHER else f"{who.teacher} teaches {who.student}"
        return [
            f"{cell.column} {MEASURES[measure]}".strip(),
            shown(cell.published[measure]),
            results.spread(values) if values else "",
            trained if values else "not in kdkernels",
        ]

    def content(self, cell: Cell, trained: Cell, recipe: Any, records: Sequence[Record]) -> Mapping[str, Any]:
        return {
            "column": cell.column,
            "teacher": trained.teacher,
            "student": trained.student,
            "method": str(cell.method) if cell.method is not None else None,
            "published": dict(cell.published),
            "measured": {
                measure: [100 - r[measure] if self.configuration.table.errors else r[measure] for r in records]
                for measure in cell.published
            },
            "recipe": asdict(recipe),
        }


def shown(value: Number) -> str:
    return f"{value[0]:.2f} ± {value[1]:.2f}" if isinstance(value, tuple) else f"{value:.2f}"


def described(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {described(part)}" for name, part in value.items()) or "none"
    if not isinstance(value, Schedule):
        return f"{value:g}" if isinstance(value, float) else str(value)
    steps = "along a cosine" if value.cosine else f"times {value.decay:g} at {', '.join(map(str, value.milestones))}"
    return (
        f"{value.epochs} epochs of {value.optimizer}, learning rate {value.lr:g} {steps}, batches of "
        f"{value.batch_size}, weight decay {value.weight_decay:g}{', Nesterov' if value.nesterov else ''}"
    )


def lasting(recipe: Any, epochs: int) -> Any:
    """The recipe with every schedule squeezed into a number of epochs."""

    def squeezed(value: object) -> object:
        if isinstance(value, Mapping):
            return {name: squeezed(part) for name, part in value.items()}
        return value.lasting(epochs) if isinstance(value, Schedule) else value

    return replace(recipe, **{field.name: squeezed(getattr(recipe, field.name)) for field in fields(recipe)})


def setting(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}")
    return name, float(value)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a row, as lkd-table1-row2, or a table, as lkd-table1")
    parser.add_argument("--list", action="store_true", help="tell all configurations and what data each runs on")
    options.add_options(parser, out=Path("runs/reproduce"), imagenet=True)
    group = parser.add_argument_group("recipe", "what is not given is the configuration's")
    group.add_argument("--seeds", type=options.positive_int, metavar="N", help="students per number")
    group.add_argument("--epochs", type=options.positive_int, metavar="N", help="squeeze every schedule into N epochs")
    group.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the recipe, as beta=0.01",
    )
    return parser


if __name__ == "__main__":
    main()
