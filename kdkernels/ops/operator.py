"""Operators and their kernels. Calls, explanations, tests and pages read these descriptions.

A *kernel* is a registered function: its schema, and its fake, which gives the shapes of its results. An *operator* is
what a loss calls: its kernels, its reference in plain PyTorch, and how its gradient comes about.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from .. import backends, native
from ..types import BACKENDS, Backend
from .autograd import (
    BackwardRule,
    ForwardRule,
    LossWithGradients,
    WithBackwardKernel,
    differentiable,
    distinct,
    needs_gradient,
)
from .tuning import Large

KERNELS: dict[str, Kernel] = {}
OPERATORS: dict[str, Operator] = {}


class Kernel:
    """A registered function: ``kdkernels::name`` in C++ and CUDA, ``kdkernels_triton::name`` in Triton, and
    ``kdkernels_library::name`` by PyTorch's matrix products.

    Its C++ file declares the same schema, so that programs without Python have it; loading compares the two.
    """

    def __init__(self, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
        self.schema = schema
        self._check = check
        self._fake = fake
        self.name, _, rest = schema.partition("(")
        arguments, _, self._results = rest.partition(")")
        self._arguments = arguments.split(", ")
        self._takes_tf32 = self._arguments[-1] == "bool tf32=False"
        self._is_number = [text.startswith(("float ", "float[] ")) for text in self._arguments]
        names = [argument.split()[-1].partition("=")[0] for argument in self._arguments]
        self._checked = [names.index(name) for name in inspect.signature(check).parameters]
        # Computes the arguments that depend on sizes, which a graph of torch.compile does not know.
        self.completed: Callable[[list[Any], str], list[Any]] | None = None
        self.left_open = ""  # the argument among them that is a bool: it is None until it is known
        KERNELS[self.name] = self

    def check(self, *arguments: Any) -> None:
        """Raise ``RuntimeError`` unless the kernel can run a call, in the words of ``csrc/checks``."""
        self._check(*(arguments[i] for i in self._checked))

    def fake(self, *arguments: Any) -> Any:
        """Check a call, and allocate its results."""
        self.check(*arguments)
        return self._fake(*arguments)

    def registered(self, backend: str) -> Callable[..., Any]:
        """Return the function that ``backend`` registered."""
        namespace = native.ops if backend == "native" else getattr(torch.ops, f"kdkernels_{backend}")
        function: Callable[..., Any] = getattr(namespace, self.name).default
        return function

    def sized(self, backend: str) -> Callable[..., Any]:
        """Return the registered function. In a graph of torch.compile, return its variant that takes symbolic sizes."""
        if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            return self.registered(backend)
        variant: Callable[..., Any] = getattr(torch.ops.kdkernels_traced, f"{backend}_{self.name}").default
        return variant

    def bind(
        self, backend: str, first: int, settings: Sequence[Any], mask: Tensor | None = None
    ) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...]]:
        """Prepare a call with ``settings`` from the argument number ``first`` on.

        Returns the registered function, the settings, and the arguments that come last, after the flags.

        torch.compile takes a number in the call of an operator as a constant, and compiles again for another value.
        Its graphs therefore call a variant of the function, which takes all numbers in one tensor. The variant also
        takes a mask of the rows that count.
        """
        last = (native.allows_tf32(),) if self._takes_tf32 else ()
        is_number = self._is_number[first : first + len(settings)]
        tracing = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        if mask is None and not (tracing and any(is_number)):
            return self.registered(backend), tuple(settings), last
        numbers: list[Any] = []
        for setting, moved in zip(settings, is_number, strict=True):
            if moved:
                numbers += setting if isinstance(setting, (list, tuple)) else [setting]
        # A product with a tensor, unlike torch.tensor(number), keeps the number out of the graph's constants.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        others = tuple(setting for setting, moved in zip(settings, is_number, strict=True) if not moved)
        variant = getattr(torch.ops.kdkernels_traced, f"{backend}_{self.name}").default
        return variant, others, (*last, torch.stack([one * number for number in numbers]), mask)

    def register(self, backend: str, namespace: str) -> None:
        """Register the fake, the batching rule, and the variant that graphs of torch.compile call."""
        name = f"{namespace}::{self.name}"
        library.register_fake(name)(self.fake)
        batching = functools.partial(_one_by_one, self.registered(backend))
        library.register_vmap(name, batching, lib=_fragment(namespace))
        if any(self._is_number):
            self._register_variant(backend)
        elif "int[] shape" in self.schema:  # LibTorch's stable ABI has no SymInt, so only Python can declare them
            variant = f"kdkernels_traced::{backend}_{self.name}"
            schema = self.schema.removeprefix(self.name)
            library.define(variant, schema.replace("int[] shape", "SymInt[] shape"))
            library.impl(variant, ("CPU", "CUDA"))(self.registered(backend))
            library.register_fake(variant)(self.fake)

    def _register_variant(self, backend: str) -> None:
        """Register ``kdkernels_traced::<backend>_<name>``, whose numbers come in one tensor at the end, before the mask
        of the rows that count.
        """
        moved = self._is_number
        arguments = [text.replace(f"bool {self.left_open}", f"bool? {self.left_open}") for text in self._arguments]
        kept = [text.partition("=")[0] for text, number in zip(arguments, moved, strict=True) if not number]
        scalars = sum(text.startswith("float ") for text in self._arguments)

        def in_order(others: Sequence[Any], numbers: list[float]) -> list[Any]:
            """Return all arguments in the kernel's order. At most one of them is a list of numbers."""
            other, number, length = iter(others), iter(numbers), len(numbers) - scalars
            return [
                next(number)
                if text.startswith("float ")
                else list(itertools.islice(number, length))
                if text.startswith("float[] ")
                else next(other)
                for text in self._arguments
            ]

        def run(*arguments: Any) -> Any:
            *others, numbers, mask = arguments
            ordered = in_order(others, numbers.tolist())
            ordered = self.completed(ordered, backend) if self.completed else ordered
            if mask is None:
                return self.registered(backend)(*ordered)
            return _of_counted_rows(self.registered(backend), self._fake, ordered, mask)

        def fake(*arguments: Any) -> Any:
            *others, numbers, _ = arguments
            allocate = self._fake if self.completed else self.fake  # incomplete arguments cannot be checked
            return allocate(*in_order(others, [1.0] * numbers.numel()))

        name = f"kdkernels_traced::{backend}_{self.name}"
        library.define(name, f"({', '.join([*kept, 'Tensor numbers', 'Tensor? counted'])}){self._results}")
        library.impl(name, ("CPU", "CUDA"))(run)
        library.register_fake(name)(fake)
        batching = functools.partial(_one_by_one, getattr(torch.ops.kdkernels_traced, f"{backend}_{self.name}").default)
        library.register_vmap(name, batching, lib=_fragment("kdkernels_traced"))


