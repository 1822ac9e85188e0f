"""The drop-ins against torchdistill's own classes, and in its own training loop."""

from __future__ import annotations

import importlib
from typing import Any

import hosts
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

hosts.make_torchvision_importable()
pytest.importorskip("torchdistill", reason="torchdistill is not installed: make test-hosts")
from torchdistill.losses import mid_level  # noqa: E402
from torchdistill.losses.registry import MIDDLE_LEVEL_LOSS_DICT  # noqa: E402

ORIGINALS = {
    name: getattr(mid_level, name) for name in ("KDLoss", "ATLoss", "PKTLoss", "RKDLoss", "CCKDLoss", "SPKDLoss")
}
ours = importlib.import_module("kdkernels.integrations.torchdistill")

pytestmark = pytest.mark.filterwarnings("ignore")

MODULES = {
    "student_module_path": "layer",
    "student_module_io": "output",
    "teacher_module_path": "layer",
    "teacher_module_io": "output",
}
OUTPUTS = {"student_output_path": "layer", "teacher_output_path": "layer"}
LINEAR = {"student_linear_path": "layer", "teacher_linear_path": "layer"}
PAIR = {"student": {"io": "output", "path": "layer"}, "teacher": {"io": "output", "path": "layer"}, "weight": 0.7}
PAIRS = {"at_pairs": {"one": PAIR, "two": PAIR}}

CASES = [
    *(
        ("KDLoss", {**MODULES, "temperature": 3.0, "alpha": alpha, "reduction": reduction}, shape)
        for shape in ((6, 5), (6, 5, 7), (6, 5, 4, 3))
        for reduction, alpha in (("batchmean", 0.3), ("mean", 0.3), ("sum", 0.3), ("none", 0.0), ("batchmean", 0.0))
    ),
    *(
        ("ATLoss", {**PAIRS, "mode": mode}, shape)
        for mode in ("code", "paper")
        for shape in ((6, 5, 4, 4), (6, 5, 4, 3), (6, 5, 7), (6, 5, 2, 3, 4))
    ),
    ("PKTLoss", MODULES, (6, 5)),
    *(
        ("RKDLoss", {**OUTPUTS, "dist_factor": 1.0, "angle_factor": 2.0, "reduction": reduction}, shape)
        for reduction in ("mean", "sum")
        for shape in ((6, 5), (6, 5, 2), (6, 5, 2, 2))
    ),
    *(
        ("CCKDLoss", {**LINEAR, "kernel_config": config, "reduction": reduction}, (6, 5))
        for reduction in ("batchmean", "sum")
        for config in ({"type": "gaussian", "gamma": 0.4, "max_p": 2}, {"type": "bilinear"})
    ),
    *(("SPKDLoss", {**OUTPUTS, "reduction": "batchmean"}, shape) for shape in ((6, 5), (6, 5, 2), (6, 5, 2, 2))),
]


def of(tensor: Tensor) -> dict[str, dict[str, Tensor]]:
    return {"layer": {"output": tensor, "input": -tensor}}


@pytest.mark.parametrize(("name", "settings", "shape"), CASES, ids=lambda value: str(value)[:40])
def test_value_and_gradient_are_the_originals(name: str, settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert MIDDLE_LEVEL_LOSS_DICT[name] is getattr(ours, name)
    torch.manual_seed(0)
    inputs = torch.randn(2, *shape, dtype=torch.float64)
    labels = torch.randint(5, (shape[0], *shape[2:]))
    found = []
    for cls in (getattr(ours, name), ORIGINALS[name]):
        student, teacher = (x.clone().requires_grad_() for x in inputs)
        loss = cls(**settings)(of(student), of(teacher), labels)
        loss.square().sum().backward()
        found.append((loss.detach(), student.grad, teacher.grad))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["PKTLoss", "ATLoss"])
def test_shapes_that_the_originals_refuse(name: str) -> None:
    """What is an error there is not a number here."""
    settings = {"PKTLoss": MODULES, "ATLoss": PAIRS}[name]
    student, teacher = torch.randn(6, 5, 4, 3), torch.randn(6, 5, 4, 2)
    for cls in (getattr(ours, name), ORIGINALS[name]):
        with pytest.raises(RuntimeError):
            cls(**settings)(of(student), of(teacher))


def test_in_its_own_distillation_box() -> None:
    """A configuration as users write it, with one more line for the loss."""
    from torchdistill.core.forward_hook import ForwardHookManager
    from torchdistill.losses.registry import get_mid_level_loss

    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * c, 5)) for c in (4, 8)
    )
    managers = []
    for network in (student, teacher):
        manager = ForwardHookManager(torch.device("cpu"))
        for path in ("0", "3"):
            manager.add_hook(network, path, requires_input=False, requires_output=True)
        managers.append(manager)
    kwargs = {"student_module_path": "0", "teacher_module_path": "0", "k": 3}
    criterion = get_mid_level_loss({"key": "LocalCorrelationLoss", "kwargs": kwargs})
    places = {"student_module_path": "3", "teacher_module_path": "3"}
    places |= {"student_module_io": "output", "teacher_module_io": "output"}
    soft = get_mid_level_loss({"key": "KDLoss", "kwargs": {**places, "temperature": 4.0, "alpha": 0.5}})
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    data = TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(5, (16,)))
    for images, labels in DataLoader(data, batch_size=8):
        student(images)
        with torch.no_grad():
            teacher(images)
        dicts = [manager.pop_io_dict() for manager in managers]
        loss = criterion(*dicts, labels) + soft(*dicts, labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in student.parameters())
        optimizer.step()
