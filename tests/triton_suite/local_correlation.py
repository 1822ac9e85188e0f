"""``local_correlation``"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches, loss_and_gradients
from torch import Tensor

import kdkernels

from . import draw, laid_out


def stages(device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    student = [draw(3, 2, 6, 6, device=device), draw(3, 5, 4, 4, device=device)]
    teacher = [draw(3, 4, 6, 4, device=device), draw(3, 3, 7, 5, device=device)]
    teacher[1] = laid_out(teacher[1], "channels_last")
    masks = [torch.rand(3, *maps.shape[-2:], device=device) for maps in teacher]
    return student, teacher, masks, [2, 3]


def whole_loss(student: list[Tensor], teacher: list[Tensor], masks: list[Tensor], ks: list[int], **options) -> Tensor:
    options = {"weights": (1.0, 0.5, 0.3), "mask": masks, "threshold": 0.6, "partition": "resize", **options}
    return kdkernels.local_correlation_loss(student, teacher, ks, **options)


@pytest.mark.parametrize("form", ["auto", "gram", pytest.param("feature", marks=pytest.mark.slow)])
def test_local_correlation(device: str, form: str) -> None:
    student, teacher, masks, ks = stages(device)

    def run(*maps: Tensor, **options: object) -> Tensor:
        return whole_loss(maps[:2], maps[2:], masks, ks, **options)

    maps = [x.requires_grad_() for x in (*student, *teacher)]
    assert_matches(
        lambda *maps: run(*maps, backend="triton", form=form),
        lambda *maps: run(*maps, backend="reference", form="gram"),
        *maps,
    )


def test_local_correlation_compiled_for_any_batch(device: str) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.local_correlation_loss(student, teacher, 2, reduction="mean", form="gram", backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in (6, 4, 9):
            student, teacher = draw(batch, 2, 2, 2, device=device).requires_grad_(), draw(batch, 3, 2, 2, device=device)
            found, expected = (loss_and_gradients(lambda x, f=f: f(x, teacher), student) for f in (compiled, loss))  # noqa: B023
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1][0], expected[1][0])


def test_local_correlation_of_a_broken_network(device: str) -> None:
    student, teacher, masks, ks = stages(device)
    student[1][2, 1, 3, 0] = float("nan")
    assert whole_loss(student, teacher, masks, ks, threshold=None, backend="triton").isnan()
