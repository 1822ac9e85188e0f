"""Reproduce rows of the papers' result tables: the published numbers beside the measured ones.

A configuration is a row of a table, for example lkd-table1-row2. The name of a table stands for all its rows. A
configuration has the networks, the schedules and the hyper-parameters. It trains with the paper's example
(train_lkd.py, ...). On the data of its paper, CIFAR-100 or ImageNet, it runs at full scale:

    python examples/reproduce.py lkd-table1-row2 --data cifar100 --root DIR
    python examples/reproduce.py icct-table5-row1 --data imagenet --root DIR

By default it runs the same methods on scikit-learn's digits, with small networks of the same kind. These numbers are
not comparable with the published ones. Rows share teachers and students. Every epoch ends with a checkpoint: after an
interruption, the same command continues from there.

--list names every table and figure of the four papers: what is implemented, the command, and an estimate of its hours
on one GPU. --scale small runs a miniature of each on digits, one epoch per network.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import train_cckd
import train_icct
import train_lkd
import train_semckd
from common import networks, options, parallel, results, training
from common.data import PEOPLE, SETS, SMALL, Dataset
from common.experiment import supervised, write_config
from common.training import Schedule
from papers import TEACHER, Cell, Number, Paper, Record, Table, catalogue, cckd, cost, icct, lkd, semckd

PAPERS = {paper.name.lower(): paper for paper in (lkd.PAPER, cckd.PAPER, icct.PAPER, semckd.PAPER)}
ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII")
MEASURES = {"test_accuracy": "", "test_top_5": "top-5", "rank_1": "rank-1", "rank_5": "rank-5", "map": "mAP"}
MEASURES |= {f"rank_1_of_{10**power}": f"rank-1 of 10^{power}" for power in range(1, 7)}
# The --data of a table's data set.
SCALES = {"CIFAR-100": "cifar100", "ImageNet": "imagenet", "MSMT17": "msmt17", "MegaFace": "faces"}


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
    """Return all configurations by name."""
    return {
        (name := f"{key}-table{number}-row{row}"): Configuration(name, paper, number, table, label, cells)
        for key, paper in PAPERS.items()
        for number, table in paper.tables.items()
        for row, (label, cells) in enumerate(table.rows.items(), 1)
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    arguments = options.parse(parser, argv)
    if arguments.list:
        print(listed())
        return
    if arguments.scale == "small":
        miniatures(parser, arguments)
        return
    if arguments.names == ["icct-table1"]:
        print(parameters())
        return
    chosen = list(choose(parser, arguments))
    dataset = options.load_data(parser, arguments)
    with supervised(parser):
        if arguments.fresh:
            for folder in arguments.out.glob(f"{arguments.data}/*/**/checkpoints"):
                options.forget(folder.parent)
        write_config(parser.prog, arguments)
        for configuration in chosen:
            Reproduction(configuration, arguments, dataset).run()


def choose(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Iterator[Configuration]:
    """Return the requested rows, if they can run on the data."""
    known = configurations()
    if not arguments.names:
        parser.error("name a configuration, for instance lkd-table1-row2; --list tells all of them")
    for asked in arguments.names:
        found = [known[name] for name in known if asked == name or name.startswith(f"{asked}-row")]
        if not found:
            parser.error(f"there is no configuration {asked!r}; --list tells all of them")
        for configuration in found:
            scale = SCALES[configuration.table.data]
            if arguments.data not in (*SMALL, scale):
                parser.error(
                    f"{configuration.name} is of {configuration.table.data}: give --data {scale} and --root, or "
                    f"--data digits or fashion-mnist for its stand-in, got --data {arguments.data}"
                )
            recipe = vars(configuration.paper.recipes["demo"])
            numbers = sorted(name for name, value in recipe.items() if isinstance(value, (int, float)))
            for name, _ in arguments.set:
                if name not in numbers:
                    parser.error(f"--set {name}: the numbers of {configuration.paper.name}'s recipe are {numbers}")
            lacking = started(configuration, arguments)
            if not lacking:
                yield configuration
                continue
            told = f"{configuration.name} starts from trained weights: give {how_to_start(lacking)}"
            if asked == configuration.name:
                parser.error(told)
            print(f"Left out: {told}")


def started(configuration: Configuration, arguments: argparse.Namespace) -> list[str]:
    """Return the networks of a row that must start from trained weights and have none."""
    cells = [cell for cell in configuration.cells if getattr(cell.method, "pretrained", False)]
    cells = [cell.on_digits() for cell in cells] if arguments.data in SMALL else cells
    return sorted({name for cell in cells for name in (cell.teacher, cell.student)} - dict(arguments.weights).keys())


def how_to_start(names: Sequence[str]) -> str:
    files = " ".join(f"{name}=FILE" for name in names)
    return f"--weights {files}, where torchvision:NAME may stand for a FILE"


def listed() -> str:
    """Return every table and figure, and every row that can be named."""
    entries = [
        [entry.name, entry.title, entry.here, cost.shown(entry.hours), entry.command or "nothing to run"]
        for entry in catalogue.entries(PAPERS, SCALES).values()
    ]
    rows = [
        [name, f"{c.paper.name}, {c.table.title}: {c.label}", f"--data {SCALES[c.table.data]}"]
        for name, c in configurations().items()
    ]
    heads = ["table or figure", "what it shows", "what is implemented", "one GPU", "command"]
    return "\n\n".join(
        [
            results.markdown(heads, entries),
            f"One GPU: an estimate, not a measurement. {cost.METHOD}",
            "Rows that can be named on their own:",
            results.markdown(["configuration", "row", "at full scale"], rows),
        ]
    )


def parameters() -> str:
    """Return ICCT's Table I: the parameters of the networks, in millions."""
    rows = []
    for label, (name, published) in catalogue.parameters().items():
        with torch.device("meta"):
            count = networks.parameter_count(networks.build(name, 3, 100))
        rows.append([label, f"{published:.2f}", f"{count / 1e6:.2f}"])
    return results.markdown(["network", "published, millions", "here, millions"], rows)


