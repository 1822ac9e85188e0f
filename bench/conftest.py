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
    measured = [bench for bench in config._benchmarksession.benchmarks if bench.extra_info]
    if not measured:
        return
    noted = [(bench.name, bench.extra_info) for bench in measured]
    columns = list(dict.fromkeys(c for _, info in noted for c, value in info.items() if not isinstance(value, dict)))
    rows = [(name, *(_text(info.get(column, "")) for column in columns)) for name, info in noted]
    terminalreporter.write_line("\n" + table(("", *columns), rows))
    file = config.getoption("--results")
    if file:
        results = [_result(bench) for bench in measured]
        file.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["kdkernels"] = provenance()


def _result(bench) -> dict[str, object]:
    """What was noted, and the test's parameters; a case that is a named tuple counts as its fields."""
    fields: dict[str, object] = {}
    for name, value in (bench.params or {}).items():
        fields |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    parameters = {name: value if isinstance(value, (int, float)) else str(value) for name, value in fields.items()}
    case = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    return {"case": case, "test": bench.name, "parameters": parameters, **bench.extra_info}


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
