"""Li et al., Local Correlation Consistency for Knowledge Distillation (2020): Tables 1 to 5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import train_lkd

from . import TEACHER, Cell, Paper, Record, Table, differing, printed

METHODS = {name: name for name in ("CE", "KD", "AT", "SP", "CC")} | {"LKD": "LKD+CAAT", "Teacher": TEACHER}

TABLE_1 = """
resnet110 resnet14 | 67.45 69.78 69.51 69.59 69.77 70.48 75.76
resnet110 resnet20 | 69.47 71.47 71.8  71.42 71.78 72.63 75.76
wrn-40-2  wrn-16-1 | 66.79 66.74 66.75 66.4  66.76 67.72 75.61
wrn-40-2  wrn-16-2 | 73.1  74.89 75.15 74.69 75.05 75.44 75.61
"""
TABLE_2 = """
Top-1 | 70.58 71.34 71.33 71.38 71.45 71.54 73.27
Top-5 | 89.45 90.27 90.26 90.28 90.26 90.30 91.27
"""
TABLE_3 = """
KD         | 69.78 71.47
intra      | 70.00 72.04
inter-same | 70.20 71.96
inter-diff | 70.03 72.10
LKD        | 70.37 72.31
LKD+CAAT   | 70.48 72.63
"""
TABLE_4 = """
resnet14 | 69.98 70.09 70.37
resnet20 | 71.82 71.86 72.31
"""
TABLE_5 = """
resnet14 | 70.37 69.88 70.41 70.48
resnet20 | 72.31 72.34 72.18 72.63
"""

WEIGHTS = "The loss weights were searched for each pair of networks and are not printed (LKD's within [0.001, 0.1])."


def cell(column: str, value: object, student: str, method: str, teacher: str = "resnet110", **settings: object) -> Cell:
    return Cell(column, {"test_accuracy": value}, teacher, student, method, settings)


TABLES = {
    1: Table(
        "CIFAR-100",
        "CIFAR-100",
        {
            f"{teacher} teaches {student}": [
                cell(column, value, student, method, teacher)
                for (column, method), value in zip(METHODS.items(), values, strict=True)
            ]
            for label, values in printed(TABLE_1).items()
            for teacher, student in [label.split()]
        },
        note=WEIGHTS + " CC compares embeddings, which these networks lack: here the averaged last map.",
    ),
    2: Table(
        "ImageNet, ResNet-34 teaches ResNet-18",
        "ImageNet",
        {
            label: [
                Cell(
                    column,
                    {"test_accuracy" if label == "Top-1" else "test_top_5": value},
                    "resnet34-224",
                    "resnet18-224",
                    method,
                    {"k": 3, "last_stage": True},
                )
                for (column, method), value in zip(METHODS.items(), values, strict=True)
            ]
            for label, values in printed(TABLE_2).items()
        },
        recipe=differing(train_lkd.RECIPES, "imagenet"),
        note="The teacher's schedule and the batch and weight decay of CAAT are not printed: here the student's. Nor "
        "is how 7 x 7 positions make 3 x 3 patches: here they are cut after 2 and 4. Nor are the weights of AT, SP "
        "and CC.",
    ),
    3: Table(
        "CIFAR-100, without parts, ResNet-110 teaches",
        "CIFAR-100",
        {
            label: [
                cell(student, value, student, label)
                for student, value in zip(("resnet14", "resnet20"), values, strict=True)
            ]
            for label, values in printed(TABLE_3).items()
        },
        note=WEIGHTS + " One weight for all here: a single term, which has fewer pairs, counts for less.",
    ),
    4: Table(
        "CIFAR-100, patches per side, ResNet-110 teaches",
        "CIFAR-100",
        {
            label: [cell(f"k = {k}", value, label, "LKD", k=k) for k, value in zip((1, 2, 4), values, strict=True)]
            for label, values in printed(TABLE_4).items()
        },
        note=WEIGHTS + " One weight for all here: of fewer patches there are fewer pairs, which count for less.",
    ),
    5: Table(
        "CIFAR-100, masks, ResNet-110 teaches",
        "CIFAR-100",
        {
            label: [
                cell(method, value, label, method)
                for method, value in zip(("LKD", "LKD+AT", "LKD+Grad-CAM", "LKD+CAAT"), values, strict=True)
            ]
            for label, values in printed(TABLE_5).items()
        },
        note=WEIGHTS + " AT's attention is here the sum of the squares of the channels.",
    ),
}


def train(cell: Cell, recipe: train_lkd.Recipe, open_in: Callable[..., train_lkd.LocalCorrelation]) -> Sequence[Record]:
    recipe = replace(recipe, teacher=cell.teacher, student=cell.student)
    school = open_in(recipe, "teachers", cell.teacher)
    teacher = school.teacher()
    if cell.method == TEACHER:
        return [school.measure(lambda images: teacher(images)[0])]
    caat = school.caat(teacher) if train_lkd.METHODS[cell.method].mask == "caat" else None
    study = open_in(recipe, cell.folder)
    few = study.dataset.only(recipe.share)
    return [study.student(cell.method, seed, few, teacher, caat)[1][-1] for seed in range(recipe.seeds)]


PAPER = Paper("LKD", TABLES, train_lkd.RECIPES, train_lkd.build_parser, train_lkd.LocalCorrelation, train)
