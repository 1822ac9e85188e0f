"""The Triton operators on CPU tensors in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter."""

import pytest

pytest.register_assert_rewrite("triton_suite")

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


@pytest.fixture
def device() -> str:
    return "cpu"
