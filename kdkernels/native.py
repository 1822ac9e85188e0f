"""Loads the native libraries on first use, and says in words why when it cannot.

There is one for the CPU, which also declares the operators, and one for CUDA. Native operators are declared in
``csrc/library.cpp``; their fake kernels, which tell ``torch.compile`` the shapes of the results, are here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, library

ops = torch.ops.kdkernels

_FOLDER = Path(__file__).parent
OLDEST_GPU = (8, 0)


def why_not(device: torch.device) -> str | None:
    """Why native kernels cannot run on ``device``, in one sentence; None when they can."""
    if device.type == "cpu":
        return _failure()
    if device.type == "cuda":
        return _cuda_failure(device.index)
    return f"the native library has no kernels for {device.type} tensors"


def built() -> list[Path]:
    """The libraries that exist: one per instruction set, and one for CUDA."""
    return sorted(_FOLDER.glob("_native_*.so"))


def cpu_library() -> Path:
    """The library for this processor; ATEN_CPU_CAPABILITY moves the choice as it does in PyTorch."""
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
    try:
        _register_fakes()
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


def launches(tensor: Tensor) -> bool:
    """Whether native kernels have to be launched for it, as on a GPU."""
    return tensor.is_cuda


def allows_tf32() -> bool:
    """Whether PyTorch may round the factors of float32 products on a GPU to tf32, by whichever of its settings.

    ``torch.get_float32_matmul_precision`` raises where the newest of them, which is read here, was set by itself.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compile calls these while it compiles and takes the answers as constants; another precision makes it compile
# again. Set by hand, because the decorator torch.compiler.assume_constant_result imports all of torch._dynamo.
_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cuda_failure._dynamo_marked_constant = True  # type: ignore[attr-defined]
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fake(function: Callable) -> None:
    """Register the fake kernel of the operator of its name, which must have the same arguments."""
    name = function.__name__
    library.register_fake(f"kdkernels::{name}")(function)
    expected = list(inspect.signature(function).parameters)
    found = [argument.name for argument in getattr(ops, name).default._schema.arguments]
    if found != expected:
        raise RuntimeError(f"its {name} has the arguments {found}, expected {expected}")


