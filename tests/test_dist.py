"""dist against the definition in NumPy, and what is special to it: masks, absent classes, lines without variation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_matches, exactly, loss_and_gradients, needs_native, relative_error
from torch import Tensor

import kdkernels
from kdkernels import native

SHAPES = [(4, 2), (3, 2), (2, 7), (5, 16), (17, 33), (65, 10), (9, 100), (33, 1000), (3, 4099)]
SETTINGS = {"beta": 1.5, "gamma": 0.7, "temperature": 2.0}


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, requires_grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_(requires_grad)


def by_numpy(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    """Return the loss from NumPy's correlation coefficients of every row and column."""

    def probabilities(z: Tensor) -> np.ndarray:
        e = np.exp(z.detach().numpy().astype(float) / temperature)
        return e / e.sum(1, keepdims=True)

    def term(q: np.ndarray, p: np.ndarray) -> float:
        correlations = []
        for a, b in zip(q - q.mean(1, keepdims=True), p - p.mean(1, keepdims=True), strict=True):
            correlations.append(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + 1e-8))
        return 1 - np.mean(correlations)

    q, p = probabilities(student), probabilities(teacher)
    return temperature**2 * (beta * term(q, p) + gamma * term(q.T, p.T))


def definition(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """Return the same in PyTorch, for gradients."""

    def term(q: Tensor, p: Tensor) -> Tensor:
        q, p = q - q.mean(1, keepdim=True), p - p.mean(1, keepdim=True)
        return 1 - ((q * p).sum(1) / (q.norm(dim=1) * p.norm(dim=1) + 1e-8)).mean()

    q, p = (z.div(temperature).softmax(1) for z in (student, teacher))
    return temperature**2 * (beta * term(q, p) + gamma * term(q.mT, p.mT))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_the_definition(backend, shape, temperature):
    student, teacher = logits(*shape), logits(*shape)
    settings = SETTINGS | {"temperature": temperature}
    assert_matches(
        lambda s, t: kdkernels.dist_loss(s, t, backend=backend, **settings),
        lambda s, t: definition(s, t, **settings),
        student,
        teacher,
    )
    loss = kdkernels.dist_loss(student.double(), teacher.double(), backend=backend, **settings)
    assert relative_error(loss, torch.tensor(by_numpy(student, teacher, **settings))) < 1e-10


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_term(backend, weights):
    beta, gamma = weights
    student, teacher = logits(9, 12), logits(9, 12)
    assert_matches(
        lambda s, t: kdkernels.dist_loss(s, t, beta=beta, gamma=gamma, backend=backend),
        lambda s, t: definition(s, t, beta, gamma, 1.0),
        student,
        teacher,
    )


def test_gradcheck(backend):
    student, teacher = (logits(5, 6, dtype=torch.float64, scale=1.0).detach() for _ in range(2))
    mask = torch.tensor([True, True, False, True, True])
    gone = torch.zeros(5, 6).bool()
    gone[:, 4] = gone[1, 2] = True

    def loss(s: Tensor, t: Tensor) -> Tensor:
        s, t = (z.masked_fill(gone, -torch.inf) for z in (s, t))
        return kdkernels.dist_loss(s, t, mask=mask, backend=backend, **SETTINGS)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), teacher.requires_grad_()))


def test_more_dimensions(backend):
    """All leading dimensions are samples."""
    student, teacher = logits(2, 3, 4, 5), logits(2, 3, 4, 5)
    assert_matches(
        lambda s, t: kdkernels.dist_loss(s, t, backend=backend, **SETTINGS),
        lambda s, t: definition(s.flatten(0, 2), t.flatten(0, 2), **SETTINGS),
        student,
        teacher,
    )


def test_masked_equals_shortened(backend):
    """Rows that do not count may hold anything."""
    student, teacher = logits(12, 7).detach(), logits(12, 7).detach()
    counts = torch.rand(12) < 0.6
    counts[3:6] = True
    student[~counts], teacher[~counts] = torch.nan, torch.inf
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dist_loss(s, t, mask=counts, backend=backend, **SETTINGS),
        student.requires_grad_(),
        teacher.requires_grad_(),
    )
    short = [z.detach()[counts].requires_grad_() for z in (student, teacher)]
    expected, exact = loss_and_gradients(lambda s, t: definition(s, t, **SETTINGS), *exactly(*short))
    assert_close(loss, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient[counts], correct)
        assert not gradient[~counts].any()


