"""kd_loss with all its settings, against values that NumPy computes row by row in float64."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, assert_matches, loss_and_gradients
from torch import Tensor

import kdkernels
from kdkernels import backends, kd_loss, nn

INF, NAN = float("inf"), float("nan")
DIVERGENCES = [
    {"divergence": "forward"},
    {"divergence": "reverse"},
    {"divergence": "jsd"},
    {"divergence": "jsd", "beta": 0.1},
    {"divergence": "jsd", "beta": 0.0},
    {"divergence": "jsd", "beta": 1.0},
]
kinds = pytest.mark.parametrize("kind", DIVERGENCES, ids=lambda kind: "-".join(map(str, kind.values())))
BACKENDS = ["reference", "native", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that can run here."""
    reason = backends.why_not(request.param, torch.empty(0))
    if reason is not None:
        pytest.skip(reason)
    return request.param


# Values, row by row ---------------------------------------------------------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(p[there] * (np.log(p[there]) - np.log(q[there]))))


def of_probabilities(q: np.ndarray, p: np.ndarray, divergence: str = "forward", beta: float = 0.5) -> float:
    if divergence == "forward" or (divergence == "jsd" and beta == 0):
        return kl(p, q)
    if divergence == "reverse" or beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def of_row(
    s: np.ndarray, t: np.ndarray, temperature: float, *, standardize: bool = False, indices: Any = None, **kind: Any
) -> float:
    """Return T² times the divergence of one row."""
    if standardize:
        s, t = ((z - z.mean()) / (z.std(ddof=1) + 1e-7) for z in (s, t))
    q = softmax(s / temperature)
    if indices is None:
        p = softmax(t / temperature)
    else:
        known = np.exp(t)
        p = np.append(known, max(1 - known.sum(), 0))
        q = np.append(q[indices], 1 - q[indices].sum())
    return temperature**2 * of_probabilities(q, p, **kind)


def rows_of(
    s: Tensor, t: Tensor, temperature: Any = 4.0, dim: int = -1, indices: Tensor | None = None, **settings: Any
):
    """Return the loss of every row, in the rows' shape."""
    s, t = (np.moveaxis(x.detach().double().numpy(), dim, -1) for x in (s, t))
    temperatures = np.broadcast_to(np.asarray(temperature, dtype=np.float64), s.shape[:-1])
    known = None if indices is None else np.moveaxis(indices.numpy(), dim, -1)
    out = np.empty(s.shape[:-1])
    for place in np.ndindex(*out.shape):
        chosen = None if known is None else known[place]
        out[place] = of_row(s[place], t[place], temperatures[place], indices=chosen, **settings)
    return torch.from_numpy(out)


def logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype).requires_grad_()


def top(t: Tensor, k: int, temperature: float = 1.0, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the classes of a teacher's k most probable classes."""
    log_p = (t.detach().double() / temperature).log_softmax(dim)
    values, indices = log_p.topk(k, dim)
    return values.to(t.dtype), indices


@kinds
@pytest.mark.parametrize("classes", [2, 262_144])
def test_smallest_and_largest_vocabulary(backend, kind, classes):
    student, teacher = logits(2, classes), logits(2, classes)
    loss = functools.partial(kd_loss, temperature=2.0, **kind)
    assert_close(loss(student, teacher, backend=backend).detach(), rows_of(student, teacher, 2.0, **kind).mean())
    assert_matches(
        functools.partial(loss, backend=backend), functools.partial(loss, backend="reference"), student, teacher
    )


@kinds
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((6, 11), 1), ((11, 6), 0), ((2, 3, 33), -1), ((2, 19, 3, 4), 1)], ids=str)
def test_values(backend, shape, dim, kind, standardize):
    s, t = logits(*shape), logits(*shape)
    found = kd_loss(s, t, temperature=2.5, dim=dim, reduction="none", standardize=standardize, backend=backend, **kind)
    assert_close(found, rows_of(s, t, 2.5, dim, standardize=standardize, **kind))


