"""Models of timm: names, layouts, tokens, and its own distillation task."""

from __future__ import annotations

import hosts
import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels.nn import FeatureCapture

hosts.make_torchvision_importable()
timm = pytest.importorskip("timm", reason="timm is not installed: make test-hosts")


def as_map(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


MODELS = [
    ("resnet18", {}, "layer*", {}, 4),
    ("convnext_atto", {}, "stages.*", {}, 4),
    ("mobilenetv3_small_050", {}, "blocks.*", {}, 6),
    ("efficientnet_lite0", {}, "blocks.*", {}, 7),
    ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2}, "layers.*", {"layout": "bhwc"}, 4),
    ("vit_tiny_patch16_224", {"img_size": 64}, "blocks.*", {"layout": as_map}, 12),
    ("vit_tiny_patch16_224", {"img_size": 64}, "blocks.*.attn", {"layout": as_map}, 12),
    ("vit_tiny_patch16_224", {"img_size": 64}, "blocks.*.attn.qkv", {"of": "input", "layout": as_map}, 12),
]


@pytest.mark.parametrize(("name", "settings", "names", "options", "count"), MODELS)
def test_maps_of_every_stage(name, settings, names, options, count):
    model = timm.create_model(name, pretrained=False, **settings)
    with FeatureCapture(model, names, **options) as capture:
        model(torch.randn(2, 3, 64, 64))
        maps = capture.features
    assert len(maps) == count
    for features in maps:
        assert features.dim() == 4
        assert features.shape[0] == 2
        assert features.shape[2] == features.shape[3] <= 32  # a square map, with channels second
    loss = kdkernels.local_correlation_loss(maps[-1], torch.randn(2, 7, *maps[-1].shape[2:]), 2)
    loss.backward()
    assert next(model.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("order", ["capture first", "compiled first"])
def test_compiled_models(order):
    model = timm.create_model("resnet18", pretrained=False).eval()
    images = torch.randn(2, 3, 64, 64)
    with FeatureCapture(model, "layer*") as capture:
        model(images)
        expected = capture.features
    torch.compiler.reset()
    if order == "capture first":
        capture = FeatureCapture(model, "layer*")
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        capture = FeatureCapture(compiled, "layer*")
    compiled(images)
    for one, other in zip(capture.features, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_names_that_do_not_exist():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    with pytest.raises(ValueError, match=r"no module 'block\.3\.attn'; close: 'blocks\.\d+\.attn'"):
        FeatureCapture(model, "block.3.attn")


def test_checkpointed_models_have_gradients():
    """timm checkpoints the blocks one by one, with use_reentrant=False."""
    model, images = timm.create_model("resnet18", pretrained=False), torch.randn(2, 3, 64, 64)
    model.set_grad_checkpointing()
    with FeatureCapture(model, "layer2") as capture:
        model(images)
        with pytest.raises(RuntimeError, match=r"'layer2' is a container.*: capture 'layer2\.1'"):
            _ = capture.features
    with FeatureCapture(model, ["layer1.0", "layer2.1"]) as capture:
        model(images)
        sum(maps.square().sum() for maps in capture.features).backward()
    assert model.conv1.weight.grad.abs().sum() > 0
