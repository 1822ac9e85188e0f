"""The Triton operators on CPU tensors in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter."""

import pytest

pytest.register_assert_rewrite("triton_suite")

from triton_suite import *  # noqa: E402, F403


@pytest.fixture
def device() -> str:
    return "cpu"
