"""The baselines against what their authors' programs computed, and against formulas that are written out here.

tests/recorded/baselines.py has the origin of the recorded numbers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, relative_error
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import kdkernels
from kdkernels import nn as losses
from kdkernels.nn.baselines import mgd as mgd_file

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@functools.cache
def recorded(method: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).with_name("recorded") / "baselines.npz", allow_pickle=False) as file:
        return {name.partition(".")[2]: torch.from_numpy(file[name]) for name in file if name.startswith(f"{method}.")}


def inputs(arrays: dict[str, Tensor], dtype: torch.dtype, *names: str) -> list[Tensor]:
    return [arrays[name].to(dtype).requires_grad_() for name in names]


def assert_recorded(
    arrays: dict[str, Tensor],
    loss: Tensor,
    found: dict[str, Tensor],
    parameters: list[nn.Parameter] = (),
    call: str = "",
) -> None:
    """Assert that the loss and all its recorded gradients are equal."""
    assert_close(loss, arrays[f"loss{call}"], "loss")
    gradients = torch.autograd.grad(loss, [*found.values(), *parameters], allow_unused=True)
    for name, gradient in zip(found, gradients, strict=False):
        expected = arrays.get(f"{name}{call}_gradient")
        if expected is not None:
            assert_close(gradient, expected, name)
    if parameters:
        of_parameters = torch.cat([gradient.flatten() for gradient in gradients[len(found) :]])
        assert_close(of_parameters, arrays[f"parameters{call}_gradient"], "parameters")


def set_parameters(module: nn.Module, values: Tensor, dtype: torch.dtype) -> list[nn.Parameter]:
    parameters = list(module.to(dtype).parameters())
    nn.utils.vector_to_parameters(values.to(dtype), parameters)
    return parameters


# CRD ------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_crd_is_the_authors(dtype):
    """The second call reads the memory and the Z that the first call left."""
    arrays = recorded("crd")
    crd = losses.CRDLoss(5, 7, 20, embedding_width=6, negatives=9)
    parameters = set_parameters(crd, arrays["parameters0"], dtype)
    for name in ("student_memory", "teacher_memory"):
        getattr(crd, name).copy_(arrays[name])
    for call in range(2):
        student, teacher = inputs(arrays, dtype, f"student{call}", f"teacher{call}")
        loss = crd(student, teacher, arrays[f"images{call}"], arrays[f"negatives{call}"])
        found = {"student": student, "teacher": teacher}
        assert_recorded(arrays, loss, found, parameters, str(call))
    for name in ("student_memory", "teacher_memory"):
        assert_close(getattr(crd, name), arrays[f"{name}_moved"], name)


def crd_by_definition(
    crd: losses.CRDLoss, student: Tensor, teacher: Tensor, images: Tensor, negatives: Tensor
) -> float:
    """Eqs. 18 and 19 image by image, with Z of this batch."""
    with torch.no_grad():
        own = F.normalize(crd.student_embedding(student)).numpy()
        other = F.normalize(crd.teacher_embedding(teacher)).numpy()
    total = 0.0
    for anchors, memory in ((own, crd.teacher_memory.numpy()), (other, crd.student_memory.numpy())):
        numbers = np.concatenate([images[:, None], negatives], 1)
        scores = np.exp(np.einsum("bd,bnd->bn", anchors, memory[numbers]) / crd.temperature)
        scores /= scores.mean() * len(memory)
        h = scores / (scores + negatives.shape[1] / len(memory))
        total -= (np.log(h[:, 0]).sum() + np.log(1 - h[:, 1:]).sum()) / len(anchors)
    return total


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 40), (8, 7)])
def test_crd_is_its_definition(batch, count):
    crd = losses.CRDLoss(4, 3, 11, embedding_width=5, temperature=0.3).double().eval()
    student, teacher = torch.randn(batch, 4).double(), torch.randn(batch, 3).double()
    images, negatives = torch.randperm(11)[:batch], torch.randint(11, (batch, count))
    expected = crd_by_definition(crd, student, teacher, images, negatives)
    # The authors' program adds 1e-7 to N / M.
    assert crd(student, teacher, images, negatives).item() == pytest.approx(expected, rel=1e-5)


def test_crd_gradients():
    crd = losses.CRDLoss(4, 3, 11, embedding_width=5, temperature=0.3).double().eval()
    student, teacher = (torch.randn(3, width).double().requires_grad_() for width in (4, 3))
    images, negatives = torch.tensor([2, 5, 7]), torch.randint(11, (3, 6))
    crd.log_normalizers.fill_(2.0)  # Z is a constant
    assert torch.autograd.gradcheck(lambda s, t: crd(s, t, images, negatives), (student, teacher))


def test_crd_learns_in_training_only():
    crd = losses.CRDLoss(4, 3, 11, embedding_width=5, negatives=8)
    student, teacher, images = torch.randn(3, 4), torch.randn(3, 3), torch.tensor([1, 4, 8])
    before = {name: value.clone() for name, value in crd.state_dict().items()}
    crd.eval()(student, teacher, images)
    for name, value in crd.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    crd.train()(student, teacher, images)
    moved = (crd.student_memory != before["student_memory"]).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 4, 8]
    assert_close(crd.teacher_memory[images].norm(dim=1), torch.ones(3))
    normalizers = crd.log_normalizers.clone()
    assert not normalizers.isnan().any()
    crd(student, teacher, images)
    assert torch.equal(crd.log_normalizers, normalizers)


def test_crd_brings_embeddings_of_an_image_together():
    crd = losses.CRDLoss(8, 8, 32, embedding_width=8, negatives=16)
    student, teacher, images = torch.randn(32, 8, requires_grad=True), torch.randn(32, 8), torch.arange(32)
    optimizer = torch.optim.Adam([student, *crd.parameters()], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        crd(student, teacher, images).backward()
        optimizer.step()
    with torch.no_grad():
        own, other = F.normalize(crd.student_embedding(student)), F.normalize(crd.teacher_embedding(teacher))
    nearest = (own @ other.T).argmax(1)
    assert (nearest == images).float().mean() > 0.9


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_crd_in_half_precision_is_that_of_rounded_embeddings(half):
    crd = losses.CRDLoss(4, 3, 11, embedding_width=5).eval()
    student, teacher = torch.randn(3, 4).to(half), torch.randn(3, 3).to(half)
    images, negatives = torch.tensor([2, 5, 7]), torch.randint(11, (3, 6))
    expected = crd(student.float(), teacher.float(), images, negatives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(crd(student, teacher, images, negatives), expected)


def test_crd_of_dead_and_nan_embeddings():
    crd = losses.CRDLoss(4, 3, 11, embedding_width=5).eval()
    nn.init.zeros_(crd.student_embedding.bias)
    student, images = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 1])
    crd(student, torch.randn(2, 3), images).backward()
    assert not student.grad.any()
    assert crd(torch.full((2, 4), torch.nan), torch.randn(2, 3), images).isnan()


# VID ------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_vid_is_the_authors(dtype):
    arrays = recorded("vid")
    vid = losses.VIDLoss(3, 4)
    parameters = set_parameters(vid, arrays["parameters"], dtype)
    student, teacher = inputs(arrays, dtype, "student", "teacher")
    assert_recorded(arrays, vid(student, teacher), {"student": student, "teacher": teacher}, parameters)


def test_vid_is_the_likelihood_of_a_gaussian():
    """On maps that are not square, with the smaller height in one network and the smaller width in the other."""
    vid = losses.VIDLoss(3, 4, hidden_channels=5, initial_variance=0.7).double()
    student, teacher = torch.randn(2, 3, 6, 2).double(), torch.randn(2, 4, 3, 4).double()
    mean, target = vid.mean(F.adaptive_avg_pool2d(student, (3, 2))), F.adaptive_avg_pool2d(teacher, (3, 2))
    variance = vid.scale.detach().exp().log1p() + 1e-5
    assert_close(variance.float(), torch.full((4,), 0.7))
    likelihood = torch.distributions.Normal(mean, variance.sqrt().view(-1, 1, 1)).log_prob(target)
    assert_close(vid(student, teacher), -likelihood.mean() - 0.5 * np.log(2 * np.pi))


# ReviewKD -------------------------------------------------------------------------------------------------------------


@DTYPES
def test_reviewkd_is_the_authors(dtype, backend):
    arrays = recorded("reviewkd")
    review = losses.ReviewKDLoss((3, 4, 5, 5), (4, 6, 7, 7), backend=backend)
    parameters = set_parameters(review, arrays["parameters"], dtype)
    names = [f"{network}{i}" for network in ("student", "teacher") for i in range(4)]
    maps = inputs(arrays, dtype, *names)
    assert_recorded(arrays, review(maps[:4], maps[4:]), dict(zip(names, maps, strict=True)), parameters)


def test_reviewkd_compares_maps_at_every_level():
    """HCL, where the fused map is the student's map: one layer, with convolutions that copy."""
    review = losses.ReviewKDLoss((3,), (3,)).double().eval()
    fusion = review.fusions[0]
    nn.init.dirac_(fusion.reduce[0].weight)
    nn.init.dirac_(fusion.expand[0].weight)
    student, teacher = torch.randn(2, 3, 6, 3).double(), torch.randn(2, 3, 6, 3).double()
    scaled = student / (1 + 1e-5)  # two normalisations by running statistics, each by 1 / sqrt(1 + eps)
    errors = [F.mse_loss(*(F.adaptive_avg_pool2d(x, side) for x in (scaled, teacher))) for side in (2, 1)]
    assert_close(review([student], [teacher]), (F.mse_loss(scaled, teacher) + errors[0] / 2 + errors[1] / 4) / 1.75)


