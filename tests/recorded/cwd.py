"""Records what mmrazor's own code computes: ``python tests/recorded/cwd.py CLONE`` writes ``cwd.npz``.

CLONE is a clone of github.com/open-mmlab/mmrazor. The file that lies here comes from its commit 90c7af1f. The maps are
random float16 numbers, which are exact in every precision. ``ChannelWiseDivergence`` computes in float64 the loss and
the gradients of both networks, for the defaults and for other settings.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

SETTINGS = ({}, {"tau": 4.0, "loss_weight": 10.0})


def recorded(clone: str) -> dict[str, torch.Tensor]:
    registry = SimpleNamespace(register_module=lambda: lambda module: module)
    sys.modules["mmrazor.registry"] = SimpleNamespace(MODELS=registry)  # the file needs nothing else of mmrazor
    loss_class = runpy.run_path(f"{clone}/mmrazor/models/losses/cwd.py")["ChannelWiseDivergence"]
    torch.manual_seed(0)
    maps = [(5 * torch.randn(2, 3, 4, 5)).half() for _ in range(2)]
    results = dict(zip(("student", "teacher"), maps, strict=True))
    for i, settings in enumerate(SETTINGS):
        leaves = [x.double().requires_grad_() for x in maps]
        loss = loss_class(**settings)(*leaves)
        gradients = torch.autograd.grad(loss, leaves)
        results |= {f"loss{i}": loss.detach(), f"student{i}": gradients[0], f"teacher{i}": gradients[1]}
    return results


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), **{name: value.numpy() for name, value in recorded(sys.argv[1]).items()}
    )
