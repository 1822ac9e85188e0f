"""Every run has a fresh seed, which its header prints, and memory that is filled with NaN before it is written."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Generator, Iterator

import pytest
import torch
from losses import LOSSES, Loss, runs_on
from torch import Tensor

from kdkernels import backends, use_backend

# Triton decides at import whether it compiles or interprets a kernel, so the two need separate processes.
collect_ignore = [] if backends.why_not("triton", torch.empty(0)) is None else ["interpreter"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="repeat the random inputs of an earlier run")


def pytest_configure(config: pytest.Config) -> None:
    """Draw the seed of the run. The processes of pytest-xdist inherit the option."""
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(2**32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed}"


def set_seed(config: pytest.Config, name: str) -> int:
    """Seed the random numbers of a module or a test, so that they do not depend on what else the run contains."""
    value = zlib.crc32(f"{config.option.seed} {name}".encode())
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Seed what a module draws while it is imported."""
    if isinstance(collector, pytest.Module):
        set_seed(collector.config, collector.nodeid)
    return (yield)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of the test's random numbers."""
    repeat = f"repeat with: pytest --seed {request.config.option.seed} '{request.node.nodeid}'"
    request.node.add_report_section("call", "seed", repeat)
    return set_seed(request.config, request.node.nodeid)


@pytest.fixture(autouse=True)
def threads(seed: int) -> None:
    """Give three tests of four one thread and the others two, because each process of pytest-xdist has one core."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(2 if seed % 4 == 0 else 1)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """In deterministic mode, PyTorch fills new memory with NaN, in C++ and in Python."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that can run here."""
    reason = backends.why_not(request.param, Tensor())
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    """Return each name in the table of losses."""
    return request.param


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def loss(name: str, backend: str, device: str) -> Iterator[Loss]:
    """Return each loss of the table, in a block of each backend in which it has kernels."""
    if not runs_on(name, backend, device):
        pytest.skip("the loss has no kernels there")
    entry = LOSSES[name]
    separate = entry.separate or backend == "triton"  # its kernels normalise each network in its own precision
    with use_backend(backend):
        yield entry._replace(device=device, separate=separate)
