"""accelerate's own wrappers: names, precision, two processes."""

from __future__ import annotations

import hosts
import pytest
import torch
from torch import nn

from kdkernels.nn import FeatureCapture, LocalCorrelationLoss, SemanticCalibration, SemCKDLoss

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: make test-hosts")


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 6))


@pytest.fixture
def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("before", [True, False])
def test_prepared_models_are_looked_through(accelerator, before):
    student, teacher = network(4), network(8)
    capture = FeatureCapture(student, "1") if before else None
    prepared = accelerator.prepare(student)
    capture = capture or FeatureCapture(prepared, "1")
    images = torch.randn(4, 3, 8, 8)
    assert prepared(images).dtype == torch.float32
    with FeatureCapture(teacher, "1") as theirs, torch.no_grad(), accelerator.autocast():
        teacher(images)
    (maps,) = capture.features
    assert maps.dtype == theirs.features[0].dtype == torch.bfloat16
    accelerator.backward(LocalCorrelationLoss(k=2)(maps, *theirs.features))
    assert student[0].weight.grad.abs().sum() > 0


def test_a_module_that_accelerate_hooks():
    """Hooks of big-model inference replace a module's forward: SemCKD's projections are called, and not bypassed."""
    calls = []

    class Count(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    calibration = SemanticCalibration((4,), (8,), batch_size=4)
    parts = [part for part in calibration.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    for part in parts:
        accelerate.hooks.add_hook_to_module(part, Count())
    student, teacher = torch.randn(4, 4, 4, 4), torch.randn(4, 8, 4, 4)
    SemCKDLoss()(*calibration([student], [teacher])).backward()
    assert set(calls) == set(parts)


def test_two_processes():
    hosts.torchrun(2, str(hosts.FOLDER / "accelerate_training.py"), "2")
