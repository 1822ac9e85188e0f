"""Large products by PyTorch's matmul: the contracts of the backend "library", and float32 in bfloat16 planes.

The tests run on the CPU. They multiply float32 in planes, as a GPU does, unless they say otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_matches, exactly, loss_and_gradients, relative_error
from losses import LOSSES, runs_on
from torch import Tensor

pytest.register_assert_rewrite("test_contracts")

from test_contracts import (  # noqa: E402, F401
    by_reference,
    kernel_calls,
    learning,
    test_autocast_changes_nothing,
    test_compiled_into_one_graph,
    test_dtypes,
    test_gradients_where_wanted,
    test_not_a_number_comes_out,
    test_opcheck,
    test_reruns_are_bitwise_equal,
    test_sizes,
)

import kdkernels  # noqa: E402
from kdkernels import backends  # noqa: E402
from kdkernels.ops import library, tuning  # noqa: E402
from kdkernels.ops.congruence import congruence  # noqa: E402
from kdkernels.ops.congruence.plan import Coefficients, Problem, size_of  # noqa: E402
from kdkernels.ops.operator import OPERATORS  # noqa: E402

Rows = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def planes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "has_bfloat16_tensor_cores", lambda _: True)
        yield


@pytest.fixture
def backend() -> str:
    return "library"


@pytest.fixture(params=[name for name in LOSSES if runs_on(name, "library")])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "has_bfloat16_tensor_cores", lambda _: True)
        return kernel_calls("library", "cpu")


# Strips ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_planes", [True, False])
def test_strips(loss, in_planes, monkeypatch):
    """Several strips, with planes and without. The last strip is short."""
    monkeypatch.setattr(library, "has_bfloat16_tensor_cores", lambda _: in_planes)
    monkeypatch.setattr(tuning, "LIBRARY_STRIP", 2**9)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert_matches(loss.function, by_reference(loss.function), *learning(*loss.draw(21, 6, dtype)))


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_relations_of_patches(form, monkeypatch):
    """Every sum of a congruence, together and by itself."""
    monkeypatch.setattr(tuning, "LIBRARY_STRIP", 2**9)
    x, y = torch.randn(42, 13, requires_grad=True), torch.randn(42, 20, requires_grad=True)
    one = torch.eye(4).tolist()
    for coefficients in ([1.0, 0.5, 2.0, 0.3], *one):
        settings = {"positions": 3, "coefficients": coefficients, "form": form}
        run = functools.partial(congruence, **settings)
        assert_matches(functools.partial(run, backend="library"), functools.partial(run, backend="reference"), x, y)


def test_strips_cover_all_rows():
    for sets, rows in ((1, 1), (1, 1000), (7, 300), (1, 100_000), (10**7, 1)):
        strips = list(library.strips(sets, rows))
        assert [row for strip in strips for row in range(strip.start, strip.stop)] == list(range(rows))
        lines = max(strip.stop - strip.start for strip in strips)
        assert sets * lines * rows <= tuning.LIBRARY_STRIP or lines == 1


# Planes ---------------------------------------------------------------------------------------------------------------


def test_neighbours_of_the_chain_are_the_six_largest_products():
    """The window of each plane holds the planes that it is multiplied with."""
    neighbours = list(zip(library.CHAIN, library.CHAIN[1:], strict=False))
    assert sorted(neighbours) == [(i, j) for i in range(3) for j in range(3 - i)]
    sums = [i + j for i, j in neighbours]
    assert sums[-1] == 0
    for j, first in enumerate(library.WINDOWS):
        assert set(library.CHAIN[first : first + 3 - j]) == set(range(3 - j))


def test_three_planes_are_a_float32():
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    assert torch.equal(sum(plane.double() for plane in library.split(x, 3)).float(), x)
    assert all(plane.dtype == torch.bfloat16 for plane in library.split(x, 3))


def product_error(compute: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    exact = rows.double() @ rows.double().T
    return relative_error(compute(rows), exact)


def by_planes(rows: Tensor) -> Tensor:
    everything = slice(None)
    return library.Rows.of(rows).sets(lambda x: x[None]).products(everything, everything)[0]


def test_planes_are_as_accurate_as_float32():
    """The six products have the error of float32's own product, up to a factor, and three products have not."""
    rows = torch.nn.functional.normalize(torch.randn(160, 256), dim=1)
    own, six = (product_error(f, rows) for f in (lambda x: x @ x.T, by_planes))
    assert six <= 1e-6
    assert six <= 6 * own

    def by_three(x: Tensor) -> Tensor:
        high, low = (plane.float() for plane in library.split(x, 2))
        return high @ high.T + high @ low.T + low @ high.T

    assert product_error(by_three, rows) > 4 * six


