"""Print the notes of each case below pytest-benchmark's own table, and add them to a file of results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import results
import torch
from measure import SECONDS, compare, provenance, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write the results, with machine and versions, to this file")
    parser.addoption("--seconds", type=float, default=SECONDS, help="time for the measurement of each case")
    parser.addoption("--grid", action="store_true", help="also measure the time on the grids of sizes (half an hour)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the cases. The grids look for sizes that are slower than PyTorch. The other cases are for tables and
    figures.
    """
    if not config.getoption("--grid"):
        items[:] = [item for item in items if item.originalname != "test_grid"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(name="compare")
def compare_case(benchmark, pytestconfig: pytest.Config) -> Callable:
    """Return ``measure.compare`` with the duration of the command line."""
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
