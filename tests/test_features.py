"""Maps captured from common models: blocks that use an in-place ReLU twice, wrapped models, compiled models."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdkernels.nn import FeatureCapture, SemanticCalibration, SemCKDLoss


class Block(nn.Module):
    """A residual block as in model zoos: one in-place ReLU in two places, and an in-place addition."""

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
    """A ResNet with the names and shapes of a model zoo."""

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


def test_a_container_whose_parts_run_is_told() -> None:
    model, x = Transformer(), torch.randn(3, 4)
    with FeatureCapture(model, "blocks") as capture:
        model(x)
        with pytest.raises(RuntimeError, match=r"'blocks' is a container, and a model .*: capture 'blocks\.10'"):
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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


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


# Modules that return several tensors, their inputs, their names -------------------------------------------------------


class Output(dict):
    """An output class as in transformers: a dict whose keys are also attributes."""

    __getattr__ = dict.__getitem__


class Returning(nn.Module):
    """A linear layer that returns ``wrap(result)``."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.linear(x))


class Named:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@pytest.mark.parametrize(
    ("wrap", "select"),
    [
        (lambda x: (x, None), 0),
        (lambda x: [None, x], -1),
        (lambda x: {"hidden": x, "other": 3}, "hidden"),
        (lambda x: Output(hidden=x), "hidden"),
        (Named, "hidden"),
        (lambda x: ((x, x + 1), None), lambda value: value[0][0]),
        (lambda x: {"items": x}, "items"),  # the key, not the method of dicts
    ],
)
def test_outputs_that_are_no_tensors(wrap: Callable[[Tensor], object], select: object) -> None:
    layer = Returning(wrap)
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with FeatureCapture(model, ["0", "1"], select={"1": select}) as capture:
        x = torch.randn(3, 4)
        model(x)
        assert torch.equal(capture.features[1], layer.linear(model[0](x)))


def test_what_there_is_to_select_is_told() -> None:
    x = torch.randn(3, 4)
    for wrap, told in (
        (lambda x: (x, None), "a tuple of Tensor, NoneType"),
        (lambda x: {"hidden": x}, "a dict with the keys 'hidden'"),
    ):
        model = nn.Sequential(Returning(wrap))
        with FeatureCapture(model, "0"), pytest.raises(TypeError, match=f"pass select to pick a tensor from {told}"):
            model(x)
        with FeatureCapture(model, "0", select=5), pytest.raises(TypeError, match="select: '0' returns " + told):
            model(x)
    with pytest.raises(ValueError, match=r"select must have keys from names \['0'\], got \['1'\]"):
        FeatureCapture(model, "0", select={"1": 0})


class Attention(nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return hidden * scale


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.attention(x + 1, mask=x - 1, scale=2.0) + self.attention(hidden=x + 2, mask=x - 2))


@pytest.mark.parametrize(
    ("select", "expected"),
    [(None, 1), (0, 1), ("hidden", 1), ("mask", -1), (1, -1), (lambda hidden, mask=None, **_: hidden, 1)],
)
def test_inputs(select: object, expected: int) -> None:
    model, x = Caller(), torch.randn(3, 4)
    with FeatureCapture(model, "attention", of="input", select=select, runs="first") as capture:
        model(x)
        assert torch.equal(capture.features[0], x + expected)


def test_an_input_that_the_module_overwrites_is_copied() -> None:
    model, x = Caller(), torch.randn(3, 4)
    with FeatureCapture(model, ["relu", "attention"], of={"relu": "input"}) as capture:
        model(x)
        assert_close(capture.features[0], 3 * x + 4)
        assert torch.equal(capture.features[1], x + 2)


@pytest.mark.parametrize(("runs", "expected"), [("last", 2), ("first", 1)])
def test_modules_that_run_twice(runs: str, expected: int) -> None:
    model, x = Caller(), torch.randn(3, 4)
    capture = FeatureCapture(model, "attention", of="input", runs=runs)
    for _ in range(2):  # counted from the begin of every forward pass
        model(x)
        assert torch.equal(capture.features[0], x + expected)
    capture.remove()
    with FeatureCapture(model, "attention", of="input", runs="all") as capture:
        for _ in range(2):
            model(x)
            one, two = capture.features[0]
            assert torch.equal(one, x + 1)
            assert torch.equal(two, x + 2)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.ModuleDict({"attn": nn.Linear(4, 4)})}) for _ in range(11)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["mlp"]["attn"](block["attn"](x))
        return x


def test_wildcards() -> None:
    model, x = Transformer(), torch.randn(3, 4)
    with FeatureCapture(model, "blocks.*.attn") as capture:
        assert capture.names == [f"blocks.{i}.attn" for i in range(11)]
        model(x)
        assert torch.equal(capture.features[0], model.blocks[0]["attn"](x))
    assert FeatureCapture(model, ["blocks.1*.mlp.attn", "blocks.0"]).names == [
        "blocks.1.mlp.attn",
        "blocks.10.mlp.attn",
        "blocks.0",
    ]
    with pytest.raises(ValueError, match=r"no module 'block\.\*\.attn'; close: 'blocks\.\d+\.attn'"):
        FeatureCapture(model, "block.*.attn")
    with pytest.raises(ValueError, match=r"no module 'encoder\.layer\.3\.mlp'.*'blocks\.0\.mlp'"):
        FeatureCapture(model, "encoder.layer.3.mlp")


