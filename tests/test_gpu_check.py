"""The order, the time and the resumption of ``bench/gpu_check.py``. No step runs here; ``--rehearse`` runs them all."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("gpu_check")


@pytest.fixture
def ran(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands, which all pass at once."""
    commands: list[list[str]] = []

    def run(arguments: list[object], limit: float, environment: dict[str, str]) -> str:
        commands.append([str(part) for part in arguments])
        return "passed"

    monkeypatch.setattr(gpu_check, "run", run)
    return commands


def outcomes(log: object) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in log.lines():
        found.setdefault(line["step"], []).append(line["outcome"])
    return found


def test_two_sittings_of_six_minutes_do_everything(gpu_check, ran, tmp_path):
    """The clock of a rehearsal adds the seconds that each step may take. The second sitting begins where the first
    ended.
    """
    log = gpu_check.Log(tmp_path / "log.jsonl")
    assert not gpu_check.sitting(log, tmp_path / "results.json", 6, gpu_check.NAMES, rehearse=True)
    first = outcomes(log)
    assert first["libraries"] == first["smoke"] == first["headline"] == ["passed"]
    assert any("stopped" in of_step for of_step in first.values())
    assert gpu_check.sitting(gpu_check.Log(log.path), tmp_path / "results.json", 6, gpu_check.NAMES, rehearse=True)
    second = outcomes(log)
    assert set(second) == set(gpu_check.NAMES)
    assert all(of_step[-1] in ("passed", "skipped") for of_step in second.values())
    assert len(second["headline"]) == 1


def test_steps_need_less_than_two_sittings(gpu_check):
    assert sum(step.seconds for step in gpu_check.STEPS) <= 2 * 6 * 60
    assert gpu_check.NAMES[:3] == ["libraries", "smoke", "headline"]


def test_a_step_that_fails_is_not_repeated(gpu_check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "run", lambda *_: "failed")
    log = gpu_check.Log(tmp_path / "log.jsonl")
    assert gpu_check.sitting(log, tmp_path / "results.json", 60, ["smoke"], rehearse=True)
    log.add(step="smoke", what="kd (native)", ok=False)
    assert "smoke: failed; 1 results, FAILED: kd (native)" in gpu_check.summary(log)


def test_a_step_that_is_stopped_goes_on(gpu_check, monkeypatch, tmp_path):
    """A process that ends with STOPPED has more to do, and so has a process that takes too long."""
    python, log = gpu_check.sys.executable, gpu_check.Log(tmp_path / "log.jsonl")
    stopping = [python, "-c", f"raise SystemExit({gpu_check.STOPPED})"]
    assert gpu_check.run(stopping, 60, {}) == "stopped"
    assert gpu_check.run([python, "-c", "import time; time.sleep(60)"], 0.5, {}) == "stopped"
    assert gpu_check.run([python, "-c", "raise SystemExit(1)"], 60, {}) == "failed"
    log.add(step="tests", outcome="stopped")
    assert log.done() == set()


def test_predictions_say_what_they_are(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    predicted = importlib.import_module("results").read(ROOT / "bench" / "results" / "predictions.json")
    assert predicted["prediction"] is True
    assert predicted["sources"]
    for case in predicted["results"]:
        assert case["prediction"] is True
        assert 0 < case["share of the limit"] <= 1
        assert case["seconds"] >= case["limit"]