def kernel(schema: str, check: Callable[..., None]) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a kernel; the decorated function is its fake. ``check`` gets the arguments that its parameters name."""
    return functools.partial(Kernel, schema, check)


def register_native() -> None:
    """Register the native kernels, which the library has declared, with PyTorch.

    Raises ``RuntimeError`` if the library was built from other sources.
    """
    for known in KERNELS.values():
        packet = getattr(torch.ops.kdkernels, known.name, None)
        found = None if packet is None else packet.default._schema
        if found is not None and found != torch._C.parse_schema(f"kdkernels::{known.schema}"):
            raise RuntimeError(f"it declares {found}, expected {known.schema}")
    missing = [name for name in KERNELS if not hasattr(torch.ops.kdkernels, name)]
    if missing:
        raise RuntimeError(f"it does not declare {', '.join(missing)}")
    for known in KERNELS.values():
        known.register("native", "kdkernels")


def in_triton(known: Kernel) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated launcher, which takes the kernel's arguments, as its implementation in Triton."""
    return functools.partial(_register_in_python, known, "triton")


def by_library(known: Kernel) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function, which takes the kernel's arguments, as its implementation by PyTorch's matrix
    products.
    """
    return functools.partial(_register_in_python, known, "library")


def _register_in_python(known: Kernel, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
    namespace = f"kdkernels_{backend}"
    library.define(f"{namespace}::{known.name}", known.schema.removeprefix(known.name))

    def checked(*arguments: Any) -> Any:
        known.check(*arguments)
        return run(*arguments)

    library.impl(f"{namespace}::{known.name}", ("CPU", "CUDA"))(checked)
    known.register(backend, namespace)
    return run


@functools.cache
def _fragment(namespace: str) -> library.Library:
    """Return a library object that stays alive. PyTorch removes registrations when their library object is deleted."""
    return library.Library(namespace, "FRAGMENT")


def _one_by_one(run: Callable[..., Any], info: Any, dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
    """Run a kernel once per entry of a batch. This is the batching rule of every kernel for ``torch.vmap``."""

    def pick(argument: Any, dim: Any, index: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [pick(*one, index) for one in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, index)

    calls = [run(*(pick(*one, i) for one in zip(arguments, dims, strict=True))) for i in range(info.batch_size)]
    return _stacked(calls)


def _of_counted_rows(
    run: Callable[..., Any], allocate: Callable[..., Any], arguments: Sequence[Any], mask: Tensor
) -> tuple[Tensor, ...]:
    """Run a kernel of a loss on the rows that count. The other rows have gradient 0."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "mask must be None while a CUDA graph is captured, because the kernel reads on the host how many samples "
            "count; use backend='reference'"
        )
    results: tuple[Tensor, ...] = tuple(result.zero_() for result in allocate(*arguments))
    rows = mask.nonzero()[:, 0]
    if len(rows):
        of_rows = run(*(x.index_select(0, rows) if isinstance(x, Tensor) else x for x in arguments))
        for result, computed in zip(results, of_rows, strict=True):
            if result.dim() == 0:
                result.copy_(computed)
            elif len(result):  # an unwanted gradient is empty
                result.index_copy_(0, rows, computed)
    return results


