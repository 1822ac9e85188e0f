"""dkd against the definition in NumPy, and what is special to it: labels, masks, absent classes, confident teachers."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from helpers import assert_close, assert_matches, exactly, loss_and_gradients, needs_native, relative_error
from torch import Tensor

import kdkernels
from kdkernels import backends, native

SHAPES = [(1, 2), (2, 1), (3, 3), (8, 2), (5, 16), (17, 33), (9, 100), (33, 1000), (2, 4099)]
SETTINGS = {"alpha": 1.5, "beta": 2.0, "temperature": 3.0}


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0, requires_grad: bool = True) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_(requires_grad)


def labels_of(rows: int, classes: int) -> Tensor:
    return torch.randint(classes, (rows,))


def by_numpy(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float, counted: int = 0
) -> float:
    """Return the loss from probabilities, one row after the other, as the paper writes it."""
    total = 0.0
    for s, t, label in zip(student.detach().numpy(), teacher.detach().numpy(), labels.tolist(), strict=True):
        p, q = (np.exp(z / temperature - np.max(z / temperature)) for z in (t.astype(float), s.astype(float)))
        p, q = p / p.sum(), q / q.sum()
        others = np.arange(len(p)) != label
        if not others.any():
            continue
        pairs = np.array([p[label], p[others].sum()]), np.array([q[label], q[others].sum()])
        tckd = (pairs[0] * np.log(pairs[0] / pairs[1])).sum()
        p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
        total += temperature**2 * (alpha * tckd + beta * (p * np.log(p / q)).sum())
    return total / (counted or len(labels))


def definition(student: Tensor, teacher: Tensor, labels: Tensor, **settings: float) -> Tensor:
    """Return the same from PyTorch's functions of the binary and of the shortened logits, for gradients."""
    temperature = settings["temperature"]
    rows = []
    for s, t, label in zip(student / temperature, teacher / temperature, labels.tolist(), strict=True):
        others = torch.tensor([j for j in range(len(s)) if j != label])
        if not len(others):
            rows.append(0 * (s + t).sum())
            continue
        s_pair, t_pair = (torch.stack([z[label], z[others].logsumexp(0)]).log_softmax(0) for z in (s, t))
        s_rest, t_rest = (z[others].log_softmax(0) for z in (s, t))
        rows.append(
            settings["alpha"] * (t_pair.exp() * (t_pair - s_pair)).sum()
            + settings["beta"] * (t_rest.exp() * (t_rest - s_rest)).sum()
        )
    return temperature**2 * torch.stack(rows).mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_the_definition(backend, shape, temperature):
    student, teacher, labels = logits(*shape), logits(*shape), labels_of(*shape)
    settings = SETTINGS | {"temperature": temperature}
    assert_matches(
        lambda s, t: kdkernels.dkd_loss(s, t, labels, backend=backend, **settings),
        lambda s, t: definition(s, t, labels, **settings),
        student,
        teacher,
    )
    loss = kdkernels.dkd_loss(student.double(), teacher.double(), labels, backend=backend, **settings)
    assert relative_error(loss, torch.tensor(by_numpy(student, teacher, labels, **settings))) < 1e-10


def test_reductions(backend):
    student, teacher, labels = logits(2, 4, 9), logits(2, 4, 9), labels_of(8, 9).view(2, 4)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    rows, total, mean = (
        kdkernels.dkd_loss(student, teacher, labels, mask=mask, backend=backend, reduction=reduction)
        for reduction in ("none", "sum", "mean")
    )
    for i, row in enumerate(rows.flatten()):
        one = [x.flatten(0, -2)[i : i + 1].double() for x in (student, teacher)]
        expected = kdkernels.dkd_loss(*one, labels.flatten()[i : i + 1], backend="reference")
        assert_close(row, expected * mask.flatten()[i])
    assert_close(total, rows.sum())
    assert_close(mean, rows.sum() / 6)


