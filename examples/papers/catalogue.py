"""Every table and figure of the four papers: what is here, the command, and a miniature.

The result tables come from the other modules of this folder. The rest is listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import train_cckd
import train_icct
import train_lkd
import train_semckd

from . import Cell, Paper, Table, cost, semckd

CIFAR, IMAGENET = "--data cifar100 --root DIR", "--data imagenet --root DIR"


@dataclass(frozen=True)
class Entry:
    """A table or a figure.

    Args:
        name: for example lkd-table1 or semckd-figure7.
        title: what the paper shows there.
        here: what of it is implemented.
        command: what computes it at full scale. Empty if nothing is computed.
        hours: an estimate for one GPU, see ``cost``.
        small: the program and the arguments of its miniature. Empty if there is nothing to run.
    """

    name: str
    title: str
    here: str
    command: str = ""
    hours: float = 0.0
    small: tuple[str, ...] = ()


def entries(papers: Mapping[str, Paper], scales: Mapping[str, str]) -> dict[str, Entry]:
    """Return all tables and figures by name, in the order of the papers. ``scales`` has the --data of a data set."""
    found = {}
    for key, paper in papers.items():
        for kind, last in COUNTS[key].items():
            for number in range(1, last + 1):
                name = f"{key}-{kind}{number}"
                known = kind == "table" and number in paper.tables
                found[name] = of_table(name, paper, paper.tables[number], scales) if known else OTHERS[name]
    return found


# How many tables and figures each paper numbers.
COUNTS = {
    "lkd": {"table": 5, "figure": 3},
    "cckd": {"table": 7, "figure": 4},
    "icct": {"table": 7, "figure": 5},
    "semckd": {"table": 9, "figure": 7},
}


def of_table(name: str, paper: Paper, table: Table, scales: Mapping[str, str]) -> Entry:
    """Return the entry of a result table, from its cells."""
    cells = [cell for row in table.rows.values() for cell in row]
    started = [label for label, row in table.rows.items() if getattr(row[0].method, "pretrained", False)]
    here = "; ".join(["all of it", *(f"{label} needs --weights" for label in started)])
    command = f"python examples/reproduce.py {name} --data {scales[table.data]} --root DIR"
    hours = cost.hours(table.data, replace(paper.recipes["paper"], **table.recipe), cells)
    # ICCT's rows are pairs of networks, which have the same methods: a few rows show all of them.
    rows = [f"{name}-row{row}" for row in range(1, 4)] if paper.name == "ICCT" else [name]
    return Entry(name, table.title, here, command, hours, ("reproduce.py", *rows, *ONE.split()))


CIFAR_100 = "CIFAR-100"
LKD, CCKD, ICCT, SEMCKD = (program.RECIPES["paper"] for program in (train_lkd, train_cckd, train_icct, train_semckd))


def trained(
    name: str,
    title: str,
    here: str,
    command: str,
    small: str,
    recipe: Any = None,
    cells: Sequence[Cell] = (),
    data: str = CIFAR_100,
) -> Entry:
    """Return an entry that an example computes. ``small`` are the flags of its miniature."""
    program = command.split()[0]
    hours = cost.hours(data, recipe, cells)
    return Entry(name, title, here, f"python examples/{command}", hours, (program, *small.split()))


def of(teacher: str, student: str, *methods: object, **settings: Any) -> list[Cell]:
    """Return cells of students of one teacher."""
    return [Cell("", {}, teacher, student, method, settings) for method in methods]


def parameters() -> dict[str, tuple[str, float]]:
    """Return the networks of ICCT's Table I by the paper's name: their name here, and the published millions."""
    return {
        "CNN-5": ("cnn5", 0.36),
        "WRN-16-2": ("wrn-16-2", 0.70),
        "WRN-28-2": ("wrn-28-2", 1.48),
        "MobileNetV2": ("mobilenetv2-full", 3.42),
        "ResNet-18": ("resnet18", 11.17),
        "WRN-16-10": ("wrn-16-10", 17.12),
        "ResNeXt-29": ("resnext29", 34.43),
        "WRN-28-10": ("wrn-28-10", 36.50),
        "ResNet-101": ("resnet101", 42.51),
    }


def drawing(name: str, title: str) -> Entry:
    return Entry(name, title, "a drawing of the method: nothing to measure")


METHODS_CCKD = tuple(train_cckd.STUDIES["methods"].values())
COMPARED = ("CE", "KD", "FitNet", "AT", "SP", "VID", "HKD", "MGD", "SemCKD")
# The pairs of networks, and how many pairs of layers they have.
FIGURE_3 = {
    ("resnet32x4", "vgg8"): 12,
    ("wrn-40-2", "mobilenetv2"): 12,
    ("vgg13", "shufflenetv2"): 12,
    ("resnet32x4", "resnet8x4"): 9,
}
PAIR = ("resnet32x4", "vgg8")
ONE = "--epochs 1 --seeds 1"
TWO = f"{ONE} --teacher-epochs 1"

OTHERS = {
    entry.name: entry
    for entry in (
        trained(
            "lkd-figure1",
            "cosines between patches of the networks",
            "figures/cosines.png; the rest of the figure is a drawing",
            f"train_lkd.py {CIFAR} --methods KD LKD LKD+CAAT",
            f"{TWO} --caat-epochs 1 --methods KD LKD LKD+CAAT",
            LKD,
            of("resnet110", "resnet20", "KD", "LKD", "LKD+CAAT"),
        ),
        drawing("lkd-figure2", "overall framework"),
        trained(
            "lkd-figure3",
            "masks of CAAT on images",
            "figures/masks.png",
            f"train_lkd.py {IMAGENET} --methods LKD+CAAT",
            f"{TWO} --caat-epochs 1 --methods LKD+CAAT",
            train_lkd.RECIPES["imagenet"],
            of("resnet34-224", "resnet18-224", "LKD+CAAT"),
            "ImageNet",
        ),
        drawing("cckd-figure1", "instance and correlation congruence"),
        drawing("cckd-figure2", "overall framework"),
        trained(
            "cckd-figure3",
            "curves of the losses and the accuracy of ResNet-20",
            "figures/curves.png",
            f"train_cckd.py {CIFAR} --study methods",
            f"{TWO} --study methods",
            CCKD,
            of("resnet110", "resnet20", *METHODS_CCKD),
        ),
        trained(
            "cckd-figure4",
            "cosines within and between classes on MSMT17",
            "figures/cosines.png",
            "train_cckd.py --data msmt17 --root DIR --study methods",
            f"{TWO} --task retrieval --study methods",
            train_cckd.RECIPES["persons"],
            of("resnet50-224", "resnet18-224", *METHODS_CCKD),
            "MSMT17",
        ),
        Entry(
            "icct-table1",
            "parameters of the networks on CIFAR-100",
            "all of it",
            "python examples/reproduce.py icct-table1",
            small=("reproduce.py", "icct-table1"),
        ),
        drawing("icct-figure1", "scenarios by the capacities of teacher and student"),
        trained(
            "icct-figure2",
            "ICC map of CIFAR-10",
            "figures/strong-to-weak-maps.png",
            "train_icct.py --data cifar10 --root DIR --scenario strong-to-weak --methods CE ICCT --seeds 1",
            f"{ONE} --scenario strong-to-weak --methods CE ICCT",
            replace(ICCT, seeds=1),
            of("wrn-28-10", "cnn5", "CE", "ICCT"),
        ),
        trained(
            "icct-figure3",
            "ICC maps of four networks",
            "figures/strong-to-weak-maps.png: the teacher's and one per method",
            "train_icct.py --data cifar10 --root DIR --scenario strong-to-weak --methods CE KD ICCT --seeds 1",
            f"{ONE} --scenario strong-to-weak --methods CE KD ICCT",
            replace(ICCT, seeds=1),
            of("wrn-28-10", "cnn5", "CE", "KD", "ICCT"),
        ),
        drawing("icct-figure4", "framework"),
        trained(
            "icct-figure5",
            "features of ResNet-18 in the three scenarios",
            "figures/*-features.png, by t-SNE",
            "train_icct.py --data cifar10 --root DIR --weak resnet18 --methods CE ICCT --seeds 1",
            f"{ONE} --methods CE ICCT --generations 1",
            replace(ICCT, seeds=1),
            [*of("wrn-28-10", "resnet18", "CE", "ICCT"), *of("resnet18", "wrn-28-10", "CE", "ICCT")]
            + [cell for g in range(1, 5) for cell in of("resnet18", "resnet18", "ICCT", generation=g)],
        ),
        Entry("semckd-table1", "the approaches compared, by formulas", "docs/baselines.md: nothing to measure"),
        trained(
            "semckd-table5",
            "SM-score and CKA of the associated layers",
            "all of it",
            f"train_semckd.py {CIFAR} --studies methods --methods {' '.join(COMPARED)}",
            f"{TWO} --studies methods --methods FitNet AT SP VID HKD MGD SemCKD",
            SEMCKD,
            of(*PAIR, *COMPARED),
        ),
        drawing("semckd-figure1", "overview of semantic calibration"),
        trained(
            "semckd-figure2",
            "distribution of relative improvements",
            "figures/improvement.png; one run per pair of networks, the last one with --runs and the others; leave "
            "out MGD where Tables 2 and 3 have no number",
            f"train_semckd.py {CIFAR} --studies methods --methods {' '.join(COMPARED)} --runs DIR",
            f"{TWO} --studies methods --methods {' '.join(COMPARED)}",
            SEMCKD,
            [cell for pair in (*semckd.PAIRS_2, *semckd.PAIRS_3) for cell in of(*pair, *COMPARED)],
        ),
        trained(
            "semckd-figure3",
            "negative regularization: students of one pair of layers",
            "figures/pairs.png, one run per pair of networks",
            f"train_semckd.py {CIFAR} --studies pairs",
            f"{TWO} --studies pairs",
            SEMCKD,
            [
                cell
                for pair, layers in FIGURE_3.items()
                for cell in (
                    *of(*pair, "KD", "SemCKD"),
                    *(c for n in range(layers) for c in of(*pair, "SemCKD", pair=n)),
                )
            ],
        ),
        trained(
            "semckd-figure4",
            "Grad-CAM of the students on ImageNet",
            "figures/grad-cam.png; not the classes of the paper",
            f"train_semckd.py {IMAGENET} --student resnet18-224 --studies methods --methods {' '.join(COMPARED)}",
            f"{TWO} --studies methods --methods KD SemCKD",
            train_semckd.RECIPES["imagenet"],
            of("resnet34-224", "resnet18-224", *COMPARED),
            "ImageNet",
        ),
        trained(
            "semckd-figure5",
            "accuracy against the softness of the attention",
            "figures/tau.png, one run per pair of networks",
            f"train_semckd.py {CIFAR} --studies tau",
            f"{TWO} --studies tau --taus 0.5",
            SEMCKD,
            [cell for tau in SEMCKD.taus for name in train_semckd.SOFTENED for cell in of(*PAIR, name, tau=tau)],
        ),
        trained(
            "semckd-figure6",
            "transfer to STL-10 and Tiny-ImageNet",
            "figures/transfer.png, one run per data set",
            f"train_semckd.py {CIFAR} --studies transfer --methods {' '.join(COMPARED)} --transfer-data stl10 "
            "--transfer-root DIR",
            f"{TWO} --studies transfer --methods KD SemCKD --transfer-data digits",
            SEMCKD,
            of(*PAIR, *COMPARED),
        ),
        trained(
            "semckd-figure7",
            "accuracy against beta",
            "figures/beta.png for SemCKD, figures/beta-crd.png for CRD",
            f"train_semckd.py {CIFAR} --studies beta",
            f"{TWO} --studies beta --betas 0 50 --betas-crd 0.8",
            SEMCKD,
            [
                cell
                for name, betas in (("SemCKD", SEMCKD.betas), ("CRD", SEMCKD.betas_crd))
                for beta in betas
                for cell in of(*PAIR, name if beta else "KD", beta=beta)
            ],
        ),
    )
}
