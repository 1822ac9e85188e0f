"""Choose the backend that runs a call: the reference, the native library, Triton or PyTorch's matrix products."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import forward_ad

from . import native
from .types import BACKENDS, Backend

# "auto" takes the first of these that runs. Neither native nor Triton kernels have been measured on a GPU yet. Until
# then the native kernels come first, because of what can be counted. LKD launches 5 kernels for the stages of CIFAR,
# where Triton launches 27, each from Python. Native kernels multiply float32 on tensor cores, in three products that
# keep its accuracy, where Triton does not use tensor cores for float32. Large products are PyTorch's on a GPU.
PREFERRED: dict[str, tuple[Backend, ...]] = {"cpu": ("native",), "cuda": ("native", "triton")}

# A plain module variable, like the flags of torch.backends: torch.compile reads and guards it.
_default: Backend = "auto"


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Make ``backend`` the default of every call in a ``with`` block. A call that names a backend keeps its own.

    Like the flags of ``torch.backends``, it holds for the whole process, not for one thread.

    Args:
        backend: "auto", "reference", "native", "triton" or "library".

    Raises:
        ValueError: if there is no backend of this name.

    Examples:
        >>> import torch
        >>> import kdkernels
        >>> student, teacher = torch.randn(8, 10), torch.randn(8, 10)
        >>> with kdkernels.use_backend("reference"):
        ...     print(kdkernels.explain("kd_loss", student, teacher).backend)
        reference
    """
    global _default
    _check(backend)
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def load_operators() -> None:
    """Load all operators that this machine can run. Otherwise the first call of a loss loads what it needs.

    Call it before ``torch.export.load``: an exported program uses operators of the library that ran when it was traced.

    Examples:
        >>> import kdkernels
        >>> kdkernels.load_operators()
    """
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        native.why_not(torch.device(device, 0))
    for backend in ("library", *(["triton"] if importlib.util.find_spec("triton") else [])):
        for path in Path(__file__).parent.glob(f"ops/*/{backend}.py"):
            importlib.import_module(f"kdkernels.ops.{path.parent.name}.{backend}")


def choose(
    backend: str,
    tensor: torch.Tensor,
    native_on: tuple[str, ...] = ("cpu", "cuda"),
    triton: bool = True,
    library: bool = False,
    large: bool = False,
) -> str:
    """Return the backend that runs a call on the device of ``tensor``, never "auto".

    Args:
        backend: the backend that the call names.
        native_on: the devices for which the operator has native kernels.
        triton: whether it has Triton kernels.
        library: whether the call has a form by PyTorch's matrix products.
        large: whether the call is so large that "auto" takes this form on a GPU.

    Raises ``RuntimeError`` if the named backend cannot run. The message says why.
    """
    backend = requested(backend)
    if backend != "auto":
        reason = why_not(backend, tensor, native_on, triton, library)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
        return backend
    return automatic(tensor, native_on, triton, library, large)


def automatic(
    tensor: torch.Tensor,
    native_on: tuple[str, ...] = ("cpu", "cuda"),
    triton: bool = True,
    library: bool = False,
    large: bool = False,
) -> Backend:
    """Return the backend that "auto" takes, by the arguments of ``choose``."""
    device = tensor.device.type
    preferred = PREFERRED.get(device, ("triton",))
    if device == "cuda":
        preferred = ("library", *preferred) if large else (*preferred, "library")
    for backend in preferred:
        if why_not(backend, tensor, native_on, triton, library) is None:
            return backend
    return "reference"


def requested(backend: str) -> str:
    """Return the backend that a call names, otherwise the backend of its block, or "auto"."""
    _check(backend)
    return _default if backend == "auto" else backend


def why_not(
    backend: str,
    tensor: torch.Tensor,
    native_on: tuple[str, ...] = ("cpu", "cuda"),
    triton: bool = True,
    library: bool = False,
) -> str | None:
    """Return why ``backend`` cannot run on the device of ``tensor``, in one sentence, or None if it can."""
    if backend == "reference":
        return None
    if transformed():
        return "the transforms of torch.func (grad, vmap, jvp) and forward mode see only through operations of PyTorch"
    if exporting() and torch.is_grad_enabled():
        return "torch.export leaves out the gradients of kernels; under torch.no_grad() it keeps the kernels"
    device = tensor.device
    if backend == "library":
        return None if library else "this call has no form by PyTorch's matrix products"
    if backend == "native" and device.type in ("cpu", "cuda") and device.type not in native_on:
        return f"this operator has no native kernels for {device.type} tensors yet"
    if backend == "triton" and not triton:
        return "this operator has no Triton kernels"
    return native.why_not(device) if backend == "native" else _why_not_triton(device)


def transformed() -> bool:
    """Return whether a torch.func transform or forward mode is active. PyTorch has no public function for this."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Return whether torch.export traces. Its strict mode is excluded, because PyTorch 2.11 always says yes within
    TorchDynamo.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _why_not_triton(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton is not installed ({error})"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton kernels need a GPU tensor; on CPU they only run under TRITON_INTERPRET=1"
    return None


_why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in native.py


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
