"""Semantic calibration against the paper's equations, sample by sample, and the effect of each switch."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_good_as, assert_close
from torch import Tensor, nn

import kdkernels
from kdkernels.integrations import repdistiller
from kdkernels.nn import SemanticCalibration, SemCKDLoss

STUDENT = ((3, 8, 8), (5, 4, 4), (6, 2, 2), (6, 2, 2))
TEACHER = ((4, 8, 8), (2, 4, 4), (7, 2, 2))
BATCH = 9


def maps(shapes, batch=BATCH, dtype=torch.float64, scale=0.5) -> list[Tensor]:
    """Return features as after a ReLU."""
    return [(scale * torch.randn(batch, *shape, dtype=torch.float64)).relu().to(dtype) for shape in shapes]


def module(**settings) -> SemanticCalibration:
    settings = {"student_shapes": STUDENT, "teacher_shapes": TEACHER, "batch_size": BATCH} | settings
    return SemanticCalibration(**settings).double()


# An independent version: Eqs. 6-10 and 16 for one sample and one pair of layers at a time, from a list of parameters.


def embedding(row: Tensor, weights: list[Tensor]) -> Tensor:
    w1, b1, w2, b2 = weights
    row = torch.cat([row, row.new_zeros(w1.shape[1] - len(row))])
    vector = w2 @ (w1 @ row + b1).clamp(min=0) + b2
    return vector / (vector**2).sum() ** 0.5


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]


def averaged(x: Tensor, height: int, width: int) -> Tensor:
    """Return the mean over windows, which may overlap by a row or column."""
    rows = [x[:, :, i * x.shape[2] // height : -(-(i + 1) * x.shape[2] // height)].mean(2) for i in range(height)]
    x = torch.stack(rows, 2)
    columns = [x[..., j * x.shape[3] // width : -(-(j + 1) * x.shape[3] // width)].mean(3) for j in range(width)]
    return torch.stack(columns, 3)


def expected(parameters: list[Tensor], student: list[Tensor], teacher: list[Tensor], temperature: float = 1.0):
    """Return attention, the error of each pair and sample, and the loss, from the parameters of keys, queries and
    projections.
    """
    parameters = list(parameters)
    batch = len(student[0])

    def take(count: int) -> list[Tensor]:
        taken = parameters[:count]
        del parameters[:count]
        return taken

    def embeddings(layers: list[Tensor]) -> list[list[Tensor]]:
        result = []
        for layer in layers:
            weights = take(4)
            rows = [[(layer[n] * layer[m]).sum() for m in range(batch)] for n in range(batch)]
            result.append([embedding(torch.stack(row), weights) for row in rows])
        return result

    keys, queries = embeddings(teacher), embeddings(student)
    attention = student[0].new_zeros(batch, len(student), len(teacher))
    errors = torch.zeros_like(attention)
    for i, layer in enumerate(student):
        for n in range(batch):
            energies = torch.stack([queries[i][n] @ keys[j][n] / temperature for j in range(len(teacher))])
            attention[n, i] = energies.exp() / energies.exp().sum()
        for j, target in enumerate(teacher):
            size = [min(a, b) for a, b in zip(layer.shape[2:], target.shape[2:], strict=True)]
            w1, scale1, shift1, w2, scale2, shift2, w3 = take(7)
            x = batch_norm(torch.einsum("nchw,oc->nohw", averaged(layer, *size), w1[:, :, 0, 0]), scale1, shift1)
            x = batch_norm(F.conv2d(x.clamp(min=0), w2, padding=1), scale2, shift2)
            x = torch.einsum("nchw,oc->nohw", x.clamp(min=0), w3[:, :, 0, 0])
            errors[:, i, j] = ((averaged(target, *size) - x) ** 2).mean((1, 2, 3))
    assert not parameters
    return attention, errors, (attention * errors).sum() / (batch * len(student))


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("batch", [BATCH, 5])
def test_attention_errors_loss_and_every_gradient(batch, temperature):
    """This includes a smaller last batch, whose similarity rows are filled up with zeros."""
    calibration, student, teacher = module(temperature=temperature), maps(STUDENT, batch), maps(TEACHER, batch)
    parameters = list(calibration.parameters())
    inputs = [*student, *teacher, *parameters]
    for value in inputs:
        value.requires_grad_()
    projected, targets, attention = calibration(student, teacher)
    loss = SemCKDLoss()(projected, targets, attention)
    exact_attention, errors, exact = expected(parameters, student, teacher, temperature)
    assert_close(attention, exact_attention, "attention")
    assert_close(loss, exact, "loss")
    for i, j in ((0, 0), (0, 2), (3, 0), (2, 1)):
        chosen = torch.zeros_like(attention)
        chosen[:, i, j] = 1
        pair = kdkernels.cross_layer_mse(projected, targets, chosen, reduction="sum")
        assert_close(pair, errors[:, i, j].sum(), f"error of pair {i}, {j}")
    names = [f"student {i}" for i in range(4)] + [f"teacher {j}" for j in range(3)]
    names += [name for name, _ in calibration.named_parameters()]
    results = gradients(loss, inputs), gradients(exact, inputs)
    scale = max(gradient.norm() for gradient in results[1])
    for name, ours, exact in zip(names, *results, strict=True):
        # A constant before a batch norm has no gradient except rounding.
        assert (ours - exact).norm() <= 1e-11 * max(exact.norm(), 1e-3 * scale), name
    # Sometimes all hidden units of an embedding are 0. The convolutions always learn.
    learning = {name.split(".")[0] for name, gradient in zip(names, results[0], strict=True) if gradient.any()}
    assert learning >= {"keys", "queries", "projections"}
    assert all(gradient.any() for name, gradient in zip(names, results[0], strict=True) if "projections" in name)


def test_sizes_that_do_not_divide_and_rectangles():
    student_shapes, teacher_shapes = ((3, 7, 5), (2, 3, 4)), ((4, 5, 5), (3, 3, 2))
    calibration = module(student_shapes=(3, 2), teacher_shapes=teacher_shapes)
    student, teacher = maps(student_shapes), maps(teacher_shapes)
    result = calibration(student, teacher)
    assert result.projected[0][0].shape == (BATCH, 4, 5, 5)
    assert result.projected[0][1].shape == (BATCH, 3, 3, 2)
    assert result.projected[1][0].shape == (BATCH, 4, 3, 4)
    _, _, exact = expected(list(calibration.parameters()), student, teacher)
    assert_close(SemCKDLoss()(*result), exact)


def test_temperature_softens():
    student, teacher = maps(STUDENT), maps(TEACHER)
    sharp, soft = module(temperature=0.25), module(temperature=4.0)
    soft.load_state_dict(sharp.state_dict())
    sharp, soft = (calibration(student, teacher).attention for calibration in (sharp, soft))
    assert (soft.std(2) < sharp.std(2)).all()
    for attention in (sharp, soft):
        assert_close(attention.sum(2), torch.ones(BATCH, len(STUDENT), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropped_in", [False, True])
def test_what_the_authors_code_computed(dtype, dropped_in):
    """tests/recorded/semckd.py has the authors' numbers and their origin."""
    with np.load(Path(__file__).with_name("recorded") / "semckd.npz", allow_pickle=False) as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file}
    student, teacher = (
        [recorded[f"{network}{i}"].to(dtype).requires_grad_() for i in range(layers)]
        for network, layers in (("student", 2), ("teacher", 3))
    )
    channels = [[layer.shape[1] for layer in layers] for layers in (student, teacher)]
    if dropped_in:
        calibration, criterion = repdistiller.SelfA(2, 3, 9, *channels).to(dtype), repdistiller.SemCKDLoss()
    else:
        calibration, criterion = SemanticCalibration(*channels, 9).to(dtype), SemCKDLoss()
    parameters = list(calibration.parameters())
    nn.utils.vector_to_parameters(recorded["parameters"].to(dtype), parameters)

    projected, targets, attention = calibration(student, teacher)
    loss = criterion(projected, targets, attention)
    assert_close(attention, recorded["attention"], "attention")
    assert_close(loss, recorded["loss"], "loss")
    of_attention, *found = gradients(loss, [attention, *student, *teacher, *parameters])
    assert_close(of_attention * 9 * 2, recorded["errors"], "error of each pair")
    for name, gradient in zip(("student0", "student1", "teacher0", "teacher1", "teacher2"), found, strict=False):
        assert_close(gradient, recorded[f"{name}_gradient"], name)
    assert_close(
        torch.cat([gradient.flatten() for gradient in found[5:]]), recorded["parameters_gradient"], "parameters"
    )


