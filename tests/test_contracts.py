"""The contracts of every operator, over the table of losses and every backend. A file per operator has what is special.

Against float64, the reference gives the exact result, which each operator's file compares with the definition.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from helpers import (
    DTYPES,
    FLOAT32_TOLERANCE,
    HALF_DTYPES,
    KernelCalls,
    assert_close,
    assert_matches,
    exactly,
    loss_and_gradients,
    needs_native,
    relative_error,
    results_of,
)
from losses import LOSSES, PROJECTIONS, Loss, masked, operators, runs_on
from torch import Tensor, library
from torch.utils._pytree import tree_leaves, tree_map_only

import kdkernels
from kdkernels import native
from kdkernels.ops.operator import KERNELS, OPERATORS


def by_reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the reference of a loss on the CPU. On a GPU, average pooling has no deterministic gradient."""

    def run(*inputs: Tensor) -> Tensor:
        with kdkernels.use_backend("reference"):
            return function(*(x.cpu() for x in inputs))

    return run


def learning(*inputs: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs]


def check(loss: Loss, *inputs: Tensor) -> None:
    """Assert that loss and gradients equal the reference's in float64, with the right dtypes."""
    dtypes = {x.dtype for x in inputs}
    if not loss.separate or torch.float64 not in dtypes or len(dtypes) == 1:
        assert_matches(loss.function, by_reference(loss.function), *inputs)
        return
    # The part of the network that is not in float64 is computed in float32.
    found = results_of(loss.function, *inputs)
    expected = results_of(by_reference(loss.function), *exactly(*inputs))
    for result, exact, dtype in zip(found, expected, (torch.float64, *(x.dtype for x in inputs)), strict=True):
        assert result.dtype == dtype
        assert relative_error(result, exact) <= max(FLOAT32_TOLERANCE, torch.finfo(dtype).eps)