def _stacked(results: Sequence[Any]) -> tuple[Any, Any]:
    """Stack results of equal structure. Return the stack and, in the same structure, its batch dimensions."""
    if isinstance(results[0], Tensor):
        return torch.stack(list(results)), 0
    parts = [_stacked(of_one) for of_one in zip(*results, strict=True)]
    structure = type(results[0])
    return structure(value for value, _ in parts), structure(dim for _, dim in parts)


class Explained(Exception):  # noqa: N818  # it ends a call, and is no error
    """Ends a call that ``kdkernels.explain`` makes, at the point where the kernels would start."""

    def __init__(self, operator: Operator, backend: str, obstacles: dict[str, str], sums: Sequence[Any]) -> None:
        super().__init__("a call was explained, not made")
        self.operator, self.backend, self.obstacles, self.sums = operator, backend, obstacles, sums


explaining = False


@dataclass(frozen=True)
class Operator:
    """Describe one operator.

    Attributes:
        name: the name of its room, of its C++ and CUDA file, of its test and of its benchmark.
        kernels: the forward kernel, and the backward kernel if the gradient has one. An operator that only the
            reference computes has no kernels.
        native: the devices that have native kernels.
        triton: whether the operator has Triton kernels.
        large: the sizes from which "auto" takes PyTorch's matrix products on a GPU, if the operator has this form.
        memory: the extra memory of a call, in numbers.
        over_ranks: what the processes of a group exchange, in numbers. It is empty if the operator takes no group.
    """

    name: str
    kernels: tuple[Kernel, ...]
    native: tuple[str, ...] = ("cpu", "cuda")
    triton: bool = True
    large: Large | None = None
    memory: str = ""
    over_ranks: str = ""

    def __post_init__(self) -> None:
        if self.kernels:
            OPERATORS[self.name] = self

    def check_backend(self, backend: str) -> None:
        """Check the name of a backend, and whether the operator has kernels for it."""
        backends.requested(backend)
        has = {"native": bool(self.native), "triton": self.triton, "library": self.large is not None}
        if not has.get(backend, True):
            raise RuntimeError(f"backend={backend!r} cannot run here: {self.name} has no such kernels")

    def choose(
        self,
        backend: str,
        tensor: Tensor,
        sums: Callable[[str], Sequence[Any]] | None = None,
        size: Callable[[], tuple[int, int]] | None = None,
    ) -> str:
        """Choose the backend that runs a call on the device of ``tensor``: never "auto".

        Args:
            backend: the backend that the call names.
            tensor: a tensor of the call.
            sums: a function for ``explain``. From the backend it makes the sums of each stage, with their costs.
            size: returns the rows and the columns of both networks. None if the call has no form by matrix products.
        """
        limits = self.native, self.triton, self.large is not None and size is not None
        chosen = backends.choose(backend, tensor, *limits, self._is_large(tensor, size))
        if explaining:
            reasons = {other: backends.why_not(other, tensor, *limits) for other in BACKENDS[1:]}
            obstacles = {other: reason for other, reason in reasons.items() if reason is not None}
            raise Explained(self, chosen, obstacles, sums(chosen) if sums else [])
        return chosen

    def automatic(self, tensor: Tensor) -> Backend:
        """Return the backend that "auto" takes outside of blocks that name one."""
        return backends.automatic(tensor, self.native, self.triton)

    @property
    def on_gpu(self) -> str:
        """Return in words which kernels "auto" takes on a GPU, and from which size on."""
        small = "CUDA, or Triton if CUDA was not built" if self.triton else "CUDA"
        if "cuda" not in self.native:
            small = "Triton" if self.triton else "reference"
        if self.large is None:
            return small
        return f"library from {self.large.rows:,} rows and d_S + d_T = {self.large.columns:,} on; below, {small}"

    def _is_large(self, tensor: Tensor, size: Callable[[], tuple[int, int]] | None) -> bool:
        if self.large is None or size is None or not tensor.is_cuda:  # on the CPU, a compiled graph needs no guard
            return False
        rows, columns = size()
        return rows >= self.large.rows and columns >= self.large.columns

    def loss(
        self,
        chosen: str,
        tensors: Sequence[Tensor | None],
        settings: Sequence[Any],
        reference: Callable[..., Tensor],
        mask: Tensor | None = None,
        kernel: int = 0,
    ) -> Tensor:
        """Compute a scalar loss by a kernel, by default the first, which also computes the gradients to ``tensors``.

        Reference and kernel take first the tensors, then the settings. The kernel then takes a flag for each gradient.
        Tensors that have no gradient, such as labels and masks, have no flag. An optional tensor may be None.
        With ``mask``, the loss is the loss of the rows that the mask counts. The kernel gets only these rows, and the
        reference takes the mask last.
        """
        if chosen == "reference":
            return self._by_reference(reference, tensors, settings if mask is None else (*settings, mask))
        if chosen in ("triton", "library"):
            load(self.name, chosen)
        run, settings, last = self.kernels[kernel].bind(chosen, len(tensors), settings, mask)
        if needs_gradient(*tensors):
            loss: Tensor = LossWithGradients.apply(run, settings, last, *distinct(tensors))[0]
        else:
            loss = run(*tensors, *settings, *[False] * sum(map(differentiable, tensors)), *last)[0]
        return loss

    def result(
        self,
        chosen: str,
        tensors: Sequence[Tensor],
        settings: Sequence[Any],
        reference: Callable[..., Tensor],
        rules: tuple[ForwardRule, BackwardRule],
    ) -> Tensor:
        """Compute a result whose gradient has its own kernel, by the rules of ``WithBackwardKernel``.

        The rules get the backend and the settings as constants.
        """
        if chosen == "reference":
            return self._by_reference(reference, tensors, settings)
        if chosen in ("triton", "library"):
            load(self.name, chosen)
        constants = chosen, *settings
        if needs_gradient(*tensors):
            result: Tensor = WithBackwardKernel.apply(*rules, constants, *distinct(tensors))[0]
            return result
        return rules[0](constants, tensors, [False] * len(tensors))[0][0]

    @staticmethod
    def _by_reference(
        reference: Callable[..., Tensor], tensors: Sequence[Tensor | None], settings: Sequence[Any]
    ) -> Tensor:
        with full_precision(next(x.device for x in tensors if x is not None)):
            return reference(*tensors, *settings)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, which would run the reference's products in half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def load(name: str, backend: str) -> None:
    """Import the Triton kernels of a room, or its matrix products. The import registers them."""
    importlib.import_module(f"kdkernels.ops.{name}.{backend}")


load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in native.py
