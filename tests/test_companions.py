"""The companion losses against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_close, assert_matches
from torch import Tensor

import kdkernels
from kdkernels import attention_transfer_loss, logit_mse_loss, teacher_free_kd_loss


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


# Attention transfer ---------------------------------------------------------------------------------------------------


def attention(maps: Tensor) -> Tensor:
    """Return Eq. 1 of the paper with p = 2, normalised per image."""
    return torch.stack([q / q.square().sum().sqrt() for q in (maps * maps).sum(1)])


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    return (attention(student) - attention(teacher)).square().mean()


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 4, 5, 5), (2, 3, 7, 4), (4, 16, 8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_transfer(shape, dtype):
    n, c, h, w = shape
    assert_matches(
        attention_transfer_loss, attention_loss, features(*shape, dtype=dtype), features(n, c + 3, h, w, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("student", "teacher"), [((8, 8), (4, 4)), ((3, 5), (7, 10)), ((7, 3), (4, 6)), ((1, 1), (5, 5))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_of_other_sizes_is_averaged(student, teacher, dtype):
    size = tuple(map(min, student, teacher))

    def definition(s: Tensor, t: Tensor) -> Tensor:
        maps = (F.adaptive_avg_pool2d((x * x).sum(1, keepdim=True), size).sqrt() for x in (s, t))
        return attention_loss(*maps)

    maps = features(3, 4, *student, dtype=dtype), features(3, 2, *teacher, dtype=dtype)
    assert_matches(attention_transfer_loss, definition, *maps)


def test_attention_of_stages_adds_up():
    students, teachers = ([torch.randn(2, 3, 4, 6), torch.randn(2, 5, 3, 3)] for _ in range(2))
    loss = attention_transfer_loss(students, teachers)
    assert_close(loss, sum(attention_loss(s.double(), t.double()) for s, t in zip(students, teachers, strict=True)))
    summed = attention_transfer_loss(students, teachers, reduction="sum")
    pairs = zip(students, teachers, (24, 9), strict=True)
    assert_close(summed, sum(attention_loss(s.double(), t.double()) * count for s, t, count in pairs))


def test_attention_keeps_to_the_contracts():
    student, teacher = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 6, 6)
    plain = attention_transfer_loss(student, teacher)
    assert_close(attention_transfer_loss(student.to(memory_format=torch.channels_last), teacher), plain)
    assert_close(attention_transfer_loss(1e15 * student, teacher), plain)  # attention does not depend on the scale
    half = (300 * student).half()  # its squares exceed the range of float16
    assert attention_transfer_loss(half, teacher.half()).isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_transfer_loss(student, teacher), plain)
    dead = torch.cat([torch.zeros(1, 4, 6, 6), student[1:]]).requires_grad_()
    attention_transfer_loss(dead, teacher).backward()
    assert dead.grad.isfinite().all()
    assert not dead.grad[0].any()
    assert dead.grad[1:].any()
    broken = torch.cat([torch.full((1, 4, 6, 6), torch.nan), student[1:]])
    assert attention_transfer_loss(broken, teacher).isnan()
    compiled = torch.compile(attention_transfer_loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(student, teacher), plain)
    double, other = (features(2, 2, 3, 3, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: attention_transfer_loss(x, other), double)


# Logits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_mse(dtype):
    def definition(s: Tensor, t: Tensor) -> Tensor:
        return ((s - t) ** 2).sum() / s.numel()

    for shape in ((1, 1), (7, 10), (3, 101)):
        assert_matches(logit_mse_loss, definition, *(features(*shape, dtype=dtype) for _ in range(2)))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_teacher_free(backend, alpha):
    labels = torch.randint(0, 10, (6,))

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return teacher_free_kd_loss(s, t, labels, alpha=alpha, temperature=3.0, backend=backend)

    def definition(s: Tensor, t: Tensor) -> Tensor:
        hard = -s.log_softmax(1)[range(6), labels].mean()
        p, q = (t / 3).softmax(1), (s / 3).softmax(1)
        return (1 - alpha) * hard + alpha * 9 * (p * (p / q).log()).sum() / 6

    assert_matches(loss, definition, features(6, 10), features(6, 10).detach())


# Modules and misuse ---------------------------------------------------------------------------------------------------


def test_modules_are_the_functions():
    logits, own, labels = torch.randn(4, 7), torch.randn(4, 7), torch.randint(0, 7, (4,))
    maps = torch.randn(4, 2, 3, 3), torch.randn(4, 5, 3, 3)
    nn = kdkernels.nn
    pairs = [
        (nn.LogitMSELoss()(logits, own), logit_mse_loss(logits, own)),
        (
            nn.TeacherFreeKDLoss(0.5, temperature=2.0)(logits, own, labels),
            teacher_free_kd_loss(logits, own, labels, alpha=0.5, temperature=2.0),
        ),
        (nn.AttentionTransferLoss(reduction="sum")(*maps), attention_transfer_loss(*maps, reduction="sum")),
    ]
    assert all(torch.equal(module, function) for module, function in pairs)
    assert "alpha=0.5" in repr(nn.TeacherFreeKDLoss(0.5))
    assert "'sum'" in repr(nn.AttentionTransferLoss(reduction="sum"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention_transfer_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 4, 4)), ValueError, "student .* n x c"),
        (lambda: attention_transfer_loss([torch.ones(2, 3, 4, 4)], []), ValueError, "1 stages .* got 0"),
        (lambda: attention_transfer_loss([], []), ValueError, "at least 1"),
        (lambda: attention_transfer_loss(*torch.ones(2, 2, 3, 4, 4), reduction="max"), ValueError, "reduction.*'max'"),
        (
            lambda: attention_transfer_loss(torch.ones(2, 3, 4, 4), torch.ones(3, 3, 4, 4)),
            ValueError,
            "teacher must have student's batch size 2, got 3",
        ),
        (lambda: logit_mse_loss(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "3 classes, got 4"),
        (lambda: logit_mse_loss(torch.ones(2, 3).int(), torch.ones(2, 3)), TypeError, "student_logits.*int32"),
        (
            lambda: teacher_free_kd_loss(*torch.ones(2, 2, 3), torch.zeros(2).long(), alpha=2),
            ValueError,
            r"alpha must be a number in \[0, 1\], got 2",
        ),
        (lambda: teacher_free_kd_loss(*torch.ones(2, 2, 3), [0, 1]), TypeError, "labels must be a tensor, got list"),
        (lambda: teacher_free_kd_loss(*torch.ones(2, 2, 3), torch.ones(2)), TypeError, "labels .* got torch.float32"),
        (
            lambda: teacher_free_kd_loss(*torch.ones(2, 2, 3), torch.zeros(3).long()),
            ValueError,
            r"labels must have shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_misuse_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()
