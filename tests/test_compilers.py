"""Every loss under torch.compile with changing sizes, torch.export, torch.func, autocast with a GradScaler, and second
derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import assert_close, loss_and_gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

import kdkernels
from kdkernels import native
from kdkernels import nn as losses
from kdkernels.ops.local_correlation import fake

needs_native = pytest.mark.skipif(
    native.why_not(torch.device("cpu")) is not None, reason=str(native.why_not(torch.device("cpu")))
)


class Step(nn.Module):
    """The smallest training step: a student, a frozen teacher, and a loss between them."""

    def __init__(self, loss: nn.Module, of_maps: bool) -> None:
        super().__init__()
        self.student, self.teacher = (nn.Conv2d(3, width, 3, padding=1) for width in (4, 6 if of_maps else 4))
        self.teacher.requires_grad_(False)
        self.loss, self.of_maps = loss, of_maps

    def forward(self, images: Tensor) -> Tensor:
        student, teacher = self.student(images), self.teacher(images)
        if not self.of_maps:
            student, teacher = student.mean((2, 3)), teacher.mean((2, 3))
        return self.loss(student, teacher)


class Calibrated(nn.Module):
    """SemCKD with attention and projections, for one layer per network. The teacher's layer has any strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calibration, self.loss = losses.SemanticCalibration([4], [6], batch_size=12), losses.SemCKDLoss()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(*self.calibration([student], [teacher[:, :, ::2]]))


class TeacherFree(losses.TeacherFreeKDLoss):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().forward(student, teacher, torch.arange(student.shape[0]) % 4)


class Decoupled(losses.DKDLoss):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().forward(student, teacher, torch.arange(student.shape[0]) % 4)


LOSSES: dict[str, Callable[[], Step]] = {
    "kd": lambda: Step(losses.KDLoss(), False),
    "local_correlation": lambda: Step(losses.LocalCorrelationLoss(2), True),
    "correlation_congruence": lambda: Step(losses.CorrelationCongruenceLoss(), False),
    "correlation_congruence rbf": lambda: Step(losses.CorrelationCongruenceLoss(kernel="rbf"), False),
    "correlation_congruence bilinear": lambda: Step(losses.CorrelationCongruenceLoss(kernel="bilinear"), False),
    "icc": lambda: Step(losses.InterClassCorrelationLoss(), False),
    "icc per sample": lambda: Step(losses.InterClassCorrelationLoss(per_sample=True), False),
    "similarity_preserving": lambda: Step(losses.SimilarityPreservingLoss(), True),
    "token_relation": lambda: Step(losses.TokenRelationLoss(form="gram"), True),
    "token_relation kl": lambda: Step(losses.TokenRelationLoss(comparison="kl"), True),
    "semckd": lambda: Step(Calibrated(), True),
    "hint": lambda: Step(losses.HintLoss(4, 6), True),
    "rkd": lambda: Step(losses.RelationalKDLoss(), False),
    "attention_transfer": lambda: Step(losses.AttentionTransferLoss(), True),
    "probabilistic_transfer": lambda: Step(losses.ProbabilisticTransferLoss(), False),
    "logit_mse": lambda: Step(losses.LogitMSELoss(), False),
    "dkd": lambda: Step(Decoupled(), False),
    "dist": lambda: Step(losses.DISTLoss(), False),
    "teacher_free_kd": lambda: Step(TeacherFree(), False),
}
OF_PYTORCH_ALONE = ("attention_transfer", "probabilistic_transfer", "logit_mse")
every_loss = pytest.mark.parametrize("name", LOSSES)


