"""Training on all processes that torchrun starts. Each takes its share of every batch, and the first one writes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn


def started() -> int:
    """Return the number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Connect the processes that torchrun started for the block. Only the first prints."""
    if started() == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.ExitStack() as stack:
        if rank():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        yield
    dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    """Return the ``group=`` of the losses."""
    return dist.group.WORLD if dist.is_initialized() else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch: Tensor) -> Tensor:
    """Return this process's part of a batch that all processes have drawn. The parts lie in the order of the batch,
    because SemCKD's attention depends on this order.
    """
    return batch.tensor_split(world_size())[rank()]


def over_all(loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Return a loss of matrices with the rows of all processes, computed on every process. Each matrix has one row per
    sample. The gradients of the networks that made the rows are right after ``average``. The loss itself has no
    parameters.
    """
    value = loss(*rows_of_all(*rows))
    return value + (world_size() - 1) * (value - value.detach())


def rows_of_all(*rows: Tensor) -> list[Tensor]:
    """Return matrices with the rows of all processes. Only this process's rows have a gradient here."""
    if world_size() == 1:
        return list(rows)
    lengths = _gathered(torch.tensor(len(rows[0]), device=rows[0].device))
    whole = []
    for own in rows:
        padded = own.new_zeros(max(lengths), *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [part[:length] for part, length in zip(_gathered(padded), lengths, strict=True)]
        parts[rank()] = own
        whole.append(torch.cat(parts))
    return whole


def _gathered(own: Tensor) -> list[Tensor]:
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return everyone


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, as DistributedDataParallel does with gradients.

    DistributedDataParallel groups gradients anew after the first step of a process. With three processes or more, a
    resumed run would then not repeat bit by bit.
    """
    if dist.is_initialized():
        message = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(message)
        for tensor, part in zip(tensors, message.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor) / world_size())


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Copy the batch statistics of the first process to every process."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
