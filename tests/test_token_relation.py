"""Token relations against their definition in float64, and what is special to them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exactly, loss_and_gradients
from torch import Tensor

import kdkernels
from kdkernels import backends
from kdkernels.ops.token_relation import TOKEN_RELATION

COMPARISONS = {
    "mse": {"comparison": "mse"},
    "mse, clipped": {"comparison": "mse", "clip": "both"},
    "mse, clipped by the teacher": {"comparison": "mse", "clip": "teacher"},
    "mse, the teacher clipped": {"comparison": "mse", "clip": "teacher_only"},
    "hinge": {"comparison": "hinge", "margin": 0.1},
    "hinge, clipped": {"comparison": "hinge", "margin": 0.05, "clip": "both"},
    "kl": {"comparison": "kl", "temperature": 0.3},
    "kl, two temperatures": {"comparison": "kl", "temperature": (0.5, 0.2)},
    "cross_entropy": {"comparison": "cross_entropy", "temperature": 0.4},
    "cross_entropy, clipped": {"comparison": "cross_entropy", "clip": "teacher", "temperature": 0.5},
}
RAW = {"normalize": False}
every_comparison = pytest.mark.parametrize("settings", COMPARISONS.values(), ids=COMPARISONS)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request) -> str:
    """Return each backend that has the operator and can run here."""
    reason = backends.why_not(request.param, Tensor(), TOKEN_RELATION.native, TOKEN_RELATION.triton)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def tensor(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(requires_grad)


def definition(
    student,
    teacher,
    *,
    comparison="mse",
    temperature=1.0,
    margin=0.0,
    clip=None,
    mask=None,
    heads=1,
    across="image",
    axis="tokens",
    normalize=True,
    reduction="mean",
) -> Tensor:
    """Return the loss image by image and head by head, from the tokens that count."""
    pairs = [x if isinstance(x, (tuple, list)) else (x, x) for x in (student, teacher)]
    masks = mask if isinstance(mask, (tuple, list)) else (mask, mask)

    def of_images(features: Tensor, kept: Tensor | None) -> list[Tensor]:
        """Return the tokens that count, n x c for each image."""
        tokens = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool) if kept is None else kept.reshape(tokens.shape[:2])
        images = [image[k] for image, k in zip(tokens, kept, strict=True)]
        return [torch.cat(images)] if across == "batch" else images

    def unit(rows: Tensor) -> Tensor:
        norms = rows.norm(dim=1, keepdim=True)
        return torch.where(norms > 1e-12, rows / torch.where(norms > 1e-12, norms, 1), 0 * rows) if normalize else rows

    inputs = [[of_images(x, m) for x, m in zip(pair, masks, strict=True)] for pair in pairs]
    s_temperature, t_temperature = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for image in range(len(inputs[0][0])):
        for head in range(heads):
            relations = []
            for network in inputs:
                matrices = [x[image].chunk(heads, 1)[head] for x in network]
                matrices = [x.T if axis == "channels" else x for x in matrices]
                relations.append(unit(matrices[0]) @ unit(matrices[1]).T)
            s, t = relations
            if 0 in s.shape or (axis == "channels" and inputs[0][0][image].shape[0] == 0):
                continue
            if clip == "both":
                s, t = s.clamp(min=0), t.clamp(min=0)
            elif clip == "teacher":
                s, t = torch.where(t < 0, s.clamp(min=0), s), t.clamp(min=0)
            elif clip == "teacher_only":
                t = t.clamp(min=0)
            if comparison in ("mse", "hinge"):
                terms = (s - t) ** 2 if comparison == "mse" else ((s - t).abs() - margin).clamp(min=0)
                total, count = total + terms.sum(), count + s.numel()
                continue
            q = (t / t_temperature).exp() / (t / t_temperature).exp().sum(1, keepdim=True)
            log_p = s / s_temperature - (s / s_temperature).exp().sum(1, keepdim=True).log()
            terms = -q * log_p if comparison == "cross_entropy" else q * (q.log() - log_p)
            total, count = total + terms.sum(), count + len(s)
    return total / max(count, 1) if reduction == "mean" else total


def check(backend: str, student: Tensor, teacher: Tensor, **settings) -> None:
    """Assert that the loss and both gradients equal the definition's, in the right dtypes."""
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, **settings)
    assert_matches(fused, functools.partial(definition, **settings), student, teacher)


