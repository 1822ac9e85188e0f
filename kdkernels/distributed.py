"""One batch spread over the processes of a group: what the losses that take ``group=`` share.

Their value is that of one process on the concatenation of all batches, and equal on all ranks. Their gradients are
those of that one process times the number of processes: DistributedDataParallel averages the gradients of parameters,
and so they come out right. A loss communicates in its forward pass alone, in the order of the program, never among the
collectives that DistributedDataParallel starts during backward.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .ops.autograd import once, scaled

# What a function gives that computes a loss over all ranks: its value, and this rank's gradients where they are wanted.
LossAndGradients = tuple[Tensor, Sequence[Tensor | None]]


class Ranks(NamedTuple):
    """The processes that a batch is spread over, and how many samples each of them holds."""

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def samples(self) -> int:
        return sum(self.sizes)


def meet(group: object, samples: int, device: torch.device, **terms: object) -> Ranks:
    """Tell the other ranks how many samples are here, and make sure that all compute the same.

    Args:
        group: a process group that this process belongs to.
        samples: of this rank.
        terms: what must be equal on all ranks, by the name of the argument that it comes from.

    Raises:
        TypeError, ValueError: if it is no such group, or a term differs: on every rank, naming term, ranks and values.
        RuntimeError: under a transform of torch.func or in forward mode.
    """
    if not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be a process group that this process belongs to")
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    if not dist.is_initialized():
        raise ValueError("group must be an initialised process group: call torch.distributed.init_process_group first")
    if backends.transformed():
        raise RuntimeError(
            "group must be None under the transforms of torch.func and forward mode: neither sees through messages"
        )
    rank = dist.get_rank(group)
    own = torch.tensor([samples, zlib.crc32(repr(terms).encode())], device=device)
    sizes, checksums = torch.stack(_gather(group, own), 1).tolist()
    if len(set(checksums)) > 1:
        _explain_difference(group, terms, device)
    return Ranks(group, rank, tuple(sizes))


def _gather(group: dist.ProcessGroup, own: Tensor) -> list[Tensor]:
    """Every rank's tensor of one shape, in the order of the ranks."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone


def _explain_difference(group: dist.ProcessGroup, terms: dict[str, object], device: torch.device) -> None:
    # As JSON, filled up with blanks: torch.distributed would send objects as pickles, which can run code.
    text = json.dumps({name: repr(value) for name, value in terms.items()}).encode()
    length = torch.tensor(len(text), device=device)
    dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
    own = torch.tensor(list(text.ljust(length.item())), dtype=torch.uint8, device=device)
    everyone = [json.loads(bytes(message.tolist())) for message in _gather(group, own)]
    for rank, others in enumerate(everyone):
        for name in everyone[0]:
            if others.get(name) != everyone[0][name]:
                raise ValueError(
                    f"{name} must be the same on all ranks of group, got {everyone[0][name]} on rank 0 and "
                    f"{others.get(name)} on rank {rank}"
                )