def run(module: Callable[[Tensor], Tensor], parameters: list[Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient to all parameters as one vector, because the gradient to a bias may be zero."""
    loss = module(images)
    return loss.detach(), together(torch.autograd.grad(loss, parameters))


def together(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@every_loss
def test_compiled_for_changing_sizes(name):
    """The graph is not compiled for every size. PyTorch would allow only eight."""
    torch.compiler.reset()  # all steps compile the same function, and PyTorch limits the number of recompilations
    step = LOSSES[name]().double()
    # Inductor compiles every graph to a call of the operator.
    backend = "inductor" if name in ("local_correlation", "correlation_congruence", "icc") else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    parameters = list(step.student.parameters())
    # Graphs from Inductor's cache have the guards of the test that compiled them.
    with torch._dynamo.config.patch(recompile_limit=8 if backend == "inductor" else 3):
        for batch in (5, 3, 9, 7):
            images = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
            for found, expected in zip(run(compiled, parameters, images), run(step, parameters, images), strict=True):
                assert_close(found, expected, name)


class OfMaps(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.function(student, teacher)


FUNCTIONS_OF_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "similarity_matrices": lambda s, t: kdkernels.similarity_matrices([s, t]).square().sum(),
    "cross_layer_mse": lambda s, t: kdkernels.cross_layer_mse([[s]], [[t[:, :4, ::2]]], s.new_ones(s.shape[0], 1, 1)),
    "local correlations": lambda s, t: kdkernels.local_correlation(s, 2).square().sum(),
    "linear_cka": lambda s, t: kdkernels.linear_cka(s, t),
}
STEPS_ON_MAPS = {name: make for name, make in LOSSES.items() if make().of_maps}
STEPS_ON_MAPS |= {
    name: functools.partial(lambda function: Step(OfMaps(function), True), function)
    for name, function in FUNCTIONS_OF_MAPS.items()
}


# SemCKD's MLPs limit the batch.
TEN_SIZES = {name: make for name, make in STEPS_ON_MAPS.items() if name != "semckd"} | {
    "correlation_congruence": LOSSES["correlation_congruence"],
    "bilinear": lambda: Step(losses.CorrelationCongruenceLoss(kernel="bilinear"), False),
    "rbf": lambda: Step(losses.CorrelationCongruenceLoss(kernel="rbf"), False),
    "channel_wise": lambda: Step(OfMaps(lambda s, t: kdkernels.channel_wise_loss(s, t[:, :4])), True),
}


@needs_native
@pytest.mark.parametrize("name", TEN_SIZES)
def test_ten_sizes_compile_at_most_twice(name):
    """Whether the Gram or the feature form is cheaper is decided when the kernel runs."""
    torch.compiler.reset()
    step = TEN_SIZES[name]().double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    parameters = list(step.student.parameters())
    for i in range(10):
        images = torch.randn(5 + 7 * i, 3, 8 + 2 * i, 10 + 2 * (i % 4), dtype=torch.float64)
        for found, expected in zip(run(compiled, parameters, images), run(step, parameters, images), strict=True):
            assert_close(found, expected, name)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", STEPS_ON_MAPS)
def test_compiled_for_maps_of_changing_sizes(name):
    """One graph for square maps, whose sides PyTorch takes for one number, and one for all others."""
    torch.compiler.reset()
    step = STEPS_ON_MAPS[name]().double()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = list(step.student.parameters())
    sizes = [(8, 8), (12, 8), (16, 16), (4, 12), (20, 12), (8, 24), (12, 12), (16, 4), (24, 20), (4, 4)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for batch, size in enumerate(sizes, 2):
            images = torch.randn(batch, 3, *size, dtype=torch.float64)
            for found, expected in zip(run(compiled, parameters, images), run(step, parameters, images), strict=True):
                assert_close(found, expected, name)


@needs_native
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_one_graph_has_the_form_that_suits_each_size(reduction, monkeypatch):
    """The factors and the forms of LKD depend on the batch, but sizes share a graph: it asks for them when it runs."""

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.local_correlation_loss(student, teacher, 2, reduction=reduction, backend="native")

    batches = [
        (torch.randn(batch, 3, 4, 4, requires_grad=True), torch.randn(batch, 5, 4, 4))
        for batch in (6, 2, 8, 11, 9, 12, 20, 13, 7, 10, 14, 17)
    ]
    explained = [kdkernels.explain("local_correlation_loss", *maps, 2, reduction=reduction) for maps in batches]
    forms = {tuple(part.form for part in of_batch.stages[0]) for of_batch in explained}
    assert len(forms) == 2
    taken = []
    kernel, complete = fake.local_correlation, fake.local_correlation.completed
    monkeypatch.setattr(kernel, "completed", lambda *given: taken.append(complete(*given)) or taken[-1])
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for maps in batches:
            (found, (gradient, _)), (expected, (correct, _)) = (loss_and_gradients(f, *maps) for f in (compiled, loss))
            assert_close(found, expected)
            assert_close(gradient, correct)
    assert [arguments[6][0] for arguments in taken] == [of_batch.stages[0][0].form.code for of_batch in explained]


def test_compiled_with_one_map_for_several_pairs():
    def loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        return kdkernels.cross_layer_mse([[student, student]], [[teacher, teacher]], weights)

    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 2, 2)
    weights = torch.rand(2, 1, 2)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(student, teacher, weights), student)[0] for f in (compiled, loss))
    assert_close(found, expected)


@every_loss
def test_exported(name):
    """Exported programs take batches of any size, in the form of the example's size. In grad mode they have
    gradients.
    """
    step, images = LOSSES[name]().double(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    largest = 12 if name == "semckd" else 100
    for learning in (False, True):
        batches = {0: torch.export.Dim("batch", max=largest)}
        with torch.set_grad_enabled(learning):
            exported = torch.export.export(step, (images,), dynamic_shapes=(batches,)).module()
        for batch in (5, 8, largest):
            images = torch.randn(batch, 3, 4, 4, dtype=torch.float64)
            loss, gradient = run(step, list(step.student.parameters()), images)
            found = exported(images)
            assert_close(found, loss, name)
            if learning:
                learned = [exported.get_parameter(f"student.{of}") for of, _ in step.student.named_parameters()]
                assert_close(together(torch.autograd.grad(found, learned)), gradient, name)


@every_loss
def test_mixed_precision_with_a_scaler(name):
    """Unscaled gradients do not depend on the scale."""
    step = LOSSES[name]()
    images = torch.randn(6, 3, 4, 4)
    for dtype in (torch.bfloat16, torch.float16):
        optimizer = torch.optim.SGD(step.student.parameters(), 0.0)

        def gradients(scale: float, dtype: torch.dtype = dtype, optimizer: torch.optim.SGD = optimizer) -> list[Tensor]:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            step.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = step(images)
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            return [parameter.grad.clone() for parameter in step.student.parameters()]

        # Without a scale, half precision would lose the smallest gradients, because its smallest number is 6e-8.
        for found, expected in zip(gradients(2.0**8), gradients(2.0**4), strict=True):
            assert found.isfinite().all()
            difference = (found - expected).norm()
            assert difference <= 4 * torch.finfo(dtype).eps * expected.norm() + 1e-5


@needs_native
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*OF_PYTORCH_ALONE, "semckd", "hint")])
def test_no_product_is_less_than_float32_whatever_pytorch_may_do(name):
    step, before = LOSSES[name](), torch.get_float32_matmul_precision()
    student, teacher = torch.randn(64, 4, 4, 4, requires_grad=True), torch.randn(64, 6 if step.of_maps else 4, 4, 4)
    if not step.of_maps:
        student, teacher = (maps.detach().flatten(1).requires_grad_() for maps in (student, teacher))
    results = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            results.append(loss_and_gradients(step.loss, student, teacher))
    finally:
        torch.set_float32_matmul_precision(before)
    (loss, (gradient, _)), (again, (same, _)) = results
    assert torch.equal(loss, again)
    assert torch.equal(gradient, same)


def functional(step: Step) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Return the loss as a function of the student's parameters and the images."""
    given = dict(step.named_parameters()) | dict(step.named_buffers())
    learned = {name: value.detach() for name, value in given.items() if name.startswith("student.")}
    return lambda learned, images: torch.func.functional_call(step, given | learned, (images,)), learned


@every_loss
def test_torch_func(name):
    """The gradient of torch.func equals autograd's, also over several batches at once."""
    step = LOSSES[name]().double().eval()  # vmap cannot update batch statistics
    images = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    loss, learned = functional(step)
    gradients, values = torch.vmap(torch.func.grad_and_value(loss), (None, 0))(learned, images)
    for batch, value, *gradient in zip(images, values, *gradients.values(), strict=True):
        expected, correct = run(step, list(step.student.parameters()), batch)
        assert_close(value, expected, name)
        assert_close(together(gradient), correct, name)


@every_loss
def test_forward_mode(name):
    """The derivative along a direction equals the component of the gradient."""
    step = LOSSES[name]().double().eval()
    images, direction = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    step.requires_grad_(False)
    (gradient,) = torch.autograd.grad(step(images.requires_grad_()), images)
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(step(forward_ad.make_dual(images.detach(), direction))).tangent
    assert_close(slope, (gradient * direction).sum(), name)


@needs_native
def test_torch_func_says_what_it_cannot_do():
    student, teacher = torch.randn(2, 5, 4)
    with pytest.raises(RuntimeError, match=r"native' cannot run here: the transforms of torch\.func"):
        torch.func.grad(lambda s: kdkernels.kd_loss(s, teacher, backend="native"))(student)


@every_loss
def test_a_second_derivative_of_the_reference_is_right(name):
    step = LOSSES[name]().double().eval()
    loss, learned = functional(step)
    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    weight = learned.pop("student.weight").requires_grad_()
    with kdkernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda weight: loss(learned | {"student.weight": weight}, images), weight, fast_mode=True
        )
