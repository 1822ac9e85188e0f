"""Load the native libraries on first use, or say why they cannot be loaded.

There is one library for the CPU, which also declares the operators, and one for CUDA.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

ops = torch.ops.kdkernels

_FOLDER = Path(__file__).parent
OLDEST_GPU = (8, 0)


def why_not(device: torch.device) -> str | None:
    """Return why native kernels cannot run on ``device``, in one sentence, or None if they can."""
    if device.type == "cpu":
        return _failure()
    if device.type == "cuda":
        return _cuda_failure(device.index)
    return f"the native library has no kernels for {device.type} tensors"


def built() -> list[Path]:
    """Return the libraries that exist: one per instruction set, and one for CUDA."""
    return sorted(_FOLDER.glob("_native_*.so"))


def cpu_library() -> Path:
    """Return the library for this processor. ATEN_CPU_CAPABILITY changes the choice as in PyTorch."""
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")
    return _FOLDER / f"_native_cpu_{level}.so"


def cuda_library() -> Path:
    return _FOLDER / "_native_cuda.so"


@functools.cache
def _load() -> str | None:
    path = cpu_library()
    if not path.exists():
        return "the native library was not built (KDKERNELS_BUILD=1 when installing turns the reason into an error)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native library does not load: {error}"
    from .ops.operator import register_native  # which needs this module

    try:
        register_native()
    except RuntimeError as error:
        return f"the native library was built from other sources than these, build it again: {error}"
    return None


@functools.cache
def _load_cuda() -> str | None:
    if not cuda_library().exists():
        return "the native CUDA library was not built (installing with KDKERNELS_BUILD=cuda tells why)"
    failure = _load()
    if failure is not None:
        return failure
    try:
        torch.ops.load_library(cuda_library())
    except OSError as error:
        return f"the native CUDA library does not load: {error}"
    return None


@functools.cache
def _check_gpu(index: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        wanted, found = ("{}.{}".format(*pair) for pair in (OLDEST_GPU, capability))
        return f"the native CUDA kernels need a GPU of compute capability {wanted}, this one has {found}"
    return None


def _failure() -> str | None:
    return _load()


def _cuda_failure(index: int | None) -> str | None:
    return _load_cuda() or _check_gpu(index)


def allows_tf32() -> bool:
    """Return whether PyTorch may round factors of float32 products on a GPU to tf32, by any of its settings.

    ``torch.get_float32_matmul_precision`` raises if only the newest setting was set. This function reads the newest
    setting.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compile calls these while it compiles, and treats the results as constants. Another precision makes it compile
# again. The attribute is set by hand, because the decorator torch.compiler.assume_constant_result imports all of
# torch._dynamo.
_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