def test_nearly_equal_networks():
    """The difference of two Gram matrices keeps as many digits as float32's own."""
    teacher = torch.nn.functional.normalize(torch.randn(160, 256), dim=1)
    student = torch.nn.functional.normalize(teacher + 1e-3 * torch.randn(160, 256), dim=1).requires_grad_()
    errors = []
    for backend in ("library", "reference"):
        run = functools.partial(congruence, form="gram", backend=backend)
        loss, (gradient, _) = loss_and_gradients(run, student, teacher)
        exact, (correct, _) = loss_and_gradients(
            functools.partial(congruence, form="gram", backend="reference"), *exactly(student, teacher)
        )
        errors.append((relative_error(loss, exact), relative_error(gradient, correct)))
    (loss, gradient), (_, own) = errors
    assert gradient <= max(6 * own, 1e-5)
    assert loss <= 1e-4


def test_tf32_is_permission_to_multiply_directly():
    x = torch.randn(4, 3)
    assert library.in_planes(x, tf32=False)
    assert not library.in_planes(x, tf32=True)
    assert not library.in_planes(x.double(), tf32=False)


# Where it runs --------------------------------------------------------------------------------------------------------


def test_auto_takes_it_for_large_problems_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends.native, "why_not", lambda _: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_cuda=True)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), is_cuda=False)
    for operator in OPERATORS.values():
        if operator.large is None:
            continue
        rows, columns = operator.large
        small = "native" if "cuda" in operator.native else "triton"
        monkeypatch.setattr(backends, "_why_not_triton", lambda _: None)
        for size, expected in (
            ((rows, columns), "library"),
            ((rows - 1, columns), small),
            ((rows, columns - 1), small),
            (None, small),
        ):
            assert operator.choose("auto", on_gpu, size=size and (lambda size=size: size)) == expected
        assert operator.choose("auto", on_cpu, size=lambda size=(rows, columns): size) == "native"


def test_the_size_counts_products():
    """A Gram form counts by its rows, and a feature form as the Gram form with as many products."""
    coefficients = Coefficients(1.0, 0.0, 0.0, 0.0)
    problem = Problem(coefficients, 4096, 1, 256, 256, True, False)
    (rows, columns), (fewer, _) = size_of("gram", problem), size_of("feature", problem)
    assert columns == 512
    assert 4096 <= rows <= 4300
    assert fewer < 2048


def test_it_comes_before_the_reference_on_a_gpu(monkeypatch):
    """Without compiled kernels and without Triton, PyTorch's products still need no N x N matrix."""
    monkeypatch.setattr(backends.native, "why_not", lambda _: "not built")
    monkeypatch.setattr(backends, "_why_not_triton", lambda _: "not installed")
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert backends.choose("auto", on_gpu, library=True) == "library"
    assert backends.choose("auto", on_gpu) == "reference"


def test_what_has_no_such_form_says_so():
    x = torch.randn(3, 4)
    for call in (
        lambda: kdkernels.kd_loss(x, x, backend="library"),
        lambda: kdkernels.correlation_congruence_loss(x, x, kernel="mmd", backend="library"),
    ):
        with pytest.raises(RuntimeError, match=r"backend='library' cannot run here.*matrix products"):
            call()


def test_explain_names_it():
    x = torch.randn(3, 4)
    assert kdkernels.explain("correlation_congruence_loss", x, x, backend="library").backend == "library"
    assert "library" in kdkernels.explain("kd_loss", x, x).obstacles
