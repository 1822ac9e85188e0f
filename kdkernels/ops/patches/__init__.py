"""Feature maps to unit patch vectors: mask, crop, resample, split and normalise in one pass.

Row ``i * k² + p`` of the result is patch ``p`` of image ``i``, divided by its norm. A patch of norm <= eps becomes the
zero vector. Within a row the components follow the memory format of the features (channel-major for NCHW, pixel-major
for channels_last), which no dot product between rows can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import checks
from ...types import PATCH_PARTITIONS, Backend, PatchPartition
from ..operator import Operator
from ..shapes import map_shape
from . import fake, reference

PATCHES = Operator("patches", kernels=(fake.patches, fake.patches_backward), memory="the norms of the rows")


def patches(
    features: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    threshold: float | None = None,
    partition: PatchPartition = "exact",
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Split n x c x h x w features into k x k patches an image and normalise each.

    Args:
        features: n x c x h x w, float32, float64, bfloat16 or float16, in any memory format.
        k: patches per side.
        mask: n x h' x w' or n x 1 x h' x w' weights in [0, 1], multiplied in (LKD Eq. 9) after bilinear resampling to
            h x w. No gradient goes to it.
        threshold: crop to the tight box of ``mask > threshold`` (the whole map where nothing exceeds it) and resample
            the crop to h x w, bilinearly. None does not crop.
        partition: "exact" wants k to divide h and w; "resize" first resamples to the next multiple, bilinearly.
        eps: patches of this norm or less are zero vectors, with gradient 0.
        backend: "auto", "reference", "native", "triton" or "library".

    Returns:
        n·k² x c·(h/k)·(w/k) unit rows in float32 (float64 for float64 features).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what it got.
        RuntimeError: when a backend asked for by name cannot run.

    Memory: the rows, plus their norms for the backward pass.
    """
    check("features", features, k, partition)
    mask = check_mask("mask", mask, threshold, "features", features)
    checks.non_negative("eps", eps)
    settings = k, mask, threshold, partition, eps
    chosen = PATCHES.choose(backend, features)
    return PATCHES.result(chosen, (features,), settings, reference.patches, (_rows, _gradient))


def _rows(
    constants: Any, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[tuple[Tensor, ...], Sequence[Tensor | None], Any]:
    backend, k, mask, threshold, partition, eps = constants
    (features,) = tensors
    resize = partition == "resize"
    rows, norms = fake.patches.registered(backend)(features, k, mask, threshold, resize, eps)
    return (rows,), (rows, norms, mask), (backend, map_shape(features), k, threshold, resize)


def _gradient(grad: Tensor, saved: Sequence[Any], kept: Any, wanted: Sequence[bool]) -> list[Tensor]:
    rows, norms, mask = saved
    backend, shape, k, threshold, resize = kept
    return [fake.patches_backward.sized(backend)(grad, rows, norms, shape, k, mask, threshold, resize)]


def check(name: str, features: object, k: object, partition: str) -> None:
    k = checks.positive_int("k", k)
    checks.one_of("partition", partition, PATCH_PARTITIONS)
    height, width = checks.tensor(name, features, 4, "n x c x h x w").shape[-2:]
    if partition == "exact" and (height % k or width % k):
        raise ValueError(
            f"k={k} must divide the height and width of {name}, got {height} x {width}; "
            f'partition="resize" resamples the map to {-(-height // k) * k} x {-(-width // k) * k} first'
        )


def check_mask(name: str, mask: object, threshold: float | None, features_name: str, features: Tensor) -> Tensor | None:
    """Return the mask as n x h' x w', or None."""
    if threshold is not None:
        checks.finite("threshold", threshold)
    if mask is None:
        if threshold is not None:
            raise ValueError(f"threshold={threshold} needs a mask, got mask=None")
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = checks.tensor(name, mask, 3, "n x h x w or n x 1 x h x w")
    checks.same_batch(name, mask, features_name, features)
    checks.same_device(name, mask, features_name, features)
    return mask.detach()
