"""One batch spread over the processes of a group: what the losses that take ``group=`` share.

The value equals the value of one process on the concatenation of all batches, and is equal on all ranks. The gradients
equal the gradients of that process times the number of processes, because DistributedDataParallel averages the
gradients of parameters. A loss communicates only in its forward pass, in the order of the program, never among the
collectives that DistributedDataParallel starts during backward.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, groups
from .ops.autograd import LossWithGradients, differentiable_once, needs_gradient

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


def agree(group: object, samples: int, device: torch.device, **terms: object) -> Ranks:
    """Exchange the number of samples between ranks, and check that all ranks compute the same.

    Args:
        group: a process group that this process belongs to.
        samples: of this rank.
        terms: values that must be equal on all ranks, by argument name.

    Raises:
        TypeError, ValueError: if it is no such group, or a term differs: on every rank, naming term, ranks and values.
        RuntimeError: under a transform of torch.func or in forward mode.
    """
    groups.check(group)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError("group must be a process group that this process belongs to")
    if not dist.is_initialized():
        raise ValueError("group must be an initialised process group: call torch.distributed.init_process_group first")
    if backends.transformed():
        raise RuntimeError(
            "group must be None under the transforms of torch.func and forward mode: neither sees through messages"
        )
    rank = dist.get_rank(group)
    own = torch.tensor([samples, zlib.crc32(repr(terms).encode())], device=device)
    sizes, checksums = torch.stack(gather(group, own), 1).tolist()
    if len(set(checksums)) > 1:
        _explain_difference(group, terms, device)
    return Ranks(group, rank, tuple(sizes))


def gather(group: dist.ProcessGroup, own: Tensor) -> list[Tensor]:
    """Return every rank's tensor of one shape, in the order of the ranks."""
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    return everyone


def _explain_difference(group: dist.ProcessGroup, terms: dict[str, object], device: torch.device) -> None:
    # As JSON padded with blanks, because torch.distributed sends objects as pickles, which can run code.
    text = json.dumps({name: repr(value) for name, value in terms.items()}).encode()
    length = torch.tensor(len(text), device=device)
    dist.all_reduce(length, dist.ReduceOp.MAX, group=group)
    own = torch.tensor(list(text.ljust(int(length.item()))), dtype=torch.uint8, device=device)
    everyone = [json.loads(bytes(message.tolist())) for message in gather(group, own)]
    for rank, others in enumerate(everyone):
        for name in everyone[0]:
            if others.get(name) != everyone[0][name]:
                raise ValueError(
                    f"{name} must be the same on all ranks of group, got {everyone[0][name]} on rank 0 and "
                    f"{others.get(name)} on rank {rank}"
                )


def add(ranks: Ranks, *tensors: Tensor) -> list[Tensor]:
    """Return the sums of each tensor over all ranks, with one message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message, group=ranks.group)
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def to_mean(ranks: Ranks, loss: Tensor, mask: Tensor | None, power: int = 1) -> Tensor:
    """Turn a mean over the samples of all ranks into the mean over the samples that count, as in ``ops.row_masks``."""
    if mask is None:
        return loss
    (samples,) = add(ranks, mask.sum())
    return loss * (ranks.samples / samples.clamp(min=1).to(loss.dtype)) ** power


def ring(ranks: Ranks, rows: Tensor, positions: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of every rank with its number, beginning with this rank. A sample has ``positions`` rows.

    While a block is processed, it is sent to the next rank and another block arrives. Two buffers hold the foreign
    blocks in turn, so a block is valid only until the next one is asked for.
    """
    block = rows.contiguous()
    largest = max(ranks.sizes) * positions
    buffers = [rows.new_empty(largest, *rows.shape[1:]) for _ in range(min(ranks.world - 1, 2))]
    after, before = (ranks.rank + 1) % ranks.world, (ranks.rank - 1) % ranks.world
    for step in range(ranks.world):
        source = (ranks.rank - step) % ranks.world
        last = step + 1 == ranks.world
        if not last:
            arriving = buffers[step % 2][: ranks.sizes[source - 1] * positions]
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
    """Return a loss over all ranks that is differentiable in ``inputs``.

    Args:
        run: is called with the inputs and whether each gradient is wanted. It returns the value, which is equal on all
            ranks, and its derivatives with respect to this rank's inputs.
    """
    # Autocast would compute the products in half precision.
    with torch.autocast(inputs[0].device.type, enabled=False):
        if not needs_gradient(*inputs):
            return run(*(x.detach() for x in inputs), wanted=[False] * len(inputs))[0]

        def loss_and_gradients(*arguments: Any) -> tuple[Tensor, ...]:
            tensors, wanted = arguments[: len(inputs)], arguments[len(inputs) :]
            value, gradients = run(*(x.detach() for x in tensors), wanted=list(wanted))
            empty = value.new_empty(0)
            return value, *(empty if gradient is None else gradient for gradient in gradients)

        value = LossWithGradients.apply(loss_and_gradients, (), (), *inputs)[0]
        scaled: Tensor = _AcrossRanks.apply(ranks.world, value)
        return scaled