@kinds
@pytest.mark.parametrize("k", [1, 5, 19])
def test_values_of_a_top_k_teacher(backend, kind, k):
    s, (values, indices) = logits(2, 19, 3), top(logits(2, 19, 3), k, 2.0, dim=1)
    found = kd_loss(
        s, values, temperature=2.0, dim=1, teacher_indices=indices, reduction="none", backend=backend, **kind
    )
    if k < 19:
        assert_close(found, rows_of(s, values, 2.0, 1, indices=indices, **kind))
    else:
        full = torch.empty_like(s).scatter(1, indices, values)
        assert_close(found, rows_of(s, 2 * full, 2.0, 1, **kind))


def test_a_top_k_teacher_of_all_classes_is_the_teacher():
    s, t = logits(5, 9), logits(5, 9)
    values, indices = top(t, 9, 3.0)
    expected = kd_loss(s, t, temperature=3.0)
    assert_close(kd_loss(s, values, temperature=3.0, teacher_indices=indices), expected.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradients_of_a_top_k_teacher(backend, kind, dtype):
    """With masks, strides, classes that are absent, and masked rows that hold NaN."""
    s, (values, indices) = logits(3, 40, 4, dtype=dtype).detach(), top(logits(3, 40, 4, dtype=dtype), 5, 2.0, dim=1)
    mask, temperature = torch.rand(3, 4) < 0.7, (1 + torch.rand(3, 4)).requires_grad_()
    mask[0], mask[1, 1] = True, False
    s.scatter_(1, indices[:, :1], s.gather(1, indices[:, :1]) + 2)
    s[0].masked_fill_(
        torch.zeros(40, 4).bool().scatter_(0, indices[0], True).logical_not_() & (torch.rand(40, 1) < 0.3), -INF
    )
    s[1, :, 1], values[1, :, 1] = NAN, NAN

    def loss(backend: str, *x: Tensor) -> Tensor:
        given = {"temperature": x[2], "dim": 1, "mask": mask, "teacher_indices": indices, "divergence": kind}
        return kd_loss(*x[:2], reduction="mean", backend=backend, **given)

    inputs = s.requires_grad_(), values.requires_grad_(), temperature
    assert_matches(functools.partial(loss, backend), functools.partial(loss, "reference"), *inputs)


def test_indices_of_a_top_k_teacher_are_checked_by_the_kernel():
    if backends.why_not("native", torch.empty(0)):
        pytest.skip("there is no native kernel")
    for wrong in (-1, 9):
        with pytest.raises(RuntimeError, match=f"indices must be class indices from 0 to 8, got {wrong}"):
            torch.ops.kdkernels.top_k(torch.randn(2, 9), torch.tensor([[0], [wrong]]), torch.ones(2))


def test_a_temperature_per_row(backend):
    s, t = logits(3, 4, 7), logits(3, 4, 7)
    for shape in ((3, 4), (4,), (3, 1), (1, 1), (), (3, 4, 1), (3, 1, 1)):
        temperature = 1 + torch.rand(shape)
        found = kd_loss(s, t, temperature=temperature, reduction="none", backend=backend)
        rows = temperature.squeeze(-1) if temperature.dim() == 3 else temperature
        assert_close(found, rows_of(s, t, rows.double().numpy()))


def test_reductions(backend):
    s, t = logits(3, 5, 7), logits(3, 5, 7)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    mask[1, 2] = False
    rows = rows_of(s, t)
    for m, samples, count in ((None, 3, 15), (mask, 2, 9)):
        total = (rows if m is None else rows[m]).sum()
        for reduction, expected in (("sum", total), ("mean", total / count), ("batchmean", total / samples)):
            assert_close(kd_loss(s, t, mask=m, reduction=reduction, backend=backend), expected)
    assert_close(
        kd_loss(s, t, backend=backend),
        torch.nn.functional.kl_div((s / 4).log_softmax(-1), (t / 4).softmax(-1), reduction="batchmean") * 16,
    )
    flat = [x.detach().flatten(0, 1) for x in (s, t)]
    assert_close(kd_loss(*flat, backend=backend), kd_loss(*flat, reduction="mean", backend=backend).double())
    assert_close(kd_loss(*flat, scale=False, reduction="sum", backend=backend), rows.sum() / 16)


# Masks ----------------------------------------------------------------------------------------------------------------


@kinds
def test_masked_equals_shortened(backend, kind):
    def loss(s: Tensor, t: Tensor, temperature: Tensor, **settings: Any) -> Tensor:
        return kd_loss(s, t, temperature=temperature, backend=backend, **settings, **kind)

    s, t = logits(20, 9), logits(20, 9)
    mask, temperature = torch.rand(20) > 0.4, (1 + torch.rand(20)).requires_grad_()
    for reduction in ("batchmean", "mean", "sum"):
        whole, gradients = loss_and_gradients(
            functools.partial(loss, mask=mask, reduction=reduction),
            *(s, t, temperature),
        )
        short, expected = loss_and_gradients(
            functools.partial(loss, reduction=reduction),
            *(x.detach()[mask].requires_grad_() for x in (s, t, temperature)),
        )
        assert_close(whole, short.double())
        for gradient, correct in zip(gradients, expected, strict=True):
            assert_close(gradient[mask], correct.double())
            assert (gradient[~mask] == 0).all()


def test_masks_broadcast_and_labels_ignore(backend):
    s, t = logits(2, 6, 4, 3), logits(2, 6, 4, 3)
    labels = torch.randint(6, (2, 4, 3))
    labels[0, 1], labels[1, :, 2] = 255, 255
    ignored = kd_loss(s, t, dim=1, labels=labels, ignore_index=255, reduction="mean", backend=backend)
    assert_close(ignored, kd_loss(s, t, dim=1, mask=labels != 255, reduction="mean").double())
    for mask in (torch.tensor([True, False, True]), torch.rand(4, 1) > 0.3, torch.rand(2, 1, 4, 3) > 0.5):
        full = (mask[:, 0] if mask.dim() == 4 else mask).expand(2, 4, 3)
        found = kd_loss(s, t, dim=1, mask=mask, labels=labels, ignore_index=255, reduction="sum", backend=backend)
        assert_close(found, rows_of(s, t, dim=1)[full & (labels != 255)].sum())


@kinds
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_nothing_counts(backend, kind, reduction):
    s, t, temperature = logits(3, 7), logits(3, 7), torch.tensor(2.0, requires_grad=True)
    s.data[1] = NAN
    loss, gradients = loss_and_gradients(
        lambda *x: kd_loss(
            *x[:2],
            temperature=x[2],
            mask=torch.zeros(3, dtype=torch.bool),
            reduction=reduction,
            backend=backend,
            **kind,
        ).sum(),
        *(s, t, temperature),
    )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_masked_rows_may_hold_anything(backend):
    s, t = logits(4, 7), logits(4, 7)
    s.data[0], t.data[0, 3], t.data[2] = NAN, INF, NAN
    mask = torch.tensor([False, True, False, True])
    loss, gradients = loss_and_gradients(lambda s, t: kd_loss(s, t, mask=mask, standardize=True, backend=backend), s, t)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


# Absent classes, NaN --------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("standardize", [False, True])
def test_a_class_that_is_absent_in_both(backend, kind, standardize):
    s, t = logits(5, 40), logits(5, 40)
    there = torch.ones(40, dtype=torch.bool)
    there[[0, 7, 33, 39]] = False
    s.data[:, ~there] = t.data[:, ~there] = -INF
    settings = {"standardize": standardize, "backend": backend, **kind}
    loss, gradients = loss_and_gradients(lambda s, t: kd_loss(s, t, **settings), s, t)
    short, expected = loss_and_gradients(
        lambda s, t: kd_loss(s, t, **settings), *(x.detach()[:, there].requires_grad_() for x in (s, t))
    )
    assert_close(loss, short.double())
    for gradient, correct in zip(gradients, expected, strict=True):
        assert_close(gradient[:, there], correct.double())
        assert (gradient[:, ~there] == 0).all()


def test_a_class_that_is_absent_in_the_teacher(backend):
    s, t = logits(5, 40), logits(5, 40)
    t.data[:, [0, 7, 33]] = -INF
    for kind in ({}, {"divergence": "jsd"}):
        loss, gradients = loss_and_gradients(functools.partial(kd_loss, backend=backend, **kind), s, t)
        assert_close(loss, rows_of(s, t, **kind).mean())
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[1][:, [0, 7, 33]] == 0).all()
    q, p = ((x.double().detach() / 4).softmax(1) for x in (s, t))
    _, gradients = loss_and_gradients(lambda s, t: kd_loss(s, t, backend=backend), s, t)
    assert_close(gradients[0], 4 * (q - p) / 5)