def check_pairs(backend: str, *inputs: Tensor, **settings) -> None:
    """``check`` for queries and keys of the student, and queries and keys of the teacher."""

    def paired(loss):
        return lambda a, b, c, d: loss((a, b), (c, d), **settings)

    fused = functools.partial(kdkernels.token_relation_loss, backend=backend)
    assert_matches(paired(fused), paired(definition), *inputs)


@every_comparison
@pytest.mark.parametrize(
    "shapes",
    [((2, 9, 5), (2, 9, 7)), ((1, 33, 16), (1, 33, 3)), ((3, 1, 4), (3, 1, 2)), ((2, 70, 2), (2, 70, 20))],
    ids=str,
)
def test_matches_the_definition(backend, settings, shapes):
    for reduction in ("mean", "sum"):
        check(backend, *(tensor(*shape) for shape in shapes), reduction=reduction, **settings)


@every_comparison
def test_tokens_of_one_channel(backend, settings):
    """Unit tokens of one channel are 1 or -1, so their gradient is 0. A relative error of it says nothing."""
    inputs = tensor(2, 70, 1), tensor(2, 70, 20)
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, **settings)
    loss, gradients = loss_and_gradients(fused, *inputs)
    expected, correct = loss_and_gradients(functools.partial(definition, **settings), *exactly(*inputs))
    assert_close(loss, expected)
    assert (inputs[0].detach().abs() * gradients[0].abs()).max() <= 1e-5
    assert_close(gradients[1], correct[1], "gradient")


@every_comparison
@pytest.mark.parametrize("tokens", [300, 1100])
def test_many_tokens(backend, settings, tokens):
    """Relations of few tokens are held. Relations of many tokens are computed in strips, for a softmax twice."""
    check(backend, tensor(1, tokens, 8), tensor(1, tokens, 12), **settings)


@every_comparison
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend, settings, dtype):
    check(backend, tensor(2, 21, 6, dtype=dtype), tensor(2, 21, 9, dtype=dtype), **settings)


@every_comparison
@pytest.mark.parametrize("layout", [{"heads": 3}, {"axis": "channels"}, {"across": "batch"}, RAW], ids=str)
def test_layouts(backend, settings, layout):
    width = 6 if layout.get("axis") == "channels" else 9
    scale = 0.3 if layout.get("normalize") is False else 1.0
    student, teacher = (scale * tensor(3, 17, c, requires_grad=False) for c in (6, width))
    check(backend, student.requires_grad_(), teacher.requires_grad_(), **layout, **settings)


@every_comparison
def test_channels_of_heads_over_the_batch(backend, settings):
    check(backend, tensor(3, 5, 8), tensor(3, 5, 8), heads=2, axis="channels", across="batch", **settings)


@every_comparison
def test_maps(backend, settings):
    """Pixels are tokens, and a student's map may be compared with a teacher's tokens."""
    maps, tokens = tensor(2, 6, 3, 4), tensor(2, 12, 8)
    check(backend, maps, tokens, **settings)
    channels_last = maps.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    check(backend, channels_last, tensor(2, 5, 4, 3), **settings)
    sliced = tensor(2, 6, 4, 8, requires_grad=False)[:, ::2, 1:, ::2].requires_grad_()
    check(backend, sliced, tokens, **settings)
    check(backend, tokens.detach().mT.contiguous().mT.requires_grad_(), maps, **settings)


