"""Everything there is to find out on a machine with a GPU, offline and in one go: ``make gpu-check``.

Builds for this GPU against the PyTorch that is installed, runs the tests that need a GPU and compute-sanitizer over the
native kernels, and measures. A step that fails does not keep the next ones from running. Results, with device, versions
and date, go to bench/results.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, command: list[object], limit: float, **environment: str) -> bool:
    """Whether the step succeeded. What it prints is passed on."""
    print(f"\n== {name} ==", flush=True)
    begin = time.perf_counter()
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=variables)
    try:
        code = process.wait(limit)
        outcome = "done" if code == 0 else f"failed with code {code}"
    except subprocess.TimeoutExpired:
        code, outcome = 1, "stopped: out of time"
        _stop(process)
    print(f"== {name}: {outcome}, {time.perf_counter() - begin:.0f} s ==", flush=True)
    return code == 0


def _stop(process: subprocess.Popen) -> None:
    """An interrupt first, upon which pytest still reports what has failed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU, and PyTorch sees none")
    end = time.perf_counter() + 60 * arguments.minutes

    def left(most: float, spare: float = 0) -> float:
        """Seconds for a step, leaving some for those after it."""
        return max(20.0, min(most, end - time.perf_counter() - spare))

    python = sys.executable
    major, minor = torch.cuda.get_device_capability()
    outcomes = {}
    outcomes["build"] = run(
        "build",
        [python, "setup.py", "--quiet", "build_ext", "--inplace"],
        left(180),
        KDKERNELS_BUILD="cuda",
        KDKERNELS_CUDA_ARCHS=f"{major}{minor}",
    )
    run("what runs here", [python, "-m", "kdkernels.info"], left(60))
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    tests = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=40", *workers, "tests/gpu"]
    outcomes["tests"] = run("tests", tests, left(240, spare=210))
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            print(f"\n== {tool}: there is no compute-sanitizer ==")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--print-limit", "5", python]
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every allocation has bounds of its own
        outcomes[tool] = run(tool, [*command, "tests/gpu/small_grid.py"], left(60, spare=150), **settings)

    device = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    arguments.results.mkdir(parents=True, exist_ok=True)
    results = arguments.results / f"{device}-{today}.json"
    seconds = left(240, spare=130)
    measure = [python, "bench/gpu.py", "--json", results, "--minutes", max(0.5, (seconds - 60) / 60)]
    outcomes["measurements"] = run("measurements", measure, seconds)
    tuning = [python, "bench/tune.py", "--json", arguments.results / "tuning" / results.name]
    seconds = left(120, spare=20)
    outcomes["tuning"] = run("tuning", [*tuning, "--minutes", max(0.2, (seconds - 30) / 60)], seconds)
    run("figures", [python, "bench/report.py"], left(60))

    print("\n" + "\n".join(f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in outcomes.items()))
    if results.exists():
        print(f"results: {results}")
    sys.exit(not all(outcomes.values()))


if __name__ == "__main__":
    main()
