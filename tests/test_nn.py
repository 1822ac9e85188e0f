"""The modules: losses that only hold settings, and class-aware attention, trained, frozen, then looked at."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_close
from torch import Tensor, nn

import kdkernels
from kdkernels.nn import ClassAwareAttention, LocalCorrelationLoss

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
    module = LocalCorrelationLoss([3, 2], threshold=0.5, backend=backend)
    expected = kdkernels.local_correlation_loss(student, teacher, [3, 2], mask=masks, threshold=0.5, backend=backend)
    assert torch.equal(module(student, teacher, masks), expected)
    # Without a mask there is nothing to crop by.
    assert torch.equal(
        module(student, teacher), kdkernels.local_correlation_loss(student, teacher, [3, 2], backend=backend)
    )


def test_module_shows_its_settings():
    module = LocalCorrelationLoss(4, weights=(1, 2, 3), threshold=0.1, reduction="mean")
    assert "k=4" in repr(module)
    assert "(1, 2, 3)" in repr(module)
    assert "threshold=0.1" in repr(module)
    assert "partition='exact', reduction='mean', eps=1e-08" in repr(module)
    assert not list(module.parameters())
    assert not module.state_dict()


def test_module_can_be_copied_pickled_and_compiled(backend):
    module = LocalCorrelationLoss(2, weights=(1, 2, 3), backend=backend)
    student, teacher = torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4)
    loss = module(student, teacher)
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(student, teacher), loss)
    assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(student, teacher), loss)


# Class-aware attention ------------------------------------------------------------------------------------------------


def blobs(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Maps of noise in which a 3 x 3 blob, in channels of its class alone, lies somewhere in the left half."""
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
    """Eq. 8, whatever the depth and width."""
    for depth, width in ((1, 8), (3, 16)):
        generator = ClassAwareAttention(6, 4, depth=depth, width=width).generator
        kinds = [type(layer) for layer in generator.modules() if not list(layer.children())]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * depth + [nn.Conv2d, nn.Sigmoid]


def test_the_classifier_sees_masked_features():
    """Eq. 9: features where the mask is 0 make no difference."""
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
    """No gradient, and running statistics stay, whatever mode the parent is put in."""
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
    """The whole of LKD's second half: a frozen mask, cropped by, into the loss; a gradient to the student alone."""
    teacher = torch.relu(torch.randn(4, 6, 8, 8))
    student = torch.randn(4, 3, 4, 4, requires_grad=True)
    attention = ClassAwareAttention(6, 3).freeze()
    loss = LocalCorrelationLoss(2, threshold=0.5, backend=backend)(student, teacher, attention(teacher))
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
