"""Prints what the benchmarks noted about each case under pytest-benchmark's own table, and writes it to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from measure import provenance, table


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="write machine, versions, date and what each case noted to this file")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    noted = [(bench.name, bench.extra_info) for bench in config._benchmarksession.benchmarks if bench.extra_info]
    if not noted:
        return
    columns = list(dict.fromkeys(c for _, info in noted for c, value in info.items() if not isinstance(value, dict)))
    rows = [(name, *(_text(info.get(column, "")) for column in columns)) for name, info in noted]
    terminalreporter.write_line("\n" + table(("", *columns), rows))
    file = config.getoption("--results")
    if file:
        results = [{"case": name, **info} for name, info in noted]
        file.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["kdkernels"] = provenance()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
