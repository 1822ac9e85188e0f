"""A pytest plugin for ``gpu_check.py``: a sample of the tests, and a line of JSON for each result."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import pytest
from gpu_check import STOPPED, Log


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=int, default=1, help="take one test of this many")
    parser.addoption("--log", type=Path, required=True)
    parser.addoption("--stop-after", type=float, default=1e9, help="seconds")


class Sample:
    def __init__(self, config: pytest.Config) -> None:
        self.log = Log(config.getoption("--log"))
        self.end = time.perf_counter() + config.getoption("--stop-after")
        self.share = config.getoption("--share")
        self.known = {line["what"] for line in self.log.lines() if "ok" in line}
        self.left = 0

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        # A hash of the name, so that every sitting takes the same sample.
        chosen = [item for item in items if zlib.crc32(item.nodeid.encode()) % self.share == 0]
        fresh = [item for item in chosen if item.nodeid not in self.known]
        fresh.sort(key=lambda item: zlib.crc32(item.nodeid[::-1].encode()))  # every file early
        config.hook.pytest_deselected(items=[item for item in items if item not in fresh])
        items[:] = fresh

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.perf_counter() > self.end:
            self.left += 1
            pytest.skip("the time is over")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            ok = not report.failed
            failure = {} if ok else {"failure": str(report.longrepr)[-300:]}
            self.log.add(step="tests", what=report.nodeid, ok=ok, **failure, seconds=round(report.duration, 2))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # an earlier sitting ran all
            session.exitstatus = 0
        elif self.left and session.exitstatus == 0:
            session.exitstatus = STOPPED


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Sample(config))
