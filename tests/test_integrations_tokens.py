"""The drop-ins of token losses against what their hosts' own code computed; tests/recorded/tokens.py has the origin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor

from kdkernels.integrations import tokens


def unit(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [F.normalize(x, dim=-1) for x in inputs]


def clip(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    images, texts, their_images, their_texts = unit(inputs[:4])
    return tokens.DistillClipLoss()(images, texts, inputs[4], their_images, their_texts, 14.0)


def of_teacher(student: Tensor, teacher: Tensor, level: bool) -> Tensor:
    return tokens.GramLoss(remove_neg=False, remove_only_teacher_neg=True)(student, teacher, img_level=level)


DROP_INS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "gram": tokens.GramLoss(),
    "gram batch": lambda s, t: tokens.GramLoss()(s, t, img_level=False),
    "gram teacher": lambda s, t: of_teacher(s, t, True),
    "gram teacher batch": lambda s, t: of_teacher(s, t, False),
    "gram raw": tokens.GramLoss(apply_norm=False, remove_neg=False),
    "lightly": lambda *inputs: tokens.DistillationV3Loss(0.07, 0.1)(*unit(inputs)),
    "clip": clip,
    "vf": lambda z, features: tokens.vf_loss(z, features, 0.25, 0.5, 1.5, 0.5),
    "trd": tokens.token_relation_distillation_loss,
    "trd spatial": lambda s, t: tokens.token_relation_distillation_loss(s, t, only_spatial=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", DROP_INS)
def test_computes_what_the_host_computes(name, dtype):
    with np.load(Path(__file__).with_name("recorded") / "tokens.npz", allow_pickle=False) as file:
        recorded = {key.removeprefix(f"{name} "): torch.from_numpy(file[key]) for key in file if key.startswith(name)}
    count = sum(key.startswith("input ") for key in recorded)
    inputs = [recorded[f"input {i}"].to(dtype).requires_grad_() for i in range(count)]
    losses = DROP_INS[name](*inputs)
    losses = losses if isinstance(losses, tuple) else (losses,)
    gradients = torch.autograd.grad(sum(i * loss for i, loss in enumerate(losses, 1)), inputs)
    single = dtype == torch.float64 and name.startswith("gram")  # the host computes in float32

    def close(found: Tensor, expected: Tensor, what: str) -> None:
        assert_close((found.float() if single else found).detach(), expected, what)

    for i, loss in enumerate(losses):
        close(loss, recorded[f"loss {i}"], f"loss {i}")
    for i, gradient in enumerate(gradients):
        close(gradient, recorded[f"gradient {i}"], f"gradient {i}")


def test_options_that_exclude_each_other():
    with pytest.raises(AssertionError, match="exclude each other"):
        tokens.GramLoss(remove_neg=True, remove_only_teacher_neg=True)


def test_clip_returns_a_dict_if_asked():
    inputs = [torch.randn(4, 3) for _ in range(4)]
    found = tokens.DistillClipLoss()(*inputs[:2], 2.0, *inputs[2:], 3.0, output_dict=True)
    contrastive, distill = tokens.DistillClipLoss()(*inputs[:2], 2.0, *inputs[2:], 3.0)
    assert found == {"contrastive_loss": contrastive, "distill_loss": distill}
