"""``gram``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, assert_gradients
from torch import Tensor

import kdkernels
from kdkernels.ops.gram import reference as gram_reference

from . import draw


def check_gram(features: list[Tensor], wanted: list[bool]) -> None:
    device, batch = features[0].device, features[0].shape[0]
    upstream = draw(len(features), batch, batch, device=device, dtype=torch.float64)

    def run(function, layers: list[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        layers = [layer.detach().requires_grad_(want) for layer, want in zip(layers, wanted, strict=True)]
        matrices = function(layers)
        matrices.backward(upstream.to(matrices.dtype))
        return matrices.detach(), [layer.grad for layer in layers]

    matrices, grads = run(lambda f: kdkernels.similarity_matrices(f, backend="triton"), features)
    expected, correct = run(gram_reference.gram, [f.double() for f in features])
    assert_close(matrices, expected, "matrices")
    assert_gradients(features, grads, correct)


@pytest.mark.parametrize(("batch", "depths"), [(1, (1,)), (2, (3, 200)), (65, (70, 1)), (3, (20_000,))])
def test_gram_of_odd_shapes(device: str, batch: int, depths: tuple[int, ...]) -> None:
    check_gram([draw(batch, depth, device=device) for depth in depths], [True] * len(depths))


def test_gram_of_a_broken_layer(device: str) -> None:
    features = [draw(4, 9, device=device), draw(4, 9, device=device)]
    features[1][2, 3] = torch.nan
    matrices = kdkernels.similarity_matrices(features, backend="triton")
    assert matrices[1, 2].isnan().all()
    assert matrices.isnan().sum() == 7
