"""kd against the definition in float64, and its contracts."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_matches, exactly, loss_and_gradients, relative_error
from torch import Tensor

import kdkernels
from kdkernels import native

SHAPES = [(1, 1), (1, 3), (2, 1), (8, 2), (3, 7), (5, 16), (64, 10), (17, 33), (9, 100), (33, 1000), (2, 4099)]
TEMPERATURES = [1.0, 4.0, 0.7]

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


def definition(student: Tensor, teacher: Tensor, temperature: float, scale: bool = True) -> Tensor:
    """Return Σ p log(p / q) / b, with the logarithm of each softmax written out."""

    def logarithms(logits: Tensor) -> Tensor:
        exponents = logits / temperature
        return exponents - exponents.logsumexp(1, keepdim=True)

    log_p, log_q = logarithms(teacher), logarithms(student)
    return (log_p.exp() * (log_p - log_q)).sum() / len(log_p) * (temperature**2 if scale else 1)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, requires_grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_(requires_grad)


def check(backend: str, student: Tensor, teacher: Tensor, temperature: float = 4.0, scale: bool = True) -> None:
    """Assert that the loss and both gradients equal the definition's, in the right dtypes."""

    assert_matches(
        lambda s, t: kdkernels.kd_loss(s, t, temperature=temperature, scale=scale, backend=backend),
        lambda s, t: definition(s, t, temperature, scale),
        student,
        teacher,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_matches_the_definition(backend, shape, temperature):
    check(backend, *(logits(*shape, scale=temperature) for _ in range(2)), temperature)


def test_without_the_temperature_factor(backend):
    check(backend, logits(5, 9), logits(5, 9), temperature=3.0, scale=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits(backend, dtype):
    """With logits of 1e4, all probabilities except the largest underflow. Loss and gradient stay exact."""
    student, teacher = (1e4 * torch.randn(7, 13, dtype=dtype) for _ in range(2))
    fused = loss_and_gradients(
        lambda s, t: kdkernels.kd_loss(s, t, backend=backend), student.requires_grad_(), teacher.requires_grad_()
    )
    exact = loss_and_gradients(lambda s, t: kdkernels.kd_loss(s, t, backend="reference"), *exactly(student, teacher))
    assert_close(fused[0], exact[0], "loss")
    assert_close(fused[1][0], exact[1][0], "gradient to the student")
    # The exact value is a probability near 0 times a difference of logits.
    assert fused[1][1].isfinite().all()


def test_shifted_logits(backend):
    """Adding any constant to a row changes nothing, except the rounding of the logits."""
    student, teacher = torch.randint(-5, 6, (2, 6, 11)).float()
    shift = torch.tensor([[1e4], [-1e4], [512.0], [0.0], [-3e5], [65536.0]])
    expected = definition(student.double(), teacher.double(), 2.0)
    assert_close(kdkernels.kd_loss(student + shift, teacher - shift, temperature=2.0, backend=backend), expected)


def test_a_perfect_student_has_no_loss(backend):
    student = logits(9, 50)
    loss, (gradient,) = loss_and_gradients(
        lambda s: kdkernels.kd_loss(s, student.detach().clone(), backend=backend), student
    )
    assert abs(loss.item()) < 1e-6
    assert gradient.abs().max() < 1e-7


@needs_native
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("shape", [(64, 10), (16, 100), (4, 1000)])
def test_a_small_divergence_is_precise(noise, shape):
    """The native loss keeps its digits as the student approaches the teacher."""
    teacher = logits(*shape)
    student = (teacher + noise * torch.randn(shape)).detach().requires_grad_()
    fused = loss_and_gradients(lambda s, t: kdkernels.kd_loss(s, t, backend="native"), student, teacher)
    exact = loss_and_gradients(lambda s, t: definition(s, t, 4.0), *exactly(student, teacher))
    assert relative_error(fused[0], exact[0]) < 1e-7 / noise
    for gradient, expected in zip(fused[1], exact[1], strict=True):
        assert relative_error(gradient, expected) < 1e-6 / noise


@needs_native
def test_a_confident_teachers_gradient_is_precise():
    """One probability is nearly 1, and the logarithms of the others are far from its logarithm."""
    student, teacher = logits(200, 3, scale=10.0, requires_grad=False), logits(200, 3, scale=10.0)
    _, (_, gradient) = loss_and_gradients(lambda s, t: kdkernels.kd_loss(s, t, backend="native"), student, teacher)
    _, (_, correct) = loss_and_gradients(lambda s, t: definition(s, t, 4.0), *exactly(student, teacher))
    assert max(map(relative_error, gradient, correct)) < 1e-5


def test_excluded_classes(backend):
    """-inf only in the student is a class with probability 0. The loss is infinite, and the gradient is finite."""
    student, teacher = logits(4, 6).detach(), logits(4, 6).detach()
    student[1, 2] = -torch.inf
    loss, (gradient,) = loss_and_gradients(
        lambda s: kdkernels.kd_loss(s, teacher, backend=backend), student.requires_grad_()
    )
    _, (expected,) = loss_and_gradients(
        lambda s: kdkernels.kd_loss(s, teacher.double(), backend="reference"), *exactly(student)
    )
    assert loss == torch.inf
    assert_close(gradient, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 5, 16, 17, 32])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_inf_give_nan(backend, value, column, where):
    student, teacher = logits(3, 33).detach(), logits(3, 33).detach()
    (student if where == "student" else teacher)[1, column] = value
    loss, (gradient,) = loss_and_gradients(
        lambda s: kdkernels.kd_loss(s, teacher, backend=backend), student.requires_grad_()
    )
    assert loss.isnan()
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_a_row_of_minus_inf_gives_nan(backend):
    student = logits(3, 20).detach()
    student[2] = -torch.inf
    assert kdkernels.kd_loss(student, logits(3, 20), backend=backend).isnan()


@needs_native
def test_logits_may_be_overwritten_before_backward():
    """An in-place activation may do this. The native gradient exists already."""
    leaf, teacher = logits(6, 15), logits(6, 15, requires_grad=False)
    student = 1 * leaf
    loss = kdkernels.kd_loss(student, teacher, backend="native")
    student.zero_()
    loss.backward()
    (expected,) = torch.autograd.grad(definition(leaf.double(), teacher.double(), 4.0), leaf)
    assert_close(leaf.grad, expected)


@needs_native
def test_threads_do_not_change_the_result():
    student, teacher = logits(130, 257).detach(), logits(130, 257).detach()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native.ops.kd(student, teacher, 4.0, 1.0, True, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_module_and_backend_block(backend):
    student, teacher = logits(4, 8), logits(4, 8)
    with kdkernels.use_backend(backend):
        loss = kdkernels.nn.KDLoss(temperature=2.0)(student, teacher)
    assert_close(loss, definition(student.double(), teacher.double(), 2.0).detach())


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error", "message"),
    [
        ([1.0], torch.ones(2, 3), {}, TypeError, "student_logits must be a tensor, got list"),
        (torch.ones(2, 3), torch.ones(2, 3).int(), {}, TypeError, "teacher_logits must be float32.*got torch.int32"),
        (
            torch.ones(2, 3, 1),
            torch.ones(2, 3),
            {},
            ValueError,
            r"teacher_logits must have student_logits' shape \(2, 3, 1\), got \(2, 3\)",
        ),
        (torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"student_logits must not be empty, got shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(4, 3), {}, ValueError, "teacher_logits must have.*batch size 2, got 4"),
        (torch.ones(2, 3), torch.ones(2, 5), {}, ValueError, "teacher_logits must have.*3 classes, got 5"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), {}, ValueError, "device cpu, got meta"),
        (torch.ones(2, 3), torch.ones(2, 3), {"temperature": 0}, ValueError, "temperature must be a positive number"),
        (torch.ones(2, 3), torch.ones(2, 3), {"temperature": "4"}, ValueError, "temperature .* got '4'"),
        (torch.ones(2, 3), torch.ones(2, 3), {"backend": "cuda"}, ValueError, "backend must be one of.*got 'cuda'"),
    ],
)
def test_misuse_is_explained(student, teacher, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.kd_loss(student, teacher, **settings)
