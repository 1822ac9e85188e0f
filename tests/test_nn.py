"""The modules: settings checked and shown, losses that call functions, and class-aware attention."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import kdkernels
from kdkernels import nn as losses
from kdkernels.nn import ClassAwareAttention, LocalCorrelationLoss

# Every module ---------------------------------------------------------------------------------------------------------

# One of each, by its class, with the shapes of what it is called with; a list stands for a list.
LOGITS = ((4, 5), (4, 5))
EMBEDDINGS = ((4, 6), (4, 7))
MAPS = ((4, 6, 4, 4), (4, 7, 4, 4))
IMAGES, NEGATIVES = torch.arange(4), torch.arange(32).view(4, 8) % 9  # tensors stand for themselves
MODULES = {
    losses.AdversarialLoss: ({"width": 6}, ((4, 6), (4, 6))),
    losses.AttentionTransferLoss: ({"eps": 1e-6}, ((4, 6, 4, 4), (4, 7, 4, 4))),
    losses.CRDLoss: ({"student_width": 6, "teacher_width": 7, "samples": 9}, (*EMBEDDINGS, IMAGES, NEGATIVES)),
    losses.ClassAwareAttention: ({"channels": 6, "num_classes": 3}, ((4, 6, 4, 4),)),
    losses.ContrastiveRelationLoss: ({"comparison": "cross_entropy"}, (*EMBEDDINGS[:1] * 2, *EMBEDDINGS[1:] * 2)),
    losses.CorrelationCongruenceLoss: ({"kernel": "bilinear", "form": "gram"}, EMBEDDINGS),
    losses.DMLLoss: ({"temperature": 2.0}, ([(4, 5), (4, 5)],)),
    losses.DISTLoss: ({"gamma": 2.0}, LOGITS),
    losses.DKDLoss: ({"beta": 2.0}, LOGITS),
    losses.ChannelWiseLoss: ({"temperature": 2.0}, ((4, 6, 4, 4), (4, 6, 4, 4))),
    losses.HKDLoss: ({"weights": (2.0, 1.0)}, ([(4, 5, 2, 2), (4, 6)], [(4, 7, 3, 3), (4, 6)])),
    losses.HintLoss: ({"student_channels": 6, "teacher_channels": 7}, ((4, 6, 4, 4), (4, 7, 4, 4))),
    losses.IRGLoss: ({"graph_weight": 2.0}, (*EMBEDDINGS, [[(4, 5), (4, 5)]], [[(4, 6), (4, 6)]])),
    losses.InterClassCorrelationLoss: ({"per_sample": True}, LOGITS),
    losses.KDLoss: ({"temperature": 2.0}, LOGITS),
    losses.LocalCorrelationLoss: ({"k": 2, "form": "feature"}, ((4, 6, 4, 4), (4, 7, 4, 4))),
    losses.LogitMSELoss: ({}, LOGITS),
    losses.MGDLoss: ({"student_channels": (3,), "teacher_channels": (7,)}, ([(4, 3, 4, 4)], [(4, 7, 4, 4)])),
    losses.ProbabilisticTransferLoss: ({"eps": 1e-6}, EMBEDDINGS),
    losses.RelationalKDLoss: ({"angle_weight": 1.0}, EMBEDDINGS),
    losses.ReviewKDLoss: (
        {"student_channels": (5, 6), "teacher_channels": (6, 7)},
        ([(4, 5, 8, 8), (4, 6, 4, 4)], [(4, 6, 8, 8), (4, 7, 3, 3)]),
    ),
    losses.SemCKDLoss: ({"reduction": "sum"}, ([[(4, 6, 4, 4)]], [[(4, 6, 2, 2)]], (4, 1, 1))),
    losses.SemanticCalibration: (
        {"student_shapes": [(6,)], "teacher_shapes": [(7,)], "batch_size": 4},
        ([(4, 6, 4, 4)], [(4, 7, 4, 4)]),
    ),
    losses.SimilarityPreservingLoss: ({"form": "feature"}, EMBEDDINGS),
    losses.SimKDProjector: ({"student_channels": 6, "teacher_channels": 8}, ((4, 6, 4, 4),)),
    losses.TeacherFreeKDLoss: ({"alpha": 0.5}, LOGITS),
    losses.TokenRelationLoss: ({"comparison": "kl", "temperature": 0.1}, ((4, 9, 6), (4, 9, 7))),
    losses.VIDLoss: ({"student_channels": 6, "teacher_channels": 7}, MAPS),
}


def test_every_module_is_tested_here():
    modules = {value for value in vars(losses).values() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert modules == set(MODULES)


def example(kind: type[nn.Module]) -> tuple[dict[str, object], list]:
    """Settings for the module, and inputs for its call."""
    settings, shapes = MODULES[kind]
    labels = [torch.arange(4)] if kind in (losses.DKDLoss, losses.DMLLoss, losses.TeacherFreeKDLoss) else []
    return settings, [tensors(shape) for shape in shapes] + labels


def tensors(shape: tuple | list | Tensor) -> Tensor | list:
    if isinstance(shape, Tensor):
        return shape
    return [tensors(one) for one in shape] if isinstance(shape, list) else torch.randn(shape)


def result(output: Tensor | losses.Calibration) -> Tensor:
    return output if isinstance(output, Tensor) else output.attention


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_settings_are_shown(kind):
    settings, _ = MODULES[kind]
    module = kind(**settings)
    shown = repr(module)
    for field in dataclasses.fields(kind):
        assert f"{field.name}={settings.get(field.name, field.default)!r}" in shown
    module.backend = "reference"  # also one that was changed later
    assert "backend='auto'" not in repr(module)


def test_form_backend_and_group_are_shown():
    shown = repr(losses.SimilarityPreservingLoss(form="gram", backend="reference", group="world"))
    assert shown == "SimilarityPreservingLoss(reduction='mean', form='gram', backend='reference', group='world')"


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_module_survives_copies_and_the_compiler(kind):
    settings, inputs = example(kind)
    module = kind(**settings).eval()
    expected = result(module(*inputs))
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(result(same(*inputs)), expected)
        assert repr(same) == repr(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(result(compiled(*inputs)), expected)
    assert len({module, module, copy.deepcopy(module)}) == 2  # by identity, as other modules


WRONG = [
    (losses.AttentionTransferLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.AttentionTransferLoss, {"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
    (losses.CRDLoss, {"samples": 0}, "samples must be a positive integer, got 0"),
    (losses.CRDLoss, {"negatives": 0.5}, "negatives must be a positive integer, got 0.5"),
    (losses.CRDLoss, {"temperature": 0}, "temperature must be a positive number, got 0"),
    (losses.CRDLoss, {"momentum": 2}, r"momentum must be a number in \[0, 1\], got 2"),
    (losses.CorrelationCongruenceLoss, {"kernel": "linear"}, "kernel must be one of"),
    (losses.CorrelationCongruenceLoss, {"gamma": 0}, "gamma must be a positive number, got 0"),
    (losses.CorrelationCongruenceLoss, {"order": -1}, "order must be an integer >= 0, got -1"),
    (losses.CorrelationCongruenceLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.CorrelationCongruenceLoss, {"form": "tiles"}, "form must be one of"),
    (losses.CorrelationCongruenceLoss, {"form": "feature"}, "form='feature'"),
    (losses.DISTLoss, {"beta": float("inf")}, "beta must be a finite number, got inf"),
    (losses.DISTLoss, {"gamma": "1"}, "gamma must be a finite number, got '1'"),
    (losses.DISTLoss, {"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
    (losses.DKDLoss, {"alpha": float("nan")}, "alpha must be a finite number, got nan"),
    (losses.DKDLoss, {"beta": None}, "beta must be a finite number, got None"),
    (losses.DKDLoss, {"temperature": -1}, "temperature must be a positive number, got -1"),
    (losses.DKDLoss, {"reduction": "batchmean"}, "reduction must be one of"),
    (losses.DKDLoss, {"ignore_index": 0.5}, "ignore_index must be an integer, got 0.5"),
    (losses.DMLLoss, {"temperature": -1}, "temperature must be a positive number, got -1"),
    (losses.ReviewKDLoss, {"student_channels": ()}, "student_channels must hold at least 1 layer"),
    (
        losses.ReviewKDLoss,
        {"teacher_channels": 3},
        "teacher_channels must be a sequence with the channels",
    ),
    (losses.ReviewKDLoss, {"teacher_channels": (3,)}, "teacher_channels must hold as many layers as student_channels"),
    (losses.ReviewKDLoss, {"hidden_channels": 0}, "hidden_channels must be a positive integer, got 0"),
    (losses.SimKDProjector, {"student_channels": 0}, "student_channels must be a positive integer, got 0"),
    (losses.SimKDProjector, {"factor": 9}, "factor must be at most teacher_channels=8, got 9"),
    (losses.AdversarialLoss, {"width": 0}, "width must be a positive integer, got 0"),
    (losses.AdversarialLoss, {"hidden_width": "64"}, "hidden_width must be a positive integer, got '64'"),
    (losses.HKDLoss, {"weights": (1.0, -1.0)}, "a weight in weights must be a number >= 0, got -1.0"),
    (losses.IRGLoss, {"graph_weight": -1}, "graph_weight must be a number >= 0, got -1"),
    (losses.IRGLoss, {"transformation_weight": -1}, "transformation_weight must be a number >= 0, got -1"),
    (losses.MGDLoss, {"student_channels": (8,)}, "teacher_channels must be at least student_channels=8, got 7"),
    (losses.MGDLoss, {"reducer": "rd"}, r"reducer must be one of \('amp', 'sm'\), got 'rd'"),
    (losses.InterClassCorrelationLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.KDLoss, {"temperature": -1}, "temperature must be a positive number, got -1"),
    (losses.LocalCorrelationLoss, {"k": 0}, "k must be a positive integer, got 0"),
    (losses.LocalCorrelationLoss, {"k": [2, 0]}, "k must be a positive integer, got 0"),
    (losses.LocalCorrelationLoss, {"k": []}, "k must hold at least one stage"),
    (losses.LocalCorrelationLoss, {"weights": (1, 2)}, "weights must be three finite numbers"),
    (losses.LocalCorrelationLoss, {"partition": "pad"}, "partition must be one of"),
    (losses.LocalCorrelationLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.LocalCorrelationLoss, {"eps": -1}, "eps must be a number >= 0, got -1"),
    (losses.LocalCorrelationLoss, {"form": "tiles"}, "form must be one of"),
    (losses.LocalCorrelationLoss, {"threshold": 0.5}, "threshold=0.5 needs a mask to crop by, got attention=None"),
    (
        losses.LocalCorrelationLoss,
        {"threshold": float("nan"), "attention": nn.Identity()},
        "threshold must be a finite number, got nan",
    ),
    (losses.HintLoss, {"student_channels": 0}, "student_channels must be a positive integer, got 0"),
    (losses.ProbabilisticTransferLoss, {"eps": -1}, "eps must be a number >= 0, got -1"),
    (losses.RelationalKDLoss, {"distance_weight": -1}, "distance_weight must be a number >= 0, got -1"),
    (losses.RelationalKDLoss, {"angle_weight": -1}, "angle_weight must be a number >= 0, got -1"),
    (losses.SemCKDLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.SemanticCalibration, {"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    (losses.SemanticCalibration, {"temperature": -1}, "temperature must be a positive number, got -1"),
    (losses.SemanticCalibration, {"allocation": "learned"}, "allocation must be one of"),
    (losses.SimilarityPreservingLoss, {"reduction": "none"}, "reduction must be one of"),
    (losses.SimilarityPreservingLoss, {"form": "tiles"}, "form must be one of"),
    (losses.ContrastiveRelationLoss, {"comparison": "mse"}, "comparison must be one of"),
    (losses.TokenRelationLoss, {"comparison": "l1"}, "comparison must be one of"),
    (losses.TokenRelationLoss, {"temperature": (1.0, 0.0)}, "temperature must be a positive number, got 0.0"),
    (losses.TokenRelationLoss, {"heads": 0}, "heads must be a positive integer, got 0"),
    (losses.TeacherFreeKDLoss, {"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
    (losses.TeacherFreeKDLoss, {"temperature": 0}, "temperature must be a positive number, got 0"),
    (losses.VIDLoss, {"teacher_channels": -1}, "teacher_channels must be a positive integer, got -1"),
    (losses.VIDLoss, {"hidden_channels": 0}, "hidden_channels must be a positive integer, got 0"),
    (losses.VIDLoss, {"initial_variance": 1e-6}, "initial_variance must be greater than eps"),
    (losses.VIDLoss, {"eps": 0}, "eps must be a positive number, got 0"),
    *[
        (kind, {name: value}, message)
        for name, value, message in (
            ("backend", "cuda", "backend must be one of"),
            ("group", "all", "group must be a torch.distributed process group, got str"),
        )
        for kind in MODULES
        if name in {field.name for field in dataclasses.fields(kind)}
    ],
]


@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG, ids=str)
def test_settings_are_checked_when_the_module_is_made(kind, wrong, message):
    settings, _ = MODULES[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        kind(**(settings | {"kernel": "rbf"} if "form" in wrong and "kernel" in settings else settings) | wrong)


@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG, ids=str)
def test_a_setting_that_is_changed_later_is_checked_at_the_call(kind, wrong, message):
    settings, inputs = example(kind)
    module = kind(**settings)
    (name, value), *_ = wrong.items()
    if kind is losses.HintLoss and name != "backend":
        pytest.skip("the convolution was made with the channels")
    if name == "form" and value == "feature":
        module.kernel = "rbf"
    setattr(module, name, value)
    with pytest.raises((TypeError, ValueError), match=message.partition(" to crop by")[0]):
        module(*inputs)


def test_changed_settings_take_effect():
    student, teacher = torch.randn(2, 4, 5)
    module = losses.KDLoss(temperature=4.0)
    module.temperature = 2.0
    assert torch.equal(module(student, teacher), kdkernels.kd_loss(student, teacher, temperature=2.0))


@pytest.mark.parametrize(
    "kind", [losses.AttentionTransferLoss, losses.LogitMSELoss, losses.ProbabilisticTransferLoss], ids=str
)
def test_losses_without_kernels_take_a_backend_like_the_others(kind):
    settings, inputs = example(kind)
    expected = kind(**settings)(*inputs)
    assert torch.equal(kind(**settings, backend="reference")(*inputs), expected)
    for backend in ("native", "triton"):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run here"):
            kind(**settings, backend=backend)
        with kdkernels.use_backend(backend):
            assert torch.equal(kind(**settings)(*inputs), expected)


def test_a_backend_without_kernels_is_refused_when_the_module_is_made():
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: attention_transfer has no such kernels"):
        losses.AttentionTransferLoss(backend="triton")


# Local correlation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": (0.5, 0, 2), "reduction": "mean", "form": "gram"},
        {"partition": "resize", "eps": 1e-3, "form": "feature"},
    ],
    ids=str,
)
def test_module_is_the_function(backend, settings):
    student, teacher = torch.randn(3, 4, 6, 6), torch.randn(3, 5, 6, 6)
    loss = LocalCorrelationLoss(3, backend=backend, **settings)(student, teacher)
    assert torch.equal(loss, kdkernels.local_correlation_loss(student, teacher, 3, backend=backend, **settings))


def test_module_with_masks_and_stages(backend):
    student, teacher = ([torch.randn(3, 4, 6, 6), torch.randn(3, 5, 4, 4)] for _ in range(2))
    masks = [torch.rand(3, 6, 6), torch.rand(3, 4, 4)]
    module = LocalCorrelationLoss([3, 2], backend=backend)
    expected = kdkernels.local_correlation_loss(student, teacher, [3, 2], mask=masks, threshold=0.5, backend=backend)
    assert torch.equal(module(student, teacher, masks, 0.5), expected)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_module_makes_the_masks_of_every_stage(backend):
    student = [torch.randn(3, 4, 6, 6, requires_grad=True), torch.randn(3, 5, 4, 4, requires_grad=True)]
    teacher = [torch.randn(3, 6, 6, 6), torch.randn(3, 7, 4, 4)]
    attention = [ClassAwareAttention(6, 2).freeze(), ClassAwareAttention(7, 2).freeze()]
    module = LocalCorrelationLoss([3, 2], threshold=0.5, attention=attention, backend=backend)
    masks = [make(maps) for make, maps in zip(attention, teacher, strict=True)]
    expected = kdkernels.local_correlation_loss(student, teacher, [3, 2], mask=masks, threshold=0.5, backend=backend)
    assert torch.equal(module(student, teacher), expected)
    assert torch.equal(copy.deepcopy(module)(student, teacher), expected)
    assert not torch.equal(module(student, teacher, [torch.rand_like(mask) for mask in masks]), expected)
    with pytest.raises(ValueError, match="teacher must have the 2 stages of attention, got 1"):
        module(student[0], teacher[0])


def test_masks_of_the_module_are_made_without_a_gradient():
    """Even by attention that is not frozen, from a teacher that learns."""
    attention, teacher = ClassAwareAttention(6, 2), torch.randn(3, 6, 4, 4, requires_grad=True)
    LocalCorrelationLoss(2, attention=attention)(torch.randn(3, 4, 4, 4), teacher).backward()
    assert teacher.grad.any()
    assert all(parameter.grad is None for parameter in attention.parameters())


# Class-aware attention ------------------------------------------------------------------------------------------------


def blobs(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return noise maps with a 3 x 3 blob somewhere in the left half, only in the channels of its class."""
    labels = torch.randint(classes, (n,))
    maps = 0.3 * torch.randn(n, 2 * classes, 8, 8)
    for i, label in enumerate(labels.tolist()):
        y, x = int(torch.randint(6, ())), int(torch.randint(2, ()))
        maps[i, 2 * label : 2 * label + 2, y : y + 3, x : x + 3] += 3
    return torch.relu(maps), labels


