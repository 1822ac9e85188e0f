"""Run by torchrun: accelerate's training on every rank's share of a batch is one process's on the whole batch."""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

import kdkernels
from kdkernels.nn import FeatureCapture


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 6))


def train(student: nn.Module, teacher: nn.Module, batches: list[Tensor], losses: list[nn.Module], backward) -> None:
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    with FeatureCapture(student, ["1", "3"]) as ours, FeatureCapture(teacher, ["1", "3"]) as theirs:
        for images in batches:
            student(images)
            with torch.no_grad():
                teacher(images)
            pairs = zip(losses, ours.features, theirs.features, strict=True)
            backward(sum(loss(s, t) for loss, s, t in pairs))
            optimizer.step()
            optimizer.zero_grad()


def losses() -> list[nn.Module]:
    """Built before there is a process group."""
    maps = kdkernels.nn.LocalCorrelationLoss(2, reduction="mean", group="world")
    return [maps, kdkernels.nn.CorrelationCongruenceLoss(group="world")]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = losses()
    student, teacher = network(4), network(8)
    alone = copy.deepcopy(student)
    batches = list(torch.randn(3, 8, 3, 8, 8))
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(student)
    world, rank = accelerator.num_processes, accelerator.process_index
    train(prepared, teacher, [batch.chunk(world)[rank] for batch in batches], ours, accelerator.backward)
    dist.barrier()
    local = [kdkernels.nn.LocalCorrelationLoss(2, reduction="mean"), kdkernels.nn.CorrelationCongruenceLoss()]
    train(alone, teacher, batches, local, Tensor.backward)
    for one, other in zip(student.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert world == int(sys.argv[1])
    dist.destroy_process_group()
    # Without finalising Python: a thread of gloo that releases the tensors of its last message meanwhile would abort.
    os._exit(0)


if __name__ == "__main__":
    main()