# SimKD ----------------------------------------------------------------------------------------------------------------


@DTYPES
def test_simkd_is_the_authors(dtype, backend):
    arrays = recorded("simkd")
    projector, classifier = losses.SimKDProjector(3, 8), nn.Linear(8, 5)
    parameters = set_parameters(projector, arrays["parameters"], dtype)
    set_parameters(classifier, arrays["classifier"], dtype)
    student, teacher = inputs(arrays, dtype, "student", "teacher")
    projected = projector(student, teacher.shape[2:])
    assert_close(projector.logits(projected, classifier), arrays["logits"], "logits")
    loss = kdkernels.hint_loss(projected, teacher, backend=backend)
    assert_recorded(arrays, loss, {"student": student, "teacher": teacher}, parameters)


def test_simkd_projects_a_map_of_any_size():
    projector, student = losses.SimKDProjector(3, 8).eval(), torch.randn(2, 3, 5, 6)
    assert projector(student).shape == (2, 8, 5, 6)
    assert projector(student, (7, 4)).shape == (2, 8, 5, 4)
    assert torch.equal(projector(student, (9, 9)), projector(student))


# DML ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("networks", "temperature"), [(2, 1.0), (3, 1.0), (4, 2.5)])
def test_dml_is_its_definition(networks, temperature, backend):
    logits = [torch.randn(5, 7).double().requires_grad_() for _ in range(networks)]
    labels = torch.randint(7, (5,))
    losses_of = losses.DMLLoss(temperature=temperature, backend=backend)(logits, labels)
    log_p = [(x / temperature).log_softmax(1).detach().numpy() for x in logits]
    for k, own in enumerate(logits):
        peers = [np.exp(log_p[j]) * (log_p[j] - log_p[k]) for j in range(networks) if j != k]
        mimicry = temperature**2 * sum(x.sum(1).mean() for x in peers) / (networks - 1)
        expected = -own.detach().log_softmax(1).numpy()[range(5), labels].mean() + mimicry
        assert losses_of[k].item() == pytest.approx(expected, rel=1e-12)
    for k, own in enumerate(logits):  # each network learns from its own loss only
        for other, gradient in zip(logits, torch.autograd.grad(losses_of[k], logits, retain_graph=True), strict=True):
            assert gradient.any() == (other is own)
        scale = temperature / (networks - 1)
        soft = [(x / temperature).softmax(1).detach() for x in logits]
        hard = own.detach().softmax(1) - F.one_hot(labels, 7)
        mimicry = scale * sum(soft[k] - soft[j] for j in range(networks) if j != k)
        assert_close(torch.autograd.grad(losses_of[k], own, retain_graph=True)[0], (hard + mimicry) / 5)


