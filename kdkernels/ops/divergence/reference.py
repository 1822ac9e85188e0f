"""Divergences of softened class probabilities, row by row, in plain PyTorch: the specification of ``divergence``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..top_k.reference import with_others

STANDARD_EPS = 1e-7  # logit standardisation adds it to the standard deviation


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperatures: Tensor,
    indices: Tensor | None = None,
    kind: str = "forward",
    beta: float = 0.5,
    standardize: bool = False,
) -> Tensor:
    """Return one divergence per row of logits.

    Args:
        student: ... x K logits.
        teacher: ... x K logits. With ``indices``, ... x k log-probabilities of the classes in ``indices``.
        temperatures: the temperature of each row. A row with the temperature 0 does not count: its result is 0.
        indices: ... x k classes.
        kind: "forward", KL(teacher ‖ student); "reverse", KL(student ‖ teacher); or "jsd".
        beta: the weight of the teacher in the mixture of "jsd".
        standardize: subtract the mean of each row, and divide by its standard deviation, before the temperature.
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    counts = (temperatures != 0)[..., None]
    temperature = torch.where(counts, temperatures.to(dtype)[..., None], 1)
    # A row that does not count may hold NaN, whose product with a gradient of 0 is NaN.
    student, teacher = (torch.where(counts, x.to(dtype), 0) for x in (student, teacher))
    if standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    exponents = _divided(student, temperature)
    if indices is None:
        targets = _divided(teacher, temperature)
    else:
        exponents = with_others(exponents, indices)
        targets = with_rest(teacher, exponents)
    losses = _between(exponents.log_softmax(-1), targets.log_softmax(-1), kind, beta)
    return torch.where(counts[..., 0], losses, 0)


def _between(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "jsd" and 0 < beta < 1:
        return _generalized_js(log_q, log_p, beta)
    # The limits of JSD, divided by beta or 1 - beta.
    reverse = kind == "reverse" or (kind == "jsd" and beta == 1)
    return kl(log_q, log_p) if reverse else kl(log_p, log_q)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q). Where only q is 0, the result is +inf. Its gradient is the gradient of the finite terms."""
    absent = log_p == -math.inf
    only_q = (log_q == -math.inf) & ~absent
    replaced = _Replaced if torch.compiler.is_compiling() else _ReplacedForward
    ratio = torch.where(absent, 0, log_p - replaced.apply(log_q, log_p, only_q))
    finite = (log_p.exp() * ratio).sum(-1)
    return torch.where(only_q.any(-1), math.inf + finite, finite)


def _generalized_js(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """Return β KL(p ‖ m) + (1 - β) KL(q ‖ m), with m = β p + (1 - β) q (GKD, Agarwal et al. 2024)."""
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    neither = no_p & no_q
    p, q = (torch.where(neither, 0, x) for x in (log_p, log_q))
    log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    terms = beta * log_p.exp() * torch.where(no_p, 0, p - log_m)
    terms = terms + (1 - beta) * log_q.exp() * torch.where(no_q, 0, q - log_m)
    return terms.sum(-1)


def _standardized(logits: Tensor) -> Tensor:
    """Return logits with mean 0 and standard deviation 1 in every row (LSKD, Sun et al. 2024). -inf stays -inf."""
    present = logits != -math.inf
    count = present.sum(-1, keepdim=True)
    mean = torch.where(present, logits, 0).sum(-1, keepdim=True) / count
    centred = torch.where(present, logits - mean, 0)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    flat = variance == 0  # here, the square root has no derivative
    deviation = torch.where(flat, 0, torch.where(flat, 1, variance).sqrt()) + STANDARD_EPS
    return torch.where(present, centred / deviation, logits / deviation.detach())


def _divided(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return the logits divided by the temperature, whose gradient no logit of -inf reaches."""
    absent = logits == -math.inf
    return torch.where(absent, logits / temperature.detach(), torch.where(absent, 0, logits) / temperature)


def with_rest(log_p: Tensor, exponents: Tensor) -> Tensor:
    """Return the teacher's log-probabilities, and last the logarithm of the remaining probability.

    It is -inf if the student has no other class: if the last of its ``exponents`` is -inf.
    """
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    nothing = (exponents[..., -1:] == -math.inf) | (rest <= 0)
    log_rest = torch.where(nothing, 1, rest).log()
    return torch.cat([log_p, torch.where(nothing, -math.inf, log_rest)], -1)


class _Replaced(torch.autograd.Function):
    """The first tensor, with the second one's values where the mask is set. Gradients go to the first tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _ReplacedForward(_Replaced):
    """The same with forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.view_as(tangent)
