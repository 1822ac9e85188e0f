"""Token relations: ``pytest bench/bench_token_relation.py``. The limit is the matrix products of the chosen form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import Case, Loss, Work
from torch import Tensor

import kdkernels


def inputs(images: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(images, tokens, width, requires_grad=True), torch.randn(images, tokens, width)


def relations(tokens: Tensor) -> Tensor:
    unit = F.normalize(tokens, dim=-1)
    return unit @ unit.mT


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.token_relation_loss(student, teacher)


def textbook_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(relations(student), relations(teacher))


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.token_relation_loss(student, teacher, clip="both")


def textbook_gram(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(relations(student).clamp(min=0), relations(teacher).clamp(min=0))


def hinge(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.token_relation_loss(student, teacher, comparison="hinge", margin=0.1)


def textbook_hinge(student: Tensor, teacher: Tensor) -> Tensor:
    return F.relu((relations(student) - relations(teacher)).abs() - 0.1).mean()


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.token_relation_loss(student, teacher, comparison="kl", temperature=0.07)


def textbook_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(relations(student).flatten(0, 1) / 0.07, dim=-1)
    return F.kl_div(log_p, F.softmax(relations(teacher).flatten(0, 1) / 0.07, dim=-1), reduction="batchmean")


def batch(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.token_relation_loss(student, teacher, across="batch")


def textbook_batch(student: Tensor, teacher: Tensor) -> Tensor:
    return textbook_mse(student.flatten(0, 1), teacher.flatten(0, 1))


def embeddings(rows: int, width: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(rows, width, requires_grad=place < 2) for place in range(4))


def contrastive(*pairs: Tensor) -> Tensor:
    return kdkernels.contrastive_relation_loss(*pairs, student_scale=20.0, teacher_scale=30.0)


def textbook_contrastive(*pairs: Tensor) -> Tensor:
    images, texts, their_images, their_texts = (F.normalize(x, dim=1) for x in pairs)
    student, teacher = 20 * images @ texts.T, 30 * their_images @ their_texts.T
    settings = {"reduction": "batchmean", "log_target": True}
    rows = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), **settings)
    return (rows + F.kl_div(student.T.log_softmax(1), teacher.T.log_softmax(1), **settings)) / 2


def work_of_contrastive(*pairs: Tensor) -> Work:
    """Both matrices, and the gradients to the student's images and texts."""
    rows, width = pairs[0].shape
    return Work(multiply_adds=4 * rows**2 * width)


def work_of(**settings: object) -> Callable[..., Work]:
    def work(student: Tensor, teacher: Tensor) -> Work:
        ((part,),) = kdkernels.explain("token_relation_loss", student, teacher, **settings).stages
        return Work(multiply_adds=part.count * part.costs[part.form])

    return work


def case(
    name: str,
    images: int,
    tokens: int,
    width: int,
    fused: Loss,
    textbook: Loss,
    headline: bool = False,
    **settings: object,
) -> Case:
    loss, arguments = f"{name} {tokens}x{width}", (images, tokens, width)
    work = work_of(**settings)
    return Case(loss, images, inputs, arguments, fused, {"textbook": textbook}, work, headline=headline)


LARGE = ((8, 1024, 768), (2, 2304, 1024))
HINGE = {"comparison": "hinge", "margin": 0.1}
KL = {"comparison": "kl", "temperature": 0.07}
CASES = (
    *(case("MSE of tokens", *shape, mse, textbook_mse, headline=shape[0] == 2) for shape in ((16, 256, 384), *LARGE)),
    case("Gram anchoring", 16, 256, 384, gram, textbook_gram, clip="both"),
    *(case("hinge of tokens", *shape, hinge, textbook_hinge, **HINGE) for shape in LARGE),
    *(case("KL of tokens", *shape, kl, textbook_kl, headline=shape[0] == 2, **KL) for shape in LARGE),
    case("MSE over the batch", 16, 256, 384, batch, textbook_batch, across="batch"),
    Case(
        "contrastive 512",
        4096,
        embeddings,
        (4096, 512),
        contrastive,
        {"textbook": textbook_contrastive},
        work_of_contrastive,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_token_relation(compare, case):
    compare(case)
