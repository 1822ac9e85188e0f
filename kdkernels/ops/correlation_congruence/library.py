"""``correlation_congruence`` by PyTorch's matrix products.

For strips of rows I, from the diagonal on, products give X_I Xᵀ and Y_I Yᵀ. A fused kernel turns them into the loss and
into the slopes S = 4·scale·(κ(X) − κ(Y)) ∘ κ′, whose products with the rows are the gradients.

Half-precision rows are multiplied as they are, so they are not divided by their norms. Their factors 1 / norm come into
the strips: the slopes f_i S_ij f_j give the gradient divided by the norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...types import KERNELS
from ..congruence.library import launch as bilinear
from ..library import Rows, by_triton, new_slopes, product, store, strips, twice_beyond
from ..operator import by_library, full_precision
from ..shapes import accumulation_dtype
from . import fake
from .reference import EPS, nonzero_terms

TAYLOR_RBF, RBF, BILINEAR, MMD = range(len(KERNELS))


@by_library(fake.correlation_congruence)
def _launch(
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
) -> tuple[Tensor, ...]:
    if kernel == MMD:
        raise RuntimeError("correlation_congruence: the kernel mmd has no form by PyTorch's matrix products")
    dtype = accumulation_dtype(student, teacher)
    kept = _kept(student, teacher, kernel, normalize, plan)
    with full_precision(student.device):
        networks = _Network(student, dtype, kept, normalize, kernel), _Network(teacher, dtype, kept, normalize, kernel)
        wanted = grad_student, grad_teacher
        if kernel == BILINEAR and not kept:
            x, y = (network.values for network in networks)
            loss, *gradients = bilinear(x, y, 1, [scale, 0.0, 0.0, 0.0], plan, *wanted, tf32)
        else:
            terms = nonzero_terms(gamma, order) if kernel == TAYLOR_RBF else 0
            loss, *gradients = _by_strips(*networks, kernel, gamma, terms, scale, wanted, tf32)
        gradients = [
            network.through_norms(grad) if want else grad
            for network, grad, want in zip(networks, gradients, wanted, strict=True)
        ]
    return loss.to(dtype), *gradients


def _kept(student: Tensor, teacher: Tensor, kernel: int, normalize: bool, plan: list[int]) -> bool:
    """Return whether rows keep half precision. Distances of rows that are not unit vectors need centred rows. Products
    of the feature form run along the rows, whose norms differ.
    """
    if student.dtype != teacher.dtype or student.dtype not in (torch.bfloat16, torch.float16):
        return False
    return plan[0] == 0 and (normalize or kernel != RBF)


class _Network:
    """Embeddings of one network: the values that are multiplied, and the factors that make them unit vectors."""

    def __init__(self, embeddings: Tensor, dtype: torch.dtype, kept: bool, normalize: bool, kernel: int) -> None:
        rows = embeddings.to(dtype)
        self.normalize, self.factors = normalize, None
        if normalize:
            norms = rows.double().square().sum(1).sqrt()
            dead = norms <= EPS
            # A power of two brings half-precision rows to a common size, where no product overflows.
            powers = torch.ldexp(torch.ones_like(norms), -torch.frexp(norms).exponent)
            sizes = 1 / powers if kept else norms
            self.values = torch.where(dead[:, None], 0, rows / sizes[:, None]).to(embeddings.dtype if kept else dtype)
            self.norms = (sizes if kept else norms).to(dtype).masked_fill(dead, torch.inf)
            if kept:
                self.factors = torch.where(dead, 0, sizes / norms).to(dtype)
        else:
            self.values = embeddings if kept else rows - rows.mean(0) if kernel == RBF else rows
        self.terms = self._unit_rows().square().sum(1) if kernel == RBF else self.values.new_empty(0, dtype=dtype)

    def _unit_rows(self) -> Tensor:
        return self.values if self.factors is None else self.values * self.factors[:, None]

    def through_norms(self, grad: Tensor) -> Tensor:
        """Return the gradient to the embeddings. With factors, ``grad`` has been multiplied by them."""
        if not self.normalize:
            return grad
        rows = self._unit_rows()
        return (grad - (grad * rows).sum(1, keepdim=True) * rows) / self.norms[:, None]


def _by_strips(
    x: _Network,
    y: _Network,
    kernel: int,
    gamma: float,
    order: int,
    scale: float,
    wanted: tuple[bool, bool],
    tf32: bool,
) -> tuple[Tensor, ...]:
    networks = x, y
    rows = [Rows.of(network.values, tf32).sets(lambda values: values[None]) for network in networks]
    like = x.terms
    gradients = [
        like.new_zeros(network.values.shape if want else (0,)) for network, want in zip(networks, wanted, strict=True)
    ]
    own_terms = [like.new_zeros(len(x.values)) if want and _has_own_term(kernel, x) else None for want in wanted]
    parts = []
    for mine in strips(1, len(x.values)):
        others = slice(mine.start, None)
        products = rows[0].products(mine, others), rows[1].products(mine, others)
        slopes = [new_slopes(products[0], own) if want else None for own, want in zip(rows, wanted, strict=True)]
        parts.append(_compare(products, slopes, networks, mine.start, kernel, gamma, order, scale).reshape(-1))
        for own, grad, own_term, of_own, sign in zip(rows, gradients, own_terms, slopes, (1, -1), strict=True):
            if of_own is not None:
                own.add_gradient(grad[None], of_own, mine.start, sign)
                if own_term is not None:
                    _add_row_sums(own_term, of_own, mine.start, sign)
    for network, grad, own_term in zip(networks, gradients, own_terms, strict=True):
        if own_term is not None:
            grad.addcmul_(own_term[:, None], network.values, value=-1)
    return torch.cat(parts).sum(), *gradients


def _has_own_term(kernel: int, network: _Network) -> bool:
    """Return whether the gradient of a distance needs −(Σ_j S_ij) x_i. For unit rows, it is radial, so it vanishes."""
    return kernel == RBF and not network.normalize


def _add_row_sums(sums: Tensor, slopes: Tensor, first: int, sign: int) -> None:
    """Add the row sums of a symmetric S, from its upper strip."""
    _, planes, height, _ = slopes.shape
    part = slopes.flatten(1, 2)
    ones = part.new_ones(1, max(part.shape[1:]), 1)
    sums[first : first + height].add_(product(part, ones[:, : part.shape[2]]).view(planes, height).sum(0), alpha=sign)
    beyond = part[..., height:]
    if beyond.shape[2]:
        sums[first + height :].add_(product(beyond.mT, ones[:, : part.shape[1]]).view(-1), alpha=sign)


def _compare(
    products: tuple[Tensor, Tensor],
    slopes: list[Tensor | None],
    networks: tuple[_Network, _Network],
    first: int,
    kernel: int,
    gamma: float,
    order: int,
    scale: float,
) -> Tensor:
    """Return parts of the loss of a strip, and write the slopes with respect to the products of each network."""
    terms, factors = [network.terms for network in networks], [network.factors for network in networks]
    if by_triton(products[0]):
        from .triton import compare_strips

        return compare_strips(products, slopes, terms, factors, first, kernel, gamma, order, scale)
    height = products[0].shape[1]
    values, multipliers = [], []
    for strip, term, factor in zip(products, terms, factors, strict=True):
        pairs = factor[first : first + height, None] * factor[first:] if factor is not None else 1
        value, slope = _correlate(strip * pairs, term[first:], kernel, gamma, order)
        values.append(value)
        multipliers.append(slope * pairs)
    difference = values[0] - values[1]
    for out, multiplier in zip(slopes, multipliers, strict=True):
        if out is not None:
            store(out, 4 * scale * difference * multiplier)
    return scale * twice_beyond(difference.double().square(), height)


def _correlate(products: Tensor, terms: Tensor, kernel: int, gamma: float, order: int) -> tuple[Tensor, Tensor]:
    """Return the values of a kernel without its constant, and their slopes with respect to the products."""
    if kernel == BILINEAR:
        return products, torch.ones_like(products)
    if kernel == RBF:
        distances = (terms[: products.shape[1], None] + terms - 2 * products).clamp(min=0)
        diagonal = torch.arange(products.shape[1], device=products.device)
        distances[:, diagonal, diagonal] = 0 * terms[: products.shape[1]]  # NaN stays NaN
        value = (-gamma * distances).exp()
        return value, 2 * gamma * value
    value, slope = 0 * products, 0 * products
    for p in range(order, 0, -1):
        factor = 2 * gamma / p
        slope = factor * (1 + value + products * slope)
        value = factor * products * (1 + value)
    constant = math.exp(-2 * gamma)
    return constant * value, constant * slope