def test_a_class_that_is_absent_in_one_network_only(backend):
    s, t, temperature = logits(5, 40), logits(5, 40), torch.tensor(4.0, requires_grad=True)
    s.data[3, 9] = -INF
    for swapped in (False, True):
        pair = (t, s) if swapped else (s, t)
        kind = "reverse" if swapped else "forward"
        loss, gradients = loss_and_gradients(
            lambda s, t, T, kind=kind: kd_loss(s, t, temperature=T, divergence=kind, reduction="sum", backend=backend),
            *(*pair, temperature),
        )
        assert loss == INF
        assert all(gradient.isfinite().all() for gradient in gradients[:2])
        assert gradients[2] == INF  # the factor T² multiplies the loss
        q, p = ((x.double().detach() / 4).softmax(1) for x in (s, t))
        assert_close(gradients[swapped], 4 * (q - p))
        rest = [row for row in range(5) if row != 3]
        expected = kd_loss(*(x[rest] for x in pair), divergence=kind, reduction="none", backend=backend)
        rows = kd_loss(*pair, divergence=kind, reduction="none", backend=backend)
        assert torch.equal(rows[rest], expected)
    assert kd_loss(s, t, divergence="jsd", backend=backend).isfinite()


@kinds
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_gives_nan(backend, kind, value, where):
    pair = [logits(3, 33), logits(3, 33)]
    pair[where].data[1, 17] = value
    loss, gradients = loss_and_gradients(lambda s, t: kd_loss(s, t, backend=backend, **kind), *pair)
    assert loss.isnan()
    for gradient in gradients:
        assert gradient[1].isnan().all()
        assert gradient[[0, 2]].isfinite().all()