def add(ranks: Ranks, *tensors: Tensor) -> list[Tensor]:
    """The sums of each tensor over all ranks, in one message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message, group=ranks.group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def ring(ranks: Ranks, rows: Tensor, positions: int = 1) -> Iterator[tuple[int, Tensor]]:
    """The rows of every rank, with its number, beginning with this one's: ``positions`` rows a sample.

    While one block is worked on it travels on to the next rank and another arrives: at most two foreign ones are held.
    """
    block = rows.contiguous()
    after, before = (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world
    for step in range(ranks.world):
        source = (ranks.rank - step) % ranks.world
        last = step + 1 == ranks.world
        if not last:
            arriving = rows.new_empty(ranks.sizes[source - 1] * positions, *rows.shape[1:])
            transfers = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, block, group=ranks.group, group_peer=after),
                    dist.P2POp(dist.irecv, arriving, group=ranks.group, group_peer=before),
                ]
            )
        yield source, block
        if not last:
            for transfer in transfers:
                transfer.wait()
            block = arriving


def loss(ranks: Ranks, run: Callable[..., LossAndGradients], *inputs: Tensor) -> Tensor:
    """A loss over all ranks, differentiable in ``inputs``.

    Args:
        run: called with the inputs and whether each one's gradient is wanted; gives the value, equal on all ranks, and
            the derivatives of it with respect to this rank's inputs.
    """
    # Autocast would run the products in half precision.
    with torch.autocast(inputs[0].device.type, enabled=False):
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return _Loss.apply(ranks, run, *inputs)
        return run(*(x.detach() for x in inputs), wanted=[False] * len(inputs))[0]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, run: Callable[..., LossAndGradients], *inputs: Tensor) -> Tensor:
        loss, gradients = run(*(x.detach() for x in inputs), wanted=list(ctx.needs_input_grad[2:]))
        ctx.save_for_backward(*gradients)
        # Not saved: only their place in the graph is asked for, so they may be overwritten.
        ctx.inputs, ctx.world = inputs, ranks.world
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if gradient is None else scaled(ctx.world * grad_loss, gradient, x.dtype, *ctx.inputs)
            for gradient, x in zip(ctx.saved_tensors, ctx.inputs, strict=True)
        ]
        return None, None, *gradients


def loss_of_all_rows(ranks: Ranks, whole: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A loss of matrices that hold the rows of all ranks, computed on every rank.

    For losses of few numbers a sample that no sums over the ranks' own samples give.

    Args:
        whole: the loss of one process.
        inputs: this rank's rows of each matrix.
    """
    own = slice(sum(ranks.sizes[: ranks.rank]), sum(ranks.sizes[: ranks.rank + 1]))

    def run(*inputs: Tensor, wanted: Sequence[bool]) -> LossAndGradients:
        rows = [_rows_of_all(ranks, x).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        with torch.set_grad_enabled(any(wanted)):
            value = whole(*rows)
        leaves = [x for x in rows if x.requires_grad]
        found = iter(torch.autograd.grad(value, leaves)) if leaves else iter(())
        return value.detach(), [next(found)[own] if want else None for want in wanted]

    return loss(ranks, run, *inputs)


def _rows_of_all(ranks: Ranks, own: Tensor) -> Tensor:
    padded = own.new_zeros(max(ranks.sizes), own.shape[1])
    padded[: len(own)] = own
    return torch.cat([rows[:size] for rows, size in zip(_gather(ranks.group, padded), ranks.sizes, strict=True)])


def sum_over(ranks: Ranks, share: Tensor) -> Tensor:
    """The sum of every rank's share of a loss, a scalar that depends on this rank's inputs alone."""
    return _Sum.apply(ranks, share)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, share: Tensor) -> Tensor:
        ctx.world = ranks.world
        return add(ranks, share.double())[0].to(share.dtype)

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[None, Tensor]:
        return None, once(ctx.world * grad_loss, grad_loss)


CHUNK = 2**22  # entries of a matrix of pairs that are held at once


def sum_over_pairs(
    ranks: Ranks,
    term: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    rows: Sequence[Tensor],
    wanted: Sequence[bool],
    positions: int = 1,
) -> LossAndGradients:
    """Sum a symmetric function of two rows over all pairs, and differentiate it: a ring over blocks of rows.

    Args:
        term: called with some of this rank's rows, a whole number of samples, and all rows of some rank; sums over the
            pairs of them. Differentiated with respect to this rank's rows.
        rows: what ``term`` is told of every row, one matrix each.
        wanted: whether the gradient to each of them is.
        positions: rows per sample.
    """
    packed = torch.cat(list(rows), 1)
    widths = [x.shape[1] for x in rows]
    total = packed.new_zeros((), dtype=torch.float64)
    gradients = [torch.zeros_like(x) if want else None for x, want in zip(rows, wanted, strict=True)]
    for _, block in ring(ranks, packed, positions):
        others = block.split(widths, 1)
        length = max(1, CHUNK // len(block) // positions) * positions
        for begin in range(0, len(packed), length):
            chunk = slice(begin, begin + length)
            own = [x[chunk].requires_grad_(want) for x, want in zip(rows, wanted, strict=True)]
            with torch.set_grad_enabled(any(wanted)):
                part = term(own, others)
            total += part.detach()
            leaves = [x for x in own if x.requires_grad]
            found = iter(torch.autograd.grad(part, leaves)) if leaves else iter(())
            for gradient in gradients:
                if gradient is not None:
                    # Every pair comes twice, once with its other row first.
                    gradient[chunk].add_(next(found), alpha=2)
    return add(ranks, total)[0].to(packed.dtype), gradients