# MGD ------------------------------------------------------------------------------------------------------------------


def mgd_of_record(reducer: str, dtype: torch.dtype) -> losses.MGDLoss:
    arrays, channels = recorded("mgd"), (6, 4)
    norms = [nn.BatchNorm2d(c) for c in channels]
    nn.utils.vector_to_parameters(arrays["norms"].float(), [p for norm in norms for p in (norm.weight, norm.bias)])
    mgd = losses.MGDLoss((3, 4), channels, reducer=reducer).to(dtype)
    mgd.set_margins(norms)
    return mgd


@DTYPES
@pytest.mark.parametrize("reducer", ["amp", "sm"])
def test_mgd_is_the_authors(dtype, reducer):
    """The recorded loss has margins that float16 holds exactly."""
    arrays = recorded("mgd")
    mgd = mgd_of_record(reducer, dtype)
    parameters = set_parameters(mgd, arrays[f"{reducer}_parameters"], dtype)
    names = [f"{network}{i}" for network in ("student", "teacher") for i in range(2)]
    maps = inputs(arrays, dtype, *names)
    mgd.track(maps[:2], maps[2:])
    mgd.assign()
    for index, count in enumerate((3 if reducer == "sm" else 6, 4)):
        assert torch.equal(getattr(mgd, f"assigned{index}"), arrays[f"{reducer}_assigned{index}"][:count])
        margins = getattr(mgd, f"margins{index}")
        assert_close(margins.float(), arrays[f"margin{index}"])
        margins.copy_(arrays[f"margin{index}"].half())
    found = {name.removeprefix(f"{reducer}_"): x for name, x in arrays.items() if name.startswith(reducer)}
    batch = len(maps[0])  # their trainer divides by it
    assert_recorded(found, batch * mgd(maps[:2], maps[2:]), dict(zip(names[:2], maps[:2], strict=True)), parameters)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (4, 4), (7, 19), (40, 40)])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_assignment_is_the_cheapest(rows, columns, repeated):
    costs = torch.rand(rows, columns)
    if repeated:  # ties, and equal rows as of several groups
        costs = costs[torch.arange(rows) // 2].mul(4).round()
    found = mgd_file.assignment(costs)
    assert len(set(found.tolist())) == rows
    expected = costs.numpy()[linear_sum_assignment(costs.numpy())].sum()
    assert costs[range(rows), found].sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_mgd_finds_channels_that_were_shuffled():
    teacher = torch.randn(8, 12, 5, 5)
    order = torch.randperm(12)
    for reducer in ("amp", "sm"):
        mgd = losses.MGDLoss((6,), (12,), reducer=reducer)
        for images in teacher.split(4):
            mgd.track([images[:, order[:6]]], [images])
        mgd.assign()
        channels = mgd.assigned0.view(-1, 6)
        assert (channels == order[:6]).any(0).all()
    with pytest.raises(RuntimeError, match="call track with batches"):
        mgd.assign()


def test_margins_are_the_mean_of_negative_values():
    norm = nn.BatchNorm2d(3)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, -1.0, 5.0])
    mgd = losses.MGDLoss((3,), (3,))
    mgd.set_margins([norm])
    values = norm.bias.detach() + norm.weight.detach() * torch.randn(400_000, 3)
    for channel in (0, 1):
        column = values[:, channel]
        assert mgd.margins0[channel].item() == pytest.approx(column[column < 0].mean().item(), rel=0.02)
    assert mgd.margins0[2].item() == -1.5
    with pytest.raises(ValueError, match="norms must hold 1 layers, got 2"):
        mgd.set_margins([norm, norm])
    with pytest.raises(ValueError, match=r"norms\[0\] must have 3 channels"):
        mgd.set_margins([nn.BatchNorm2d(4)])


