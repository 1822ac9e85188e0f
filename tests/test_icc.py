"""icc against the definition in float64, and its contracts."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import (
    HALF_DTYPES,
    assert_close,
    assert_matches,
    exactly,
    loss_and_gradients,
    relative_error,
)
from torch import Tensor

import kdkernels
from kdkernels import inter_class_correlation, inter_class_correlation_loss, native
from kdkernels.ops.icc import reference

SHAPES = [(1, 1), (1, 2), (1, 37), (5, 1), (2, 3), (64, 2), (7, 16), (9, 17), (64, 10), (30, 33), (13, 100), (3, 261)]

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


def definition_of_map(logits: Tensor) -> Tensor:
    """Return Eqs. 5 and 6 with plain exponentials. float64 holds them for products up to 700."""
    powers = (logits[:, :, None] * logits[:, None, :]).exp()
    return (powers / powers.sum(2, keepdim=True)).mean(0)


def definition(student: Tensor, teacher: Tensor, per_sample: bool = False, reduction: str = "mean") -> Tensor:
    """Return Σ M_T log(M_T / M_S), or the mean of this sum over single samples."""
    if per_sample:
        pairs = zip(student, teacher, strict=True)
        return sum(definition(s[None], t[None], False, reduction) for s, t in pairs) / len(student)
    m_s, m_t = definition_of_map(student), definition_of_map(teacher)
    return (m_t * (m_t / m_s).log()).sum() / (1 if reduction == "sum" else len(m_s))


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the textbook version: the softmax of the outer product, and its logarithm."""
    m_s, m_t = (torch.softmax(z[:, :, None] * z[:, None, :], 2).mean(0) for z in (student, teacher))
    return (m_t * (m_t / m_s).log()).sum() / len(m_s)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.5, requires_grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_(requires_grad)


def check(
    backend: str, student: Tensor, teacher: Tensor, per_sample: bool = False, reduction: str = "mean", exact=definition
) -> None:
    """Assert that loss and gradients equal the definition's, in the right dtypes."""
    settings = {"per_sample": per_sample, "reduction": reduction}

    assert_matches(
        lambda s, t: inter_class_correlation_loss(s, t, backend=backend, **settings),
        lambda s, t: exact(s, t, **settings),
        student,
        teacher,
    )


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_rows_that_are_nearly_certain(backend, per_sample):
    """One entry is nearly 1, and the networks differ only in the other entries, which are about 1e-6."""
    student, teacher = ((torch.tensor([[2.5, -2.5]]) + 0.1 * torch.rand(1, 2)).requires_grad_() for _ in range(2))
    reference = functools.partial(inter_class_correlation_loss, backend="reference")
    check(backend, student, teacher, per_sample, exact=reference)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_loss_matches_the_definition(backend, shape, per_sample):
    check(backend, logits(*shape), logits(*shape), per_sample)


@pytest.mark.parametrize("shape", SHAPES)
def test_map_matches_the_definition(backend, shape):
    z, weight = logits(*shape), torch.randn(shape[1], shape[1])
    m = inter_class_correlation(z, backend=backend)
    assert m.shape == (shape[1], shape[1])
    assert m.dtype == torch.float32
    assert_close(m, definition_of_map(z.double()))
    assert_close(m.sum(1), torch.ones(shape[1]))
    assert_matches(
        lambda z: (inter_class_correlation(z, backend=backend) * weight).sum(),
        lambda z: (definition_of_map(z) * weight.to(z)).sum(),
        z,
    )


def test_map_of_one_sample_by_hand(backend):
    z = torch.tensor([[0.0, 1.0, -2.0]])
    rows = [[1, 1, 1], [1, torch.e, torch.e**-2], [1, torch.e**-2, torch.e**4]]
    expected = torch.tensor([[x / sum(row) for x in row] for row in rows])
    assert_close(inter_class_correlation(z, backend=backend), expected)


def test_finite_differences(backend):
    student, teacher = logits(4, 7, dtype=torch.float64), logits(4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: inter_class_correlation(z, backend=backend), student)
    for per_sample in (False, True):
        assert torch.autograd.gradcheck(
            lambda s, t, p=per_sample: inter_class_correlation_loss(s, t, per_sample=p, backend=backend),
            (student, teacher),
        )


@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_reductions(backend, per_sample):
    check(backend, logits(5, 8), logits(5, 8), per_sample, "sum")


def test_map_gradient_in_any_strides(backend):
    z, weight = logits(5, 6), torch.randn(12, 6)
    for grad in (weight[:6].t(), weight[::2], weight[:1].expand(6, 6)):
        (gradient,) = torch.autograd.grad(inter_class_correlation(z, backend=backend), z, grad)
        (expected,) = torch.autograd.grad(inter_class_correlation(z.double(), backend="reference"), z, grad.double())
        assert_close(gradient, expected)


# Logarithms -----------------------------------------------------------------------------------------------------------


