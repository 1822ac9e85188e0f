"""Losses of the examples that compare samples: several processes return what one process does on the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from common import heads

LOSSES = {
    "triplet": lambda x, y, labels: heads.triplet_loss(x, labels, 0.3),
    "polynomial": lambda x, y, labels: heads.polynomial_congruence(
        x, y, (0.1, 0.5, 0.2), normalize=True, reduction="mean"
    ),
}


def main(seed: int) -> None:
    torch.manual_seed(seed)
    x, y, labels = torch.randn(9, 4), torch.randn(9, 6), torch.arange(9) % 3
    wholes = {}
    for name, loss in LOSSES.items():
        rows = x.clone().requires_grad_()
        value = loss(rows, y, labels)
        wholes[name] = value.detach(), *torch.autograd.grad(value, rows)
    dist.init_process_group("gloo")
    share = slice(dist.get_rank(), None, dist.get_world_size())
    for name, loss in LOSSES.items():
        own = x[share].clone().requires_grad_()
        value = loss(own, y[share], labels[share])
        value.backward()
        torch.testing.assert_close(value.detach(), wholes[name][0])
        torch.testing.assert_close(own.grad / dist.get_world_size(), wholes[name][1][share])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