# IRG ------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_irg_is_that_of_semckds_trainer(dtype):
    arrays = recorded("irg")
    names = ["student", "teacher", *(f"{network}{i}" for network in ("student", "teacher") for i in range(4))]
    student, teacher, *layers = inputs(arrays, dtype, *names)
    own, other = ([(x[0], x[1]), (x[2], x[3])] for x in (layers[:4], layers[4:]))
    loss = losses.IRGLoss()(student, teacher, own, other)
    of_student = {name: x for name, x in zip(names, [student, teacher, *layers], strict=True) if "student" in name}
    assert_recorded(arrays, loss, of_student)
    weighted = losses.IRGLoss(graph_weight=2.0, transformation_weight=3.0)
    wide = arrays["wide"].to(dtype)
    assert_close(weighted(student, wide, own[:1], other[:1]), arrays["other_loss"])


def test_irg_gradients():
    tensors = [torch.randn(4, *shape).double().requires_grad_() for shape in ((3,), (3,), (2, 2), (2, 2), (5,), (4,))]

    def loss(student, teacher, *layers):
        return losses.IRGLoss()(student, teacher, [layers[:2]], [layers[2:]])

    assert torch.autograd.gradcheck(loss, tensors)


def test_irg_of_equal_samples_is_finite():
    student = torch.ones(3, 4, requires_grad=True)
    loss = losses.IRGLoss()(student, torch.ones(3, 4))
    loss.backward()
    assert loss == 0
    assert student.grad.isfinite().all()


# HKD ------------------------------------------------------------------------------------------------------------------


