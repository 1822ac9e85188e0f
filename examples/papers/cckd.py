"""Peng et al., Correlation Congruence for Knowledge Distillation (2019): Tables 1 to 7."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import train_cckd
from train_cckd import Variant

from . import TEACHER, Cell, Number, Paper, Record, Table, differing, printed

VARIANTS = {
    "teacher": TEACHER,
    "CE": Variant("ce"),
    "KD": Variant("kd"),
    "DML": Variant("dml"),
    "AT": Variant("at"),
    "Adv": Variant("adv"),
    "CCKD": Variant(),
}
# DML-2 starts from weights of ImageNet.
PERSONS = VARIANTS | {"DML-1": Variant("dml"), "DML-2": Variant("dml", pretrained=True)}
FACES = {"teacher": TEACHER, "student": Variant("ce"), "mimic": Variant("kd"), "mimic+Adv": Variant("adv")}
FACES |= {"CCKD": Variant()}

TABLE_1 = """
CE   | 68.4 91.3 66.4 90.3
KD   | 70.8 92.4 68.3 90.7
DML  | 71.2 92.5 69.1 91.2
AT   | 71.0 92.4 68.6 91.1
Adv  | 70.5 92.1 68.1 90.6
CCKD | 72.4 92.9 70.2 92.0
"""
TABLE_2 = """
teacher | 75.5 92.7
CE      | 64.2 85.4
KD      | 66.7 87.3
DML     | 65.3 86.1
Adv     | 66.8 87.3
AT      | 65.4 86.1
CCKD    | 67.7 87.7
"""
TABLE_3 = """
teacher | 66.4 79   34.3
CE      | 32.4 49.0 14.2
DML-1   | 34.5 51.5 16.5
DML-2   | 50.2 66.4 25.3
KD      | 56.8 72.3 28.3
AT      | 57.6 72.5 28.7
Adv     | 56.0 71.6 27.8
CCKD    | 59.7 74.1 30.7
"""
TABLE_4 = """
teacher   | 99.76 99.66 99.58 99.49 99.23 98.15
student   | 99.20 96.37 91.49 84.45 75.60 65.91
mimic     | 99.63 98.73 97.25 94.39 89.60 83.01
mimic+Adv | 99.64 98.80 97.43 94.81 90.52 84.13
CCKD      | 99.66 99.07 97.93 95.76 91.99 86.29
"""
TABLE_5 = """
mmd        | 58.9 73.6 29.4
bilinear   | 59.2 73.8 30.2
taylor_rbf | 59.6 74.0 30.4
"""
TABLE_6 = """
1 | 59.2 73.7 30.1
2 | 59.6 74   30.4
3 | 60.5 74.5 30.7
"""
TABLE_7 = """
uniform 1 | 57.2 72.3 28.6
cur 1     | 57.4 72.4 28.8
cur 2     | 58.9 73.6 29.4
cur 4     | 59.7 74.1 30.2
cur 8     | 55.7 71.8 29.1
cur 20    | 24.7 40.9 10.7
sur 1     | 56.2 72.2 29.4
sur 2     | 58.3 73.9 29.9
sur 4     | 59.6 75.0 31.1
sur 8     | 56.2 72.2 29.4
sur 20    | 30.1 47.7 13.7
"""


def accuracies(top_1: Number, top_5: Number) -> dict[str, Number]:
    return {"test_accuracy": top_1, "test_top_5": top_5}


def retrieval(values: Sequence[Number], variant: Variant, **settings: object) -> list[Cell]:
    """Return a row of the tables on MSMT17, with ResNet-50 and ResNet-18."""
    published = dict(zip(("rank_1", "rank_5", "map"), values, strict=True))
    return [Cell("ResNet-18", published, "resnet50-224", "resnet18-224", variant, settings)]


def identification(values: Sequence[Number], variant: Variant) -> list[Cell]:
    """Return the row of Table 4: rank-1 among 10, 100, ... distractors."""
    published = {f"rank_1_of_{10**power}": value for power, value in enumerate(values, 1)}
    settings = {"head": "arcface", "instance": "mimic"}
    return [Cell("MobileNetV2", published, "resnet50-224", "mobilenetv2-224", variant, settings)]


_PERSONS = differing(train_cckd.RECIPES, "persons")
_MSMT17 = (
    "The size of the images is not printed: here 256 x 128. The networks start from random weights. The paper's "
    "teacher is pretrained on ImageNet. Of digits, the networks see some classes and retrieve the others."
)

TABLES = {
    1: Table(
        "CIFAR-100, ResNet-110 teaches",
        "CIFAR-100",
        {
            label: [
                Cell(student, accuracies(*pair), "resnet110", student, VARIANTS[label])
                for student, pair in (("resnet20", values[:2]), ("resnet14", values[2:]))
            ]
            for label, values in printed(TABLE_1).items()
        },
        note="The temperature (here 4) and AT's weight are not printed. Nor is Adv's: here 1. Adv's two "
        "losses and DML's two networks learn in one step.",
    ),
    2: Table(
        "ImageNet, ResNet-50 teaches MobileNetV2 0.5x",
        "ImageNet",
        {
            label: [Cell("MobileNetV2", accuracies(*values), "resnet50-224", "mobilenetv2-224", VARIANTS[label])]
            for label, values in printed(TABLE_2).items()
        },
        recipe=differing(train_cckd.RECIPES, "imagenet"),
        note="The teacher's schedule is not printed: here the student's. The temperature is said to lie in [4, 8]: 4 "
        "here. Adv's weight is 1 here.",
    ),
    3: Table(
        "MSMT17, ResNet-50 teaches ResNet-18",
        "MSMT17",
        {label: retrieval(values, PERSONS[label]) for label, values in printed(TABLE_3).items()},
        recipe=_PERSONS,
        arguments={"task": "retrieval"},
        note=_MSMT17
        + " Both networks of DML-2 start from weights of ImageNet, which --weights names. Adv's weight is 1 "
        "here.",
    ),
    4: Table(
        "MegaFace, ResNet-50 teaches MobileNetV2 0.5x",
        "MegaFace",
        {label: identification(values, FACES[label]) for label, values in printed(TABLE_4).items()},
        recipe=differing(train_cckd.RECIPES, "faces"),
        arguments={"task": "identification"},
        note="Of digits, half of the unseen classes are distractors, so only 10 and 100 of them are asked for. "
        "ArcFace's scale and margin are not printed: here 64 and 0.5. Nor are the size of the faces (112 x 112), the "
        "weight of mimic (1) and of Adv (1). CE has the weight 0 beside mimic, as beside KD.",
    ),
    5: Table(
        "MSMT17, metrics of correlation",
        "MSMT17",
        {label: retrieval(values, Variant(kernel=label)) for label, values in printed(TABLE_5).items()},
        recipe=_PERSONS,
        arguments={"task": "retrieval"},
        note=_MSMT17 + " The same CCKD has a mAP of 30.7 in Table 3 and of 30.2 in Table 7.",
    ),
    6: Table(
        "MSMT17, orders of the Taylor series",
        "MSMT17",
        {f"p = {order}": retrieval(values, Variant(order=int(order))) for order, values in printed(TABLE_6).items()},
        recipe=_PERSONS,
        arguments={"task": "retrieval"},
        note=_MSMT17,
    ),
    7: Table(
        "MSMT17, samplers",
        "MSMT17",
        {
            f"{sampler} k = {samples}" if sampler != "uniform" else sampler: retrieval(
                values, Variant(sampler=sampler), samples=int(samples)
            )
            for label, values in printed(TABLE_7).items()
            for sampler, samples in [label.split()]
        },
        recipe=_PERSONS,
        arguments={"task": "retrieval"},
        note=_MSMT17 + " SUR's rows of k = 1 and k = 8 are printed alike. Of digits six classes are seen, so that a "
        "class-uniform batch holds at most six times k images.",
    ),
}


def train(
    cell: Cell, recipe: train_cckd.Recipe, open_in: Callable[..., train_cckd.CorrelationCongruence]
) -> Sequence[Record]:
    recipe = replace(recipe, teacher=cell.teacher, student=cell.student)
    teacher, history = open_in(recipe, "teachers", cell.teacher).teacher()
    if cell.method == TEACHER:
        return [history[-1]]
    study = open_in(recipe, cell.folder)
    return [study.student(cell.method, seed, teacher)[1][-1] for seed in range(recipe.seeds)]


PAPER = Paper("CCKD", TABLES, train_cckd.RECIPES, train_cckd.build_parser, train_cckd.CorrelationCongruence, train)