def exact_in_logarithms(student: Tensor, teacher: Tensor, **settings) -> Tensor:
    """Return the reference in float64, because the plain exponentials of ``definition`` overflow even there."""
    return inter_class_correlation_loss(student.double(), teacher.double(), backend="reference", **settings)


def test_the_reference_is_the_definition():
    student, teacher = (logits(6, 11, dtype=torch.float64, scale=3) for _ in range(2))
    for per_sample in (False, True):
        assert_close(
            exact_in_logarithms(student, teacher, per_sample=per_sample), definition(student, teacher, per_sample)
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("shape", [(1, 40), (3, 25), (8, 50), (16, 20)])
@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_confident_networks(backend, dtype, shape, per_sample):
    """Logits are up to 30, and their products reach 900. The loss is exact, but the textbook version overflows and
    divides by 0.
    """
    student, teacher = (60 * torch.rand(shape) - 30 for _ in range(2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    if shape[0] < 8:
        loss, (gradient, _) = loss_and_gradients(lambda s, t: textbook(s.float(), t.float()), student, teacher)
        assert not loss.isfinite()
        assert not gradient.isfinite().all()
    check(backend, student, teacher, per_sample, exact=exact_in_logarithms)


@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_confident_teachers_get_a_gradient(backend, per_sample):
    student, teacher = ((60 * torch.rand(9, 60) - 30).requires_grad_() for _ in range(2))
    check(backend, student, teacher, per_sample, exact=exact_in_logarithms)


def test_map_of_confident_networks(backend):
    z, weight = (60 * torch.rand(4, 30) - 30).requires_grad_(), torch.randn(30, 30)

    def total(z: Tensor) -> Tensor:
        return (inter_class_correlation(z, backend=backend) * weight.to(z)).sum()

    _, (gradient,) = loss_and_gradients(total, z)
    with kdkernels.use_backend("reference"):
        _, (expected,) = loss_and_gradients(
            lambda z: (inter_class_correlation(z, backend="reference") * weight.double()).sum(), *exactly(z)
        )
    assert_close(inter_class_correlation(z, backend=backend), inter_class_correlation(z.double(), backend="reference"))
    assert_close(gradient, expected)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_everything_finite_stays_finite(backend, scale, per_sample):
    student, teacher = logits(3, 20, scale=scale), logits(3, 20, scale=scale)
    run = {"per_sample": per_sample, "backend": backend}
    loss, gradients = loss_and_gradients(lambda s, t: inter_class_correlation_loss(s, t, **run), student, teacher)
    assert_close(loss, exact_in_logarithms(student.double(), teacher.double(), per_sample=per_sample))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert inter_class_correlation(student, backend=backend).isfinite().all()


@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_perfect_student_has_no_loss(backend, per_sample, scale):
    student = logits(9, 50, scale=scale)
    teacher = student.detach().clone()
    loss, (gradient,) = loss_and_gradients(
        lambda s: inter_class_correlation_loss(s, teacher, per_sample=per_sample, backend=backend), student
    )
    assert abs(loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-5


@needs_native
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
def test_a_small_divergence_is_precise(noise, per_sample):
    """The native loss keeps its digits as the student approaches the teacher."""
    teacher = logits(8, 50)
    student = (teacher + noise * torch.randn(8, 50)).detach().requires_grad_()
    (loss, gradients), (expected, exact_gradients) = (
        loss_and_gradients(
            lambda s, t, b=backend: inter_class_correlation_loss(s, t, per_sample=per_sample, backend=b), *inputs
        )
        for backend, inputs in (("native", (student, teacher)), ("reference", exactly(student, teacher)))
    )
    assert relative_error(loss, expected) < 1e-6 / noise
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) < 2e-6 / noise


def test_the_reference_goes_by_chunks(monkeypatch):
    student, teacher = logits(6, 14), logits(6, 14)
    whole = loss_and_gradients(lambda s, t: reference.icc_loss(s, t, False), *exactly(student, teacher))
    m = reference.icc_map(student)
    monkeypatch.setattr(reference, "CHUNK", 6 * 14 * 3)
    chunked = loss_and_gradients(lambda s, t: reference.icc_loss(s, t, False), *exactly(student, teacher))
    assert_close(chunked[0], whole[0])
    for gradient, expected in zip(chunked[1], whole[1], strict=True):
        assert_close(gradient, expected)
    assert_close(reference.icc_map(student), m)


# Contracts ------------------------------------------------------------------------------------------------------------


def test_nan_of_a_sample_stays_with_it(backend):
    """In the form per sample, the gradients of other samples do not depend on it."""
    student, teacher = logits(4, 19, requires_grad=False), logits(4, 19, requires_grad=False)
    student[2, 5] = torch.nan
    loss, (gradient,) = loss_and_gradients(
        lambda s: inter_class_correlation_loss(s, teacher, per_sample=True, backend=backend), student.requires_grad_()
    )
    assert loss.isnan()
    assert gradient[2].isnan().any()
    assert gradient[[0, 1, 3]].isfinite().all()


def test_nan_does_not_stay_in_scratch_memory(backend):
    """The vector with the last of 20 classes also holds the numbers behind the last of 17 classes."""
    x, y = logits(3, 20), logits(3, 17)
    of_x, of_y = (inter_class_correlation(z, backend=backend) for z in (x, y))
    assert torch.autograd.grad(of_x, x, torch.full((20, 20), torch.nan))[0].isnan().any()
    assert torch.autograd.grad(of_y, y, torch.randn(17, 17))[0].isfinite().all()


def test_one_class(backend):
    """The softmax over one class is 1 for any logits."""
    student, teacher = logits(5, 1, scale=20), logits(5, 1)
    for per_sample in (False, True):
        loss, gradients = loss_and_gradients(
            lambda s, t, p=per_sample: inter_class_correlation_loss(s, t, per_sample=p, backend=backend),
            student,
            teacher,
        )
        assert loss == 0
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.equal(inter_class_correlation(student, backend=backend), torch.ones(1, 1))
    assert torch.equal(inter_class_correlation(torch.full((2, 1), 3e38), backend=backend), torch.ones(1, 1))


@needs_native
@pytest.mark.parametrize("per_sample", [False, True], ids=["map", "per sample"])
@pytest.mark.parametrize("scale", [1.5, 20.0])
def test_any_number_of_threads(per_sample, scale):
    """The number of rows is not a multiple of a block. The result is right, and equal bit by bit from run to run."""
    student, teacher = (logits(40, 131, scale=scale) for _ in range(2))
    expected = loss_and_gradients(
        lambda s, t: exact_in_logarithms(s, t, per_sample=per_sample), *exactly(student, teacher)
    )
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            first, second = (native.ops.icc_loss(student, teacher, per_sample, 1 / 131, True, True) for _ in range(2))
            assert all(map(torch.equal, first, second))
            for result, exact in zip(first, (expected[0], *expected[1]), strict=True):
                assert_close(result.detach(), exact)
            assert_close(native.ops.icc_map(student), reference.icc_map(student.double()))
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_large_batches_recompute(monkeypatch):
    """Exponentials that do not fit in the cache are computed twice."""
    check("native", logits(700, 130), logits(700, 130), exact=exact_in_logarithms)


def test_module_and_backend_block(backend):
    student, teacher = logits(4, 8), logits(4, 8)
    for settings in ({}, {"per_sample": True, "reduction": "sum"}):
        module = kdkernels.nn.InterClassCorrelationLoss(**settings)
        with kdkernels.use_backend(backend):
            loss = module(student, teacher)
        assert torch.equal(loss, inter_class_correlation_loss(student, teacher, backend=backend, **settings))
    assert "per_sample=True, reduction='sum'" in repr(module)


def test_explain():
    student, teacher = logits(4, 8), logits(4, 8)
    told = str(kdkernels.explain("inter_class_correlation_loss", student, teacher, backend="reference"))
    assert "inter_class_correlation_loss: reference" in told
    assert "reference" in str(kdkernels.explain("inter_class_correlation", student, backend="reference"))
    with pytest.raises(ValueError, match="classes"):
        kdkernels.explain("inter_class_correlation_loss", student, logits(4, 9))


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "error", "message"),
    [
        ([1.0], torch.ones(2, 3), {}, TypeError, "student_logits must be a tensor, got list"),
        (torch.ones(2, 3).long(), torch.ones(2, 3), {}, TypeError, "student_logits must be float32.*got torch.int64"),
        (torch.ones(2, 3).to_sparse(), torch.ones(2, 3), {}, TypeError, "student_logits must be a dense .*sparse_coo"),
        (torch.ones(2, 3, 1), torch.ones(2, 3), {}, ValueError, r"student_logits must have shape b x K"),
        (torch.ones(0, 3), torch.ones(0, 3), {}, ValueError, r"student_logits must not be empty, got shape \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(4, 3), {}, ValueError, "teacher_logits must have.*batch size 2, got 4"),
        (torch.ones(2, 3), torch.ones(2, 5), {}, ValueError, "teacher_logits must have.*3 classes, got 5"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), {}, ValueError, "device cpu, got meta"),
        (torch.ones(2, 3), torch.ones(2, 3), {"reduction": "none"}, ValueError, "reduction must be one of.*'none'"),
        (torch.ones(2, 3), torch.ones(2, 3), {"backend": "cuda"}, ValueError, "backend must be one of.*got 'cuda'"),
        (torch.ones(2, 3), torch.ones(2, 3), {"group": object()}, TypeError, "group must be .* process group"),
    ],
)
def test_misuse_is_explained(student, teacher, settings, error, message):
    with pytest.raises(error, match=message):
        inter_class_correlation_loss(student, teacher, **settings)


def test_misuse_of_the_map_is_explained():
    with pytest.raises(ValueError, match="logits must have shape b x K"):
        inter_class_correlation(torch.ones(3))
    with pytest.raises(TypeError, match=r"logits must be float32.*torch\.int64"):
        inter_class_correlation(torch.ones(3, 4).long())
    with pytest.raises(ValueError, match="logits must not be empty"):
        inter_class_correlation(torch.ones(0, 4))
