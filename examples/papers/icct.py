"""Transferring Inter-Class Correlation (ICCT): Tables II to VII."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import train_icct

from . import TEACHER, Cell, Paper, Record, Table, differing, printed

PLAIN = {"S(B)": "CE", "T(B)": TEACHER, "KD": "KD", "LT": "LT"}
METHODS = PLAIN | {name: name for name in ("AT", "SP", "ICCT", "ICCT+AT", "ICCT+SP")}
AGAIN = ("KD", "LT", "Tf-KD", "ICCT")

TABLE_2 = """
cnn5             resnext29 | 39.66 17.70 37.93 38.16 -     37.71 37.35 37.02 36.87
mobilenetv2-full resnext29 | 34.82 17.70 33.78 33.95 33.26 32.81 31.84 31.43 31.12
resnet18         resnext29 | 24.34 17.70 23.35 23.32 23.17 22.98 22.32 21.94 21.45
resnet18         resnet101 | 24.34 22.19 23.52 23.59 23.43 23.19 22.41 22.15 21.76
wrn-16-10        wrn-28-10 | 21.56 20.48 21.10 21.22 20.97 20.84 20.53 20.36 20.05
wrn-28-2         wrn-28-10 | 25.28 20.48 24.73 24.82 24.56 24.27 23.61 23.36 23.14
wrn-16-2         wrn-28-10 | 27.29 20.48 26.84 26.92 26.58 26.27 25.66 25.42 25.23
resnet101        resnext29 | 22.19 17.70 21.66 21.72 21.48 21.30 20.78 20.61 20.54
"""
TABLE_3 = """
resnet18         0 | 24.34 24.34 24.34 24.34
resnet18         1 | 23.97 23.83 23.15 22.90
resnet18         2 | 23.62 23.96 23.32 22.97
resnet18         3 | 23.59 23.68 23.49 22.74
resnet18         4 | 23.84 23.63 23.22 23.08
resnet101        0 | 22.19 22.19 22.19 22.19
resnet101        1 | 21.98 21.83 21.06 20.86
resnet101        2 | 21.80 21.86 20.73 20.95
resnet101        3 | 21.76 21.81 20.87 20.84
resnet101        4 | 21.91 22.04 21.45 20.87
mobilenetv2-full 0 | 34.82 34.82 34.82 34.82
mobilenetv2-full 1 | 34.65 34.04 33.74 33.25
mobilenetv2-full 2 | 34.12 34.15 33.68 32.07
mobilenetv2-full 3 | 33.90 34.28 32.87 32.64
mobilenetv2-full 4 | 34.18 34.47 33.02 32.92
"""
TABLE_4 = """
resnext29 cnn5             | 17.70 39.66 17.58 17.61 17.48
resnext29 mobilenetv2-full | 17.70 34.82 17.49 17.55 17.41
resnext29 resnet18         | 17.70 24.34 17.43 17.46 17.33
resnet101 resnet18         | 22.19 24.34 21.96 22.07 21.23
wrn-28-10 wrn-16-10        | 20.48 21.56 20.28 20.35 20.07
wrn-28-10 wrn-28-2         | 20.48 25.28 20.32 20.38 20.15
wrn-28-10 wrn-16-2         | 20.48 27.29 20.37 20.41 20.26
"""
# With width 1, a wide ResNet for photographs is a ResNet.
TABLE_5 = """
resnet18-224         resnext101-224 | 29.12 20.40 28.74 28.94 28.31 28.02 27.66 27.52 27.41
mobilenetv2-full-224 resnext101-224 | 28.13 20.40 27.90 27.97 27.43 27.12 26.74 26.63 26.45
resnet50-224         resnext101-224 | 22.71 20.40 22.16 22.32 21.87 21.75 21.22 21.03 20.86
resnet18-224         resnet50-224   | 29.12 22.71 28.78 28.94 28.65 28.42 28.19 27.86 27.73
wrn-18-2-224         wrn-34-2-224   | 25.56 23.35 25.28 25.30 25.14 25.03 24.81 24.62 24.47
resnet34-224         wrn-34-2-224   | 26.74 23.35 26.37 26.45 26.32 26.18 25.86 25.79 25.56
resnet18-224         wrn-34-2-224   | 30.38 23.35 29.96 30.08 29.71 29.57 29.32 29.25 29.04
"""
TABLE_6 = """
resnet18-224         0 | 29.12 29.12 29.12 29.12
resnet18-224         1 | 29.03 29.08 28.84 28.91
resnet18-224         2 | 28.94 29.13 28.75 28.66
resnet18-224         3 | 28.91 28.96 28.83 28.25
resnet18-224         4 | 28.97 29.04 28.72 28.41
mobilenetv2-full-224 0 | 28.13 28.13 28.13 28.13
mobilenetv2-full-224 1 | 27.97 28.15 27.89 26.86
mobilenetv2-full-224 2 | 28.03 28.02 27.54 26.77
mobilenetv2-full-224 3 | 27.94 28.06 26.97 27.50
mobilenetv2-full-224 4 | 27.96 28.03 27.15 26.91
"""
TABLE_7 = """
resnext101-224 resnet18-224         | 20.40 29.12 20.26 20.34 20.15
resnext101-224 mobilenetv2-full-224 | 20.40 28.13 20.21 20.28 20.03
resnext101-224 resnet50-224         | 20.40 22.71 20.16 20.25 19.97
resnet50-224   resnet18-224         | 22.71 29.12 22.44 22.56 22.10
wrn-34-2-224   wrn-18-2-224         | 23.35 25.56 23.08 23.14 22.95
wrn-34-2-224   resnet34-224         | 23.35 26.74 23.19 23.21 23.13
wrn-34-2-224   resnet18-224         | 23.35 30.38 23.22 23.24 23.18
"""


def taught(text: str, methods: dict[str, str]) -> dict[str, list[Cell]]:
    """Return rows of a student and its teacher."""
    return {
        f"{teacher} teaches {student}": [
            Cell(column, {"test_accuracy": value}, teacher, student, method)
            for (column, method), value in zip(methods.items(), values, strict=True)
            if value is not None
        ]
        for label, values in printed(text).items()
        for student, teacher in [label.split()]
    }


def again(text: str) -> dict[str, list[Cell]]:
    """Return rows of a network and its generation. Generation 0 has no teacher."""
    rows = {}
    for label, values in printed(text).items():
        network, generation = label.split()
        settings = {"generation": int(generation)}
        cells = [
            Cell(method, {"test_accuracy": value}, network, network, method, settings)
            for method, value in zip(AGAIN, values, strict=True)
        ]
        if generation == "0":
            cells = [Cell("baseline", {"test_accuracy": values[0]}, network, network, "CE", settings)]
        rows[f"{network}, generation {generation}"] = cells
    return rows


LOST = (
    "Medians of ten runs at full scale on CIFAR-100, as in the paper; of digits, means. AT compares every stage. The "
    "weights of the transfers and the temperature are lost in the text that we have: here 1, for AT and SP those "
    "published with the methods, and 4."
)
SIZES = (
    " Its MobileNetV2 has 3.42 million parameters, this one, of full width, 2.35. The batch of the ResNets is not "
    "printed: here 128."
)
_IMAGENET = differing(train_icct.RECIPES, "imagenet")

TABLES = {
    2: Table("CIFAR-100, strong to weak", "CIFAR-100", taught(TABLE_2, METHODS), errors=True, note=LOST + SIZES),
    3: Table("CIFAR-100, born again", "CIFAR-100", again(TABLE_3), errors=True, note=LOST + SIZES),
    4: Table(
        "CIFAR-100, weak to strong",
        "CIFAR-100",
        taught(TABLE_4, PLAIN | {"ICCT": "ICCT"}),
        errors=True,
        note=LOST + SIZES,
    ),
    5: Table("ImageNet, strong to weak", "ImageNet", taught(TABLE_5, METHODS), _IMAGENET, errors=True, note=LOST),
    6: Table("ImageNet, born again", "ImageNet", again(TABLE_6), _IMAGENET, errors=True, note=LOST),
    7: Table(
        "ImageNet, weak to strong",
        "ImageNet",
        taught(TABLE_7, PLAIN | {"ICCT": "ICCT"}),
        _IMAGENET,
        errors=True,
        note=LOST,
    ),
}


def train(
    cell: Cell, recipe: train_icct.Recipe, open_in: Callable[..., train_icct.InterClassCorrelation]
) -> Sequence[Record]:
    seeds, network = range(recipe.seeds), cell.student
    baselines = open_in(recipe, "baselines")
    if cell.method == "CE":
        return [baselines.student("CE", network, seed, None, "")[1][-1] for seed in seeds]
    study = open_in(recipe, f"{cell.teacher}-{network}")
    generation = cell.settings.get("generation")
    if generation:
        starts = [baselines.student("CE", network, seed, None, "")[0] for seed in seeds]
        descents = (
            study.descent(cell.method, network, seed, start, range(1, generation + 1))
            for seed, start in zip(seeds, starts, strict=True)
        )
        return [descent[-1][1][-1] for descent in descents]
    teacher, history = baselines.teacher(cell.teacher)
    if cell.method == TEACHER:
        return [history[-1]]
    return [study.student(cell.method, network, seed, teacher, "taught")[1][-1] for seed in seeds]


PAPER = Paper("ICCT", TABLES, train_icct.RECIPES, train_icct.build_parser, train_icct.InterClassCorrelation, train)
