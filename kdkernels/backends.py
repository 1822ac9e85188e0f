"""Which backend runs a call: the reference, the native library or Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.autograd import forward_ad

from . import native

BACKENDS = ("auto", "reference", "native", "triton")
# What "auto" takes, the first that runs: on a GPU, of native kernels and Triton's, those that bench/results has as
# faster on the published sizes. Neither has been measured yet. Until then native ones, for what can be counted: LKD
# launches 5 kernels for the stages of CIFAR where Triton launches 27, each from Python, and float32 is multiplied on
# tensor cores, in three products that keep its accuracy, where Triton multiplies it outside them.
PREFERRED = {"cpu": ("native",), "cuda": ("native", "triton")}

# A plain module variable, like the flags of torch.backends: torch.compile reads and guards it.
_default = "auto"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Make ``backend`` the choice of every call in the block that does not name one itself.

    Like the flags of ``torch.backends`` this holds for the whole process, not for one thread.
    """
    global _default
    _check(backend)
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def load_operators() -> None:
    """Load all operators that can be, which otherwise the first call that wants them does.

    ``torch.export.load`` wants them before: a saved program has operators of the library that ran where it was traced.
    """
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        native.why_not(torch.device(device, 0))
    if importlib.util.find_spec("triton"):
        for path in Path(__file__).parent.glob("ops/*/triton.py"):
            importlib.import_module(f"kdkernels.ops.{path.parent.name}.triton")


def choose(backend: str, *tensors: torch.Tensor, native_on: tuple[str, ...] = ("cpu", "cuda")) -> str:
    """The backend that runs a call on ``tensors``: never "auto". ``native_on`` names the devices of its native kernels.

    Raises ``RuntimeError`` when the backend asked for by name cannot run, saying why.
    """
    backend = asked(backend)
    if backend != "auto":
        reason = why_not(backend, *tensors, native_on=native_on)
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
        return backend
    for preferred in PREFERRED.get(tensors[0].device.type, ("triton",)):
        if why_not(preferred, *tensors, native_on=native_on) is None:
            return preferred
    return "reference"


def asked(backend: str) -> str:
    """The backend that a call names, or else its block; "auto" if neither does."""
    _check(backend)
    return _default if backend == "auto" else backend


def why_not(backend: str, *tensors: torch.Tensor, native_on: tuple[str, ...] = ("cpu", "cuda")) -> str | None:
    """Why ``backend`` cannot run on ``tensors``, in one sentence; None when it can."""
    if backend == "reference":
        return None
    if transformed():
        return "the transforms of torch.func (grad, vmap, jvp) and forward mode see through operations of PyTorch alone"
    if exporting() and torch.is_grad_enabled():
        return "torch.export leaves out the gradients of kernels; under torch.no_grad() it keeps the kernels"
    device = tensors[0].device
    if backend == "native" and device.type == "cuda" and "cuda" not in native_on:
        return "this operator has no native kernels for cuda tensors yet"
    return native.why_not(device) if backend == "native" else _why_not_triton(device)


def transformed() -> bool:
    """Whether a transform of torch.func or forward mode is at work. PyTorch has no public way to ask."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether torch.export traces, but for its strict mode: within TorchDynamo PyTorch 2.11 always says so."""
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