def test_no_row_counts(backend):
    student, teacher = logits(3, 5), logits(3, 5)
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dist_loss(s, t, mask=torch.zeros(3, dtype=torch.bool), backend=backend),
        student,
        teacher,
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_absent_classes_equal_shortened(backend):
    student, teacher = logits(9, 40).detach(), logits(9, 40).detach()
    kept = torch.randperm(40)[:21].sort().values
    gone = torch.ones(40, dtype=torch.bool).index_fill(0, kept, False)
    student[:, gone] = teacher[:, gone] = -torch.inf
    found = loss_and_gradients(
        lambda s, t: kdkernels.dist_loss(s, t, backend=backend, **SETTINGS),
        student.requires_grad_(),
        teacher.requires_grad_(),
    )
    short = [z.detach()[:, kept].requires_grad_() for z in (student, teacher)]
    expected = loss_and_gradients(lambda s, t: definition(s, t, **SETTINGS), *exactly(*short))
    assert_close(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert_close(gradient[:, kept], exact)
        assert not gradient[:, gone].any()


def test_classes_that_some_samples_lack(backend):
    """A row is shorter by such a class, and the class's column is shorter by such a sample."""
    student, teacher = logits(6, 9, dtype=torch.float64).detach(), logits(6, 9, dtype=torch.float64).detach()
    gone = torch.rand(6, 9) < 0.3
    gone[:2] = False
    student[gone] = teacher[gone] = -torch.inf
    q, p = (z.softmax(1) for z in (student, teacher))

    def term(q: Tensor, p: Tensor, gone: Tensor) -> Tensor:
        pairs = [torch.stack([a[~without], b[~without]]) for a, b, without in zip(q, p, gone, strict=True)]
        centred = [pair - pair.mean(1, keepdim=True) for pair in pairs]
        return torch.stack([1 - a @ b / (a.norm() * b.norm() + 1e-8) for a, b in centred]).mean()

    expected = term(q, p, gone) + term(q.T, p.T, gone.T)
    assert_close(kdkernels.dist_loss(student, teacher, backend=backend), expected)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_class_of_one_network_has_probability_0(backend, broken):
    pair = [logits(4, 6).detach() for _ in range(2)]
    pair[broken][1, 2] = -torch.inf
    nearly = [z.double().nan_to_num(neginf=-1e4).requires_grad_() for z in pair]
    expected, exact = loss_and_gradients(lambda s, t: definition(s, t, **SETTINGS), *nearly)
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dist_loss(s, t, backend=backend, **SETTINGS), *(z.requires_grad_() for z in pair)
    )
    assert_close(loss, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient, correct)


def test_lines_without_variation(backend):
    """Equal logits and equal samples have the correlation 0 and a finite gradient. So has a single sample."""
    for student in (torch.zeros(4, 6), logits(1, 6).detach().expand(4, 6), logits(1, 6).detach()):
        teacher = logits(*student.shape)
        loss, gradients = loss_and_gradients(
            lambda s, t: kdkernels.dist_loss(s, t, backend=backend), student.requires_grad_(), teacher
        )
        assert_close(loss, definition(student.double(), teacher.double(), 1.0, 1.0, 1.0))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("noise", [1e-1, 1e-2])
def test_nearly_equal_networks(backend, noise):
    """1 - the correlation keeps its digits as it approaches 0."""
    teacher = logits(32, 50)
    student = (teacher + noise * torch.randn(32, 50)).detach().requires_grad_()
    found = loss_and_gradients(lambda s, t: kdkernels.dist_loss(s, t, backend=backend), student, teacher)
    exact = loss_and_gradients(lambda s, t: definition(s, t, 1.0, 1.0, 1.0), *exactly(student, teacher))
    if backend != "reference":
        assert relative_error(found[0], exact[0]) < 1e-6 / noise
    for gradient, expected in zip(found[1], exact[1], strict=True):
        assert relative_error(gradient, expected) < 1e-5 / noise


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 16, 32])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(backend, value, column, where):
    pair = [logits(3, 33).detach() for _ in range(2)]
    pair[where][1, column] = value
    loss, (gradient, _) = loss_and_gradients(
        lambda s, t: kdkernels.dist_loss(s, t, backend=backend), pair[0].requires_grad_(), pair[1]
    )
    assert loss.isnan()
    assert gradient[1].isnan().any()


def test_compiled_into_one_graph(backend):
    if backend == "triton":
        pytest.skip("the interpreter does not compile")
    torch.compiler.reset()
    mask = torch.tensor([True, False, True, True])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return 2 * kdkernels.dist_loss(s, t, mask=mask, backend=backend)

    compiled = torch.compile(loss, fullgraph=True)
    pair = logits(4, 6), logits(4, 6)
    (found, gradients), (expected, exact) = (loss_and_gradients(f, *pair) for f in (compiled, loss))
    assert_close(found, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient, correct)


@needs_native
def test_threads_do_not_change_the_result():
    if not hasattr(torch.ops.kdkernels, "dist"):
        pytest.skip("there is no native kernel")
    student, teacher = logits(130, 257).detach(), logits(130, 257).detach()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native.ops.dist(student, teacher, None, 1.0, 1.0, 1.0, True, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


ROWS = torch.ones(2, 3), torch.ones(2, 3)
MASK = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (([1.0], ROWS[1]), {}, TypeError, "student_logits must be a tensor, got list"),
        ((ROWS[0], ROWS[1].int()), {}, TypeError, "teacher_logits must be float32.*got torch.int32"),
        ((ROWS[0][0], ROWS[1]), {}, ValueError, r"student_logits must have shape ... x K, got \(3,\)"),
        ((ROWS[0], ROWS[1].T), {}, ValueError, r"teacher_logits must have.* shape \(2, 3\), got \(3, 2\)"),
        (ROWS, {"mask": MASK.int()}, TypeError, "mask must be a bool tensor.*got torch.int32"),
        (ROWS, {"mask": MASK[:1]}, ValueError, r"mask must have shape \(2,\), got \(1,\)"),
        (ROWS, {"temperature": -1.0}, ValueError, "temperature must be a positive number, got -1.0"),
        (ROWS, {"beta": None}, ValueError, "beta must be a finite number, got None"),
        (ROWS, {"gamma": float("inf")}, ValueError, "gamma must be a finite number, got inf"),
        (ROWS, {"backend": "cuda"}, ValueError, "backend must be one of.*got 'cuda'"),
    ],
)
def test_misuse_is_explained(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.dist_loss(*arguments, **settings)
