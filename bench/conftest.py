"""Prints what the benchmarks noted about each case under pytest-benchmark's own table, and adds it to a file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import results
import torch
from measure import SECONDS, compare, provenance, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="put what was measured, with machine and versions, into this file")
    parser.addoption("--seconds", type=float, default=SECONDS, help="time for the measurement of each case")
    parser.addoption("--grid", action="store_true", help="measure the time on the grids of sizes, too: half an hour")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The grids show that no size is slower than PyTorch; the other cases are what tables and figures are made of."""
    if not config.getoption("--grid"):
        items[:] = [item for item in items if item.originalname != "test_grid"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="compare")
def compare_case(benchmark, pytestconfig: pytest.Config) -> Callable:
    """``measure.compare`` for as long as the command line says."""
    return functools.partial(compare, benchmark, seconds=pytestconfig.getoption("--seconds"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    noted = [bench.extra_info for bench in config._benchmarksession.benchmarks if bench.extra_info]
    if not noted:
        return
    columns = list(dict.fromkeys(c for info in noted for c, value in info.items() if isinstance(value, (float, str))))
    rows = [tuple(_text(info.get(column, "")) for column in columns) for info in noted]
    terminalreporter.write_line("\n" + table(tuple(columns), rows))
    file = config.getoption("--results")
    if file:
        results.add(file, provenance(), noted)


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["kdkernels"] = provenance()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