@every_comparison
@pytest.mark.parametrize("layout", [{}, {"heads": 2}, {"across": "batch"}, {"axis": "channels"}], ids=str)
def test_a_mask_leaves_tokens_out(backend, settings, layout):
    """Numbers of masked tokens do not matter, even NaN. An image may have no token."""
    mask = torch.rand(4, 13) < 0.6
    mask[1], mask[3] = False, True
    student, teacher = tensor(4, 13, 6, requires_grad=False), tensor(4, 13, 6, requires_grad=False)
    student[0, ~mask[0]] = math.nan
    teacher[0, ~mask[0]] = math.inf
    inputs = student.requires_grad_(), teacher.requires_grad_()
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, mask=mask, **layout, **settings)
    loss, gradients = loss_and_gradients(fused, *inputs)
    clean = [x.detach().masked_fill(~mask[..., None], 0).double().requires_grad_() for x in inputs]
    expected, correct = loss_and_gradients(functools.partial(definition, mask=mask, **layout, **settings), *clean)
    assert_close(loss, expected)
    for gradient, exact in zip(gradients, correct, strict=True):
        assert_close(gradient, exact, "gradient")
        assert not gradient[~mask].any()


@every_comparison
def test_a_mask_equals_shorter_images(backend, settings):
    maps, teacher, mask = tensor(2, 4, 3, 5), tensor(2, 15, 6), torch.zeros(2, 3, 5, dtype=torch.bool)
    mask[:, 1:, :4] = True
    loss = functools.partial(kdkernels.token_relation_loss, backend=backend, **settings)
    shorter = loss(maps[:, :, 1:, :4], teacher.unflatten(1, (3, 5))[:, 1:, :4].flatten(1, 2))
    assert_close(loss(maps, teacher, mask=mask).detach(), shorter.detach())


@every_comparison
def test_no_token_counts(backend, settings):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, mask=mask, **settings)
    loss, gradients = loss_and_gradients(fused, tensor(2, 5, 3), tensor(2, 5, 4))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@every_comparison
@pytest.mark.parametrize("layout", [{}, {"heads": 2}, {"across": "batch"}, RAW], ids=str)
def test_two_inputs(backend, settings, layout):
    scale = 0.3 if layout else 1.0
    shapes = (2, 7, 6), (2, 11, 6), (2, 7, 8), (2, 11, 8)
    inputs = [(scale * tensor(*shape, requires_grad=False)).requires_grad_() for shape in shapes]
    check_pairs(backend, *inputs, **layout, **settings)
    mask = torch.rand(2, 7) < 0.7, torch.rand(2, 11) < 0.7
    check_pairs(backend, *inputs, mask=mask, **layout, **settings)


@every_comparison
def test_an_image_without_keys(backend, settings):
    mask = torch.ones(2, 7, dtype=torch.bool), torch.tensor([[True] * 4, [False] * 4])
    check_pairs(backend, tensor(2, 7, 3), tensor(2, 4, 3), tensor(2, 7, 5), tensor(2, 4, 5), mask=mask, **settings)


@every_comparison
def test_two_inputs_by_channels(backend, settings):
    inputs = tensor(2, 7, 6), tensor(2, 7, 4), tensor(2, 7, 6), tensor(2, 7, 4)
    check_pairs(backend, *inputs, axis="channels", mask=torch.rand(2, 7) < 0.7, **settings)


def test_embeddings_of_a_batch(backend):
    """With across="batch", n x c embeddings are the rows, as the images and texts of CLIP."""
    images, texts, their_images, their_texts = (tensor(9, c) for c in (6, 6, 8, 8))
    settings = {"comparison": "cross_entropy", "across": "batch", "temperature": (0.1, 0.05), "backend": backend}
    loss = kdkernels.token_relation_loss((images, texts), (their_images, their_texts), **settings)
    a, b, c, d = (F.normalize(x.double(), dim=1) for x in (images, texts, their_images, their_texts))
    expected = F.cross_entropy(a @ b.T / 0.1, (c @ d.T / 0.05).softmax(1))
    assert_close(loss.detach(), expected.detach())


