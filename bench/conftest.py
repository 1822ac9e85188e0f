"""Prints what the benchmarks noted about each case under pytest-benchmark's own table."""

from __future__ import annotations

import pytest
from compare import provenance, table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    noted = [(bench.name, bench.extra_info) for bench in config._benchmarksession.benchmarks if bench.extra_info]
    if noted:
        columns = list(noted[0][1])
        rows = [(name, *(_text(info[column]) for column in columns)) for name, info in noted]
        terminalreporter.write_line("\n" + table(("", *columns), rows))


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["kdkernels"] = provenance()


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
