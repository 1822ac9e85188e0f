"""Defaults of PyTorch that a program may change, and settings that are numbers of NumPy's instead of Python's."""

from __future__ import annotations

import contextlib
import copy
import decimal
import fractions
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch import Tensor

import kdkernels
from kdkernels import checks, samplers
from kdkernels import nn as losses
from kdkernels.samplers import ClassUniformSampler, SuperclassUniformSampler


def inputs(*shape: int) -> list[Tensor]:
    """Student and teacher."""
    return [torch.randn(shape, device="cpu", dtype=torch.float32) for _ in range(2)]


ROWS, MAPS, SMALLER = inputs(6, 8), inputs(6, 8, 4, 4), inputs(6, 8, 2, 3)
LABELS, FEATURES = torch.arange(6) % 3, torch.randn(30, 4)
MASK, ATTENTION = torch.rand(6, 4, 4), torch.rand(6, 1, 2)
MASKS = losses.ClassAwareAttention(8, 3).freeze()

# A call of every public function. A setting that is a number is in the keywords, and is not its default.
FUNCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "attention_transfer_loss": ((MAPS[0], SMALLER[1]), {"eps": 0.5}),
    "average_relative_improvement": (([1.0, 2.0], [0.5, 1.0], [0.25, 0.5]), {}),
    "channel_wise_loss": (MAPS, {"temperature": 2.0}),
    "contrastive_relation_loss": ((*ROWS, *ROWS[::-1]), {"student_scale": 2.0, "teacher_scale": 0.5}),
    "correlation_congruence_loss": (ROWS, {"gamma": 0.5, "order": 3}),
    "cross_layer_mse": (([[MAPS[0], SMALLER[0]]], [MAPS], ATTENTION), {}),
    "dist_loss": (ROWS, {"beta": 0.5, "gamma": 2.0, "temperature": 2.0}),
    "dkd_loss": ((*ROWS, LABELS), {"alpha": 0.5, "beta": 2.0, "temperature": 2.0, "ignore_index": 1}),
    "hint_loss": ((MAPS[0], SMALLER[1]), {}),
    "inter_class_correlation": (ROWS[:1], {}),
    "inter_class_correlation_loss": (ROWS, {}),
    "kd_loss": (ROWS, {"temperature": 2.0}),
    "kernel_matrix": (ROWS, {"gamma": 0.5, "order": 3}),
    "linear_cka": (ROWS, {}),
    "local_correlation": (MAPS[:1], {"k": 2, "relation": "inter_diff", "eps": 0.5}),
    "local_correlation_loss": (MAPS, {"k": 2, "weights": (1.0, 2.0, 0.5), "mask": MASK, "threshold": 0.25, "eps": 0.5}),
    "logit_mse_loss": (ROWS, {}),
    "probabilistic_transfer_loss": (ROWS, {"eps": 0.5}),
    "relational_kd_loss": (ROWS, {"distance_weight": 2.0, "angle_weight": 4.0}),
    "semantic_mismatch_score": (inputs(2, 6, 6), {"pairs": [(0, 1), (1, 0)]}),
    "similarity_matrices": ((MAPS,), {}),
    "similarity_preserving_loss": (MAPS, {}),
    "token_relation_loss": ((MAPS[0], MAPS[1]), {"comparison": "kl", "temperature": 0.5, "margin": 0.25, "heads": 2}),
    "teacher_free_kd_loss": ((*ROWS, LABELS), {"alpha": 0.5, "temperature": 2.0}),
}
NO_KERNELS = {"attention_transfer_loss", "logit_mse_loss", "probabilistic_transfer_loss"}
OTHERS = {"explain", "functional", "load_operators", "metrics", "nn", "samplers", "use_backend"}
EXPLAINED = [name for name in FUNCTIONS if "backend" in inspect.signature(getattr(kdkernels, name)).parameters]

