"""What every operator keeps to."""

from __future__ import annotations

import pytest
import torch
from helpers import loss_and_gradients
from torch import Tensor, library

import kdkernels
from kdkernels import inter_class_correlation
from kdkernels import inter_class_correlation_loss as icc_loss
from kdkernels import similarity_preserving_loss as sp_loss
from kdkernels.ops.congruence import congruence
from kdkernels.ops.patches import patches

from . import draw, laid_out, ops


def losses(device: str) -> list[tuple[object, Tensor]]:
    """Each operator as a scalar function of one input, and an input."""
    other, logits, rows = draw(3, 2, 4, 4, device=device), draw(4, 6, device=device), draw(8, 3, device=device)
    weight = draw(12, 8, device=device)
    return [
        (lambda x: kdkernels.kd_loss(x, logits, backend="triton"), draw(4, 6, device=device)),
        (lambda x: icc_loss(x, logits, backend="triton"), draw(4, 6, device=device)),
        (lambda x: icc_loss(x, logits, per_sample=True, backend="triton"), draw(4, 6, device=device)),
        (lambda x: (inter_class_correlation(x, backend="triton") ** 2).sum(), draw(4, 6, device=device)),
        (lambda x: (patches(x, 2, backend="triton") * weight).sum(), draw(3, 2, 4, 4, device=device)),
        (lambda x: congruence(x, rows, positions=4, form="gram", backend="triton"), draw(8, 3, device=device)),
        (lambda x: congruence(x, rows, positions=4, form="feature", backend="triton"), draw(8, 3, device=device)),
        (lambda x: kdkernels.local_correlation_loss(x, other, 2, backend="triton"), draw(3, 2, 4, 4, device=device)),
        (lambda x: sp_loss(x, rows, form="gram", backend="triton"), draw(8, 2, 3, device=device)),
        (lambda x: sp_loss(x, rows, form="feature", backend="triton"), draw(8, 2, 3, device=device)),
    ]


def test_a_second_backward_gives_the_same_gradient(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        loss = function(x)
        first, second = (torch.autograd.grad(3 * loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_reruns_are_bitwise_equal(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        (a, (grad_a,)), (b, (grad_b,)) = (loss_and_gradients(function, x) for _ in range(2))
        assert torch.equal(a, b)
        assert torch.equal(grad_a, grad_b)


def test_a_second_derivative_raises(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            (x.sum() + gradient.square().sum()).backward()


def test_no_gradient_without_grad_mode(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        with torch.no_grad():
            assert not function(x).requires_grad


def test_compile_without_graph_breaks(device: str) -> None:
    for function, x in losses(device):
        x.requires_grad_()
        loss, (gradient,) = loss_and_gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), x)
        expected, (correct,) = loss_and_gradients(function, x)
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, correct)
        torch.compiler.reset()


def test_registration(device: str) -> None:
    features = [draw(2, 3, 4, 4, device=device), laid_out(draw(2, 3, 5, 5, device=device).bfloat16(), "channels_last")]
    bounds = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]], dtype=torch.int32, device=device)
    library.opcheck(ops.bounding_boxes, (torch.rand(2, 5, 3, device=device), 0.5, 7, 7))
    for maps, resize in zip(features, (False, True), strict=True):
        options = (2, torch.rand(2, *maps.shape[-2:], device=device), bounds, resize)
        rows, norms = ops.patches(maps, *options, 1e-8)
        library.opcheck(ops.patches, (maps, *options, 1e-8))
        like = (maps.shape, maps.dtype, resize)
        library.opcheck(ops.patches_backward, (torch.ones_like(rows), rows, norms, *like, *options))
    x, y = draw(8, 3, device=device), laid_out(draw(8, 5, device=device), "transposed")
    for feature in (False, True):
        library.opcheck(ops.congruence, (x, y, 4, [0.7, 0.5, -0.3, 0.2], [feature] * 3, True, False))
        library.opcheck(ops.similarity_preserving, (features[0], draw(2, 5, device=device), 0.1, feature, True, True))
        library.opcheck(ops.similarity_preserving, (*features, 0.1, feature, False, True))
    library.opcheck(ops.kd, (x, draw(8, 3, device=device), 4.0, 16.0, True, False))
    logits = laid_out(draw(6, 4, device=device), "transposed")
    for per_sample in (False, True):
        library.opcheck(ops.icc_loss, (logits, draw(6, 4, device=device), per_sample, 0.1, True, per_sample))
    library.opcheck(ops.icc_map, (logits,))
    library.opcheck(ops.icc_map_backward, (draw(4, 4, device=device), logits))
