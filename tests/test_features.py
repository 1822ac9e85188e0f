"""Maps caught from models as they come: blocks with in-place ReLUs used twice, wrapped, compiled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

from kdkernels.nn import FeatureCapture, SemanticCalibration, SemCKDLoss


class Block(nn.Module):
    """A residual block as model zoos write it: one in-place ReLU for both places, and an in-place addition."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(out)
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """The names and the shape of a model zoo's ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)
        self.extra = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


LAYERS = ["layer1", "layer2"]


@pytest.fixture
def model() -> ResNet:
    return ResNet()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 8, 8)


def stem(model: ResNet, images: Tensor) -> Tensor:
    return model.bn1(model.conv1(images))


def test_maps_are_what_the_modules_return(model: ResNet, images: Tensor) -> None:
    model.eval()
    alone = model(images)
    with FeatureCapture(model, ["layer2", "layer1"]) as capture:
        logits = model(images)
        last, first = capture.features
    assert torch.equal(logits, alone)
    assert torch.equal(first, model.layer1(stem(model, images).relu()))
    assert torch.equal(last, model.layer2(first))
    (gradient,) = torch.autograd.grad(last.sum(), model.conv1.weight)
    assert gradient.abs().sum() > 0


def test_before_relu_even_where_it_is_in_place_and_used_twice(model: ResNet, images: Tensor) -> None:
    model.eval()
    alone = model(images)
    capture = FeatureCapture(model, LAYERS, before_relu=True)
    assert torch.equal(model(images), alone)
    before = capture.features
    with FeatureCapture(model, LAYERS) as after:
        model(images)
        for one, other in zip(capture.features, after.features, strict=True):
            assert one.min() < 0
            assert torch.equal(one.relu(), other)
    block = model.layer2[1]
    x = model.layer2[0](before[0].relu())
    x = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())) + block.downsample(x)
    assert_close(before[1], x)
    loss = before[1].sum()
    assert_close(*(torch.autograd.grad(y.sum(), model.conv1.weight, retain_graph=True)[0] for y in (loss, x)))


def test_an_activation_itself_before_and_after(model: ResNet, images: Tensor) -> None:
    model.eval()
    for before_relu in (False, True):
        with FeatureCapture(model, "relu", before_relu=before_relu) as capture:
            model(images)
            (value,) = capture.features
        expected = stem(model, images)
        assert torch.equal(value, expected if before_relu else expected.relu())


def test_a_map_that_an_in_place_relu_overwrites_is_copied(model: ResNet, images: Tensor) -> None:
    model.eval()
    with FeatureCapture(model, ["bn1"]) as capture:
        model(images)
        assert capture.features[0].min() < 0
        assert torch.equal(capture.features[0], stem(model, images))
        with torch.inference_mode():
            model(images)
            assert capture.features[0].min() < 0


def test_a_map_overwritten_by_a_function_is_not_passed_off_as_right(model: ResNet, images: Tensor) -> None:
    capture = FeatureCapture(model, ["layer1.0.bn2"])
    model(images)
    with pytest.raises(RuntimeError, match=r"the map of 'layer1\.0\.bn2' was overwritten in place"):
        _ = capture.features


def test_names_that_do_not_exist_bring_those_that_are_close(model: ResNet) -> None:
    with pytest.raises(ValueError, match=r"no module 'layr1'; close: 'layer1'"):
        FeatureCapture(model, ["layer2", "layr1"])
    with pytest.raises(ValueError, match=r"no module 'features'; close: .*'conv1'.*'layer1'"):
        FeatureCapture(nn.Sequential(model)[0], ["features"])
    assert not model._forward_pre_hooks


def test_what_did_not_run_is_named(model: ResNet, images: Tensor) -> None:
    capture = FeatureCapture(model, ["layer1", "extra"])
    with pytest.raises(RuntimeError, match="no map of 'layer1', 'extra'"):
        _ = capture.features
    model(images)
    with pytest.raises(RuntimeError, match="no map of 'extra'"):
        _ = capture.features


def test_what_cannot_be_captured_is_told(model: ResNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"nn\.DataParallel.*DistributedDataParallel"):
        FeatureCapture(nn.DataParallel(model), ["module.layer1"])
    with (
        FeatureCapture(model, ["layer1.0.conv1"], before_relu=True),
        pytest.raises(RuntimeError, match=r"before_relu: 'layer1\.0\.conv1' must return what a ReLU module in it gave"),
    ):
        model(images)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    pair = nn.Sequential(Pair())
    with FeatureCapture(pair, ["0"]), pytest.raises(TypeError, match=r"'0' must return a tensor.*got tuple"):
        pair(images)


def test_removed_hooks_leave_no_trace(model: ResNet, images: Tensor) -> None:
    capture = FeatureCapture(model, LAYERS, before_relu=True)
    model(images)
    capture.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="no map"):
        _ = capture.features


@pytest.mark.parametrize("before_relu", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_leaves_the_maps_alone(
    model: ResNet, images: Tensor, duplicate: Callable[[nn.Module], nn.Module], before_relu: bool
) -> None:
    capture = FeatureCapture(model, LAYERS, before_relu=before_relu)
    model(images)
    before = capture.features
    twin = duplicate(model)
    twin(images + 1)
    assert all(one is other for one, other in zip(capture.features, before, strict=True))
    capture.remove()
    assert any(module._forward_hooks for module in twin.modules())


@pytest.mark.parametrize("before_relu", [False, True])
def test_compiled_after_the_capture_was_set_up(model: ResNet, images: Tensor, before_relu: bool) -> None:
    model.eval()
    capture = FeatureCapture(model, LAYERS, before_relu=before_relu)
    model(images)
    expected = capture.features
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images)
    for value, other in zip(capture.features, expected, strict=True):
        assert value is not other
        assert_close(value, other)


def test_two_unchanged_models_feed_the_calibration(model: ResNet, images: Tensor) -> None:
    student = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 5))
    ours, theirs = FeatureCapture(student, ["1"]), FeatureCapture(model.eval(), LAYERS)
    student(images)
    with torch.no_grad():
        model(images)
    shapes = [[map.shape[1:] for map in capture.features] for capture in (ours, theirs)]
    calibration = SemanticCalibration(*shapes, batch_size=6)
    SemCKDLoss()(*calibration(ours.features, theirs.features)).backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