# How every public module is made, and what it is called with.
MODULES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "AdversarialLoss": ({"width": 8, "hidden_width": 4}, ROWS),
    "AttentionTransferLoss": ({"eps": 0.5}, (MAPS[0], SMALLER[1])),
    "CRDLoss": (
        {"student_width": 8, "teacher_width": 8, "samples": 9, "embedding_width": 4, "negatives": 3, "momentum": 0.25},
        (*ROWS, torch.arange(6), torch.arange(18).view(6, 3) % 9),
    ),
    "ChannelWiseLoss": ({"temperature": 2.0}, MAPS),
    "ClassAwareAttention": ({"channels": 8, "num_classes": 3, "width": 4, "depth": 2, "blocks": 1}, MAPS[:1]),
    "ContrastiveRelationLoss": ({}, (*ROWS, *ROWS[::-1])),
    "CorrelationCongruenceLoss": ({"gamma": 0.5, "order": 3}, ROWS),
    "DISTLoss": ({"beta": 0.5, "gamma": 2.0, "temperature": 2.0}, ROWS),
    "DKDLoss": ({"alpha": 0.5, "beta": 2.0, "temperature": 2.0, "ignore_index": 1}, (*ROWS, LABELS)),
    "DMLLoss": ({"temperature": 2.0}, (ROWS, LABELS)),
    "HKDLoss": ({"weights": (1.0, 0.5)}, ([ROWS[0], ROWS[1]], [ROWS[1], ROWS[0].flip(1)])),
    "HintLoss": ({"student_channels": 8, "teacher_channels": 8}, (MAPS[0], SMALLER[1])),
    "IRGLoss": ({"graph_weight": 0.5, "transformation_weight": 2.0}, (*ROWS, [ROWS], [ROWS[::-1]])),
    "InterClassCorrelationLoss": ({}, ROWS),
    "KDLoss": ({"temperature": 2.0}, ROWS),
    "LocalCorrelationLoss": ({"k": 2, "threshold": 0.25, "eps": 0.5, "attention": MASKS}, MAPS),
    "LogitMSELoss": ({}, ROWS),
    "MGDLoss": ({"student_channels": [8], "teacher_channels": [8]}, ([MAPS[0]], [MAPS[1]])),
    "ProbabilisticTransferLoss": ({"eps": 0.5}, ROWS),
    "RelationalKDLoss": ({"distance_weight": 2.0, "angle_weight": 4.0}, ROWS),
    "ReviewKDLoss": (
        {"student_channels": [8, 8], "teacher_channels": [8, 8], "hidden_channels": 4},
        ([MAPS[0], SMALLER[0]], [MAPS[1], SMALLER[1]]),
    ),
    "SemCKDLoss": ({}, ([[MAPS[0], SMALLER[0]]], [MAPS], ATTENTION)),
    "SemanticCalibration": (
        {"student_shapes": [8], "teacher_shapes": [(8, 4, 4), 8], "batch_size": 8, "temperature": 2.0},
        ([MAPS[0]], [MAPS[1], SMALLER[1]]),
    ),
    "SimKDProjector": ({"student_channels": 8, "teacher_channels": 8, "factor": 4}, MAPS[:1]),
    "SimilarityPreservingLoss": ({}, MAPS),
    "TokenRelationLoss": ({"comparison": "kl", "temperature": 0.5, "margin": 0.25, "heads": 2}, MAPS),
    "TeacherFreeKDLoss": ({"alpha": 0.5, "temperature": 2.0}, (*ROWS, LABELS)),
    "VIDLoss": ({"student_channels": 8, "teacher_channels": 8, "initial_variance": 2.0, "eps": 0.5}, MAPS),
}
OTHER_CLASSES = {"Calibration", "FeatureCapture"}

SAMPLERS: dict[str, tuple[type, tuple[Any, ...], dict[str, Any]]] = {
    "ClassUniformSampler": (
        ClassUniformSampler,
        ((np.arange(30) % 3).tolist(),),
        {"classes": 2, "samples": 3, "rank": 1, "world_size": 2, "seed": 5},
    ),
    "SuperclassUniformSampler": (
        SuperclassUniformSampler,
        (FEATURES,),
        {"superclasses": 3, "classes": 2, "samples": 3, "rank": 1, "world_size": 2, "seed": 5},
    ),
}


def test_every_public_name_is_here():
    assert set(FUNCTIONS) | OTHERS >= set(kdkernels.__all__)
    assert set(MODULES) | OTHER_CLASSES == set(losses.__all__)
    assert set(SAMPLERS) == set(samplers.__all__)


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (list, tuple)):
        return [tensor for part in result for tensor in tensors_in(part)]
    return [torch.tensor(result, device="cpu", dtype=torch.float64)]


