"""The contracts of every Triton operator, in Triton's interpreter."""

import pytest

pytest.register_assert_rewrite("test_contracts")

from test_contracts import *  # noqa: E402, F403
from test_contracts import kernel_calls  # noqa: E402

del test_any_number_of_threads  # noqa: F821  # of the native library


@pytest.fixture(params=["triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple]]:
    return kernel_calls("triton", "cpu")
