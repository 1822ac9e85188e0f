"""Feature maps to unit patch vectors: mask, crop, resample, split and normalise in one pass.

Row ``i * k² + p`` of the result is patch ``p`` of image ``i``, divided by its norm. A patch of norm <= eps becomes the
zero vector. Within a row the components follow the memory format of the features (channel-major for NCHW, pixel-major
for channels_last), which no dot product between rows can tell apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends, checks, native
from ..autograd import once
from . import reference

PARTITIONS = ("exact", "resize")


def patches(
    features: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    threshold: float | None = None,
    partition: str = "exact",
    eps: float = 1e-8,
    backend: str = "auto",
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
        backend: "auto", "reference", "native" or "triton".

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
    runs = {"reference": reference.patches, "native": _Native.apply, "triton": _triton}
    run = runs[backends.choose(backend, features)]
    return run(features, k, mask, threshold, partition, eps)


def _triton(
    features: Tensor, k: int, mask: Tensor | None, threshold: float | None, partition: str, eps: float
) -> Tensor:
    from .triton import patches as run

    return run(features, k, mask, threshold, partition, eps)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, k, mask, threshold, partition, eps):
        resize = partition == "resize"
        rows, norms = native.ops.patches(features, k, mask, threshold, resize, eps)
        ctx.save_for_backward(rows, norms, mask)
        ctx.settings = native.map_shape(features), k, threshold, resize
        ctx.dtype = features.dtype
        return rows

    @staticmethod
    def backward(ctx, grad):
        rows, norms, mask = ctx.saved_tensors
        shape, k, threshold, resize = ctx.settings
        with torch.no_grad():
            result = native.ops.patches_backward(grad, rows, norms, shape, k, mask, threshold, resize).to(ctx.dtype)
        return once(result, rows), None, None, None, None, None


def check(name: str, features: object, k: object, partition: str) -> None:
    checks.positive_int("k", k)
    checks.one_of("partition", partition, PARTITIONS)
    height, width = checks.tensor(name, features, 4, "n x c x h x w").shape[-2:]
    if partition == "exact" and (height % k or width % k):
        raise ValueError(
            f"k={k} must divide the height and width of {name}, got {height} x {width}; "
            f'partition="resize" resamples the map to {-(-height // k) * k} x {-(-width // k) * k} first'
        )


def check_mask(name: str, mask: object, threshold: float | None, features_name: str, features: Tensor) -> Tensor | None:
    """The mask as n x h' x w', or None."""
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