def test_weighted_rows(backend):
    """Every row's gradient is multiplied by the gradient to its loss."""
    weights, labels = torch.randn(2, 4), labels_of(8, 9).view(2, 4)

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return (kdkernels.dkd_loss(s, t, labels, reduction="none", backend=backend) * weights).sum()

    def each(s: Tensor, t: Tensor) -> Tensor:
        flat = (s.flatten(0, 1), t.flatten(0, 1), labels.flatten())
        rows = [definition(*(x[i : i + 1] for x in flat), alpha=1.0, beta=8.0, temperature=4.0) for i in range(8)]
        return (torch.stack(rows).view(2, 4) * weights).sum()

    assert_matches(loss, each, logits(2, 4, 9), logits(2, 4, 9))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction):
    student, teacher = (logits(4, 6, dtype=torch.float64) for _ in range(2))
    labels, mask = torch.tensor([0, 5, -100, 2]), torch.tensor([True, True, True, False])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return kdkernels.dkd_loss(s, t, labels, mask=mask, reduction=reduction, backend=backend, **SETTINGS)

    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_more_dimensions_and_labels_of_any_integer_type(backend, dtype):
    student, teacher, labels = logits(2, 3, 4, 5), logits(2, 3, 4, 5), torch.randint(5, (2, 3, 4))
    mask = torch.rand(2, 3, 4) < 0.7
    found = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels.to(dtype), mask=mask, backend=backend), student, teacher
    )
    flat = [z.detach().flatten(0, 2)[mask.flatten()].requires_grad_() for z in (student, teacher)]
    expected = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels.flatten()[mask.flatten()], backend="reference"), *exactly(*flat)
    )
    assert_close(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert gradient.shape == (2, 3, 4, 5)
        assert_close(gradient[mask], exact)
        assert not gradient[~mask].any()


@pytest.mark.parametrize("by", ["mask", "ignore_index", "both"])
def test_masked_equals_shortened(backend, by):
    """Rows that do not count may hold anything, also a label that is no class."""
    student, teacher, labels = logits(12, 7).detach(), logits(12, 7).detach(), labels_of(12, 7)
    counts = torch.rand(12) < 0.6
    counts[3] = True
    settings = {"reduction": "mean", "backend": backend}
    given, wrong = labels.clone(), ~counts
    student[wrong], teacher[wrong] = torch.nan, torch.inf
    if by == "mask":
        settings["mask"] = counts
        given[wrong] = 99
    else:
        given[wrong] = -1
        settings["ignore_index"] = -1
        if by == "both":
            settings["mask"] = counts | (torch.rand(12) < 0.5)
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, given, **settings), student.requires_grad_(), teacher.requires_grad_()
    )
    short = [z.detach()[counts].requires_grad_() for z in (student, teacher)]
    expected, exact = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels[counts], backend="reference"), *exactly(*short)
    )
    assert_close(loss, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient[counts], correct)
        assert not gradient[wrong].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_counts(backend, reduction):
    student, teacher = logits(3, 5), logits(3, 5)
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(
            s, t, torch.zeros(3, dtype=torch.int64), mask=torch.zeros(3, dtype=torch.bool), reduction=reduction
        ).sum(),
        student,
        teacher,
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_absent_classes_equal_shortened(backend):
    """Also where the label's class is the last one, or the only one."""
    student, teacher = logits(6, 8).detach(), logits(6, 8).detach()
    labels = torch.tensor([0, 3, 7, 3, 0, 7])
    kept = torch.tensor([0, 3, 6, 7])
    gone = torch.ones(8, dtype=torch.bool).index_fill(0, kept, False)
    student[:, gone] = teacher[:, gone] = -torch.inf
    position = torch.zeros(8, dtype=torch.int64).index_copy(0, kept, torch.arange(4))
    found = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels, backend=backend, **SETTINGS),
        student.requires_grad_(),
        teacher.requires_grad_(),
    )
    short = [z.detach()[:, kept].requires_grad_() for z in (student, teacher)]
    expected = loss_and_gradients(lambda s, t: definition(s, t, position[labels], **SETTINGS), *exactly(*short))
    assert_close(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert_close(gradient[:, kept], exact)
        assert not gradient[:, gone].any()


def test_nothing_to_decide(backend):
    """Only the label is there, or the label is not there: TCKD is 0."""
    student, teacher = logits(2, 4).detach(), logits(2, 4).detach()
    student[0, 1:] = teacher[0, 1:] = -torch.inf
    student[1, 0] = teacher[1, 0] = -torch.inf
    labels = torch.zeros(2, dtype=torch.int64)
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels, backend=backend, reduction="sum", **SETTINGS),
        student.requires_grad_(),
        teacher.requires_grad_(),
    )
    log_q, log_p = (z.detach()[1, 1:].double().div(3).log_softmax(0) for z in (student, teacher))
    assert_close(loss, 9 * 2.0 * (log_p.exp() * (log_p - log_q)).sum())
    assert not any(gradient[0].any() for gradient in gradients)
    assert_close(gradients[0][1, 1:], 3 * 2.0 * (log_q.exp() - log_p.exp()))


