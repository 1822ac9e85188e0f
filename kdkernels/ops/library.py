"""Large products by PyTorch's matmul, which several operators share: their backend "library".

A loss over pairs of rows is computed in strips. A product gives a strip of the Gram matrix, one kernel turns it into
the loss and into slopes, and more products turn the slopes into gradients. Strips stay in the cache of a GPU.

On a GPU, tensor cores multiply float32 as sums of three bfloat16 planes, x = h + m + l, in six of the nine products.
They keep the accuracy of float32. The planes of a row lie one after the other in the order l h m m h h h. In the order
l h l m m h h, all six pairs are neighbours, so two overlapping windows of this memory are the factors of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import backends
from . import tuning

# The planes of a row, 0 for h, 1 for m and 2 for l. The neighbours are the pairs (h, l), (l, h), (h, m), (m, m),
# (m, h) and (h, h). Small products come first, because the additions of tensor cores truncate.
CHAIN = (0, 2, 0, 1, 1, 0, 0)
PAIRS = len(CHAIN) - 1
# For plane j of one factor, the first of 3 - j planes of the chain that holds the planes 0 to 2 - j of the other one.
WINDOWS = (1, 2, 0)
PLACES = tuple(map(CHAIN.index, range(3)))
ALIGNED = 8  # numbers in 16 bytes of bfloat16, the alignment that cuBLAS wants

View = Callable[[Tensor], Tensor]


def by_triton(tensor: Tensor) -> bool:
    """Return whether Triton's kernels process strips on this device. Otherwise PyTorch does, in several passes."""
    return backends.why_not("triton", tensor) is None


def in_planes(tensor: Tensor, tf32: bool) -> bool:
    """Return whether float32 is multiplied in bfloat16 planes: if the GPU multiplies bfloat16 on tensor cores, unless
    PyTorch's settings allow tf32.
    """
    return tensor.dtype == torch.float32 and not tf32 and has_bfloat16_tensor_cores(tensor.device)


