"""The Triton operators on a GPU: pytest -m gpu."""

import pytest
import torch

pytest.register_assert_rewrite("triton_suite")
pytest.importorskip("triton")

from triton_suite import *  # noqa: E402, F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.fixture
def device() -> str:
    return "cuda"
