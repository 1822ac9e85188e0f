"""What ``patches`` and ``patches_backward`` expect of their arguments, and ``local_correlation`` of its maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...boundary import FULL_FLOATS, Check


def check_patches(
    features: Tensor, k: int, mask: Tensor | None, threshold: float | None, resize: bool, eps: float
) -> None:
    check = Check("patches")
    check.tensor("features", features, "n c h w")
    check_maps(check, "features", features, "k", k, resize)
    if mask is not None:
        check_mask(check, "mask", mask, features.shape[0], *features.shape[2:])
    check_threshold(check, threshold, "mask", mask is not None)
    check.non_negative("eps", eps)


def check_patches_backward(
    grad_rows: Tensor,
    rows: Tensor,
    norms: Tensor,
    shape: Sequence[int],
    k: int,
    mask: Tensor | None,
    threshold: float | None,
    resize: bool,
) -> None:
    check = Check("patches_backward")
    check.holds("shape", shape, 4, "numbers")
    images = check_rows(check, "rows", rows, "shape", shape, 0, "k", k, resize)
    check.tensor("grad_rows", grad_rows, "N d", FULL_FLOATS)
    check.same_type("grad_rows", grad_rows, "rows", rows)
    check.tensor("norms", norms, "N", FULL_FLOATS)
    check.same_type("norms", norms, "rows", rows)
    if mask is not None:
        check_mask(check, "mask", mask, images, *shape[1:3])
    check_threshold(check, threshold, "mask", mask is not None)


def check_maps(check: Check, name: str, features: Tensor, side: str, k: int, resize: bool) -> None:
    check.positive_int(side, k)
    _cut(check, name, side, features.shape, k, resize)


def check_mask(check: Check, name: str, mask: Tensor, images: int, height: int, width: int) -> None:
    check.forget()
    check.bind("n", images)
    check.tensor(name, mask, "n h w")
    check.fits(name, 4, mask.shape[1], height)
    check.fits(name, 4, mask.shape[2], width)
    check.fits_gpu(name, "pixels", *mask.shape[1:])


def check_threshold(check: Check, threshold: float | None, mask: str, masked: bool) -> None:
    if threshold is None:
        return
    check.finite("threshold", threshold)
    if not masked:
        check.fail(f"threshold must be None without {mask}, got {threshold:g}")


def check_rows(
    check: Check,
    name: str,
    rows: Tensor,
    shape_name: str,
    shape: Sequence[int],
    first: int,
    side: str,
    k: int,
    resize: bool,
) -> int:
    """Return the number of images of the rows.

    ``shape`` has the maps' channels, height, width and whether the channels are neighbours in memory from entry
    ``first`` on.
    """
    check.positive_int(side, k)
    check.fits(side, k, k)
    c, h, w, channels_last = shape[first : first + 4]
    for i, size in enumerate((c, h, w), first):
        check.positive_int(f"{shape_name}[{i}]", size)
    check.flag(f"{shape_name}[{first + 3}]", channels_last)
    _cut(check, name, side, (1, c, h, w), k, resize)
    check.forget()
    check.bind("d", c * -(-h // k) * -(-w // k))
    check.tensor(name, rows, "N d", FULL_FLOATS)
    count = rows.shape[0]
    check.require(count % k**2 == 0, lambda: f"{name} must hold {side}² = {k**2} rows for each image, got {count}")
    return count // k**2


def _cut(check: Check, name: str, side: str, shape: Sequence[int], k: int, resize: bool) -> None:
    """Check how n x c x h x w maps are cut."""
    n, c, h, w = shape
    if not resize:
        for size in (h, w):
            check.require(
                size % k == 0,
                lambda: (
                    f"{side} must divide the height and width of {name} unless resize is true, "
                    f"got {side}={k} for {h} x {w}"
                ),
            )
    patch = -(-h // k), -(-w // k)
    check.fits(name, n, k, k, c, *patch)
    check.fits_gpu(name, "numbers in an image", c, *patch, k, k)
