"""Records what SemCKD's authors' own code computes: ``python tests/recorded/semckd.py CLONE`` writes ``semckd.npz``.

CLONE is a clone of github.com/DefangChen/SemCKD; the file that lies here comes from its commit ebe5db1. Features and
parameters are random float16 numbers, exact in every precision. From them ``SelfA`` and ``SemCKDLoss`` compute in
float64 the attention, the error of every sample at every pair of layers, the loss, and the gradients of features and
of parameters, which lie one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BATCH = 9
STUDENT = ((3, 6), (2, 3))  # channels and side: between them and the teacher's are all kinds of windows to average
TEACHER = ((2, 4), (3, 3), (2, 6))


def recorded(clone: str) -> dict[str, Tensor]:
    sys.path.insert(0, clone)
    from distiller_zoo import SemCKDLoss
    from models.util import SelfA

    Tensor.cuda = lambda self: self  # they call it, GPU or not
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)

    def rounded(x: Tensor) -> Tensor:
        return x.detach().half().double().requires_grad_()

    features = {
        f"{network}{index}": rounded(0.3 * torch.randn(BATCH, channels, side, side).relu())
        for network, layers in (("student", STUDENT), ("teacher", TEACHER))
        for index, (channels, side) in enumerate(layers)
    }
    attention = SelfA(len(STUDENT), len(TEACHER), BATCH, *([c for c, _ in layers] for layers in (STUDENT, TEACHER)))
    parameters = list(attention.parameters())
    for parameter in parameters:
        parameter.data = rounded(parameter + 0.2 * torch.randn_like(parameter)).data
    layers = list(features.values())
    projected, targets, weights = attention(layers[: len(STUDENT)], layers[len(STUDENT) :])
    loss = SemCKDLoss()(projected, targets, weights)
    of_weights, *gradients = torch.autograd.grad(loss, [weights, *layers, *parameters])
    of_layers, of_parameters = gradients[: len(layers)], gradients[len(layers) :]
    return (
        {name: value.half() for name, value in features.items()}
        | {f"{name}_gradient": gradient for name, gradient in zip(features, of_layers, strict=True)}
        | {"parameters": _vector(parameters).half(), "parameters_gradient": _vector(of_parameters)}
        | {"attention": weights, "errors": of_weights * BATCH * len(STUDENT), "loss": loss}
    )


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


if __name__ == "__main__":
    arrays = {name: value.detach().numpy() for name, value in recorded(sys.argv[1]).items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
