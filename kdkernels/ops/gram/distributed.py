"""Similarity matrices over the samples of all ranks: each rank holds the rows of its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ... import distributed
from ...distributed import Ranks
from ...types import Backend
from ..autograd import differentiable_once
from ..shapes import accumulation_dtype
from . import GRAM, check


def gram(features: Sequence[Tensor], mask: Tensor | None, backend: Backend, group: ProcessGroup) -> Tensor:
    """Return the L x b x B dot products of this rank's b samples with all B samples; see
    ``kdkernels.similarity_matrices``.
    """
    features = check(features, mask)
    dtype = accumulation_dtype(*features)
    widths = [layer[0].numel() for layer in features]
    learning = [torch.is_grad_enabled() and layer.requires_grad for layer in features]
    terms = {"sizes of features": widths, "requires_grad of features": learning, "dtype": dtype}
    ranks = distributed.agree(group, len(features[0]), features[0].device, **terms)
    GRAM.choose(backend, features[0])
    with torch.autocast(features[0].device.type, enabled=False):
        return torch.stack([_Gram.apply(ranks, layer.flatten(1).to(dtype)) for layer in features])


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.ranks = ranks
        blocks = {source: rows @ block.T for source, block in distributed.ring(ranks, rows)}
        return torch.cat([blocks[source] for source in range(ranks.world)], 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """``Σ_s (dA_rs + dA_srᵀ) F_s``: the features go round again, and every rank sends the others their columns."""
        (rows,), ranks = ctx.saved_tensors, ctx.ranks
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            columns = _columns(ranks, grad)
            own = grad.split(list(ranks.sizes), 1)
            result = torch.zeros_like(rows)
            for source, block in distributed.ring(ranks, rows):
                result += (own[source] + columns[source].T) @ block
        return None, differentiable_once(result, rows)


def _columns(ranks: Ranks, grad: Tensor) -> list[Tensor]:
    """Return what every rank's gradient holds for the similarities of its samples to this rank's."""
    received = [grad.new_empty(size, ranks.sizes[ranks.rank]) for size in ranks.sizes]
    sent = [part.contiguous() for part in grad.split(list(ranks.sizes), 1)]
    received[ranks.rank] = sent[ranks.rank]
    transfers = [
        dist.P2POp(send_or_receive, tensors[rank], group=ranks.group, group_peer=rank)
        for rank in range(ranks.world)
        for send_or_receive, tensors in ((dist.isend, sent), (dist.irecv, received))
        if rank != ranks.rank
    ]
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    return received