@every_comparison
def test_zero_and_duplicate_tokens(backend, settings):
    student, teacher = tensor(2, 9, 5, requires_grad=False), tensor(2, 9, 7, requires_grad=False)
    student[0, 1] = student[0, 4]
    student[1, 6] = teacher[0, 2] = teacher[1, 6] = 0
    check(backend, student.requires_grad_(), teacher.requires_grad_(), **settings)


@every_comparison
def test_nan(backend, settings):
    for place in range(2):
        inputs = [tensor(2, 9, 5), tensor(2, 9, 7)]
        inputs[place].data[1, 3, 2] = math.nan
        assert kdkernels.token_relation_loss(*inputs, backend=backend, **settings).isnan()


@every_comparison
def test_gradients_by_finite_differences(backend, settings):
    inputs = exactly(tensor(1, 5, 3), tensor(1, 5, 4))
    loss = functools.partial(kdkernels.token_relation_loss, backend=backend, **settings)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("comparison", ["kl", "cross_entropy"])
def test_large_relations(backend, comparison):
    """Raw rows have relations far beyond the range of exp. Their rounding becomes a relative error of the terms, which
    are above 1 and may cancel.
    """
    student, teacher = 20 * torch.randn(2, 40, 6), 20 * torch.randn(2, 40, 6)
    settings = {"comparison": comparison, "normalize": False}
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, **settings)
    exact = functools.partial(kdkernels.token_relation_loss, backend="reference", **settings)
    inputs = student.requires_grad_(), teacher.requires_grad_()
    found, gradients = loss_and_gradients(fused, *inputs)
    expected, correct = loss_and_gradients(exact, *exactly(*inputs))
    tolerance = torch.finfo(torch.float32).eps * max(x.square().sum(2).max().item() for x in inputs)
    for result, value in zip((found, *gradients), (expected, *correct), strict=True):
        assert (result - value).norm() <= tolerance * value.norm().clamp(min=1)


@pytest.mark.parametrize("form", ["gram", "feature"])
@pytest.mark.parametrize(
    "layout", [{}, {"heads": 2}, {"across": "batch"}, {"axis": "channels"}, {"mask": True}], ids=str
)
def test_forms(backend, form, layout):
    given = {"mask": torch.rand(3, 23) < 0.6} if "mask" in layout else layout
    fused = functools.partial(kdkernels.token_relation_loss, backend=backend, form=form, **given)
    assert_matches(fused, functools.partial(definition, **given), tensor(3, 23, 6), tensor(3, 23, 6))


