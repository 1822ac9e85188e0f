"""Records what LSKD's authors' own code computes: ``python tests/recorded/standardised.py CLONE`` writes
``standardised.npz``.

CLONE is a clone of github.com/sunshangquan/logit-standardization-KD; the file that lies here comes from its commit
f6e5aa5. Logits are random float16 numbers, which are exact in every precision. ``kd_loss`` computes in float64 the loss
and the gradients of both networks, with and without ``logit_stand``.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TEMPERATURE = 2.0


def recorded(clone: str) -> dict[str, Tensor]:
    # The file imports the base class of distillers, which the function does not need.
    base = types.ModuleType("distillers._base")
    base.Distiller = nn.Module
    sys.modules |= {"distillers": types.ModuleType("distillers"), "distillers._base": base}
    module = types.ModuleType("distillers.KD")
    module.__package__ = "distillers"
    exec(Path(f"{clone}/mdistiller/distillers/KD.py").read_text(), vars(module))

    torch.manual_seed(0)
    student, teacher = ((3 * torch.randn(7, 11)).half() for _ in range(2))
    results = {"student": student, "teacher": teacher}
    for name, standardised in (("kd", False), ("kd_standardised", True)):
        leaves = [z.double().requires_grad_() for z in (student, teacher)]
        loss = module.kd_loss(*leaves, TEMPERATURE, standardised)
        gradients = torch.autograd.grad(loss, leaves)
        results |= {name: loss.detach(), f"{name}_student": gradients[0], f"{name}_teacher": gradients[1]}
    return results


if __name__ == "__main__":
    arrays = {name: value.numpy() for name, value in recorded(sys.argv[1]).items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