# Ablations ------------------------------------------------------------------------------------------------------------

SWITCHES = [
    {},
    {"allocation": "equal"},
    {"allocation": "shared"},
    {"mlp": False},
    {"similarity": False},
    {"projection": False},
    {"temperature": 4.0},
]


def common_state(calibration: SemanticCalibration, other: SemanticCalibration) -> dict[str, Tensor]:
    own, theirs = calibration.state_dict(), other.state_dict()
    return {key: theirs[key] if key in theirs and theirs[key].shape == own[key].shape else own[key] for key in own}


def test_every_switch_changes_attention_or_targets_and_the_loss():
    student, teacher, full = maps(STUDENT), maps(TEACHER), module()
    losses = []
    for switches in SWITCHES:
        calibration = module(**switches)
        calibration.load_state_dict(common_state(calibration, full))
        losses.append(SemCKDLoss()(*calibration(student, teacher)).item())
    assert len({round(loss, 9) for loss in losses}) == len(SWITCHES)


def test_equal_allocation_is_one_over_the_layers_and_has_no_queries():
    calibration = module(allocation="equal")
    result = calibration(maps(STUDENT, 4), maps(TEACHER, 4))
    assert result.attention.eq(1 / 3).all()
    assert result.attention.shape == (4, 4, 3)
    assert {name.split(".")[0] for name, _ in calibration.named_parameters()} == {"projections"}


