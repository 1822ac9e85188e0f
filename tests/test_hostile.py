"""Inputs that try to break the operators. hypothesis draws strides, views, dtypes and values.

Every example is computed three times: with the backend "auto" on the views, with the reference on compact copies, and
with the reference in float64. A few examples run with the other tests, and thousands with ``make fuzz``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from helpers import DTYPES, FLOAT64_TOLERANCE, HALF_DTYPES, loss_and_gradients
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import kdkernels
from kdkernels.ops.congruence import congruence
from kdkernels.ops.patches import patches

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
FLOAT32_FLOOR = 4e-6  # relative to the size of the terms that may cancel

VALUES = ("normal", "normal", "alike", "zero rows", "sparse", "tiny", "huge", "denormal", "mixed", "nan", "inf", "-inf")
LAYOUTS = ("compact", "compact", "permuted", "sliced", "expanded", "overlapping", "channels_last")


class Problem(NamedTuple):
    """An operator with drawn settings: a scalar function of tensors, and the shapes of the tensors."""

    function: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    terms: float = 0.0  # the size of terms that cancel for any inputs: logarithms of probabilities, kernels near 1
    # the numbers by which function and gradients are divided, from an input
    divisors: Callable[[Tensor], Tensor] | None = None
    # a function of absolute values; its terms are the sizes of the function's terms
    sizes: Callable[..., Tensor] | None = None
    smooth: bool = True  # whether its gradient is continuous


def norms(x: Tensor) -> Tensor:
    """Return a lower bound of the norms of rows and patches: the smallest number that is not zero."""
    return x.abs()


def distances(x: Tensor) -> Tensor:
    return (x[:, None] - x).norm(dim=2)


def sizes(most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most)


@st.composite
def views(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Draw a tensor of this shape, with some layout and some values."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    layout, kind = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(VALUES))

    def fresh(*shape: int) -> Tensor:
        return fill(kind, torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    if layout == "permuted":
        order = draw(st.permutations(range(len(shape))))
        view = fresh(*(shape[i] for i in order)).permute([order.index(i) for i in range(len(shape))])
    elif layout == "sliced":
        steps = [draw(st.integers(1, 3)) for _ in shape]
        starts = [draw(st.integers(0, 2)) for _ in shape]
        whole = fresh(*(start + step * size for start, step, size in zip(starts, steps, shape, strict=True)))
        view = whole[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    elif layout == "expanded":
        repeated = [draw(st.booleans()) for _ in shape]
        view = fresh(*(1 if r else size for r, size in zip(repeated, shape, strict=True))).expand(shape)
    elif layout == "overlapping":
        strides = [draw(st.integers(0, 3)) for _ in shape]
        offset = draw(st.integers(0, 3))
        length = 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
        view = fresh(offset + length).as_strided(shape, strides, offset)
    elif layout == "channels_last" and len(shape) == 4:
        view = fresh(*shape).to(memory_format=torch.channels_last)
    else:
        view = fresh(*shape)
    if kind in ("nan", "inf", "-inf"):
        index = tuple(draw(st.integers(0, size - 1)) for size in shape)
        view[index].fill_(float(kind))
    note(f"{tuple(shape)} {dtype} {layout} strides {view.stride()} {kind}")
    return view


def fill(kind: str, normal: Tensor) -> Tensor:
    """Return numbers of a kind, from normal numbers."""
    if kind == "alike":
        return 1 + 1e-3 * normal
    if kind == "zero rows":
        first = (slice(None), *[slice(0, 1)] * (normal.dim() - 1))
        return normal * (normal[first] > 0)
    if kind == "sparse":
        return normal.relu() * (normal > 1)
    scale = {"tiny": 1e-12, "huge": 1e15, "denormal": 1e-40}
    if kind == "mixed":
        return normal * 10 ** (6 * normal.roll(1)).clamp(-15, 15)
    return normal * scale.get(kind, 1.0)


# One strategy per operator: its settings, and the shapes that go with them ------------------------------------------

REDUCTION = st.sampled_from(("sum", "mean"))
FORM = st.sampled_from(("auto", "gram", "feature"))


@st.composite
def kd(draw) -> Problem:
    shape = (draw(sizes(7)), draw(sizes(40)))
    given = {"temperature": draw(st.sampled_from((1.0, 4.0, 0.3))), "scale": draw(st.booleans())}
    return Problem(lambda s, t, backend: kdkernels.kd_loss(s, t, backend=backend, **given), [shape, shape], 16.0)


@st.composite
def divergence(draw) -> Problem:
    shape = (draw(sizes(7)), draw(sizes(40)))
    given = {
        "temperature": draw(st.sampled_from((1.0, 4.0, 0.3))),
        "divergence": draw(st.sampled_from(("forward", "reverse", "jsd"))),
        "dim": draw(st.sampled_from((0, 1))),
        "mask": None,
    }
    if draw(st.booleans()):
        given["mask"] = torch.rand(shape[1 - given["dim"]], generator=torch.Generator().manual_seed(1)) < 0.8
    return Problem(lambda s, t, backend: kdkernels.kd_loss(s, t, backend=backend, **given), [shape, shape], 16.0)


@st.composite
def decoupled(draw) -> Problem:
    shape = (draw(sizes(7)), draw(sizes(40)))
    given = {
        "alpha": draw(st.sampled_from((1.0, 0.0, 2.5))),
        "temperature": draw(st.sampled_from((1.0, 4.0, 0.3))),
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "ignore_index": draw(st.integers(0, 3)),
    }
    labels = torch.tensor(draw(st.lists(st.integers(0, shape[1] - 1), min_size=shape[0], max_size=shape[0])))
    weights = torch.linspace(1, 2, shape[0])

    def loss(s: Tensor, t: Tensor, backend: str) -> Tensor:
        found = kdkernels.dkd_loss(s, t, labels, backend=backend, **given)
        return (found * weights.to(found)).sum()

    return Problem(loss, [shape, shape], 200.0)


@st.composite
def correlations(draw) -> Problem:
    shape = (draw(sizes(7)), draw(sizes(40)))
    given = {"temperature": draw(st.sampled_from((1.0, 4.0))), "gamma": draw(st.sampled_from((1.0, 0.0)))}

    def spreads(x: Tensor) -> Tensor:
        """Return the norms by which probabilities are divided after their mean is subtracted, and what is added."""
        p = (x / given["temperature"]).softmax(1)
        return 1e-8 + torch.cat([(p - p.mean(dim, keepdim=True)).norm(dim=dim) for dim in (0, 1)])

    loss = lambda s, t, backend: kdkernels.dist_loss(s, t, backend=backend, **given)  # noqa: E731
    return Problem(loss, [shape, shape], 16.0, spreads)


@st.composite
def local_correlation(draw) -> Problem:
    n, k = draw(sizes(4)), draw(sizes(3))
    resize = draw(st.booleans())
    side = sizes(7) if resize else sizes(3).map(lambda cells: k * cells)
    shapes = [(n, draw(sizes(5)), draw(side), draw(side)) for _ in range(2)]
    given = {
        "weights": draw(st.sampled_from(((1, 1, 1), (1, 0, 0), (0, 1, 0), (0.5, 2, 0), (0.1, 0.7, 3), (0, 0, 0)))),
        "partition": "resize" if resize else "exact",
        "reduction": draw(REDUCTION),
        "form": draw(FORM),
    }
    masked = draw(st.sampled_from((None, "mask", "box")))
    if masked is None:
        return Problem(
            lambda s, t, backend: kdkernels.local_correlation_loss(s, t, k, backend=backend, **given),
            shapes,
            1.0,
            norms,
        )
    mask = 0.1 + 0.9 * torch.rand(n, *shapes[1][2:], generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    given |= {"threshold": 0.5 if masked == "box" else None}

    def loss(s: Tensor, t: Tensor, backend: str) -> Tensor:
        return kdkernels.local_correlation_loss(s, t, k, mask=mask, backend=backend, **given)

    return Problem(loss, shapes, 1.0, norms)


@st.composite
def patch_vectors(draw) -> Problem:
    n, k = draw(sizes(4)), draw(sizes(3))
    shape = (n, draw(sizes(5)), draw(sizes(7)), draw(sizes(7)))
    rows = n * k * k
    weights = torch.randn(rows, shape[1] * -(-shape[2] // k) * -(-shape[3] // k), dtype=torch.float64)

    def projection(x: Tensor, backend: str) -> Tensor:
        # The order of a row's components is not specified, so only their sum is compared.
        result = patches(x, k, partition="resize", backend=backend)
        return (result.sum(1) * weights[:, 0].to(result)).sum()

    return Problem(projection, [shape], 1.0, norms)


@st.composite
def congruent_rows(draw) -> Problem:
    positions = draw(sizes(3))
    rows = positions * draw(sizes(5))
    given = {
        "positions": positions,
        "coefficients": draw(st.sampled_from(((1, 0, 0, 0), (0, 1, 0, 1), (1, -1, 2, 0.5), (2, 0, 1, 0)))),
        "form": draw(FORM),
    }
    shapes = [(rows, draw(sizes(9))) for _ in range(2)]
    of_sizes = given | {"coefficients": [abs(c) for c in given["coefficients"]]}

    def added(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return congruence(torch.cat([x, y], 1), x.new_zeros(rows, 1), backend=backend, **of_sizes)

    return Problem(lambda x, y, backend: congruence(x, y, backend=backend, **given), shapes, sizes=added)


@st.composite
def correlation_congruence(draw) -> Problem:
    n, kernel = draw(sizes(9)), draw(st.sampled_from(("taylor_rbf", "rbf", "bilinear", "mmd")))
    given = {
        "kernel": kernel,
        "gamma": draw(st.sampled_from((0.4, 2.0))),
        "order": draw(st.integers(0, 4)),
        "normalize": draw(st.booleans()),
        "reduction": draw(REDUCTION),
        "form": draw(FORM) if kernel == "bilinear" else "auto",
    }
    shapes = [(n, draw(sizes(12))) for _ in range(2)]
    return Problem(
        lambda s, t, backend: kdkernels.correlation_congruence_loss(s, t, backend=backend, **given),
        shapes,
        1.0,
        norms if given["normalize"] else None,
        smooth=kernel != "mmd",
    )


@st.composite
def similarity_preserving(draw) -> Problem:
    n, given = draw(sizes(7)), {"reduction": draw(REDUCTION), "form": draw(FORM)}
    shapes = [(n, *draw(st.lists(sizes(4), min_size=1, max_size=3))) for _ in range(2)]
    return Problem(
        lambda s, t, backend: kdkernels.similarity_preserving_loss(s, t, backend=backend, **given), shapes, 1.0, norms
    )


@st.composite
def inter_class(draw) -> Problem:
    shape = (draw(sizes(5)), draw(sizes(20)))
    given = {"per_sample": draw(st.booleans()), "reduction": draw(REDUCTION)}
    return Problem(
        lambda s, t, backend: kdkernels.inter_class_correlation_loss(s, t, backend=backend, **given),
        [shape, shape],
        3.0 * shape[1],
    )


@st.composite
def similarities(draw) -> Problem:
    n, layers = draw(sizes(6)), draw(sizes(3))
    shapes = [(n, *draw(st.lists(sizes(4), min_size=1, max_size=3))) for _ in range(layers)]
    weights = torch.randn(layers, n, n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))

    def projection(*features: Tensor, backend: str, weights: Tensor = weights) -> Tensor:
        matrices = kdkernels.similarity_matrices(features, backend=backend)
        return (matrices * weights.to(matrices)).sum()

    return Problem(projection, shapes, sizes=functools.partial(projection, weights=weights.abs()))


@st.composite
def cross_layer(draw) -> Problem:
    n, c, layers = draw(sizes(4)), draw(sizes(4)), (draw(sizes(2)), draw(sizes(2)))
    maps = [(n, c, draw(sizes(5)), draw(sizes(5))) for _ in range(layers[0] + layers[1])]
    reduction = draw(REDUCTION)

    def loss(weights: Tensor, *features: Tensor, backend: str) -> Tensor:
        projected = [[features[i]] * layers[1] for i in range(layers[0])]
        targets = [list(features[layers[0] :])] * layers[0]
        return kdkernels.cross_layer_mse(projected, targets, weights, reduction=reduction, backend=backend)

    return Problem(loss, [(n, *layers), *maps], 1.0)


@st.composite
def relations(draw) -> Problem:
    n, weight = draw(sizes(7)), st.sampled_from((0.0, 1.0, 25.0))
    given = {"distance_weight": draw(weight), "angle_weight": draw(weight)}
    shapes = [(n, draw(sizes(9))) for _ in range(2)]
    return Problem(
        lambda s, t, backend: kdkernels.relational_kd_loss(s, t, backend=backend, **given), shapes, 25.0, distances
    )


OPERATORS = {
    "kd": kd(),
    "divergence": divergence(),
    "dkd": decoupled(),
    "dist": correlations(),
    "local_correlation": local_correlation(),
    "patches": patch_vectors(),
    "congruence": congruent_rows(),
    "correlation_congruence": correlation_congruence(),
    "similarity_preserving": similarity_preserving(),
    "icc": inter_class(),
    "gram": similarities(),
    "feature_mse": cross_layer(),
    "rkd": relations(),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_input(operator: str) -> None:
    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, print_blob=True
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        problem = data.draw(OPERATORS[operator])
        only = (torch.float32, torch.float64) if operator == "congruence" else DTYPES
        dtype = data.draw(st.sampled_from(only))
        tensors = [data.draw(views(shape, dtype)) for shape in problem.shapes]
        learns = [data.draw(st.booleans()) for _ in tensors]
        check(problem, tensors, learns)

    run()


def check(problem: Problem, tensors: list[Tensor], learns: list[bool]) -> None:
    """Assert that "auto" is as close to the exact result as the reference, or within the rounding of its terms."""
    before = [x.clone() for x in tensors]
    loss, gradients = evaluate(problem, tensors, learns, "auto")
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(tensors, before, strict=True))
    eager_loss, eager_gradients = evaluate(problem, before, learns, "reference")
    exact = [x.double() for x in before]
    exact_loss, exact_gradients = evaluate(problem, exact, learns, "reference")
    assert loss.dtype == eager_loss.dtype
    assert loss.shape == ()
    if not exact_loss.isfinite():
        assert not loss.isfinite(), f"{loss} where the exact result is {exact_loss}"
        return
    # A loss is a sum of products of up to four inputs.
    largest = max(x.abs().max().item() ** 4 * x.numel() ** 2 for x in exact)
    overflows = largest > torch.finfo(eager_loss.dtype).max
    floors = term_sizes(problem, exact, learns)
    within(loss, eager_loss, exact_loss, floors[0], overflows, "loss")
    for gradient, eager, found, floor, x in zip(
        gradients, eager_gradients, exact_gradients, floors[1:], tensors, strict=True
    ):
        if found is None:
            assert gradient is None
        else:
            assert gradient.dtype == x.dtype
            assert gradient.shape == x.shape
            if problem.smooth:
                within(gradient, eager, found, floor, overflows, "gradient")


def evaluate(
    problem: Problem, tensors: Sequence[Tensor], learns: Sequence[bool], backend: str
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [x.detach().requires_grad_(learn) for x, learn in zip(tensors, learns, strict=True)]
    if not any(learns):
        loss = problem.function(*leaves, backend=backend)
        assert not loss.requires_grad
        return loss, [None] * len(leaves)
    return loss_and_gradients(lambda *x: problem.function(*x, backend=backend), *leaves)


def term_sizes(problem: Problem, exact: list[Tensor], learns: list[bool]) -> list[Tensor]:
    """Return the size of loss and gradients if the other inputs are zero. These terms cancel for equal inputs."""
    largest = 1.0 if problem.divisors else max(1.0, *(x.abs().max().item() for x in exact))
    sizes = [torch.tensor(problem.terms * largest**3, dtype=torch.float64) for _ in range(1 + len(exact))]
    alone = [[x if i == kept else torch.zeros_like(x) for i, x in enumerate(exact)] for kept in range(len(exact))]
    found = [evaluate(problem, inputs, learns, "reference") for inputs in alone]
    if problem.sizes:
        of_sizes = problem._replace(function=problem.sizes)
        found.append(evaluate(of_sizes, [x.abs() for x in exact], learns, "reference"))
    for loss, gradients in found:
        for i, value in enumerate([loss, *gradients]):
            if value is not None and value.isfinite().all():
                sizes[i] = torch.maximum(sizes[i], value.norm())
    if problem.divisors:
        for i, x in enumerate(exact):
            numbers = [number for number in problem.divisors(x).flatten().tolist() if number > 0] or [1.0]
            if problem.divisors is distances:
                # An angle is a difference of squared distances over a product of distances.
                sizes[0] = sizes[0] + 1e-3 * problem.terms * max(numbers) / min(numbers)
            sizes[1 + i] = sizes[1 + i] + 10 * sizes[0] / min(numbers)
    return sizes


def within(value: Tensor, eager: Tensor, exact: Tensor, floor: Tensor, overflows: bool, what: str) -> None:
    if not value.isfinite().all():
        assert overflows or not eager.isfinite().all(), f"{what} is not finite, the reference's is"
        return
    error, of_eager = ((x.double() - exact).norm() for x in (value, eager))
    tolerance = FLOAT64_TOLERANCE if value.dtype == torch.float64 else FLOAT32_FLOOR
    if value.dtype in HALF_DTYPES:
        tolerance = torch.finfo(value.dtype).eps
    allowed = 4 * of_eager.nan_to_num(torch.inf, torch.inf) + tolerance * (exact.norm() + floor)
    smallest = torch.finfo(value.dtype).smallest_normal * max(1, value.numel())
    assert error <= allowed + smallest, f"{what}: error {error:.3g}, allowed {allowed:.3g}, exact {exact.norm():.3g}"