@pytest.mark.parametrize("column", [0, 2])
def test_a_class_of_one_network(backend, column):
    """The label is class 0. In the teacher alone, -inf is the probability 0. In the student alone, the loss is inf."""
    labels = torch.zeros(3, dtype=torch.int64)
    for broken in (0, 1):
        pair = [logits(3, 5).detach() for _ in range(2)]
        pair[broken][1, column] = -torch.inf
        loss, gradients = loss_and_gradients(
            lambda s, t: kdkernels.dkd_loss(s, t, labels, backend=backend, **SETTINGS),
            *(z.requires_grad_() for z in pair),
        )
        if broken == 0:
            assert loss == torch.inf
        else:
            nearly = pair[1].detach().double().nan_to_num(neginf=-1e4)
            expected, exact = loss_and_gradients(
                lambda s, t: definition(s, t, labels, **SETTINGS),
                pair[0].detach().double().requires_grad_(),
                nearly.requires_grad_(),
            )
            assert_close(loss, expected)
            assert_close(gradients[1], exact[1])
        student_gradient = definition_gradient(pair[0].detach(), pair[1].detach(), labels)
        assert_close(gradients[0], student_gradient)


def definition_gradient(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient to the student, q - p, of probabilities that may be 0."""
    alpha, beta, temperature = SETTINGS.values()
    q, p = (z.double().div(temperature).softmax(1) for z in (student, teacher))
    is_label = torch.nn.functional.one_hot(labels, student.shape[1]).bool()
    difference = (q - p)[is_label][:, None]
    q, p = (x.masked_fill(is_label, 0) / x.masked_fill(is_label, 0).sum(1, keepdim=True) for x in (q, p))
    rows = torch.where(is_label, alpha * difference, beta * (q - p) - alpha * difference * q)
    return temperature * rows / len(labels)


def test_not_a_number_as_the_only_other_class(backend):
    """A maximum that ignores NaN must not take the other classes for absent."""
    z = torch.tensor([[torch.nan, 0.8]])
    pair = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, gradients = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, torch.tensor([1]), backend=backend), *pair
    )
    assert loss.isnan()
    assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("gap", [20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_teachers(backend, gap, dtype):
    """1 - p is far below the precision of p. The expected values have 120 digits."""
    student, teacher = (logits(3, 5, dtype=dtype, scale=1.0, requires_grad=False) for _ in range(2))
    labels = torch.tensor([1, 0, 4])
    teacher[0, 1] += gap  # a confident teacher, right or wrong, and a confident student
    teacher[1, 2] += gap
    student[1, 0] += gap / 2
    teacher[2, 4] += gap
    student[2, 4] += gap + 8  # far from the teacher, because the divergence of nearly equal networks is mostly rounding
    settings = {"alpha": 1.0, "beta": 0.0, "temperature": 1.0}
    for row in range(3):
        pair = [z[row : row + 1].clone().requires_grad_() for z in (student, teacher)]
        label = labels[row : row + 1]
        loss, (of_student, of_teacher) = loss_and_gradients(
            lambda s, t, label=label: kdkernels.dkd_loss(s, t, label, backend=backend, **settings), *pair
        )
        expected, exact_student, exact_teacher = by_mpmath(*(z[0].tolist() for z in pair), label.item())
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        tiny = torch.finfo(dtype).tiny  # below it, numbers lose digits
        assert abs(loss.item() - expected) <= tolerance * expected + tiny
        label = label.item()
        assert abs(of_student[0, label].item() - exact_student) <= tolerance * abs(exact_student) + tiny
        assert abs(of_teacher[0, label].item() - exact_teacher) <= tolerance * abs(exact_teacher) + tiny


def by_mpmath(student: list[float], teacher: list[float], label: int) -> tuple[float, float, float]:
    """Return TCKD, and its derivatives by the student's and the teacher's logit of the label."""
    with mpmath.workdps(120):
        q, p = ([mpmath.exp(z) for z in row] for row in (student, teacher))
        q, p = ([x / sum(row) for x in row] for row in (q, p))
        q_rest, p_rest = (sum(x for j, x in enumerate(row) if j != label) for row in (q, p))
        of_label, of_rest = mpmath.log(p[label] / q[label]), mpmath.log(p_rest / q_rest)
        loss = p[label] * of_label + p_rest * of_rest
        return float(loss), float(q[label] - p[label]), float(p[label] * p_rest * (of_label - of_rest))


def test_a_perfect_student_has_no_loss(backend):
    student, labels = logits(9, 50), labels_of(9, 50)
    loss, (gradient,) = loss_and_gradients(
        lambda s: kdkernels.dkd_loss(s, student.detach().clone(), labels, backend=backend), student
    )
    assert abs(loss.item()) < 1e-5
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 5, 16, 32])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_give_nan(backend, value, column, where):
    pair = [logits(3, 33).detach() for _ in range(2)]
    pair[where][1, column] = value
    labels = torch.tensor([1, 5, 2])
    loss, (gradient, _) = loss_and_gradients(
        lambda s, t: kdkernels.dkd_loss(s, t, labels, backend=backend), pair[0].requires_grad_(), pair[1]
    )
    assert loss.isnan()
    assert gradient[1].isnan().any()
    assert gradient[[0, 2]].isfinite().all()


def test_compiled_into_one_graph(backend):
    if backends.why_not(backend, torch.empty(0)) is not None or backend == "triton":
        pytest.skip("the interpreter does not compile")
    torch.compiler.reset()
    mask = torch.tensor([True, False, True, True])
    labels = torch.tensor([0, 99, -100, 4])

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return 2 * kdkernels.dkd_loss(s, t, labels, mask=mask, backend=backend)

    compiled = torch.compile(loss, fullgraph=True)
    pair = logits(4, 6), logits(4, 6)
    (found, gradients), (expected, exact) = (loss_and_gradients(f, *pair) for f in (compiled, loss))
    assert_close(found, expected)
    for gradient, correct in zip(gradients, exact, strict=True):
        assert_close(gradient, correct)


@needs_native
def test_threads_do_not_change_the_result():
    if not hasattr(torch.ops.kdkernels, "dkd"):
        pytest.skip("there is no native kernel")
    student, teacher, labels = logits(130, 257).detach(), logits(130, 257).detach(), labels_of(130, 257)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native.ops.dkd(student, teacher, labels, 1.0, 8.0, 4.0, 0, -100, True, True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


ROWS = torch.ones(2, 3), torch.ones(2, 3)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (([1.0], ROWS[1], LABELS), {}, TypeError, "student_logits must be a tensor, got list"),
        ((ROWS[0], ROWS[1].int(), LABELS), {}, TypeError, "teacher_logits must be float32.*got torch.int32"),
        ((ROWS[0][0], ROWS[1], LABELS), {}, ValueError, r"student_logits must have shape ... x K, got \(3,\)"),
        ((ROWS[0][:0], ROWS[1], LABELS), {}, ValueError, r"student_logits must not be empty, got shape \(0, 3\)"),
        ((ROWS[0], ROWS[1].T, LABELS), {}, ValueError, r"teacher_logits must have.* shape \(2, 3\), got \(3, 2\)"),
        ((ROWS[0], ROWS[1].to("meta"), LABELS), {}, ValueError, "device cpu, got meta"),
        ((*ROWS, [0, 2]), {}, TypeError, "labels must be a tensor, got list"),
        ((*ROWS, LABELS.float()), {}, TypeError, "labels must be integer class indices, got torch.float32"),
        ((*ROWS, LABELS[:1]), {}, ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        ((*ROWS, LABELS.to("meta")), {}, ValueError, "labels must be on the logits' device cpu, got meta"),
        ((*ROWS, LABELS + 1), {}, ValueError, "labels must be class indices from 0 to 2, or ignore_index=-100, got 3"),
        ((*ROWS, LABELS - 1), {"ignore_index": 7}, ValueError, "labels must be.*or ignore_index=7, got -1"),
        ((*ROWS, LABELS), {"ignore_index": 0.5}, ValueError, "ignore_index must be an integer, got 0.5"),
        ((*ROWS, LABELS), {"mask": LABELS}, TypeError, "mask must be a bool tensor.*got torch.int64"),
        ((*ROWS, LABELS), {"mask": [True, True]}, TypeError, "mask must be a bool tensor, got list"),
        ((*ROWS, LABELS), {"mask": LABELS[:1] > 0}, ValueError, r"mask must have shape \(2,\), got \(1,\)"),
        ((*ROWS, LABELS), {"mask": (LABELS > 0).to("meta")}, ValueError, "mask must be on the logits' device cpu"),
        ((*ROWS, LABELS), {"temperature": 0}, ValueError, "temperature must be a positive number, got 0"),
        ((*ROWS, LABELS), {"alpha": "1"}, ValueError, "alpha must be a finite number, got '1'"),
        ((*ROWS, LABELS), {"beta": float("nan")}, ValueError, "beta must be a finite number, got nan"),
        ((*ROWS, LABELS), {"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ((*ROWS, LABELS), {"backend": "cuda"}, ValueError, "backend must be one of.*got 'cuda'"),
    ],
)
def test_misuse_is_explained(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        kdkernels.dkd_loss(*arguments, **settings)