def test_shared_allocation_is_the_mean_over_the_samples():
    shared, own = module(allocation="shared", temperature=2.0), module(temperature=2.0)
    own.load_state_dict(shared.state_dict())
    student, teacher = maps(STUDENT), maps(TEACHER)
    result = shared(student, teacher)
    assert torch.equal(result.attention, result.attention[:1].expand_as(result.attention))
    each = own(student, teacher).attention
    assert_close(result.attention[3], each.mean(0))
    assert each.std(0).max() > 1e-6
    SemCKDLoss()(*result).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in shared.queries.parameters())


def test_without_mlp_queries_and_keys_are_linear_and_not_normalised():
    calibration = module(mlp=False)
    student, teacher = maps(STUDENT, scale=0.1), maps(TEACHER, scale=0.1)
    attention = calibration(student, teacher).attention
    vectors = [
        [layer.flatten(1) @ layer.flatten(1).T @ e.linears[0].weight.T + e.linears[0].bias for e, layer in pairs]
        for pairs in (zip(calibration.queries, student, strict=True), zip(calibration.keys, teacher, strict=True))
    ]
    energy = torch.einsum("inc,jnc->nij", *map(torch.stack, vectors))
    assert_close(attention, energy.softmax(2))


def test_without_similarities_queries_come_from_the_features_themselves():
    calibration = module(similarity=False)
    student, teacher = maps(STUDENT), maps(TEACHER)
    assert calibration.queries[1].linears[0].weight.shape == (4, 5 * 4 * 4)
    attention = calibration(student, teacher).attention
    # Without similarities, a sample's attention does not depend on other samples.
    one = [layer[:1] for layer in student], [layer[:1] for layer in teacher]
    assert_close(calibration.eval()(*one).attention, attention[:1])
    with pytest.raises(ValueError, match=r"student_shapes must have c x h x w"):
        module(similarity=False, student_shapes=(3, 5))
    with pytest.raises(ValueError, match=r"teacher\[1\] must have shape b x \(2, 4, 4\), got \(9, 2, 3, 4\)"):
        calibration(student, maps(((4, 8, 8), (2, 3, 4), (7, 2, 2))))


def test_without_projections_embeddings_are_compared():
    calibration = module(projection=False)
    projected, targets, _ = calibration(maps(STUDENT, 6), maps(TEACHER, 6))
    assert projected[2][1].shape == targets[2][1].shape == (6, BATCH // 4, 1, 1)
    assert_close(projected[2][1].square().sum(1), torch.ones(6, 1, 1, dtype=torch.float64))
    assert not hasattr(calibration, "projections")


# Contracts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_features_of_norm_300(dtype, autocast):
    """Their similarities exceed the range of float16, and nothing becomes infinite."""
    calibration = SemanticCalibration(STUDENT, TEACHER, BATCH)
    student, teacher = ([300 * F.normalize(x, dim=(1, 2, 3)) for x in maps(shapes)] for shapes in (STUDENT, TEACHER))
    exact = copy.deepcopy(calibration).double()(
        [x.to(dtype).double() for x in student], [x.to(dtype).double() for x in teacher]
    )
    student, teacher = ([x.to(dtype).requires_grad_() for x in layers] for layers in (student, teacher))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        result = calibration(student, teacher)
        loss = SemCKDLoss()(*result)
    assert result.attention.dtype == loss.dtype == torch.float32
    assert_close(result.attention, exact.attention, "attention")
    exact_loss = SemCKDLoss()(*exact)
    assert abs(loss - exact_loss) < (0.02 if autocast else 1e-4) * exact_loss
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.dtype == dtype for x in (*student, *teacher))