def _register_fakes() -> None:
    @_fake
    def kd(
        student: Tensor, teacher: Tensor, temperature: float, scale: float, grad_student: bool, grad_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_of_logits(student, teacher, grad_student, grad_teacher)

    @_fake
    def icc_map(logits: Tensor) -> Tensor:
        return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=accumulation_dtype(logits))

    @_fake
    def icc_map_backward(grad_map: Tensor, logits: Tensor) -> Tensor:
        return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits))

    @_fake
    def icc_loss(
        student: Tensor, teacher: Tensor, per_sample: bool, scale: float, grad_student: bool, grad_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_of_logits(student, teacher, grad_student, grad_teacher)

    @_fake
    def patches(
        features: Tensor, k: int, mask: Tensor | None, threshold: float | None, resize: bool, eps: float
    ) -> tuple[Tensor, Tensor]:
        n, c, h, w = features.shape
        dtype = accumulation_dtype(features)
        rows = features.new_empty((n * k * k, c * -(-h // k) * -(-w // k)), dtype=dtype)
        return rows, features.new_empty((n * k * k,), dtype=dtype)

    @_fake
    def patches_backward(
        grad_rows: Tensor,
        rows: Tensor,
        norms: Tensor,
        shape: list[int],
        k: int,
        mask: Tensor | None,
        threshold: float | None,
        resize: bool,
    ) -> Tensor:
        return _new_maps(rows, shape, k)

    @_fake
    def congruence(
        x: Tensor,
        y: Tensor,
        positions: int,
        coefficients: list[float],
        plan: list[int],
        grad_x: bool,
        grad_y: bool,
        tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (x.shape if grad_x else (0,), y.shape if grad_y else (0,))
        return x.new_empty(()), x.new_empty(shapes[0]), x.new_empty(shapes[1])

    @_fake
    def gram(features: list[Tensor], tf32: bool = False) -> Tensor:
        batch = features[0].shape[0]
        return features[0].new_empty((len(features), batch, batch), dtype=accumulation_dtype(*features))

    @_fake
    def gram_backward(grad_matrices: Tensor, features: list[Tensor], tf32: bool = False) -> list[Tensor]:
        return [layer.new_empty((layer.shape[0], layer.shape[1:].numel())) for layer in features]

    @_fake
    def correlation_congruence(
        student: Tensor,
        teacher: Tensor,
        kernel: int,
        gamma: float,
        order: int,
        normalize: bool,
        scale: float,
        plan: list[int],
        grad_student: bool,
        grad_teacher: bool,
        tf32: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(student, teacher)
        shapes = (student.shape if grad_student else (0,), teacher.shape if grad_teacher else (0,))
        return (
            student.new_empty((), dtype=dtype),
            student.new_empty(shapes[0], dtype=dtype),
            student.new_empty(shapes[1], dtype=dtype),
        )

    @_fake
    def similarity_preserving(
        student: Tensor, teacher: Tensor, scale: float, feature: bool, grad_student: bool, grad_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(student, teacher)
        return (
            student.new_empty((), dtype=dtype),
            _new_samples(student, dtype) if grad_student else student.new_empty((0,), dtype=dtype),
            _new_samples(teacher, dtype) if grad_teacher else student.new_empty((0,), dtype=dtype),
        )

    @_fake
    def feature_mse(
        projected: list[Tensor], targets: list[Tensor], weights: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(*projected, *targets)
        return weights.new_empty((), dtype=dtype), weights.new_empty(weights.shape, dtype=dtype)

    @_fake
    def feature_mse_backward(
        grad_loss: Tensor,
        projected: list[Tensor],
        targets: list[Tensor],
        weights: Tensor,
        scale: float,
        wanted: list[int],
    ) -> list[Tensor]:
        orders = [map_shape(maps)[3] for maps in projected]
        return [
            new_like(maps, channels_last) if want else maps.new_empty((0,))
            for maps, channels_last, want in zip([*projected, *targets], [*orders, *orders], wanted, strict=True)
        ]

    @_fake
    def convolution(maps: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        n, _, h, w = maps.shape
        return maps.new_empty((n, h, w, weight.shape[1 if transposed else 0])).permute(0, 3, 1, 2)

    @_fake
    def convolution_weight(maps: Tensor, grad: Tensor, channels_last: bool) -> Tensor:
        weight = maps.new_empty((grad.shape[1], maps.shape[1], 3, 3))
        return weight.contiguous(memory_format=torch.channels_last) if channels_last else weight

    @_fake
    def rkd(
        student: Tensor,
        teacher: Tensor,
        distance_weight: float,
        angle_weight: float,
        grad_student: bool,
        grad_teacher: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _loss_of_logits(student, teacher, grad_student, grad_teacher)

    @_fake
    def local_correlation(
        students: list[Tensor],
        teachers: list[Tensor],
        masks: list[Tensor],
        k: list[int],
        weights: list[float],
        mean: bool,
        plans: list[int],
        threshold: float | None,
        resize: bool,
        eps: float,
        wanted: list[int],
        tf32: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        dtypes = [accumulation_dtype(*stage) for stage in zip(students, teachers, strict=True)]
        grads = []
        for i, (features, want) in enumerate(zip([*students, *teachers], wanted, strict=True)):
            side = k[i % len(k)]
            n, c, h, w = features.shape
            shape = (n * side**2, c * -(-h // side) * -(-w // side)) if want else (0,)
            grads.append(features.new_empty(shape, dtype=dtypes[i % len(k)]))
        return students[0].new_empty((), dtype=accumulation_dtype(*students, *teachers)), grads

    @_fake
    def local_correlation_backward(
        grad_loss: Tensor,
        grad_rows: list[Tensor],
        shapes: list[int],
        masks: list[Tensor],
        k: list[int],
        threshold: float | None,
        resize: bool,
    ) -> list[Tensor]:
        return [
            _new_maps(rows, shapes[4 * i : 4 * i + 4], k[i % len(k)]) if rows.dim() == 2 else rows.new_empty((0,))
            for i, rows in enumerate(grad_rows)
        ]


def _loss_of_logits(
    student: Tensor, teacher: Tensor, grad_student: bool, grad_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(student, teacher)
    shapes = (student.shape if grad_student else (0,), teacher.shape if grad_teacher else (0,))
    return student.new_empty((), dtype=dtype), *(student.new_empty(shape, dtype=dtype) for shape in shapes)


def map_shape(features: Tensor) -> tuple[int, int, int, bool]:
    """Channels, height, width and whether the channels are neighbours in memory, for the backward operators."""
    _, c, h, w = features.shape
    return c, h, w, features.stride(1) == 1 and c > 1 and h * w > 1


def _new_maps(rows: Tensor, shape: list[int], k: int) -> Tensor:
    """Gradient maps as the native operators allocate them: compact, in the memory format of the features."""
    c, h, w, channels_last = shape
    n = rows.shape[0] // k**2
    return rows.new_empty((n, h, w, c)).permute(0, 3, 1, 2) if channels_last else rows.new_empty((n, c, h, w))


def _new_samples(features: Tensor, dtype: torch.dtype) -> Tensor:
    """A compact gradient, channels last where every sample lies so in memory."""
    if features.dim() == 4:
        n, c, h, w = features.shape
        if c > 1 and h * w > 1 and features[:1].is_contiguous(memory_format=torch.channels_last):
            return features.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return features.new_empty(features.shape, dtype=dtype)


def new_like(maps: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient of ``maps``: compact, in the memory format that is given."""
    n, c, h, w = maps.shape
    if channels_last:
        return maps.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return maps.new_empty((n, c, h, w), dtype=dtype)


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of losses and of the gradients that native operators return."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