class _AcrossRanks(torch.autograd.Function):
    """Multiply the gradient by the number of processes."""

    @staticmethod
    def forward(ctx: Any, world: int, loss: Tensor) -> Tensor:
        ctx.world = world
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[None, Tensor]:
        return None, ctx.world * grad_loss


def loss_of_all_rows(ranks: Ranks, whole: Callable[..., Tensor], *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return a loss of matrices with the rows of all ranks, computed on every rank.

    For losses with few numbers per sample that are not sums over the samples of single ranks.

    Args:
        whole: the loss of one process.
        inputs: this rank's rows of each matrix.
        mask: this rank's rows that count. None counts all rows.
    """
    own = slice(sum(ranks.sizes[: ranks.rank]), sum(ranks.sizes[: ranks.rank + 1]))

    def run(*inputs: Tensor, wanted: Sequence[bool]) -> LossAndGradients:
        rows = [rows_of_all(ranks, x).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        masks = {} if mask is None else {"mask": rows_of_all(ranks, mask[:, None].byte())[:, 0].bool()}
        with torch.set_grad_enabled(any(wanted)):
            value = whole(*rows, **masks)
        leaves = [x for x in rows if x.requires_grad]
        found = iter(torch.autograd.grad(value, leaves)) if leaves else iter(())
        return value.detach(), [next(found)[own] if want else None for want in wanted]

    return loss(ranks, run, *inputs)


def rows_of_all(ranks: Ranks, own: Tensor) -> Tensor:
    padded = own.new_zeros(max(ranks.sizes), own.shape[1])
    padded[: len(own)] = own
    return torch.cat([rows[:size] for rows, size in zip(gather(ranks.group, padded), ranks.sizes, strict=True)])


def sum_over(ranks: Ranks, share: Tensor) -> Tensor:
    """Return the sum of every rank's share of a loss. A share is a scalar that depends only on its rank's inputs."""
    total: Tensor = _Sum.apply(ranks, share)
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, share: Tensor) -> Tensor:
        ctx.world = ranks.world
        return add(ranks, share.double())[0].to(share.dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[None, Tensor]:
        return None, differentiable_once(ctx.world * grad_loss, grad_loss)


CHUNK = 2**22  # entries of a matrix of pairs that are held together


def sum_over_pairs(
    ranks: Ranks,
    term: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    rows: Sequence[Tensor],
    wanted: Sequence[bool],
    positions: int = 1,
) -> LossAndGradients:
    """Return the sum of a symmetric function of two rows over all pairs, and its gradients, from a ring over blocks of
    rows.

    Args:
        term: is called with some of this rank's rows (whole samples) and all rows of some rank. It sums over their
            pairs and is differentiated with respect to this rank's rows.
        rows: the matrices of rows that ``term`` takes.
        wanted: whether the gradient to each matrix is wanted.
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
                    # Every pair occurs twice, in both orders.
                    gradient[chunk].add_(next(found), alpha=2)
    return add(ranks, total)[0].to(packed.dtype), gradients
