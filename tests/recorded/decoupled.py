"""Records what the authors' own code computes: ``python tests/recorded/decoupled.py CLONES`` writes ``decoupled.npz``.

CLONES is a folder with clones of github.com/megvii-research/mdistiller (a08d46f), of sunshangquan/
logit-standardization-KD (f6e5aa5), and of hunto/DIST_KD (2418f18) and hunto/image_classification_sota (6f7a70a). The
file that lies here comes from these commits. Logits are random float16 numbers, which are exact in every precision.
``dkd_loss`` and ``DIST`` compute in float64 the loss and the gradients of both networks. The gradient of ``dkd_loss``
to the teacher is NaN, and is left out.
"""

from __future__ import annotations

import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DKD = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
DIST = {"beta": 2.0, "gamma": 1.5}
TAU = 4.0


def with_gradients(loss: Callable[..., Tensor], *logits: Tensor) -> tuple[Tensor, ...]:
    leaves = [z.double().requires_grad_() for z in logits]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def dkd(clone: str) -> Callable[..., Tensor]:
    """Load ``dkd_loss``. Its file imports the base class of distillers, which the function does not need."""
    package = types.ModuleType("distillers")
    package.__path__ = []
    base = types.ModuleType("distillers._base")
    base.Distiller = nn.Module
    sys.modules |= {"distillers": package, "distillers._base": base}
    module = types.ModuleType("distillers.DKD")
    module.__package__ = "distillers"
    exec(Path(f"{clone}/mdistiller/distillers/DKD.py").read_text(), vars(module))
    return module.dkd_loss


def recorded(clones: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rows = [(3 * torch.randn(7, 11)).half() for _ in range(2)]
    pixels = [(2 * torch.randn(2, 5, 3, 4)).half() for _ in range(2)]
    labels = torch.randint(11, (7,))
    plain, standardised = (dkd(f"{clones}/{name}") for name in ("mdistiller", "logit-standardization-KD"))
    of_images = runpy.run_path(f"{clones}/image_classification_sota/lib/models/losses/dist_kd.py")["DIST"]
    of_pixels = runpy.run_path(f"{clones}/DIST_KD/segmentation/losses/dist_kd.py")["DIST"]
    results = {
        "dkd": with_gradients(lambda s, t: plain(s, t, labels, **DKD), *rows),
        "dkd_standardised": with_gradients(lambda s, t: standardised(s, t, labels, logit_stand=True, **DKD), *rows),
        "dist": with_gradients(of_images(**DIST, tau=TAU), *rows),
        "dist_of_pixels": with_gradients(of_pixels(**DIST), *pixels),
    }
    names = "student", "teacher", "student_pixels", "teacher_pixels", "labels"
    arrays = dict(zip(names, (*rows, *pixels, labels), strict=True))
    for name, values in results.items():
        arrays |= dict(zip((name, f"{name}_student", f"{name}_teacher"), values, strict=True))
    return {name: value for name, value in arrays.items() if value.isfinite().all()}


if __name__ == "__main__":
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), **{name: value.numpy() for name, value in recorded(sys.argv[1]).items()}
    )