def test_a_module_in_half_precision_still_attends_in_float32():
    calibration = module().float()
    half = copy.deepcopy(calibration).half()
    student, teacher = (maps(shapes, dtype=torch.float16, scale=40) for shapes in (STUDENT, TEACHER))
    attention = half(student, teacher).attention
    rounded = copy.deepcopy(half).double()(*([x.double() for x in layers] for layers in (student, teacher))).attention
    assert_as_good_as(attention, attention, rounded)
    assert attention.isfinite().all()


def test_strides_make_no_difference():
    calibration = module()
    student, teacher = maps(STUDENT), maps(TEACHER)
    plain = calibration(student, teacher)
    strided = calibration(
        [x.to(memory_format=torch.channels_last) for x in student], [x.mT.contiguous().mT for x in teacher]
    )
    assert_close(strided.attention, plain.attention)
    assert_close(SemCKDLoss()(*strided), SemCKDLoss()(*plain))


def test_a_dead_layer_attends_to_all_alike():
    """A query of norm 0 is the zero vector. Division by its norm would give NaN."""
    calibration = module()
    for parameter in calibration.queries[1].linears[1].parameters():
        nn.init.zeros_(parameter)
    result = calibration(maps(STUDENT), maps(TEACHER))
    assert_close(result.attention[:, 1], torch.full((BATCH, 3), 1 / 3, dtype=torch.float64))
    SemCKDLoss()(*result).backward()
    assert all(parameter.grad.isfinite().all() for parameter in calibration.parameters())


def test_nan_in_nan_out():
    student, teacher = maps(STUDENT), maps(TEACHER)
    student[2][3, 0, 0, 0] = math.nan
    result = module()(student, teacher)
    assert result.attention[3, 2].isnan().all()
    assert SemCKDLoss()(*result).isnan()