def test_mask_is_one_channel_between_0_and_1():
    attention = ClassAwareAttention(6, 4)
    mask = attention(torch.randn(3, 6, 5, 7))
    assert mask.shape == (3, 5, 7)
    assert ((mask > 0) & (mask < 1)).all()
    assert attention.logits(torch.randn(3, 6, 5, 7)).shape == (3, 4)


def test_the_generator_is_a_stack_of_conv_bn_relu_then_a_sigmoid():
    """This is Eq. 8, for any depth and width."""
    for depth, width in ((1, 8), (3, 16)):
        generator = ClassAwareAttention(6, 4, depth=depth, width=width).generator
        kinds = [type(layer) for layer in generator.modules() if not list(layer.children())]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * depth + [nn.Conv2d, nn.Sigmoid]


def test_the_classifier_sees_masked_features():
    """In Eq. 9, features where the mask is 0 have no effect."""
    attention = ClassAwareAttention(6, 4).eval()
    features = torch.randn(3, 6, 5, 5)
    masked = attention(features)[:, None] * features
    assert_close(attention.logits(features), attention.classifier(masked))
    labels = torch.tensor([0, 3, 1])
    assert_close(attention.loss(features, labels), nn.functional.cross_entropy(attention.classifier(masked), labels))


def test_it_learns_from_labels():
    attention = ClassAwareAttention(6, 3, blocks=1)
    optimizer = torch.optim.Adam(attention.parameters(), lr=1e-2)
    features, labels = blobs(128, 3)
    first = attention.loss(features, labels)
    for _ in range(150):
        optimizer.zero_grad()
        loss = attention.loss(features, labels)
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in attention.generator.parameters())
    assert loss < 0.7 * first
    features, labels = blobs(64, 3)
    right = attention.freeze().logits(features).argmax(1) == labels
    assert right.float().mean() > 0.7