# Gradients ------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradcheck(backend, kind, standardize, per_row):
    s, t = (logits(2, 5, 3, dtype=torch.float64) for _ in range(2))
    temperature = (1 + torch.rand(2, 1) if per_row else torch.tensor(2.0)).double().requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def loss(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        settings = {"dim": 1, "standardize": standardize, "mask": mask, "reduction": "none", "backend": backend}
        return kd_loss(s, t, temperature=temperature, **settings, **kind)

    assert torch.autograd.gradcheck(loss, (s, t, temperature))


@kinds
def test_gradcheck_of_a_top_k_teacher(backend, kind):
    s, t, temperature = logits(3, 9, dtype=torch.float64), logits(3, 9, dtype=torch.float64), torch.tensor(2.0).double()
    indices = t.detach().topk(4).indices

    def loss(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        values = (t / temperature).log_softmax(1).gather(1, indices)
        return kd_loss(s, values, temperature=temperature, teacher_indices=indices, backend=backend, **kind)

    assert torch.autograd.gradcheck(loss, (s, t, temperature.requires_grad_()))


def test_a_learned_temperature(backend):
    """CTKD learns one temperature by the gradient of T² KL."""

    def definition(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        p, q = (t / temperature).softmax(1), (s / temperature).softmax(1)
        return (p * (p.log() - q.log())).sum(1).mean() * temperature**2

    temperature = torch.tensor(3.0, requires_grad=True)
    fused = lambda s, t, T: kd_loss(s, t, temperature=T, backend=backend)  # noqa: E731
    assert_matches(fused, definition, logits(8, 10), logits(8, 10), temperature)


# Interface ------------------------------------------------------------------------------------------------------------


def test_the_module_takes_the_tensors_of_a_batch(backend):
    s, t, mask = logits(2, 3, 7), logits(2, 3, 7), torch.rand(2, 3) > 0.5
    temperature = torch.tensor(2.0, requires_grad=True)
    module = nn.KDLoss(divergence="reverse", reduction="sum", backend=backend)
    found = module(s, t, mask=mask, temperature=temperature)
    assert_close(found, rows_of(s, t, 2.0, divergence="reverse")[mask].sum())


@pytest.mark.parametrize("settings", [{"mask": True}, {"divergence": "jsd"}, {"standardize": True}, {"labels": True}])
def test_compiled_whole(backend, settings):
    s, t = logits(3, 4, 7), logits(3, 4, 7)
    given = dict(settings)
    if "mask" in given:
        given["mask"] = torch.rand(3, 4) > 0.5
    if "labels" in given:
        given["labels"] = torch.randint(7, (3, 4))
    torch.compiler.reset()
    temperature = torch.tensor(2.0, requires_grad=True)

    def loss(s: Tensor, t: Tensor, temperature: Tensor) -> Tensor:
        return kd_loss(s, t, temperature=temperature, backend=backend, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, gradients = loss_and_gradients(compiled, s, t, temperature)
    expected, correct = loss_and_gradients(loss, s, t, temperature)
    assert_close(found, expected.double())
    for gradient, exact in zip(gradients, correct, strict=True):
        assert_close(gradient, exact.double())


def test_explain():
    s, t = logits(3, 4, 7), logits(3, 4, 7)
    explanation = kdkernels.explain("kd_loss", s, t, mask=torch.ones(3, 4, dtype=torch.bool), backend="reference")
    assert explanation.backend == "reference"


S, INDICES = torch.ones(2, 3, 5), torch.tensor([0, 1]).expand(2, 3, 2)


@pytest.mark.parametrize(
    ("t", "settings", "error", "message"),
    [
        (torch.ones(2, 3, 4), {}, ValueError, "teacher_logits must have student_logits' 5 classes, got 4"),
        (torch.ones(2, 4, 5), {}, ValueError, r"teacher_logits must have student_logits' shape \(2, 3, 5\), got"),
        (S, {"dim": 3}, ValueError, r"dim must be in \[-3, 2\] for logits of shape \(2, 3, 5\), got 3"),
        (S, {"dim": 1.0}, ValueError, "dim must be an integer, got 1.0"),
        (S, {"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, True for rows that count, got torch.float32"),
        (S, {"mask": [True]}, TypeError, "mask must be a tensor, got list"),
        (
            S,
            {"mask": torch.ones(2, 4) > 0},
            ValueError,
            r"mask must broadcast to the rows' shape \(2, 3\), got \(2, 4\)",
        ),
        (S, {"labels": torch.ones(2).long()}, ValueError, r"labels must have shape \(2, 3\), got \(2,\)"),
        (S, {"labels": torch.full((2, 3), 5)}, ValueError, r"labels must be in \[0, 4\] or ignore_index=-100, got 5"),
        (
            S,
            {"temperature": torch.zeros(2, 3)},
            ValueError,
            "temperature must be a positive number in every row, got 0",
        ),
        (S, {"temperature": -torch.ones(3)}, ValueError, "temperature must be a positive number in every row, got -1"),
        (S, {"temperature": torch.ones(4)}, ValueError, r"temperature must broadcast to the rows' shape \(2, 3\), got"),
        (S, {"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        (S, {"reduction": "max"}, ValueError, "reduction must be one of"),
        (S, {"divergence": "kl"}, ValueError, "divergence must be one of"),
        (S, {"divergence": "jsd", "beta": 1.5}, ValueError, r"beta must be a number in \[0, 1\], got 1.5"),
        (
            S,
            {"teacher_indices": INDICES},
            ValueError,
            r"teacher_logits must have teacher_indices' shape \(2, 3, 2\), got",
        ),
        (-S[..., :2], {"teacher_indices": INDICES + 4}, ValueError, r"teacher_indices must be in \[0, 4\], got 5"),
        (-S[..., :2], {"teacher_indices": INDICES - 1}, ValueError, r"teacher_indices must be in \[0, 4\], got -1"),
        (-S[..., :2], {"teacher_indices": 0 * INDICES}, ValueError, "teacher_indices must not repeat a class"),
        (-S[..., :2], {"teacher_indices": INDICES.int()}, TypeError, "teacher_indices must be int64, got torch.int32"),
        (S[..., :2], {"teacher_indices": INDICES}, ValueError, "teacher_logits must hold log-probabilities"),
        (-S[..., :2], {"teacher_indices": INDICES, "standardize": True}, ValueError, "standardize must be False"),
    ],
    ids=str,
)
def test_misuse_is_explained(t, settings, error, message):
    with pytest.raises(error, match=message):
        kd_loss(S, t, **settings)