@DTYPES
def test_hkd_is_that_of_semckds_trainer(dtype):
    arrays = recorded("hkd")
    leaves = inputs(arrays, dtype, "student", "teacher")
    loss = losses.HKDLoss()(leaves[:1], leaves[1:])
    expected = [arrays[name] for name in ("loss", "student_gradient", "teacher_gradient")]
    # Their distance of a sample from itself is a rounding error, under a square root.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for found, correct in zip([loss, *torch.autograd.grad(loss, leaves)], expected, strict=True):
        assert relative_error(found, correct) < tolerance


def test_hkd_weighs_layers():
    student, teacher = ([torch.randn(4, 3), torch.randn(4, 2, 2)] for _ in range(2))
    of_layers = [losses.HKDLoss()([a], [b]) for a, b in zip(student, teacher, strict=True)]
    hkd = losses.HKDLoss(weights=[3.0, 0.5])
    assert_close(hkd(student, teacher), 3 * of_layers[0] + 0.5 * of_layers[1])
    hkd.weights = None
    assert_close(hkd(student, teacher), sum(of_layers))


def test_hkd_of_dead_and_opposite_samples_is_finite():
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    for teacher in (torch.randn(3, 2), student.detach().flip(0), student.detach()):
        loss = losses.HKDLoss()([student], [teacher])
        assert loss.isfinite()
        assert torch.autograd.grad(loss, student)[0].isfinite().all()
    assert loss == 0
    assert losses.HKDLoss()([torch.full((3, 2), torch.nan)], [teacher]).isnan()


# The adversarial loss -------------------------------------------------------------------------------------------------


def test_adversarial_losses_are_binary_cross_entropies():
    adversary = losses.AdversarialLoss(5, hidden_width=4).double()
    student, teacher = (torch.randn(3, 5).double().requires_grad_() for _ in range(2))
    first, norm, _, last = adversary.discriminator
    hidden = first(torch.cat([student, teacher]))
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    p = last((hidden * norm.weight + norm.bias).relu()).sigmoid()
    deceived = -(torch.log(1 - p[:3, 0]) + torch.log(p[:3, 1])).mean() / 2
    told = -(torch.log(p[:3, 0]) + torch.log(1 - p[:3, 1]) + torch.log(1 - p[3:, 0]) + torch.log(p[3:, 1])).mean() / 4
    loss, of_discriminator = adversary(student, teacher), adversary.discriminator_loss(student, teacher)
    assert_close(loss, deceived)
    assert_close(of_discriminator, told)
    leaves = [student, teacher, *adversary.parameters()]
    exact = torch.autograd.grad(deceived, student, retain_graph=True)[0], torch.autograd.grad(told, leaves[2:])
    of_loss = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert [x is not None for x in of_loss] == [True] + [False] * (len(leaves) - 1)
    assert_close(of_loss[0], exact[0])
    found = torch.autograd.grad(of_discriminator, leaves, allow_unused=True)
    assert found[:2] == (None, None)
    assert_close(*(torch.cat([x.flatten() for x in gradients]) for gradients in (found[2:], exact[1])))


def test_an_adversary_moves_the_student_to_the_teacher():
    adversary, shift = losses.AdversarialLoss(4), nn.Parameter(torch.full((4,), 3.0))
    steps = torch.optim.Adam(adversary.parameters(), lr=5e-3), torch.optim.Adam([shift], lr=0.05)
    for _ in range(200):
        student, teacher = torch.randn(64, 4), torch.randn(64, 4)
        for step, loss in zip(steps, (adversary.discriminator_loss, adversary), strict=True):
            step.zero_grad()
            loss(student + shift, teacher).backward()
            step.step()
    assert shift.norm() < 2  # from 6


# Half precision -------------------------------------------------------------------------------------------------------

MAPS = [(4, 3, 8, 8), (4, 4, 4, 4)], [(4, 6, 8, 8), (4, 8, 4, 4)]
EMBEDDINGS = (4, 3), (4, 6)
OF_MAPS = {
    losses.HKDLoss: ((), MAPS),
    losses.IRGLoss: ((), EMBEDDINGS),
    losses.MGDLoss: (((3, 4), (6, 8)), MAPS),
    losses.ReviewKDLoss: (((3, 4), (6, 8)), MAPS),
    losses.SimKDProjector: ((3, 8), MAPS[0][:1]),
    losses.VIDLoss: ((3, 6), [MAPS[0][0], MAPS[1][0]]),
    losses.AdversarialLoss: ((3,), [EMBEDDINGS[0]] * 2),
}