def learning(value: Any) -> Any:
    """Return the same tensors as leaves of a graph of their own."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    return [learning(part) for part in value] if isinstance(value, (list, tuple)) else value


def call(function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[Tensor]:
    """Results, and the gradients to all arguments."""
    arguments = learning(arguments)
    results = tensors_in(function(*arguments, **settings))
    if any(result.requires_grad for result in results):
        sum(result.square().sum() for result in results).backward()
    return results + [x.grad for x in tensors_in(arguments) if x.grad is not None]


def call_function(name: str, backend: str, change: Callable[[Any], Any] = lambda value: value) -> list[Tensor]:
    function = getattr(kdkernels, name)
    arguments, settings = FUNCTIONS[name]
    if "backend" in inspect.signature(function).parameters:
        settings = {**settings, "backend": "reference" if name in NO_KERNELS else backend}
    return call(function, *arguments, **{key: change(value) for key, value in settings.items()})


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.device.type == "cpu"
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


# Defaults -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# What does not name its own device and dtype fails or differs here.
foreign_defaults = pytest.mark.parametrize(
    "foreign", [lambda: torch.device("meta"), default_device, default_dtype], ids=["context", "device", "dtype"]
)


@foreign_defaults
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_under_other_defaults(name, backend, foreign):
    expected = call_function(name, backend)
    with foreign():
        found = call_function(name, backend)
    assert_equal(found, expected)


@foreign_defaults
@pytest.mark.parametrize("name", MODULES)
def test_modules_under_other_defaults(name, foreign):
    """Parameters are where the program wants them, and the rest is where the inputs are."""
    settings, arguments = MODULES[name]
    module = getattr(losses, name)(**settings)
    twin = copy.deepcopy(module)
    expected = call(module, *arguments)
    with foreign():
        found = call(twin, *arguments)
    assert_equal(found, expected)


@foreign_defaults
def test_class_aware_attention_under_other_defaults(foreign):
    attention = losses.ClassAwareAttention(8, 3).eval()
    expected = call(attention.loss, MAPS[0], LABELS)
    with foreign():
        assert_equal(call(attention.loss, MAPS[0], LABELS), expected)


@foreign_defaults
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_under_other_defaults(name, foreign):
    sampler, arguments, settings = SAMPLERS[name]
    expected = [list(epoch) for epoch in 2 * [sampler(*arguments, **settings)]]
    with foreign():
        found = sampler(*arguments, **settings)
        state = found.state_dict()
        assert [list(epoch) for epoch in 2 * [found]] == expected
        found.load_state_dict(state)
        assert list(found) == expected[0]


# Settings -------------------------------------------------------------------------------------------------------------


def numpy_scalar(value: Any) -> Any:
    """Return the same number as NumPy's, of the types that a configuration or a search may give."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(numpy_scalar, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return np.int64(value)
    return np.float32(value) if isinstance(value, float) else value


def tensor_scalar(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(tensor_scalar, value))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.tensor(value, device="cpu") if number else value


scalars = pytest.mark.parametrize("scalar", [numpy_scalar, tensor_scalar])


@scalars
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_scalars(name, backend, scalar):
    found, expected = call_function(name, backend, scalar), call_function(name, backend)
    if name == "contrastive_relation_loss" and scalar is tensor_scalar:  # a scale that may learn multiplies the rows
        for result, exact in zip(found, expected, strict=True):
            assert_close(result, exact)
    else:
        assert_equal(found, expected)


@scalars
@pytest.mark.parametrize("name", sorted(EXPLAINED))
def test_explain_takes_scalars(name, scalar):
    arguments, settings = FUNCTIONS[name]
    given = {key: scalar(value) for key, value in settings.items()}
    assert str(kdkernels.explain(name, *arguments, **given)) == str(kdkernels.explain(name, *arguments, **settings))


@scalars
@pytest.mark.parametrize("name", MODULES)
def test_modules_take_scalars(name, scalar):
    settings, arguments = MODULES[name]
    modules = []
    for change in (lambda value: value, scalar):
        torch.manual_seed(3)
        modules.append(getattr(losses, name)(**{key: change(value) for key, value in settings.items()}))
    expected, found = (call(module, *arguments) for module in modules)
    assert_equal(found, expected)
    assert repr(modules[0]) == repr(modules[1])


@scalars
@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name][0]])
def test_modules_with_scalars_are_compiled_whole(name, scalar):
    settings, arguments = MODULES[name]
    torch.compiler.reset()
    torch.manual_seed(3)
    module = getattr(losses, name)(**{key: scalar(value) for key, value in settings.items()})
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="eager")
    for found, expected in zip(call(compiled, *arguments), call(module, *arguments), strict=True):
        assert_close(found, expected)


@scalars
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_scalars(name, scalar):
    sampler, arguments, settings = SAMPLERS[name]
    given = sampler(*arguments, **{key: scalar(value) for key, value in settings.items()})
    given.set_epoch(scalar(3))
    expected = sampler(*arguments, **settings)
    expected.set_epoch(3)
    assert list(given) == list(expected)
    assert given.state_dict().keys() == expected.state_dict().keys()
    assert {type(value) for key, value in given.state_dict().items() if key != "labels"} <= {int, type(None)}


