"""CWD against its definition, mmrazor's own numbers, and maps whose sizes vary."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import DTYPES, assert_close, assert_matches, loss_and_gradients
from recorded.cwd import SETTINGS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels.integrations.mmrazor import ChannelWiseDivergence


def definition(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return the loss channel by channel, from probabilities."""
    total = 0.0
    for s, t in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True):
        p, q = ((x.flatten() / temperature).softmax(0) for x in (t, s))
        total = total + (p * (p.log() - q.log())).sum()
    return temperature**2 * total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 7, 3), (3, 5, 1, 6), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_the_definition(backend, dtype, shape, temperature):
    maps = [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
    assert_matches(
        lambda s, t: kdkernels.channel_wise_loss(s, t, temperature=temperature, backend=backend),
        lambda s, t: definition(s, t, temperature),
        *maps,
    )


def test_strides(backend):
    for student in (
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 5, 4, 3).mT,
        torch.randn(2, 6, 8, 5)[:, ::2, 1::2],
        torch.randn(1, 3, 1, 1).expand(2, 3, 4, 5),
    ):
        maps = student.requires_grad_(), torch.randn(student.shape).requires_grad_()
        assert_matches(lambda s, t: kdkernels.channel_wise_loss(s, t, backend=backend), definition, *maps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_logits_are_finite(backend, dtype):
    """Confident segmentation networks, whose small probabilities underflow in half precision and under autocast."""
    maps = [(1e4 * torch.randn(2, 3, 4, 5)).to(dtype).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(
            lambda s, t: kdkernels.channel_wise_loss(s, t, temperature=1.0, backend=backend), *maps
        )
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_what_mmrazor_computes(backend, dtype):
    """tests/recorded/cwd.py has mmrazor's numbers and their origin."""
    with np.load(Path(__file__).with_name("recorded") / "cwd.npz", allow_pickle=False) as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file}
    for i, settings in enumerate(SETTINGS):
        maps = [recorded[name].to(dtype).requires_grad_() for name in ("student", "teacher")]
        with kdkernels.use_backend(backend):
            loss, gradients = loss_and_gradients(ChannelWiseDivergence(**settings), *maps)
        assert_close(loss, recorded[f"loss{i}"])
        for gradient, name in zip(gradients, ("student", "teacher"), strict=True):
            assert_close(gradient, recorded[f"{name}{i}"])


def test_the_drop_in_registers_itself(monkeypatch):
    class Registry:
        def register_module(self, module: type, force: bool) -> None:
            assert force  # mmrazor has registered its own class
            self.module = module

    models = Registry()
    for name in ("mmrazor", "mmrazor.registry"):
        host = ModuleType(name)
        host.__spec__, host.__path__, host.MODELS = ModuleSpec(name, None), [], models
        monkeypatch.setitem(sys.modules, name, host)
    drop_in = importlib.reload(sys.modules["kdkernels.integrations.mmrazor"])
    assert models.module is drop_in.ChannelWiseDivergence
    loss = drop_in.ChannelWiseDivergence(tau=2, loss_weight=3)
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    assert_close(loss(preds_S=student, preds_T=teacher), 3 * definition(student, teacher, 2.0))


def test_maps_whose_sizes_vary_compile_at_most_twice(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t: kdkernels.channel_wise_loss(s, t, backend=backend), backend=counter, dynamic=True, fullgraph=True
    )
    for i in range(10):
        student = torch.randn(2, 3, 4 + i, 9 - i // 2, requires_grad=True)
        teacher = torch.randn(student.shape)
        loss = compiled(student, teacher)
        loss.backward()
        expected, (gradient,) = loss_and_gradients(
            lambda s, t=teacher: kdkernels.channel_wise_loss(s, t, backend="reference"), student
        )
        assert_close(loss, expected)
        assert_close(student.grad, gradient)
    assert counter.frame_count <= 2


def test_errors():
    maps = torch.randn(2, 3, 4, 5)
    for teacher, message in (
        (torch.randn(2, 2, 4, 5), "teacher must have student's 3 channels, got 2"),
        (torch.randn(2, 3, 5, 4), "teacher must have student's height and width 4 x 5, got 5 x 4; resize one of them"),
        (torch.randn(1, 3, 4, 5), "teacher must have student's batch size 2, got 1"),
        (torch.randn(2, 3, 20), "teacher must have shape b x c x h x w"),
    ):
        with pytest.raises(ValueError, match=message):
            kdkernels.channel_wise_loss(maps, teacher)
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        kdkernels.channel_wise_loss(maps, maps, temperature=0)
    with pytest.raises(ValueError, match="temperature must be a positive number, got -1"):
        kdkernels.nn.ChannelWiseLoss(temperature=-1)
