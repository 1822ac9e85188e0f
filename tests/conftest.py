"""What every test gets: a fresh seed, named when the test fails, and memory that is poisoned before it is written."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kdkernels import backends

# Triton's kernels are compiled or interpreted from the moment they are imported, so the two need a process each.
collect_ignore = [] if backends.why_not("triton", torch.empty(0)) is None else ["interpreter"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="repeat the random inputs of an earlier run")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of the test's random numbers, drawn afresh."""
    value = request.config.getoption("--seed")
    value = random.SystemRandom().randrange(2**32) if value is None else value
    torch.manual_seed(value)
    random.seed(value)
    request.node.add_report_section("call", "seed", f"repeat with: pytest --seed {value} '{request.node.nodeid}'")
    return value


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In deterministic mode PyTorch fills what it allocates with NaN, in C++ as in Python."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here."""
    reason = backends.why_not(request.param, Tensor())
    if reason is not None:
        pytest.skip(reason)
    return request.param