def test_only_what_requires_a_gradient_gets_one():
    student, teacher = maps(STUDENT), maps(TEACHER)
    student[0].requires_grad_()
    SemCKDLoss()(*module()(student, teacher)).backward()
    assert student[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in (*student[1:], *teacher))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
        ({"allocation": "hard"}, "allocation must be one of .*'shared'.*got 'hard'"),
        ({"student_shapes": ()}, "student_shapes must have channels or c x h x w of at least one layer"),
        ({"teacher_shapes": (3, (2, 4))}, "teacher_shapes must have channels or c x h x w"),
        ({"teacher_shapes": (3, -1)}, "teacher_shapes must be a positive integer, got -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        module(**settings)
    with pytest.raises(TypeError, match="student_shapes must be a sequence with an entry for each layer, got int"):
        module(student_shapes=3)


def test_wrong_features_are_named():
    calibration, student, teacher = module(), maps(STUDENT), maps(TEACHER)
    with pytest.raises(ValueError, match="student must have at most batch_size=9 samples, got 10"):
        calibration(maps(STUDENT, 10), maps(TEACHER, 10))
    with pytest.raises(ValueError, match="teacher must hold 3 layers, got 4"):
        calibration(student, [*teacher, teacher[0]])
    with pytest.raises(ValueError, match=r"student\[1\] must have 5 channels, got 3"):
        calibration([student[0], student[0], *student[2:]], teacher)
    with pytest.raises(ValueError, match=r"teacher\[0\] must have student\[0\]'s batch size 9, got 8"):
        calibration(student, maps(TEACHER, 8))
    with pytest.raises(TypeError, match="student must be a sequence of maps, one per layer, got Tensor"):
        calibration(student[0], teacher)
    with pytest.raises(ValueError, match=r"student\[2\] must have shape b x c x h x w, got \(9, 24\)"):
        calibration([*student[:2], student[2].flatten(1), student[3]], teacher)
    with pytest.raises(TypeError, match=r"teacher\[1\] must be float32.*got torch.int64"):
        calibration(student, [teacher[0], teacher[1].long(), teacher[2]])


def test_the_last_batch_may_be_smaller_in_training():
    """23 samples in batches of 9 leave 5: association and projections learn to bring the layers together."""
    calibration = SemanticCalibration(STUDENT, TEACHER, BATCH)
    optimizer = torch.optim.Adam(calibration.parameters(), lr=1e-2)
    student, teacher = (maps(shapes, 23, torch.float32) for shapes in (STUDENT, TEACHER))
    losses = []
    for _ in range(15):
        for batch in torch.randperm(23).split(BATCH):
            optimizer.zero_grad()
            loss = SemCKDLoss()(*calibration([x[batch] for x in student], [x[batch] for x in teacher]))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_copied_pickled_compiled_and_shown():
    calibration, student, teacher = module(temperature=2.0), maps(STUDENT), maps(TEACHER)
    result = SemCKDLoss()(*calibration(student, teacher))
    for same in (copy.deepcopy(calibration), pickle.loads(pickle.dumps(calibration))):
        assert torch.equal(SemCKDLoss()(*same(student, teacher)), result)
    compiled = torch.compile(
        lambda s, t: SemCKDLoss()(*calibration(s, t)), fullgraph=True, backend="aot_eager", dynamic=False
    )
    assert_close(compiled(student, teacher), result)
    assert "batch_size=9, temperature=2.0, allocation='attention'" in repr(calibration)
    assert "reduction='sum'" in repr(SemCKDLoss(reduction="sum"))


def test_loss_reductions():
    result = SemanticCalibration(STUDENT, TEACHER, BATCH)(
        maps(STUDENT, 4, torch.float32), maps(TEACHER, 4, torch.float32)
    )
    mean, total = (SemCKDLoss(reduction=reduction)(*result) for reduction in ("mean", "sum"))
    assert_close(mean * 4 * len(STUDENT), total)


def test_parameters_lie_in_the_published_order_and_start_as_published():
    """The order is keys, queries, then projections row by row. A state dictionary of the authors' module fits entry by
    entry, and the same seed gives the same initial weights.
    """
    torch.manual_seed(3)
    layers = []
    for count in (len(TEACHER), len(STUDENT)):
        for _ in range(count):
            layers += [nn.Linear(BATCH, 2 * (BATCH // 4)), nn.Linear(2 * (BATCH // 4), BATCH // 4)]
    for source, *_ in STUDENT:
        for target, *_ in TEACHER:
            layers += [nn.Conv2d(source, 2 * target, 1, bias=False), nn.BatchNorm2d(2 * target)]
            layers += [nn.Conv2d(2 * target, 2 * target, 3, bias=False), nn.BatchNorm2d(2 * target)]
            layers += [nn.Conv2d(2 * target, target, 1, bias=False)]
    published = [value for layer in layers for value in layer.state_dict().values()]
    torch.manual_seed(3)
    own = SemanticCalibration(STUDENT, TEACHER, BATCH).state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(own, published, strict=True))


# Projections that keep less for the backward pass


def saved_bytes(step) -> int:
    """Return the bytes that the graph of a scalar keeps."""
    saved = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graph = step()
    assert graph.requires_grad
    return sum(saved.values())


def test_half_as_much_is_kept_as_by_the_layers_themselves():
    calibration = SemanticCalibration((64,), (16,), BATCH)
    student, teacher = (maps([(c, 16, 16)], dtype=torch.float32) for c in (64, 16))
    inner = BATCH * 32 * 16 * 16 * 4
    there = saved_bytes(lambda: calibration.projections[0][0](student[0]).sum())
    assert there >= 4 * inner
    assert saved_bytes(lambda: calibration(student, teacher).projected[0][0].sum()) <= there - 1.9 * inner


@pytest.mark.parametrize("frozen", [(), (0,), (1, 4), (0, 1, 3, 4), (3, 6)], ids=str)
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("channels", [4, 48])
def test_projections_are_those_of_their_layers(channels, frozen, learns):
    """Running statistics and every gradient are right, for any frozen parameters. With 96 channels inside, native
    convolutions run.
    """
    calibration = SemanticCalibration((3,), (channels,), BATCH).double()
    layers = calibration.projections[0][0]
    for index in frozen:
        layers[index].requires_grad_(False)
    plain = copy.deepcopy(layers)
    student = torch.randn(BATCH, 3, 7, 5, dtype=torch.float64, requires_grad=learns)
    projected = calibration([student], [torch.randn(BATCH, channels, 7, 5).double()]).projected[0][0]
    exact = plain(student)
    slopes = torch.randn_like(exact)
    learning = [[student] * learns + [p for p in m.parameters() if p.requires_grad] for m in (layers, plain)]
    assert_close(projected, exact)
    results = [torch.autograd.grad(y, inputs, slopes) for y, inputs in zip((projected, exact), learning, strict=True)]
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected)
    for ours, expected in zip(layers.buffers(), plain.buffers(), strict=True):
        assert_close(ours.double(), expected.double())


def test_projections_under_autocast():
    calibration = SemanticCalibration((16,), (8,), BATCH)
    plain = copy.deepcopy(calibration.projections[0][0])
    student, teacher = torch.randn(BATCH, 16, 6, 6), torch.randn(BATCH, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected, like = calibration([student], [teacher]).projected[0][0], plain(student)
    exact = copy.deepcopy(plain).double()(student.double())
    assert projected.dtype == like.dtype
    assert_as_good_as(projected, like, exact, "projection")
    gradients = [
        torch.autograd.grad(y.float().square().sum(), list(m.parameters()))
        for y, m in ((projected, calibration.projections[0][0]), (like, plain))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_projections_of_one_number_raise():
    calibration = SemanticCalibration((3,), (4,), BATCH)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        calibration([torch.randn(1, 3, 1, 1)], [torch.randn(1, 4, 1, 1)])


def test_a_second_derivative_of_projections_raises_or_is_right():
    """This includes a loss whose gradient is constant."""
    calibration = SemanticCalibration((3,), (4,), BATCH, allocation="equal").double()
    student, teacher = torch.randn(BATCH, 3, 4, 4).double(), [torch.randn(BATCH, 4, 4, 4).double()]
    weight = calibration.projections[0][0][3].weight
    for loss in (Tensor.sum, lambda projected: projected.square().sum()):
        projected = calibration([student], teacher).projected[0][0]
        (gradient,) = torch.autograd.grad(loss(projected), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.square().sum().backward()

    def of_weight(weight: Tensor) -> Tensor:
        given = {"projections.0.0.3.weight": weight}
        return torch.func.functional_call(calibration, given, ([student], teacher)).projected[0][0].square().mean()

    with kdkernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(of_weight, weight, fast_mode=True)


# Modules that are hooked, wrapped or changed --------------------------------------------------------------------------


def count(calls: list[str], name: str):
    return lambda *_: calls.append(name)


@pytest.mark.parametrize("dropped_in", [False, True])
def test_every_forward_hook_fires_in_training(dropped_in):
    if dropped_in:
        calibration = repdistiller.SelfA(2, 2, BATCH, [3, 5], [4, 2]).double()
    else:
        calibration = module(student_shapes=(3, 5), teacher_shapes=(4, 2))
    shapes = ((3, 8, 8), (5, 4, 4)), ((4, 8, 8), (2, 4, 4))
    student, teacher = ([x.requires_grad_() for x in maps(s)] for s in shapes)
    expected = SemCKDLoss()(*calibration(student, teacher))
    for hooked in [m for m in calibration.modules() if m is not calibration and type(m) is not nn.ModuleList]:
        registers = [hooked.register_forward_hook, hooked.register_forward_pre_hook]
        if not isinstance(hooked, nn.BatchNorm2d | nn.ReLU):  # PyTorch allows no backward hooks with in-place layers
            registers += [hooked.register_full_backward_hook, hooked.register_full_backward_pre_hook]
        for register in registers:
            calls: list[str] = []
            handle = register(count(calls, "hook"))
            loss = SemCKDLoss()(*calibration(student, teacher))
            loss.backward()
            handle.remove()
            assert calls, f"{type(hooked).__name__}: {register.__name__}"
            assert_close(loss, expected.detach())


def test_projections_that_are_changed_are_called():
    calibration = module(student_shapes=(3,), teacher_shapes=(4,))
    student, teacher = maps(((3, 8, 8),)), maps(((4, 8, 8),))
    expected = calibration(student, teacher)
    projection = calibration.projections[0][0]

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    calibration.projections[0][0] = Wrapper(projection)
    assert_close(calibration(student, teacher).projected[0][0], 2 * expected.projected[0][0])
    calibration.projections[0][0] = projection
    forward = projection[6].forward
    projection[6].forward = lambda x: 3 * forward(x)  # like accelerate's hooks
    assert_close(calibration(student, teacher).projected[0][0], 3 * expected.projected[0][0])
    del projection[6].forward
    nn.utils.parametrizations.weight_norm(projection[3])
    assert_close(calibration(student, teacher).projected[0][0], expected.projected[0][0])
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    calibration(student, teacher)
    handle.remove()
    assert nn.BatchNorm2d in seen