def test_frozen_is_for_good():
    """There is no gradient, and running statistics do not change, in any mode of the parent."""
    attention = ClassAwareAttention(4, 2)
    assert attention.freeze() is attention
    parent = nn.ModuleList([attention, nn.BatchNorm2d(4)])
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    features = torch.randn(3, 4, 5, 5, requires_grad=True)
    parent.train()
    assert parent[1].training
    assert not any(module.training for module in attention.modules())
    mask = attention(features)
    assert not any(parameter.requires_grad for parameter in attention.parameters())
    assert torch.equal(mask, attention(features))
    assert all(torch.equal(value, before[name]) for name, value in attention.state_dict().items())


def test_trains_and_evaluates_before_it_is_frozen():
    attention = ClassAwareAttention(4, 2)
    assert not attention.eval().training
    assert attention.train().training
    assert attention.generator.training


def test_frozen_weights_can_be_saved_and_loaded(tmp_path):
    attention = ClassAwareAttention(4, 2).freeze()
    torch.save(attention.state_dict(), tmp_path / "attention.pt")
    other = ClassAwareAttention(4, 2)
    other.load_state_dict(torch.load(tmp_path / "attention.pt", weights_only=True))
    features = torch.randn(2, 4, 5, 5)
    assert torch.equal(other.freeze()(features), attention(features))