def has_bfloat16_tensor_cores(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b of batches of matrices, in float32 if they are half precision."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if not a.is_cuda:  # PyTorch has this product only for GPUs
        return torch.bmm(a.float(), b.float())
    result: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
    return result


def add_product(onto: Tensor, a: Tensor, b: Tensor, sign: float = 1.0) -> None:
    """Add sign · a b, in place."""
    if a.dtype == onto.dtype:
        onto.baddbmm_(a, b, alpha=sign)
    elif not a.is_cuda:
        onto.baddbmm_(a.float(), b.float(), alpha=sign)
    else:
        torch.baddbmm(onto, a, b, out_dtype=onto.dtype, alpha=sign, out=onto)


def split(x: Tensor, count: int) -> Iterator[Tensor]:
    """Yield bfloat16 planes, the largest first. The sum of three has the 24 bits of a float32."""
    for _ in range(count):
        plane = x.to(torch.bfloat16)
        yield plane
        x = x - plane


def chain_of(x: Tensor) -> Tensor:
    """Return the planes of a float32 matrix, rows x (7 · width). Zeros fill the width up."""
    rows, columns = x.shape
    width = -(-columns // ALIGNED) * ALIGNED
    chain = x.new_empty(rows, len(CHAIN), width, dtype=torch.bfloat16)
    if by_triton(x):
        from .planes import write_chain

        write_chain(x, chain)
    else:
        chain[..., columns:] = 0
        planes = list(split(x, 3))
        for place, plane in enumerate(CHAIN):
            chain[:, place, :columns] = planes[plane]
    return chain.flatten(1)


class Rows:
    """The rows of one network, prepared for products. ``x`` is sets x rows x columns.

    Attributes:
        planes: the number of planes of the slopes that are multiplied with these rows, 0 if they are not split.
    """

    def __init__(self, x: Tensor, chain: Tensor | None = None, halves: tuple[Tensor, ...] = ()) -> None:
        self.x, self._chain, self._halves = x, chain, halves
        self.planes = 3 if chain is not None else 2 if halves else 0
        self.columns = x.shape[-1]
        self._width = 0 if chain is None else chain.shape[-1] // len(CHAIN)

    @staticmethod
    def of(x: Tensor, tf32: bool = False) -> Rows:
        """Prepare a matrix, rows x columns. Half precision is multiplied as it is. Its slopes have two planes."""
        if in_planes(x, tf32):
            return Rows(x, chain=chain_of(x))
        if x.dtype == torch.bfloat16:
            return Rows(x, halves=(x,))
        if x.dtype == torch.float16:  # two planes hold its 11 bits
            return Rows(x, halves=tuple(split(x, 2)))
        return Rows(x)

    def sets(self, view: View) -> Rows:
        """Return the same rows as sets x rows, by a view of their first dimension."""
        chain = None if self._chain is None else view(self._chain)
        return Rows(view(self.x), chain, tuple(map(view, self._halves)))

    def products(self, mine: slice, others: slice) -> Tensor:
        """Return the products of the rows ``mine`` with the rows ``others``."""
        return product(*self._factors(mine, others))

    def subtract_products(self, onto: Tensor, mine: slice, others: slice) -> None:
        add_product(onto, *self._factors(mine, others), sign=-1)

    def _factors(self, mine: slice, others: slice) -> tuple[Tensor, Tensor]:
        if self._chain is None:
            return self.x[:, mine], self.x[:, others].mT
        depth = PAIRS * self._width
        return self._chain[:, mine, :depth], self._chain[:, others, self._width :].mT

    def _window(self, place: int, count: int) -> Tensor:
        """Return ``count`` neighbouring planes from a place of the chain on."""
        assert self._chain is not None
        return self._chain[..., place * self._width : (place + count) * self._width]

    def _factor_planes(self) -> list[Tensor]:
        """Return the planes that slopes are multiplied with, the largest first."""
        if self._chain is not None:
            return [self._window(place, 1)[..., : self.columns] for place in PLACES]
        return list(self._halves) or [self.x]

    def add_gradient(self, grad: Tensor, slopes: Tensor, first: int, sign: float = 1.0) -> None:
        """Add sign · (S X) to a gradient, from the upper strip of a symmetric S.

        Args:
            grad: sets x rows x columns.
            slopes: sets x planes x height x width: the rows of S from ``first`` on, and the columns from ``first`` on.
                The rows below get its transpose.
        """
        _, planes, height, width = slopes.shape
        factors = self._factor_planes()
        for j in reversed(range(len(factors))):  # small products first
            count = planes - j if self.planes else 1
            part = slopes[:, :count].flatten(1, 2)
            own = factors[j][:, first : first + height].repeat(1, count, 1)
            add_product(grad[:, first:], part.mT, own, sign)
            if width > height:
                above = product(part[..., height:], factors[j][:, first + height :])
                grad[:, first : first + height].add_(above.unflatten(1, (count, height)).sum(1), alpha=sign)

    def inner(self, other: Rows) -> Tensor:
        """Return XᵀY of each set. Its depth is the number of rows."""
        if self._chain is None or other._chain is None:
            return product(self.x.mT, other.x)
        total: Tensor | None = None
        for j in (2, 1, 0):
            count = 3 - j
            stack = product(self._window(WINDOWS[j], count).mT, other._window(PLACES[j], 1))
            folded = stack.unflatten(1, (count, self._width)).sum(1)
            total = folded if total is None else total + folded
        assert total is not None
        return total[:, : self.columns, : other.columns].contiguous()

    def times(self, matrix: Tensor) -> Tensor:
        """Return X M of each set. M is sets x columns x any."""
        if self._chain is None:
            return product(self.x, matrix)
        sets, depth, across = matrix.shape
        chain = chain_of(matrix.reshape(sets * depth, across)).view(sets, depth, len(CHAIN), -1)
        stack = matrix.new_zeros(sets, len(CHAIN), self._width, chain.shape[-1], dtype=torch.bfloat16)
        stack[:, :, :depth] = chain.transpose(1, 2)
        left = self._chain[..., : PAIRS * self._width]
        return product(left, stack[:, 1:].flatten(1, 2))[..., :across]


def strips(sets: int, rows: int) -> Iterator[slice]:
    """Yield the rows of each strip. A strip of all sets has about LIBRARY_STRIP numbers."""
    height = max(1, tuning.LIBRARY_STRIP // (sets * rows))
    height = height // 128 * 128 or height  # whole tiles of cuBLAS
    for first in range(0, rows, height):
        yield slice(first, min(first + height, rows))


def new_slopes(strip: Tensor, rows: Rows) -> Tensor:
    """Allocate the slopes of a strip: sets x planes x height x width."""
    sets, height, width = strip.shape
    if not rows.planes:
        return strip.new_empty(sets, 1, height, width)
    return strip.new_empty(sets, rows.planes, height, width, dtype=torch.bfloat16)


def store(slopes: Tensor, values: Tensor) -> None:
    """Write values, sets x height x width, as planes if the slopes have planes."""
    if slopes.dtype == torch.bfloat16:
        for j, plane in enumerate(split(values, slopes.shape[1])):
            slopes[:, j] = plane
    else:
        slopes[:, 0] = values


def twice_beyond(squares: Tensor, height: int) -> Tensor:
    """Sum a strip's squares in float64. Columns beyond the strip's own rows stand for two entries each."""
    return 2 * squares.sum(dtype=torch.float64) - squares[..., :height].sum(dtype=torch.float64)