def assert_same(first: tuple, second: tuple) -> None:
    """Assert that a loss and its gradients are bitwise equal."""
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_has_every_operator_and_every_public_loss():
    public = {function: getattr(kdkernels, function) for function in kdkernels.functional.__all__}
    public = {f.__code__: name for name, f in public.items() if "backend" in f.__code__.co_varnames}
    called = set()

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in public:
            called.add(public[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(trace)
    try:
        for loss in LOSSES.values():
            loss.function(*loss.draw())
    finally:
        sys.setprofile(before)
    assert called == set(public.values())
    in_a_projection = {"convolution"}
    assert set(OPERATORS) == set().union(in_a_projection, *map(operators, LOSSES))


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(loss, dtype):
    """Half precision is read as it is, and no product or sum of it is computed in less than float32."""
    for other in DTYPES:
        student, teacher = loss.draw()
        check(loss, *learning(student.to(dtype), teacher.to(other)))


@pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 6), (2, 1), (2, 33), (9, 17), (19, 3), (35, 8)], ids=str)
def test_sizes(loss, batch, width):
    """Small batches may have a loss or a gradient of 0, so the error is absolute where the exact result is small."""
    inputs = learning(*loss.draw(batch, width))
    found, gradients = loss_and_gradients(loss.function, *inputs)
    expected, correct = loss_and_gradients(by_reference(loss.function), *exactly(*inputs))
    for result, exact in zip((found, *gradients), (expected, *correct), strict=True):
        assert result.shape == exact.shape
        assert (result.cpu() - exact.cpu()).norm() <= 4 * FLOAT32_TOLERANCE * exact.norm().cpu().clamp(min=1)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda x: torch.cat([x, x], -1)[..., 1 : 1 + x.shape[-1]],
    "every second sample": lambda x: torch.cat([x, x])[::2],
    "every second number": lambda x: torch.stack([x, x], -1)[..., 1],
    "overlapping": lambda x: x.flatten().as_strided(x.shape, [max(1, stride // 2) for stride in x.stride()]),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, 1 : 1 + x.shape[1]
    ],
    "one line": lambda x: x[:, :, :1].expand(x.shape),
}
OF_MAPS = ("channels_last", "channels of channels_last", "one line")


@pytest.mark.parametrize("view", VIEWS)
def test_strides(loss, view):
    """Strided inputs on one side, on the other side, and on both."""
    student, teacher = loss.draw(8, 6)
    if view in OF_MAPS and student.dim() != 4:
        pytest.skip("the inputs are no maps")
    viewed = VIEWS[view](student), VIEWS[view](teacher)
    for own, other in ((viewed[0], teacher), (student, viewed[1]), (viewed[0].bfloat16(), viewed[1])):
        check(loss, *learning(own, other))


def test_one_sample_for_all(loss):
    """Inputs of stride 0 over the batch, in the network that does not learn."""
    student, teacher = loss.draw()
    check(loss, student.requires_grad_(), teacher[:1].expand(teacher.shape))
    check(loss, student.detach()[:1].expand(student.shape), teacher.requires_grad_())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number_comes_out(name, loss, value):
    """The number is the first, one in the middle, or the last of the last sample."""
    for batch, broken, place in itertools.product((1, 7), (0, 1), (0, 0.5, 1)):
        if place == 0 and loss.function is masked:
            continue  # outside of the box
        inputs = loss.draw(batch, 37)
        sample = inputs[broken][-1].view(-1)
        sample[int(place * (len(sample) - 1))] = value
        result, gradients = loss_and_gradients(loss.function, *learning(*inputs))
        if value == -torch.inf and set() < operators(name) <= {"kd", "divergence", "top_k", "dkd", "dist"}:
            continue  # -inf is a class that a network does not have
        assert not result.isfinite()
        assert not gradients[broken].isfinite().all()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_autocast_changes_nothing(loss, dtype):
    """Squares of the inputs exceed the range of float16."""

    def mixed(*inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, dtype):
            return loss.function(*inputs)

    for of_inputs in (torch.float32, dtype):
        inputs = learning(*(300 * x for x in loss.draw(dtype=of_inputs)))
        plain, result = (loss_and_gradients(function, *inputs) for function in (loss.function, mixed))
        assert result[0].dtype == torch.float32
        assert result[0].isfinite()
        assert_same(plain, result)


def test_reruns_are_bitwise_equal(loss):
    inputs = learning(*loss.draw(67, 12))
    assert_same(*(loss_and_gradients(loss.function, *inputs) for _ in range(2)))


@needs_native
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_any_number_of_threads(loss, threads):
    """Sizes are not a multiple of a block. Sums may be split differently, but equally in every run."""
    inputs, before = learning(*loss.draw(67, 12)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same(*(loss_and_gradients(loss.function, *inputs) for _ in range(2)))
        check(loss, *inputs)
    finally:
        torch.set_num_threads(before)


def test_inputs_are_left_alone(loss):
    inputs = [x for batch in (1, 7) for x in loss.draw(batch)]
    before = [x.clone() for x in inputs]
    for pair in (inputs[:2], inputs[2:]):
        value = loss.function(*[x.requires_grad_() for x in pair])
        value.backward(retain_graph=True)
        (2 * value).backward()
    assert all(map(torch.equal, inputs, before))


# Autograd -------------------------------------------------------------------------------------------------------------


def flags(function: torch._ops.OpOverload, arguments: tuple) -> list[bool]:
    """Return the flags by which a call asks for gradients, first to the student and then to the teacher."""
    found = []
    for argument, value in zip(function._schema.arguments, arguments, strict=False):
        if argument.name == "wanted":
            found += map(bool, value)
        elif argument.name.startswith("grad_") and isinstance(value, bool):
            found.append(value)
    return found


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=2)), ids=str)
def test_gradients_where_wanted(loss, wanted):
    inputs = [x.requires_grad_(want) for x, want in zip(loss.draw(), wanted, strict=True)]
    with KernelCalls() as log:
        if any(wanted):
            check(loss, *inputs)
        else:
            assert not loss.function(*inputs).requires_grad
    for call in log.calls:
        of_call = flags(*call)
        if len(of_call) == 1:  # top_k takes only the student
            assert of_call == [wanted[0]]
            continue
        half = len(of_call) // 2
        assert of_call == half * [wanted[0]] + half * [wanted[1]]