@pytest.mark.parametrize("check", [checks.positive, checks.non_negative, checks.fraction, checks.finite])
def test_numbers_are_whatever_float_takes(check):
    for value in (np.float16(0.5), np.float64(0.5), np.array(0.5), fractions.Fraction(1, 2), decimal.Decimal("0.5")):
        assert check("setting", value) == 0.5
        assert type(check("setting", value)) is float
    assert check("setting", np.uint8(1)) == check("setting", torch.tensor(1)) == 1
    learns = torch.tensor(0.5, requires_grad=True)  # a number would stop it from learning, without a word
    for value in ("0.5", b"1", None, [0.5], 0.5j, np.ones(2), torch.ones(2), learns, math.nan, np.float32(np.inf)):
        with pytest.raises(ValueError, match="setting must be a"):
            check("setting", value)


@pytest.mark.parametrize("check", [checks.positive_int, checks.non_negative_int])
def test_integers_are_whatever_index_takes(check):
    for value in (np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3], dtype=torch.int16)):
        assert check("setting", value) == 3
        assert type(check("setting", value)) is int
    for value in (True, np.True_, torch.tensor(True), 3.0, np.float32(3), torch.tensor(3.0), "3", None, -1, np.ones(2)):
        with pytest.raises(ValueError, match="setting must be a"):
            check("setting", value)


# Half precision -------------------------------------------------------------------------------------------------------


def near_the_edge(value: Any, dtype: torch.dtype) -> Any:
    """Return float16 features in ``dtype``: a third are 0, the others are 60,000 to 65,504 with both signs.

    Without the zeros, all attention maps are nearly uniform, and their difference is mostly rounding. Weights are not
    changed.
    """
    if isinstance(value, (list, tuple)):
        return [near_the_edge(part, dtype) for part in value]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if value is MASK or value is ATTENTION:
        return value.half().to(dtype)
    return (value.sign() * (65504 - 1000 * value.abs()).clamp(min=60000) * (value.abs() > 0.4)).half().to(dtype)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "average_relative_improvement"])
def test_float16_near_its_edge_is_right_or_infinite(name):
    """Results are right. Gradients, which are float16 as well, are infinite only where they do not fit."""
    arguments, settings = FUNCTIONS[name]
    function = getattr(kdkernels, name)
    half, double = ([learning(near_the_edge(x, dtype)) for x in arguments] for dtype in (torch.float16, torch.float64))
    found, exact = (tensors_in(function(*given, **settings)) for given in (half, double))
    for value, correct in zip(found, exact, strict=True):
        assert value.dtype == torch.float32
        assert_close(value, correct, name)
    for results in (found, exact):
        sum(result.sum() for result in results).backward()
    # Gradients are computed in float32 and rounded. The terms that cancel in them are as large as the results.
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    terms = max(result.abs().max().item() for result in exact)
    for value, correct in zip(tensors_in(half), tensors_in(double), strict=True):
        if value.grad is None:
            continue
        floor = smallest + torch.finfo(torch.float32).eps * max(terms, correct.grad.abs().max().item())
        fits = correct.grad.abs() <= torch.finfo(torch.float16).max
        error = (value.grad.double() - correct.grad)[fits].norm()
        assert error <= 2e-3 * correct.grad[fits].norm() + floor * value.numel() ** 0.5
        assert (value.grad[~fits].isinf() | (correct.grad[~fits].abs() < 65520)).all()  # which still rounds to 65504


# Labels ---------------------------------------------------------------------------------------------------------------

INTEGERS = [getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_type(dtype):
    strided = torch.stack([LABELS, LABELS], 1).to(dtype)[:, 0]
    expected = kdkernels.teacher_free_kd_loss(*ROWS, LABELS)
    assert torch.equal(kdkernels.teacher_free_kd_loss(*ROWS, strided), expected)
    attention = losses.ClassAwareAttention(8, 3).eval()
    assert torch.equal(attention.loss(MAPS[0], strided), attention.loss(MAPS[0], LABELS))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1, 2, 0, 1, 2], TypeError, "labels must be a tensor, got list"),
        (torch.rand(6), TypeError, "labels must be integer class indices, got torch.float32"),
        (torch.ones(6) > 0, TypeError, "labels must be integer class indices, got torch.bool"),
        (LABELS[:5], ValueError, r"labels must have shape \(6,\), got \(5,\)"),
        (LABELS.to("meta"), ValueError, "labels must be on the logits' device cpu, got meta"),
    ],
)
def test_misuse_of_labels_is_explained(labels, error, message):
    with pytest.raises(error, match=message):
        kdkernels.teacher_free_kd_loss(*ROWS, labels)
    with pytest.raises(error, match=message):
        losses.ClassAwareAttention(8, 3).loss(MAPS[0], labels)
