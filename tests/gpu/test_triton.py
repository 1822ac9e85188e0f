"""The Triton operators on a GPU: pytest -m gpu."""

from collections.abc import Iterator

import pytest
import torch
from helpers import exactly, loss_and_gradients, relative_error

pytest.register_assert_rewrite("triton_suite")
pytest.importorskip("triton")

from triton_suite.congruence import *  # noqa: E402, F403
from triton_suite.correlation_congruence import *  # noqa: E402, F403
from triton_suite.dist import *  # noqa: E402, F403
from triton_suite.divergence import *  # noqa: E402, F403
from triton_suite.dkd import *  # noqa: E402, F403
from triton_suite.feature_mse import *  # noqa: E402, F403
from triton_suite.gram import *  # noqa: E402, F403
from triton_suite.icc import *  # noqa: E402, F403
from triton_suite.kd import *  # noqa: E402, F403
from triton_suite.library import *  # noqa: E402, F403
from triton_suite.local_correlation import *  # noqa: E402, F403
from triton_suite.patches import *  # noqa: E402, F403
from triton_suite.rkd import *  # noqa: E402, F403
from triton_suite.similarity_preserving import *  # noqa: E402, F403
from triton_suite.token_relation import *  # noqa: E402, F403
from triton_suite.top_k import *  # noqa: E402, F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


import kdkernels  # noqa: E402


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.fixture
def permit_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def run(student: torch.Tensor, teacher: torch.Tensor, form: str = "auto") -> torch.Tensor:
    return kdkernels.local_correlation_loss(student, teacher, 4, form=form, backend="triton")


def maps(device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = (torch.randn(32, channels, 8, 8, device=device) for channels in (16, 64))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("form", ["gram", "feature"])
def test_tf32_where_permitted(permit_tf32: None, form: str) -> None:
    student, teacher = maps()
    loss, (gradient, _) = loss_and_gradients(lambda s, t: run(s, t, form), student, teacher)
    expected, (correct, _) = loss_and_gradients(
        lambda s, t: kdkernels.local_correlation_loss(s, t, 4, backend="reference"), *exactly(student, teacher)
    )
    assert relative_error(loss, expected) <= 1e-3
    assert relative_error(gradient, correct) <= 1e-3


def test_memory() -> None:
    """The memory is at most the packed rows, their gradients, and 64 MiB of strips. All pairs in float32 would take 1
    GiB.
    """
    student, teacher = (torch.randn(1024, 64, 8, 8, device="cuda") for _ in range(2))
    student.requires_grad_()
    packed = student.numel() * student.element_size()
    for form in ("gram", "feature"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(run(student, teacher, form), student)
        assert torch.cuda.max_memory_allocated() - before <= 6 * packed + 72 * 2**20