def test_no_gradient_without_grad_mode(loss):
    """Validation under no_grad computes no gradient, and takes the kernels that inputs without gradients take."""
    inputs = loss.draw()
    with KernelCalls() as detached:
        expected = loss.function(*inputs)
    with KernelCalls() as log, torch.no_grad():
        found = loss.function(*learning(*inputs))
    assert not found.requires_grad
    assert torch.equal(found, expected)
    with torch.inference_mode():
        assert torch.equal(loss.function(*inputs), expected)
    assert log.names == detached.names
    for call, of_detached in zip(log.calls, detached.calls, strict=True):
        assert not any(flags(*call))
        # Plans and settings are the same too.
        plain, other = ([x for x in tree_leaves(args) if not isinstance(x, Tensor)] for _, args in (call, of_detached))
        assert plain == other


@pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
def test_a_second_derivative_raises(loss):
    """A wrong one would be silent. The result may reach the inputs in other ways."""
    for which in range(2):
        inputs = learning(*loss.draw())
        value = loss.function(*inputs)
        (gradient,) = torch.autograd.grad(value, inputs[which], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (inputs[which].sum() + value + gradient.square().sum()).backward()


def test_compiled_into_one_graph(loss):
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: 2 * loss.function(*x), fullgraph=True, backend="aot_eager")
    inputs = learning(*loss.draw())
    found, gradients = loss_and_gradients(compiled, *inputs)
    expected, correct = loss_and_gradients(lambda *x: 2 * loss.function(*x), *inputs)
    assert_close(found, expected)
    for gradient, exact in zip(gradients, correct, strict=True):
        assert gradient.dtype == exact.dtype
        assert_close(gradient, exact)


# Registration ---------------------------------------------------------------------------------------------------------


CALLS_OF_A_KERNEL = 6
CASES = (  # of both networks, and whether they learn
    ((torch.float32, "as drawn"), (torch.float32, "as drawn"), (True, True)),
    ((torch.bfloat16, "transposed"), (torch.float32, "batch inside"), (True, False)),
    ((torch.float32, "channels_last"), (torch.float16, "transposed"), (False, True)),
    ((torch.float64, "batch inside"), (torch.float64, "channels_last"), (True, True)),
    ((torch.float32, "sliced"), (torch.float64, "as drawn"), (False, False)),
)


def kernel_calls(backend: str, device: str) -> dict[str, list[tuple]]:
    """Return the calls of every kernel by the table's losses, which differ in dtypes, strides or flags."""
    found: dict[str, dict[object, tuple]] = {}
    table = [loss._replace(device=device) for name, loss in LOSSES.items() if runs_on(name, backend, device)]
    if (backend, device) == ("native", "cpu"):
        table.append(PROJECTIONS)
    for loss, (*of_inputs, wanted) in itertools.product(table, CASES):
        inputs = []
        for x, (dtype, view), want in zip(loss.draw(), of_inputs, wanted, strict=True):
            fits = view != "as drawn" and (view != "channels_last" or x.dim() == 4)
            inputs.append((VIEWS[view](x.to(dtype)) if fits else x.to(dtype)).requires_grad_(want))
        if loss is PROJECTIONS:
            inputs = [x.detach().to(inputs[0].dtype).float() for x in inputs]
        with kdkernels.use_backend(backend), KernelCalls() as log:
            value = loss.function(*inputs)
            if value.requires_grad:
                (2 * value).backward()
        for function, arguments in log.calls:
            arguments = tree_map_only(Tensor, Tensor.detach, arguments)
            kind = [(x.dtype, x.stride()) if isinstance(x, Tensor) else x for x in tree_leaves(arguments)]
            found.setdefault(function._opname, {}).setdefault(str(kind), (function, arguments))
    return {name: list(calls.values()) for name, calls in found.items()}


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple]]:
    reason = native.why_not(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return kernel_calls("native", "cpu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(calls, kernel):
    """Schema, fake and compilation of every kernel, at arguments that losses call it with."""
    if kernel not in calls:
        pytest.skip("the backend has no such kernel")
    step = -(-len(calls[kernel]) // CALLS_OF_A_KERNEL)
    for function, arguments in calls[kernel][::step]:
        library.opcheck(function, arguments)


def test_every_kernel_is_called(calls):
    (namespace,) = {function.namespace for of_kernel in calls.values() for function, _ in of_kernel}
    assert set(calls) == {kernel for kernel in KERNELS if hasattr(getattr(torch.ops, namespace), kernel)}