def miniatures(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Run a miniature of every table and figure that --only names, or of all. Print a line of progress for each."""
    entries = catalogue.entries(PAPERS, SCALES)
    asked = arguments.only or arguments.names or list(entries)
    for name in asked:
        if name not in entries:
            parser.error(f"--only {name}: there is no such table or figure; --list tells all of them")
    out, failed = arguments.out / "small", []
    for number, name in enumerate(asked, 1):
        begun, entry = perf_counter(), entries[name]
        print(f"[{number}/{len(asked)}] {name}, {entry.title}: ", end="", flush=True)
        if not entry.small:
            print(f"nothing to run ({entry.here})")
            continue
        log = out / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        program, *flags = entry.small
        try:
            with log.open("w") as file, contextlib.redirect_stdout(file):
                PROGRAMS[program]([*flags, "--out", str(out / name), *(["--fresh"] if arguments.fresh else [])])
        except (Exception, SystemExit) as error:
            failed.append(name)
            print(f"failed: {error}")
        else:
            print(f"{perf_counter() - begun:.0f} s; {log}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


class Reproduction:
    """A configuration on a data set."""

    def __init__(self, configuration: Configuration, arguments: argparse.Namespace, dataset: Dataset) -> None:
        self.configuration = configuration
        self.arguments = arguments
        self.dataset = dataset
        self.small = arguments.data in SMALL
        table = configuration.table
        self.task = table.arguments.get("task", "")
        self.out: Path = arguments.out / arguments.data / "-".join(filter(None, [configuration.paper.name, self.task]))

    def run(self) -> None:
        """Train what is not trained yet. Print and write the published and the measured numbers."""
        print(f"\n{self.configuration.name}: {self.configuration.title}\n{self.explanation()}")
        rows, content = [], []
        for cell in self.configuration.cells:
            trained = cell.on_digits() if self.small else cell
            recipe = self.recipe(cell)
            records = self.configuration.paper.train(trained, recipe, self.open_in)
            median = getattr(recipe, "median", False)
            rows += [self.row(cell, measure, records, median) for measure in cell.published]
            content.append(self.content(cell, trained, recipe, records))
        if parallel.rank() == 0:
            training.write_json(
                self.out.parent / f"{self.configuration.name}.json",
                {"title": self.configuration.title, "data": self.arguments.data, "cells": content},
            )
        what = "error, %" if self.configuration.table.errors else "accuracy, %"
        measured = f"on {self.arguments.data} (stand-in)" if self.small else "measured"
        print(f"\n{results.markdown(['', f'published {what}', f'{measured}, {what}', 'trained'], rows)}")
        what = "Median, lowest and highest" if median else "Mean ± standard deviation"
        print(f"{what} over seeds. Numbers: {self.out.parent / self.configuration.name}.json")

    def explanation(self) -> str:
        """Return the substituted networks, the recipe, and what the paper leaves open."""
        table = self.configuration.table
        lines = []
        if self.small:
            stand_in = f"{self.arguments.data} for {table.data}, small networks for the paper's"
            lines.append(f"Stand-in: {stand_in}. Compare methods only.")
        if table.note:
            lines.append(table.note)
        recipe = self.recipe(self.configuration.cells[0])
        names = {"teacher", "student", "strong", "weak", "again"}  # every cell has its own value
        shown = ((field.name, getattr(recipe, field.name)) for field in fields(recipe) if field.name not in names)
        lines.append("Recipe: " + "; ".join(f"{name} {described(value)}" for name, value in shown))
        return "\n".join(lines)

    def recipe(self, cell: Cell) -> Any:
        """Return the example's recipe, with the changes of the table and the command line."""
        paper, table = self.configuration.paper, self.configuration.table
        recipe = paper.recipes["demo" if self.small else "paper"]
        # The recipe already has a share of the images.
        known = {field.name for field in fields(recipe)} - {"share"}
        settings = {name: value for name, value in cell.settings.items() if name in known}
        recipe = replace(recipe, **(settings if self.small else dict(table.recipe) | settings))
        given = {name: type(getattr(recipe, name))(value) for name, value in self.arguments.set}
        recipe = replace(recipe, seeds=self.arguments.seeds or recipe.seeds, **given)
        return lasting(recipe, self.arguments.epochs) if self.arguments.epochs else recipe

    def open_in(self, recipe: Any, *folder: str) -> Any:
        """Return the paper's experiment, with its files in a folder."""
        paper, table = self.configuration.paper, self.configuration.table
        defaults = vars(paper.parser().parse_args([]))
        arguments = argparse.Namespace(**defaults | vars(self.arguments) | dict(table.arguments))
        arguments.out = self.out.joinpath(*folder)
        return paper.experiment(arguments, recipe, self.dataset)

    def row(self, cell: Cell, measure: str, records: Sequence[Record], median: bool) -> list[str]:
        errors = self.configuration.table.errors
        found = [record[measure] for record in records if measure in record]
        values = [100 - value if errors else value for value in found]
        who = cell.on_digits() if self.small else cell
        trained = who.teacher if cell.method == TEACHER else f"{who.teacher} teaches {who.student}"
        return [
            f"{cell.column} {MEASURES[measure]}".strip(),
            shown(cell.published[measure]),
            results.spread(values, median=median) if values else "",
            trained if values else "too few distractors" if self.task == "identification" else "no layers match",
        ]

    def content(self, cell: Cell, trained: Cell, recipe: Any, records: Sequence[Record]) -> Mapping[str, Any]:
        return {
            "column": cell.column,
            "teacher": trained.teacher,
            "student": trained.student,
            "method": str(cell.method),
            "published": dict(cell.published),
            "measured": {
                measure: [100 - r[measure] if self.configuration.table.errors else r[measure] for r in records]
                for measure in cell.published
                if all(measure in record for record in records)
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
    """Return the recipe with every schedule scaled to a number of epochs."""

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


def weights(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or name not in networks.NETWORKS:
        raise argparse.ArgumentTypeError(f"expected NETWORK=FILE or NETWORK=torchvision:NAME, got {text!r}")
    return name, file


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="a row, for example lkd-table1-row2, or a table, for example lkd-table1",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="list every table and figure: what is implemented, what it costs, the command; and all configurations",
    )
    parser.add_argument(
        "--scale", choices=["small", "full"], default="full", help="small: run the miniatures; default: %(default)s"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="with --scale small: only these, for example icct-table4 lkd-figure1"
    )
    options.add_options(parser, out=Path("runs/reproduce"), sets=(*SETS, *PEOPLE))
    group = parser.add_argument_group("recipe", "what is not given is the configuration's")
    group.add_argument("--seeds", type=options.positive_int, metavar="N", help="students per published number")
    group.add_argument("--epochs", type=options.positive_int, metavar="N", help="scale every schedule to N epochs")
    group.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a number of the recipe, for example beta=0.01",
    )
    group.add_argument(
        "--weights",
        type=weights,
        nargs="+",
        default=[],
        metavar="NETWORK=FILE",
        help="trained weights from which DML-2 of CCKD's Table 3 starts. FILE may be torchvision:NAME, "
        "the file of ImageNet in PyTorch's cache",
    )
    return parser


# What a miniature calls.
PROGRAMS = {
    "reproduce.py": main,
    "train_lkd.py": train_lkd.main,
    "train_cckd.py": train_cckd.main,
    "train_icct.py": train_icct.main,
    "train_semckd.py": train_semckd.main,
}


if __name__ == "__main__":
    main()