def test_mask_feeds_the_loss(backend):
    """A frozen mask crops the maps in the loss. Only the student gets a gradient."""
    teacher = torch.relu(torch.randn(4, 6, 8, 8))
    student = torch.randn(4, 3, 4, 4, requires_grad=True)
    attention = ClassAwareAttention(6, 3).freeze()
    loss = LocalCorrelationLoss(2, threshold=0.5, attention=attention, backend=backend)(student, teacher)
    assert torch.equal(loss, LocalCorrelationLoss(2, backend=backend)(student, teacher, attention(teacher), 0.5))
    loss.backward()
    assert loss > 0
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"width": 0}, "width must be a positive integer, got 0"),
        ({"blocks": -1}, "blocks must be an integer >= 0, got -1"),
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"num_classes": "3"}, "num_classes must be a positive integer, got '3'"),
    ],
)
def test_attention_that_cannot_be_built_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassAwareAttention(**{"channels": 6, "num_classes": 3, **settings})


def test_attention_to_other_features_is_refused():
    with pytest.raises(ValueError, match="features must have 6 channels, got 5"):
        ClassAwareAttention(6, 3)(torch.randn(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"features must have shape n x c x h x w, got \(6, 4, 4\)"):
        ClassAwareAttention(6, 3).logits(torch.randn(6, 4, 4))


def test_a_parameter_is_no_setting():
    temperature = torch.nn.Parameter(torch.tensor(4.0))
    with pytest.raises(TypeError, match="temperature must be a fixed setting, got a Parameter; what learns is given"):
        losses.KDLoss(temperature=temperature)
    losses.KDLoss()(torch.randn(3, 5), torch.randn(3, 5), temperature=temperature).backward()
    assert temperature.grad != 0