def test_switched_off_and_on(model: ResNet, images: Tensor) -> None:
    capture = FeatureCapture(model, LAYERS)
    with capture:
        model(images)
    maps = capture.features
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(images + 1)
    assert all(one is other for one, other in zip(capture.features, maps, strict=True))
    with capture:
        model(images + 1)
        assert not torch.equal(capture.features[0], maps[0])
    capture.clear()
    with pytest.raises(RuntimeError, match="no map of 'layer1', 'layer2'"):
        _ = capture.features


def test_channels_last_models_and_tokens() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    x = torch.randn(2, 5, 6, 3)

    def without_class_token(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 2))

    with FeatureCapture(model, ["0", "1"], layout={"0": "bhwc"}) as capture:
        model(x)
        turned, plain = capture.features
        assert turned.shape == (2, 3, 5, 6)
        assert torch.equal(turned, x.permute(0, 3, 1, 2))
        assert plain is x
    tokens = torch.randn(2, 5, 3)
    with FeatureCapture(model, "0", layout=without_class_token) as capture:
        model(tokens)
        assert torch.equal(capture.features[0][1, :, 1, 0], tokens[1, 3])
    with FeatureCapture(model, "0", layout="bhwc") as capture:
        model(tokens)
        with pytest.raises(ValueError, match=r"layout 'bhwc' wants maps of 4 dimensions, got shape \(2, 5, 3\) of '0'"):
            _ = capture.features
    with pytest.raises(ValueError, match="layout for '0' must be one of"):
        FeatureCapture(model, "0", layout="bcwh")


# Wrappers and checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["layer1.1.conv2", "_orig_mod.layer1.1.conv2"])
def test_compiled_models_are_looked_through(model: ResNet, images: Tensor, name: str) -> None:
    model.eval()
    with FeatureCapture(model, "layer1.1.conv2") as capture:
        model(images)
        expected = capture.features
    compiled = torch.compile(model, backend="eager")
    with FeatureCapture(compiled, name) as capture:
        compiled(images)
        assert_close(*capture.features, *expected)


def test_a_compiled_layer_in_a_model_that_has_run(model: ResNet, images: Tensor) -> None:
    model.eval()
    with FeatureCapture(model, "layer2") as capture:
        model(images)
        (expected,) = capture.features
    model.layer2 = torch.compile(model.layer2, backend="eager")
    model(images)
    with FeatureCapture(model, "layer2") as capture:
        model(images)
        assert_close(capture.features[0], expected)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_capture_after_the_compiled_model_has_run(model: ResNet, images: Tensor, in_place: bool) -> None:
    compiled = model
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(images)
    capture = FeatureCapture(compiled, "layer1")
    compiled(images)
    with pytest.raises(RuntimeError, match="set up the capture before its first call"):
        _ = capture.features
    torch.compiler.reset()
    compiled(images)
    assert capture.features[0].shape == (6, 4, 8, 8)
    del capture
    gc.collect()
    assert compiled(images).shape == (6, 5)


def test_averaged_models_are_looked_through(model: ResNet, images: Tensor) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model).eval()
    with FeatureCapture(averaged, "layer1.0") as capture:
        averaged(images)
        assert len(capture.features) == 1


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.reentrant)


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = Checkpointed(True), torch.randn(3, 4, requires_grad=True)
    for names, settings in (("layer.0", {}), ("layer", {"before_relu": True}), ("layer.1", {"of": "input"})):
        with FeatureCapture(model, names, **settings), pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(x)
    with FeatureCapture(model, "layer.0") as capture, torch.no_grad():  # a teacher has no gradient
        model(x)
        assert len(capture.features) == 1


def test_checkpointing_that_is_not_reentrant() -> None:
    model, x = Checkpointed(False), torch.randn(3, 4)
    with FeatureCapture(model, "layer.0", runs="all") as capture:
        loss = model(x).sum() + capture.features[0][0].square().sum()
        loss.backward()
        gradient = model.layer[0].weight.grad.clone()
        assert len(capture.features[0]) == 1  # without the maps of the recomputation
    model.zero_grad()
    (model.layer(x).sum() + model.layer[0](x).square().sum()).backward()
    assert_close(gradient, model.layer[0].weight.grad)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp of a block", "fsdp 2", "checkpoint", "compile of ddp"])
def test_parallel_models_are_looked_through(one_process: None, model: ResNet, images: Tensor, wrapper: str) -> None:
    model.eval()
    names = ["layer1.0", "layer2"]
    with FeatureCapture(model, names) as capture:
        model(images)
        expected = capture.features
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrapper == "compile of ddp":
        wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
    elif wrapper == "fsdp":
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif wrapper == "fsdp of a block":
        model.layer1[0] = FullyShardedDataParallel(model.layer1[0], device_id=torch.device("cpu"), use_orig_params=True)
        wrapped = model
    elif wrapper == "fsdp 2":
        mesh = init_device_mesh("cpu", (1,))
        for block in (model.layer1, model.layer2):
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        model.layer1[0] = checkpoint_wrapper(model.layer1[0], checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        wrapped = model
    with FeatureCapture(wrapped, names) as capture:
        logits = wrapped(images)
        for one, other in zip(capture.features, expected, strict=True):
            assert_close(one, other)
        # FSDP gathers parameters again when a gradient reaches the model's output.
        (logits.sum() + sum(maps.square().sum() for maps in capture.features)).backward()
    with FeatureCapture(wrapped, "layer1.*") as capture:
        assert capture.names == ["layer1.0", "layer1.1"]