t = torch.randn
X = t(2, 3, 4)
SAME = X, X
MISTAKES = {
    "type": ((1, t(2, 3, 4)), {}, TypeError, "student must be a tensor, got int"),
    "dimensions": (
        (t(2, 3), t(2, 3)),
        {},
        ValueError,
        r"student must have shape b x n x c or b x c x h x w, got \(2, 3\)",
    ),
    "batch": ((t(2, 3, 4), t(3, 3, 4)), {}, ValueError, "teacher must have student's batch size 2, got 3"),
    "tokens": ((t(2, 3, 4), t(2, 5, 4)), {}, ValueError, "teacher must have student's 3 tokens, got 5; resample"),
    "channels": ((t(2, 3, 4), t(2, 3, 5)), {"axis": "channels"}, ValueError, "teacher must have student's 4 channels"),
    "one pair": (
        (SAME, t(2, 3, 4)),
        {},
        ValueError,
        "teacher must have as many inputs as student, 2, got 1",
    ),
    "three": (
        ((t(2, 3, 4),) * 3, t(2, 3, 4)),
        {},
        ValueError,
        "student must be a tensor, or a pair of queries and keys",
    ),
    "keys": (
        ((t(2, 3, 4), t(2, 3, 5)),) * 2,
        {},
        ValueError,
        r"student\[1\] must have student\[0\]'s 4 channels, got 5",
    ),
    "heads": (SAME, {"heads": 3}, ValueError, "heads=3 must divide the channels of student, got 4"),
    "no heads": (SAME, {"heads": 0}, ValueError, "heads must be a positive integer, got 0"),
    "comparison": (SAME, {"comparison": "l1"}, ValueError, "comparison must be one of"),
    "clip": (SAME, {"clip": "none"}, ValueError, "clip must be one of"),
    "across": (SAME, {"across": "head"}, ValueError, "across must be one of"),
    "axis": (SAME, {"axis": 1}, ValueError, "axis must be one of"),
    "temperature": (SAME, {"temperature": 0}, ValueError, "temperature must be a positive number, got 0"),
    "temperatures": (SAME, {"temperature": (1, 2, 3)}, ValueError, "temperature must be a number, or the student"),
    "margin": (SAME, {"margin": -1}, ValueError, "margin must be a number >= 0, got -1"),
    "form": (
        SAME,
        {"form": "feature", "clip": "both"},
        ValueError,
        'form="feature" needs comparison="mse"',
    ),
    "mask type": (SAME, {"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
    "mask shape": (
        SAME,
        {"mask": torch.ones(2, 4) > 0},
        ValueError,
        r"mask must have shape \(2, 3\), got",
    ),
    "masks": (SAME, {"mask": (torch.ones(2, 3) > 0,) * 2}, TypeError, "mask must be one tensor"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    inputs, settings, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        kdkernels.token_relation_loss(*inputs, **settings)


def test_local_correlation_names_it():
    with pytest.raises(ValueError, match="for b x n x c tokens use token_relation_loss"):
        kdkernels.local_correlation_loss(t(2, 9, 4), t(2, 9, 4), k=3)


def contrastive(a, b, c, d, scale, *, comparison, reduction) -> Tensor:
    """Return the loss from both n x m matrices of logits."""
    a, b, c, d = (F.normalize(x, dim=1) for x in (a, b, c, d))
    s, t = scale * a @ b.T, 7.0 * c @ d.T
    losses = []
    for x, y in ((s, t), (s.T, t.T)):
        q, log_p = y.softmax(1), x.log_softmax(1)
        terms = -(q * log_p).sum(1) if comparison == "cross_entropy" else (q * (q.log() - log_p)).sum(1)
        losses.append(terms.mean() if reduction == "mean" else terms.sum())
    return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("comparison", ["kl", "cross_entropy"])
def test_contrastive(backend, comparison, reduction):
    """Also the gradient to a scale that learns."""
    settings = {"comparison": comparison, "reduction": reduction}

    def fused(a, b, c, d, scale):
        return kdkernels.contrastive_relation_loss(
            a, b, c, d, student_scale=scale, teacher_scale=7.0, backend=backend, **settings
        )

    scale = torch.tensor(5.0, requires_grad=True)
    inputs = tensor(9, 6), tensor(13, 6), tensor(9, 8), tensor(13, 8)
    assert_matches(fused, functools.partial(contrastive, **settings), *inputs, scale)


CONTRASTIVE_MISTAKES = {
    "channels": ((t(3, 4), t(3, 5), t(3, 4), t(3, 4)), {}, "student_b must have 4 channels, got 5"),
    "rows": ((t(3, 4), t(3, 4), t(2, 4), t(3, 4)), {}, "teacher_a must have 3 rows, as the student has, got 2"),
    "scale": ((t(3, 4),) * 4, {"student_scale": 0.0}, "student_scale must be a positive number, got 0.0"),
    "scales": ((t(3, 4),) * 4, {"teacher_scale": torch.ones(2)}, "teacher_scale must hold one number"),
    "comparison": ((t(3, 4),) * 4, {"comparison": "mse"}, "comparison must be one of"),
}


@pytest.mark.parametrize("name", CONTRASTIVE_MISTAKES)
def test_contrastive_mistakes(name):
    inputs, settings, message = CONTRASTIVE_MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        kdkernels.contrastive_relation_loss(*inputs, **settings)
