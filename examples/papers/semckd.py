"""Chen et al., Cross-Layer Distillation with Semantic Calibration (SemCKD): Tables 2 to 4 and 6 to 9."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import train_semckd
from train_semckd import Setting

from . import TEACHER, Cell, Paper, Record, Table, differing, printed

METHODS = {name: name for name in train_semckd.METHODS} | {"Student": "CE", "Teacher": TEACHER}

PAIRS_2 = [
    ("resnet32x4", "vgg8"),
    ("resnet32x4", "vgg13"),
    ("vgg13", "shufflenetv2"),
    ("resnet32x4", "shufflenetv2"),
    ("wrn-40-2", "mobilenetv2"),
    ("resnet32x4", "shufflenetv1"),
]
PAIRS_3 = [
    ("resnet32x4", "wrn-16-2"),
    ("wrn-40-2", "shufflenetv1"),
    ("resnet32x4", "mobilenetv2"),
    ("shufflenetv2", "mobilenetv2"),
    ("vgg13", "vgg8"),
    ("resnet32x4", "resnet8x4"),
]
PAIRS_4 = [
    ("resnet34-224", "resnet18-224"),
    ("resnet34-224", "shufflenetv2-half-224"),
    ("resnet34-224", "resnet18-224"),
]
COLUMNS_6 = {
    "equal allocation": "equal-allocation",
    "w/o projection": "no-projection",
    "w/o MLP": "no-mlp",
    "w/o similarity matrices": "no-similarity",
    "shared allocation": "shared-allocation",
    "SemCKD": "SemCKD",
}
COLUMNS_9 = ("Student", "PKT", "RKD", "IRG", "CC", "CRD", "SemCKD", "SemCKD+CRD", "Teacher")

TABLE_2 = """
Student | 70.46±0.29 74.82±0.22 72.60±0.12 72.60±0.12 65.43±0.29 71.36±0.25
KD      | 72.73±0.15 77.17±0.11 75.60±0.21 75.49±0.24 68.70±0.22 74.30±0.16
FitNet  | 72.91±0.18 77.06±0.14 75.44±0.11 75.82±0.22 68.64±0.12 74.52±0.03
AT      | 71.90±0.13 77.23±0.19 75.41±0.10 75.91±0.14 68.79±0.13 75.55±0.19
SP      | 73.12±0.10 77.72±0.33 75.54±0.18 75.77±0.08 68.48±0.36 74.69±0.32
VID     | 73.19±0.23 77.45±0.13 75.22±0.07 75.55±0.18 68.37±0.24 74.76±0.22
HKD     | 72.63±0.12 76.76±0.13 76.24±0.09 76.64±0.05 69.23±0.16 75.89±0.09
MGD     | 72.39±0.16 77.17±0.22 75.74±0.21 75.78±0.29 68.55±0.14 -
SemCKD  | 75.27±0.13 79.43±0.02 76.39±0.12 77.62±0.32 69.61±0.05 76.31±0.20
Teacher | 79.42      79.42      74.64      79.42      75.61      79.42
"""
TABLE_3 = """
Student | 73.41±0.27 71.36±0.25 65.43±0.29 65.43±0.29 70.46±0.29 73.09±0.30
KD      | 74.87±0.09 75.13±0.19 68.39±0.32 69.70±0.15 73.38±0.05 74.42±0.05
FitNet  | 74.87±0.14 75.28±0.21 68.28±0.21 69.33±0.23 73.63±0.11 74.32±0.08
AT      | 75.34±0.08 76.39±0.05 67.15±0.16 69.37±0.26 73.51±0.08 75.07±0.03
SP      | 74.79±0.05 75.92±0.29 67.20±0.71 70.04±0.27 73.53±0.23 74.29±0.07
VID     | 75.27±0.08 75.97±0.25 67.94±0.24 69.92±0.30 73.63±0.07 74.55±0.10
HKD     | 74.99±0.08 75.98±0.09 68.88±0.08 69.97±0.21 73.06±0.24 74.86±0.21
MGD     | 74.79±0.18 -          67.34±0.41 69.68±0.24 73.47±0.24 74.36±0.16
SemCKD  | 76.24±0.21 76.83±0.27 69.00±0.19 70.24±0.12 74.43±0.25 76.23±0.04
Teacher | 79.42      75.61      79.42      72.60      74.64      79.42
"""
TABLE_4 = """
Student | 69.67 53.78 69.67
KD      | 70.62 53.73 70.54
FitNet  | 70.31 51.46 70.42
AT      | 70.30 52.83 70.30
SP      | 69.99 51.73 70.12
VID     | 70.30 53.97 70.26
HKD     | 68.86 51.60 68.44
MGD     | 70.37 52.96 70.18
SemCKD  | 70.87 53.99 70.66
Teacher | 73.26 73.54 73.54
"""
TABLE_6 = """
all | 72.94±0.87 72.51±0.16 72.78±0.29 74.75±0.14 74.87±0.21 75.27±0.13
"""
TABLE_7 = """
Student | 55.26±0.33 64.28±0.20 68.21±0.16 70.46±0.29
KD      | 59.23±0.23 67.16±0.14 70.32±0.16 72.73±0.15
FitNet  | 60.29±0.32 67.58±0.25 70.84±0.33 72.91±0.18
AT      | 59.72±0.21 66.94±0.13 70.18±0.36 71.90±0.13
SP      | 60.93±0.22 67.92±0.22 71.22±0.28 73.12±0.10
VID     | 60.15±0.15 67.91±0.19 70.86±0.15 73.19±0.23
HKD     | 58.96±0.24 67.25±0.31 70.38±0.26 72.63±0.12
MGD     | 60.03±0.17 67.31±0.14 70.59±0.29 72.39±0.16
SemCKD  | 64.82±0.20 70.76±0.23 73.06±0.25 75.27±0.13
"""
TABLE_8 = """
Student | 70.46±0.29 66.48±0.27 60.08±0.16 49.57±0.11 39.93±0.15 32.81±0.11
KD      | 72.73±0.15 71.39±0.33 67.99±0.20 62.53±0.29 58.70±0.21 54.54±0.13
FitNet  | 72.91±0.18 71.59±0.23 68.25±0.20 62.68±0.17 58.94±0.39 54.93±0.19
AT      | 71.90±0.13 70.81±0.19 67.75±0.29 61.81±0.15 57.94±0.27 54.08±0.30
SP      | 73.12±0.10 71.73±0.27 68.49±0.18 62.94±0.38 59.21±0.29 54.81±0.39
VID     | 73.19±0.23 72.02±0.08 68.72±0.14 63.22±0.27 59.26±0.40 55.26±0.29
HKD     | 72.63±0.12 68.87±0.31 62.71±0.14 52.41±0.14 43.84±0.06 36.94±0.18
MGD     | 72.39±0.16 71.34±0.08 68.09±0.19 62.56±0.27 58.65±0.31 54.57±0.39
SemCKD  | 75.27±0.13 73.81±0.19 70.62±0.15 65.16±0.10 60.93±0.06 57.19±0.19
"""
TABLE_9 = """
resnet32x4 vgg8          | 70.46±0.29 73.11±0.21 72.49±0.08 72.57±0.20 72.63±0.30 73.54±0.19 75.27±0.13 75.52±0.09 79.42
resnet32x4 vgg13         | 74.82±0.22 77.43±0.11 76.93±0.19 76.91±0.15 77.16±0.19 77.48±0.13 79.43±0.02 79.48±0.07 79.42
vgg13 shufflenetv2       | 72.60±0.12 75.82±0.28 75.51±0.34 75.65±0.39 75.40±0.19 76.11±0.27 76.39±0.12 76.58±0.29 74.64
resnet32x4 shufflenetv2  | 72.60±0.12 75.88±0.06 75.67±0.25 75.45±0.27 75.47±0.28 77.04±0.61 77.62±0.32 77.94±0.33 79.42
wrn-40-2 mobilenetv2     | 65.43±0.29 68.68±0.29 68.71±0.20 68.83±0.18 68.68±0.14 69.98±0.27 69.61±0.05 70.55±0.11 75.61
resnet32x4 shufflenetv1  | 71.36±0.25 74.48±0.16 74.22±0.26 74.11±0.12 74.26±0.49 75.34±0.24 76.31±0.20 76.60±0.08 79.42
resnet32x4 wrn-16-2      | 73.41±0.27 75.07±0.12 74.93±0.45 74.73±0.23 74.91±0.15 75.89±0.38 76.24±0.21 76.32±0.14 79.42
wrn-40-2 shufflenetv1    | 71.36±0.25 75.42±0.24 75.25±0.16 75.24±0.23 75.23±0.22 75.89±0.24 76.83±0.27 76.92±0.26 75.61
resnet32x4 mobilenetv2   | 65.43±0.29 67.99±0.29 67.46±0.55 67.89±0.26 67.68±0.22 69.39±0.11 69.00±0.19 69.81±0.42 79.42
shufflenetv2 mobilenetv2 | 65.43±0.09 69.57±0.14 69.39±0.41 69.51±0.31 70.00±0.17 70.83±0.17 70.27±0.12 71.07±0.07 72.60
vgg13 vgg8               | 70.46±0.29 73.40±0.30 73.42±0.14 73.31±0.12 73.33±0.23 74.31±0.17 74.43±0.25 74.67±0.11 74.64
resnet32x4 resnet8x4     | 73.09±0.30 74.61±0.25 74.36±0.23 74.67±0.15 74.50±0.13 75.59±0.07 76.23±0.04 76.68±0.19 79.42
"""

MATCHED = (
    "HKD's auxiliary network has twice the student's width. MGD compares layers of equal size after ReLU. It has the "
    "factor of its own program, because SemCKD's has none."
)
BETAS = "The factors of the methods compared are not printed: here the factors of the program that the paper follows. "
BETAS += "Plain momentum, as in the authors' program; the paper names Nesterov's."


def cell(
    column: str, value: object, label: str, pair: tuple[str, str] = ("resnet32x4", "vgg8"), **settings: float
) -> Cell:
    return Cell(column, {"test_accuracy": value}, *pair, METHODS[label], settings)


def compared(text: str, pairs: Sequence[tuple[str, str]]) -> dict[str, list[Cell]]:
    """Return a row per method and a column per pair of networks."""
    return {
        label: [
            cell(f"{pair[0]} teaches {pair[1]}", value, label, pair)
            for pair, value in zip(pairs, values, strict=True)
            if value is not None
        ]
        for label, values in printed(text).items()
    }


def of_parts(text: str, name: str, shares: Sequence[float]) -> dict[str, list[Cell]]:
    """Return a row per method and a column per share of the images."""
    return {
        label: [
            cell(f"{100 * share:g} %", value, label, **{name: share})
            for share, value in zip(shares, values, strict=True)
        ]
        for label, values in printed(text).items()
    }


TABLES = {
    2: Table("CIFAR-100", "CIFAR-100", compared(TABLE_2, PAIRS_2), note=f"{BETAS} {MATCHED}"),
    3: Table("CIFAR-100", "CIFAR-100", compared(TABLE_3, PAIRS_3), note=f"{BETAS} {MATCHED}"),
    4: Table(
        "ImageNet, ResNet-34 teaches",
        "ImageNet",
        {
            label: [
                cell(f"{student}{'*' if longer else ''}", value, label, (teacher, student), longer=longer)
                for (teacher, student), value, longer in zip(PAIRS_4, values, (False, True, True), strict=True)
            ]
            for label, values in printed(TABLE_4).items()
        },
        recipe=differing(train_semckd.RECIPES, "imagenet"),
        note=f"{BETAS} {MATCHED} Columns with * have a teacher that is trained for 100 epochs, not 90.",
    ),
    6: Table(
        "CIFAR-100, without parts, ResNet-32x4 teaches VGG-8",
        "CIFAR-100",
        {
            "all": [
                Cell(column, {"test_accuracy": value}, "resnet32x4", "vgg8", method)
                for (column, method), value in zip(COLUMNS_6.items(), *printed(TABLE_6).values(), strict=True)
            ]
        },
        note="Shared allocation is here the mean over the batch.",
    ),
    7: Table(
        "CIFAR-100, shares of the training images, ResNet-32x4 teaches VGG-8",
        "CIFAR-100",
        of_parts(TABLE_7, "share", (0.25, 0.5, 0.75, 1.0)),
        note=f"{BETAS} {MATCHED} The teacher sees all images, which the paper leaves open; of digits, students see "
        "these shares of their quarter.",
    ),
    8: Table(
        "CIFAR-100, shares of wrong labels, ResNet-32x4 teaches VGG-8",
        "CIFAR-100",
        of_parts(TABLE_8, "noise", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        note=f"{BETAS} {MATCHED} A wrong label is any other class, and the teacher has seen the right ones: the paper "
        "leaves both open.",
    ),
    9: Table(
        "CIFAR-100, embeddings",
        "CIFAR-100",
        {
            f"{teacher} teaches {student}": [
                cell(column, value, column, (teacher, student)) for column, value in zip(COLUMNS_9, values, strict=True)
            ]
            for label, values in printed(TABLE_9).items()
            for teacher, student in [label.split()]
        },
        note=f"{BETAS} SemCKD+CRD has the factors of both. CC is here as in its own paper. For SemCKD's MobileNetV2 "
        "taught by ShuffleNetV2 Table 3 prints 70.24, this one 70.27.",
    ),
}


def train(cell: Cell, recipe: train_semckd.Recipe, open_in: Callable[..., train_semckd.CrossLayer]) -> Sequence[Record]:
    recipe = replace(
        recipe,
        teacher=cell.teacher,
        student=cell.student,
        teacher_schedule=train_semckd.started(recipe.teacher_schedule, cell.teacher),
        student_schedule=train_semckd.started(recipe.student_schedule, cell.student),
    )
    longer = cell.settings.get("longer", False)
    if longer:
        epochs = round(recipe.teacher_schedule.epochs * 100 / 90)
        recipe = replace(recipe, teacher_schedule=replace(recipe.teacher_schedule, epochs=epochs))
    school = open_in(recipe, "teachers", f"{cell.teacher}-longer" if longer else cell.teacher)
    teacher = school.teacher()
    if cell.method == TEACHER:
        return [school.measure(lambda images: teacher(images)[0])]
    # One folder for both studies, because the names of checkpoints contain the settings.
    study = open_in(recipe, f"{cell.teacher}{'-longer' if longer else ''}-{cell.student}")
    share, noise = cell.settings.get("share", 1.0) * recipe.share, cell.settings.get("noise", 0.0)
    setting = Setting(cell.method, share, noise)
    try:
        return [study.student(setting, seed, teacher)[-1] for seed in range(recipe.seeds)]
    except train_semckd.NoMatchError:  # small networks of digits, which have other sizes
        return []


PAPER = Paper("SemCKD", TABLES, train_semckd.RECIPES, train_semckd.build_parser, train_semckd.CrossLayer, train)
