"""The variants of a benchmark agree, and tables show the measured results."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
OPERATORS = sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py"))


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


ORIGIN = {"processor": "A", "PyTorch": "2.13.0", "commit": "aaa", "date": "2026-01-02T00:00:00"}


def record(case: str, operator: str, seconds: dict[str, float], **more) -> dict:
    loss, batch, how = re.fullmatch(r"(.*), batch (\d+)(.*)", case).groups()
    parameters = {"loss": loss + how, "batch": int(batch)}
    settings = {"case": case, "operator": operator, "parameters": parameters, "headline": True}
    return settings | {"seconds": seconds} | more


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "semckd"])  # semckd takes long
def test_variants_agree(operator: str) -> None:
    """At the smallest size of each benchmark, loss and gradient of the textbook version equal those of the fused
    version.
    """
    measure = importlib.import_module("measure")
    cases = importlib.import_module(f"bench_{operator}").CASES
    case = min((case for case in cases if case.baselines), key=lambda case: case.batch)
    inputs = case.inputs(*case.arguments)
    measure.agree(case, case.baselines, inputs)
    wrong = {"wrong": lambda *inputs: 1.05 * case.fused(*inputs)}
    with pytest.raises(AssertionError, match="wrong differs from fused"):
        measure.agree(case, wrong, inputs)


def test_every_example_is_run_and_filed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    examples = importlib.import_module("examples")
    (tmp_path / "bench" / "results" / "examples").mkdir(parents=True)

    def run(command: list, check: bool) -> None:
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"tables": [command[1].name]}))

    monkeypatch.setattr(examples, "ROOT", tmp_path)
    monkeypatch.setattr(examples.subprocess, "run", run)
    monkeypatch.setattr(examples, "provenance", dict)
    monkeypatch.setattr("sys.argv", ["examples.py", "--out", str(tmp_path / "runs")])
    examples.main()
    filed = (tmp_path / "bench" / "results" / "examples").glob("*.json")
    tables = {path.stem: json.loads(path.read_text())["tables"] for path in filed}
    assert tables == {name: [script] for name, (script, *_) in examples.EXAMPLES.items()}


def test_every_operator_is_reported() -> None:
    assert sorted(importlib.import_module("report").OPERATORS) == OPERATORS


def test_what_is_tried_for_tuning_is_there_and_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    tune = importlib.import_module("tune")
    numbers = tune.present()
    read = re.findall(r"&chosen\.(\w+)", (BENCH.parent / "csrc/cuda/host.h").read_text())
    assert ["capability", *read] == list(numbers)
    now = " ".join(map(str, list(numbers.values())[1:]))
    for trial in tune.trials():
        assert any(case.headline for case in importlib.import_module(f"bench_{trial.operator}").CASES)
        if trial.setting == "present":
            continue
        if trial.backend == "native":
            assert trial.variables["KDKERNELS_TUNING"] != now
            continue
        name, value = json.loads(trial.variables["TRIED"])
        module = importlib.import_module(f"kdkernels.ops.{trial.operator}.triton")
        monkeypatch.setattr(module, name, getattr(module, name).copy() if name == "TILES" else getattr(module, name))
        before = repr(getattr(module, name))
        tune.apply(trial.operator, name, value)
        assert repr(getattr(module, name)) != before


def test_results_of_the_same_machine_are_kept(tmp_path: Path) -> None:
    results = importlib.import_module("results")
    file = tmp_path / "folder" / "cpu.json"
    results.add(
        file, ORIGIN, [record("KD, batch 1", "kd", {"fused": 1.0}), record("KD, batch 2", "kd", {"fused": 2.0})]
    )
    later = ORIGIN | {"commit": "bbb"}
    results.add(file, later, [record("KD, batch 1", "kd", {"fused": 3.0}), record("KD, batch 4", "kd", {"fused": 4.0})])
    measured = json.loads(file.read_text())
    assert measured["processor"] == "A"
    assert "commit" not in measured
    kept = [(r["case"], r["seconds"]["fused"], r["commit"]) for r in measured["results"]]
    assert kept == [("KD, batch 1", 3.0, "bbb"), ("KD, batch 2", 2.0, "aaa"), ("KD, batch 4", 4.0, "bbb")]
    results.add(file, ORIGIN | {"processor": "B"}, [record("KD, batch 2", "kd", {"fused": 5.0})])
    assert [r["seconds"]["fused"] for r in json.loads(file.read_text())["results"]] == [5.0]


def test_a_truncated_file_of_results_is_named(tmp_path):
    results, file = importlib.import_module("results"), tmp_path / "cpu.json"
    results.write(file, {"results": []})
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cpu\.json is truncated or corrupt: "):
        results.add(file, ORIGIN, [])


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, report = importlib.import_module("results"), importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    seconds = {"fused": 2e-3, "textbook": 9e-3, "other": 8e-3, "textbook, compiled": 5e-3, "KeOps": 0.5}
    peaks = {"fused": 3 * 2**20, "textbook": 40 * 2**20, "KeOps": 5 * 2**20}
    measured = [
        record("KD, batch 64", "kd", {"fused": 4e-6}, headline=False),
        record("KD, batch 9", "kd", {"textbook": 1e-3}),  # its fused version failed
        record("KD, batch 8", "kd", {"fused": 3e-4, "textbook": 1.5e-4}),
        record("LKD, batch 8", "congruence", seconds, **{"peak extra bytes": peaks, "share of the limit": 0.456}),
    ]
    results.add(tmp_path / "x.json", ORIGIN, measured)
    page = "before\n<!-- results: x.json -->\nstale\n<!-- end -->\n<!-- results: x.json kd -->\n<!-- end -->\nafter\n"
    filled = report.filled(page)
    assert report.filled(filled) == filled
    # A column that is empty in more than three quarters of the rows is left out.
    loop = record("CCKD, batch 8", "correlation_congruence", {"fused": 1e-6, "textbook": 2e-6, "row by row": 3e-4})
    for others in (3, 4):
        kd = [record(f"KD, batch {batch}", "kd", {"fused": 4e-6}) for batch in range(others)]
        table = report.time_table([loop, *kd])
        assert ("300.00x" in table[1][0]) == ("ratio to a loop over rows" in table[0]) == (others == 3)
    headlines, of_kd = filled.split("<!-- end -->")[:2]
    rows = [line for line in headlines.splitlines() if line.startswith("| ")]
    lkd = "| LKD, batch 8 | **2.0 ms** | 8.0 ms | 5.0 ms | 500.0 ms | 2.50x | 3.0 / 40 MiB | 46% |"
    assert rows[2:] == [lkd, "| KD, batch 8 | **300 µs** | 150 µs |  |  | 0.50x |  |  |"]
    rows = [line for line in of_kd.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| KD, batch 8 | **300 µs** | 150 µs | 0.50x |", "| KD, batch 64 | **4 µs** |  |  |"]
    assert "A, PyTorch 2.13.0, 2026-01-02, commit aaa; `bench/results/x.json`." in of_kd
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "stale" not in filled


def test_files_that_may_not_be_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, report = importlib.import_module("results"), importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = "<!-- results: nvidia-*.json -->\n<!-- end -->\n"
    assert "Not yet measured." in report.filled(page)
    for device in ("b", "a"):
        measured = [record("KD, batch 8, in a CUDA graph", "kd", {"fused": 3e-6, "textbook": 9e-6})]
        results.add(tmp_path / f"nvidia-{device}.json", ORIGIN | {"processor": device}, measured)
    filled = report.filled(report.filled(page))
    assert filled.count("| KD, batch 8, in a CUDA graph | **3 µs** | 9 µs | 3.00x |") == 2
    assert re.findall(r"^([ab]), PyTorch", filled, re.MULTILINE) == ["a", "b"]
    assert "Not yet" not in filled


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    errors = [{"float32": {"loss": 1.2e-7, "gradient": 3e-7, "rounded": rounded}} for rounded in (1e-8, 2e-8)]
    cases = [{"case": name, "errors": error} for name, error in zip("ab", errors, strict=True)]
    (tmp_path / "x.json").write_text(json.dumps(ORIGIN | {"results": cases}))
    filled = report.filled("<!-- results: x.json -->\n<!-- end -->")
    rows = [line for line in filled.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| a | 1e-07 | 3e-07 |", "| b | 1e-07 | 3e-07 |", "| the exact gradient, rounded |  | 2e-08 |"]
    assert "A, PyTorch 2.13.0, 2026-01-02, commit aaa" in filled
    assert report.curves(tmp_path / "x.json") == {}


def test_a_file_of_tables_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, report = importlib.import_module("results"), importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [["KD", [90.0, 92.0], "a text"], ["LKD", [91.0], ""]]
    table = {"title": "above", "header": ["method", "accuracy", "note"], "rows": rows}
    results.write(tmp_path / "folder" / "x.json", ORIGIN | {"tables": [table]})
    lines = report.filled("<!-- results: folder/x.json -->\n<!-- end -->\n").splitlines()
    assert lines[2] == "above"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[6:8]]
    assert cells == [["KD", "91.00 ± 1.41", "a text"], ["LKD", "91.00", ""]]
    assert lines[9] == "A, PyTorch 2.13.0, 2026-01-02, commit aaa; `bench/results/folder/x.json`."
    assert report.curves(tmp_path / "folder" / "x.json") == {}


def test_figures(tmp_path: Path) -> None:
    results, report = importlib.import_module("results"), importlib.import_module("report")
    file = tmp_path / "x.json"
    seconds = {"fused": 1e-3, "textbook": 3e-3}
    measured = [record(f"KD K=9, batch {b}", "kd", seconds) for b in (1, 64)]
    measured += [record(f"ICCT K=9, batch {b}", "icc", seconds, **{"share of the limit": 0.5}) for b in (1, 8, 64)]
    results.add(file, ORIGIN, [*measured, record("RKD d=8, batch 1", "rkd", seconds)])
    groups = report.curves(file)
    assert {loss: [case["parameters"]["batch"] for case in group] for loss, group in groups.items()} == {
        "ICCT K=9": [1, 8, 64],
        "KD K=9": [1, 64],
    }
    assert list(report.drawn("overview", groups)) == ["ICCT K=9"]
    assert list(report.drawn("companions", groups)) == ["KD K=9"]
    report.plot(groups, tmp_path / "x.svg")
    light, dark = ((tmp_path / name).read_text() for name in ("x.svg", "x-dark.svg"))
    assert light != dark
    report.plot(groups, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == light


def test_sentence_and_table_of_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, report = importlib.import_module("results"), importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    peaks = {"peak extra bytes": {"fused": 3 * 2**20, "textbook": 40 * 2**20}}
    fast = record("LKD, batch 8", "congruence", {"fused": 1e-3, "textbook": 9e-3, "textbook, compiled": 7e-3}, **peaks)
    slow = record("LKD, batch 1", "congruence", {"fused": 1e-3, "textbook": 2e-3}, **peaks)
    for name in ("b", "a"):
        measured = [fast, slow][: 1 + (name == "a")]
        results.add(tmp_path / f"cpu-{name}.json", ORIGIN | {"processor": name}, measured)
    filled = report.filled("<!-- best: cpu-a.json congruence -->\n<!-- end -->")
    assert "**7 times faster" in filled
    assert "takes 1.0 ms in place of 7.0 ms, and 3.0 MiB of extra memory in place of 40 MiB" in filled
    page = "<!-- machines: cpu-*.json; LKD, batch 8; LKD, batch 1 -->\n<!-- end -->"
    rows = [line for line in report.filled(page).splitlines() if line.startswith("| ")]
    assert rows == [
        "| machine | LKD, batch 8 | LKD, batch 1 |",
        "| --- | ---: | ---: |",
        "| a | 7.00x | 2.00x |",
        "| b | 7.00x |  |",
    ]


def test_graphs_share_the_memory_of_a_gpu(monkeypatch):
    """The largest graphs are left out, with the reason."""
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu.torch.cuda, "mem_get_info", lambda: (78 * 2**30, 80 * 2**30))
    memory = {"native": 2**30, "textbook": 50 * 2**30, "torch": 30 * 2**30, "triton": 2 * 2**30}
    failures = {}
    assert list(gpu.that_fit(dict.fromkeys(memory), memory, failures)) == ["native", "torch", "triton"]
    assert failures == {"textbook": "no room for a graph of 50.0 GiB: all of them share 78.0 GiB"}


def test_the_peak_of_multiply_adds_is_a_peak() -> None:
    """A matrix product of PyTorch is below it. Time of the thread, because other programs use the processor, too."""
    measure = importlib.import_module("measure")
    a, b = torch.randn(2, 512, 512)

    def per_second(run: Callable[[], int]) -> float:
        begin = time.thread_time()
        count = run()
        return count / (time.thread_time() - begin)

    def product() -> int:
        torch.mm(a, b)
        return 512**3

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = max(per_second(lambda: measure._rates().multiply_adds(2_000_000)) for _ in range(3))
        assert peak > 0.9 * max(per_second(product) for _ in range(30))
    finally:
        torch.set_num_threads(threads)
    assert measure.rate("exponentials", 1000) > 0