def each(shape, function):
    return [each(one, function) for one in shape] if isinstance(shape, list) else function(shape)


@pytest.mark.parametrize("kind", OF_MAPS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_the_modules_precision(kind, half):
    settings, shapes = OF_MAPS[kind]
    module, arguments = kind(*settings).train(), each(list(shapes), lambda shape: torch.randn(shape).to(half))
    result, expected = module(*arguments), module(*each(arguments, Tensor.float))
    assert result.dtype == torch.float32
    assert_close(result, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(module(*arguments), expected) < 0.1
    assert module(*each(arguments, lambda x: torch.full_like(x, torch.nan))).isnan().any()


# Arguments ------------------------------------------------------------------------------------------------------------

IMAGES = torch.tensor([0, 1])
WRONG_CALLS = [
    (losses.CRDLoss, (4, 3, 5), (torch.randn(2, 5), torch.randn(2, 3), IMAGES), "student must have width 4, got 5"),
    (losses.CRDLoss, (4, 3, 5), (torch.randn(2, 4), torch.randn(3, 3), IMAGES), "student's batch size 2, got 3"),
    (losses.CRDLoss, (4, 3, 5), (torch.randn(2, 4), torch.randn(2, 3), IMAGES.float()), "images must be integers"),
    (losses.CRDLoss, (4, 3, 5), (torch.randn(2, 4), torch.randn(2, 3), IMAGES[:1]), r"shape \(2,\), got \(1,\)"),
    (losses.CRDLoss, (4, 3, 5), (torch.randn(2, 4), torch.randn(2, 3), IMAGES + 4), "must be from 0 to 4, got 5"),
    (
        losses.CRDLoss,
        (4, 3, 5),
        (torch.randn(2, 4), torch.randn(2, 3), IMAGES, IMAGES),
        r"negatives must have shape \(2, 16384\), got \(2,\)",
    ),
    (losses.VIDLoss, (3, 4), (torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)), "student must have 3 channels, got 4"),
    (losses.VIDLoss, (3, 4), (torch.randn(2, 3), torch.randn(2, 4, 4, 4)), "student must have shape b x c x h x w"),
    (losses.DMLLoss, (), ([torch.randn(2, 3)], IMAGES), "logits must hold at least 2 networks, got 1"),
    (losses.DMLLoss, (), ([torch.randn(2, 3), torch.randn(2, 4)], IMAGES), r"logits\[1\] must have shape \(2, 3\)"),
    (
        losses.DMLLoss,
        (),
        (torch.randn(2, 3), IMAGES),
        "logits must be a sequence of tensors, one per",
    ),
    (losses.HKDLoss, (), ([torch.randn(2, 3)], []), "teacher must hold 1 layers, got 0"),
    (losses.HKDLoss, (), ([torch.randn(2, 3)], [torch.randn(3, 3)]), "student's batch size 2, got 3"),
    (losses.IRGLoss, (), (torch.randn(2, 3), torch.randn(2, 3), [], [()]), "teacher_pairs must hold 0 pairs"),
    (losses.IRGLoss, (), (torch.randn(2), torch.randn(2, 3)), "student must have shape b x ..., got"),
    (losses.AdversarialLoss, (3,), (torch.randn(2, 3), torch.randn(2, 4)), "teacher must have width 3, got 4"),
    (
        losses.MGDLoss,
        ((3,), (4,)),
        ([torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 4, 4)]),
        r"teacher\[0\] must have 4 channels, got 3",
    ),
    (losses.ReviewKDLoss, ((3,), (4,)), ([], []), "student must hold 1 layers, got 0"),
    (
        losses.ReviewKDLoss,
        ((3,), (4,)),
        ([torch.randn(2, 3, 4, 4)], [torch.randn(3, 4, 4, 4)]),
        r"teacher\[0\] must have student\[0\]'s batch size 2, got 3",
    ),
    (losses.SimKDProjector, (3, 4), (torch.randn(2, 4, 4, 4),), "student must have 3 channels, got 4"),
    (losses.VIDLoss, (3, 4), ([], torch.randn(2, 4, 4, 4)), "student must be a tensor, got list"),
]


@pytest.mark.parametrize(("kind", "settings", "arguments", "message"), WRONG_CALLS)
def test_wrong_arguments_are_named(kind, settings, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kind(*settings)(*arguments)
