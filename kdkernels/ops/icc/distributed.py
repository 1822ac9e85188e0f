"""Inter-class correlation over the samples of all ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import LossAndGradients, Ranks
from ...types import Backend, Reduction
from ..shapes import accumulation_dtype
from . import ICC, check, icc_map
from . import icc_loss as icc_loss_of_one
from .reference import CHUNK, log_correlations

HELD = 2**22  # entries of maps that are held completely
# Entries of the student's map below LOST have lost digits. This matters if the teacher's entry is not below FAINT.
LOST, FAINT = 2.0**-900, 2.0**-200


def icc_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    per_sample: bool,
    reduction: Reduction,
    backend: Backend,
    group: ProcessGroup,
    mask: Tensor | None = None,
    class_mask: Tensor | None = None,
) -> Tensor:
    """Return the divergence of the concatenated batch; see ``kdkernels.inter_class_correlation_loss``.

    Each rank computes the divergences of its own samples, and only their sum is exchanged. The classes that are there
    are the same on all ranks.
    """
    check(student_logits, teacher_logits, reduction, mask, class_mask)
    dtype = accumulation_dtype(student_logits, teacher_logits)
    there = None if class_mask is None else class_mask.tolist()
    settings = {"per_sample": per_sample, "reduction": reduction, "dtype": dtype, "class_mask": there}
    batch, (student_logits, teacher_logits) = _counted((student_logits, teacher_logits), mask, class_mask)
    classes = student_logits.shape[1]
    ranks = distributed.agree(group, batch, student_logits.device, **{"number of classes": classes}, **settings)
    ICC.choose(backend, student_logits)
    if ranks.samples == 0 or (class_mask is not None and not class_mask.any()):
        return (0 * (student_logits + teacher_logits)).sum().to(dtype)
    if per_sample:
        own = icc_loss_of_one(student_logits, teacher_logits, per_sample=True, reduction=reduction, backend=backend)
        return distributed.sum_over(ranks, own * (batch / ranks.samples))
    scale = 1.0 if reduction == "sum" else 1.0 / classes
    run = functools.partial(_divergence_of_maps, ranks=ranks, scale=scale, backend=backend)
    return distributed.loss(ranks, run, student_logits, teacher_logits).to(dtype)


def _counted(logits: Sequence[Tensor], mask: Tensor | None, class_mask: Tensor | None) -> tuple[int, Sequence[Tensor]]:
    """Return how many samples count, and their logits of the classes that are there. A rank without one keeps a sample
    of zeros, which counts nowhere.
    """
    if class_mask is not None:
        logits = [z[:, class_mask] if class_mask.any() else torch.zeros_like(z[:, :1]) for z in logits]
    if mask is None:
        return len(logits[0]), logits
    count = int(mask.sum())
    return count, [z[mask] if count else z[:1].masked_fill(z.new_ones((), dtype=torch.bool), 0) for z in logits]


def _divergence_of_maps(
    student: Tensor, teacher: Tensor, *, ranks: Ranks, scale: float, backend: Backend, wanted: Sequence[bool]
) -> LossAndGradients:
    """Return KL(M_T ‖ M_S) as the sum of p log(p / q) - p + q, from the sums of all ranks' maps in float64.

    Maps that are too large, or have entries that float64 cannot hold, are compared in logarithms.
    """
    logits = [z.double().requires_grad_(want) for z, want in zip((student, teacher), wanted, strict=True)]
    classes = student.shape[1]
    batch = ranks.sizes[ranks.rank]
    if classes**2 > HELD:
        return _divergence_in_logarithms(logits, ranks, scale)
    share = batch / ranks.samples
    with torch.set_grad_enabled(any(wanted)):
        own = [icc_map(z, backend=backend) for z in logits]
    q, p = distributed.add(ranks, *(share * part.detach() for part in own))
    faint = p < FAINT
    if bool(((q < LOST) & ~faint).any()):
        return _divergence_in_logarithms(logits, ranks, scale)
    log_ratio = (p / q).log().masked_fill(faint, 0)
    loss = scale * (p * log_ratio - p + q).sum()
    of_maps = 1 - (p / q).masked_fill(faint, 0), log_ratio
    gradients = [
        torch.autograd.grad(part, z, scale * share * of_map)[0] if z.requires_grad else None
        for z, part, of_map in zip(logits, own, of_maps, strict=True)
    ]
    return loss, gradients


def _divergence_in_logarithms(logits: Sequence[Tensor], ranks: Ranks, scale: float) -> LossAndGradients:
    """Return the same divergence from logarithms, some rows of the maps at a time.

    ``R`` is this rank's share of ``b·M``. The gradient to its logits is the gradient of its own log-sum-exp of the rows
    of log P, times ``R`` and the derivative with respect to log M: −M_T for the student, ``M_T (1 + log M_T − log
    M_S)`` for the teacher.
    """
    gradients = [torch.zeros_like(z) if z.requires_grad else None for z in logits]
    loss = logits[0].new_zeros(())
    classes = logits[0].shape[1]
    step = max(1, CHUNK // (max(ranks.sizes) * classes))  # equal on all ranks
    for begin in range(0, classes, step):
        rows = slice(begin, begin + step)
        with torch.set_grad_enabled(any(z.requires_grad for z in logits)):
            own = [torch.logsumexp(log_correlations(rows, z), dim=0) for z in logits]
        if ranks.sizes[ranks.rank] == 0:
            own = [part.detach().fill_(-math.inf) for part in own]
        q, p = log_maps = _log_maps(ranks, torch.stack([part.detach() for part in own]))
        loss += scale * F.kl_div(q, p, reduction="sum", log_target=True)
        of_log_maps = (-p.exp(), p.exp() * (1 + p - q))
        for z, gradient, part, log_map, of_log_map in zip(logits, gradients, own, log_maps, of_log_maps, strict=True):
            if gradient is not None and ranks.sizes[ranks.rank]:
                share = (part.detach() - log_map - math.log(ranks.samples)).exp()
                gradient += torch.autograd.grad(part, z, scale * of_log_map * share)[0]
    return loss, gradients


def _log_maps(ranks: Ranks, own: Tensor) -> Tensor:
    """Return log M from every rank's log-sum-exp over its samples: first the largest, then the sum relative to it."""
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks.group)
    (total,) = distributed.add(ranks, (own - largest).exp())
    return largest + total.log() - math.log(ranks.samples)
