"""Everything there is to find out on a machine with a GPU, offline and in one go: ``make gpu-check``.

Builds for this GPU against the PyTorch that is installed, runs the tests that need a GPU, measures, runs
compute-sanitizer over the native kernels, and measures what other numbers would do to their speed. A step that fails
does not keep the next ones from running. Results, with device, versions and date, go to bench/results. Where there is
no git, the variable COMMIT names what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
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
# In this order, each with its share of the time that those before it have left.
STEPS = {"build": 6, "tests": 5, "measurements": 5, "memcheck": 2, "racecheck": 2, "tuning": 1}
LAST_CASE = 45  # seconds that the case begun last may take, where torch.compile has others to compile


def command(step: str, seconds: float, results: Path) -> list[object] | None:
    """What a step runs, for about so long at most; nothing if what it needs is not there."""
    python, minutes = sys.executable, max(0.2, (seconds - LAST_CASE) / 60)
    if step == "build":
        return [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    if step == "tests":
        workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
        return [
            python,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--maxfail=40",
            *workers,
            "tests/gpu",
        ]
    if step == "measurements":
        return [python, "bench/gpu.py", "--json", results, "--minutes", minutes]
    if step == "tuning":
        return [python, "bench/tune.py", "--json", results.parent / "tuning" / results.name, "--minutes", minutes]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    options = ["--tool", step, "--error-exitcode", "1", "--print-limit", "5"]
    return [sanitizer, *options, python, "tests/gpu/small_grid.py"] if sanitizer else None


def variables(step: str) -> dict[str, str]:
    if step == "build":
        major, minor = torch.cuda.get_device_capability()
        return {"KDKERNELS_BUILD": "cuda", "KDKERNELS_CUDA_ARCHS": f"{major}{minor}"}
    if step in ("memcheck", "racecheck"):
        return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every allocation has bounds of its own
    return {}


def run(name: str, command: list[object], limit: float, **environment: str) -> bool:
    """Whether the step succeeded. What it prints is passed on."""
    print(f"\n== {name} ==", flush=True)
    begin = time.perf_counter()
    everything = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environment
    arguments = [str(part) for part in command]
    process = subprocess.Popen(arguments, cwd=ROOT, env=everything, start_new_session=True)
    try:
        code = process.wait(limit)
        outcome = "done" if code == 0 else f"failed with code {code}"
    except subprocess.TimeoutExpired:
        code, outcome = 1, "stopped: out of time"
        process.send_signal(signal.SIGINT)  # upon which pytest still reports what has failed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
    print(f"== {name}: {outcome}, {time.perf_counter() - begin:.0f} s ==", flush=True)
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9, help="for everything")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU, and PyTorch sees none")
    end = time.perf_counter() + 60 * arguments.minutes
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    today = datetime.datetime.now(datetime.timezone.utc).date()
    results = arguments.results.resolve() / f"{device}-{today}.json"

    outcomes = {}
    steps = [step for step in STEPS if step in arguments.only]
    for i, step in enumerate(steps):
        share = STEPS[step] / sum(STEPS[later] for later in steps[i:])
        seconds = max(20.0, share * (end - time.perf_counter()))
        what = command(step, seconds, results)
        if what is None:
            print(f"\n== {step}: there is no compute-sanitizer ==")
            continue
        outcomes[step] = run(step, what, seconds, **variables(step))
        if step == "build":
            run("what runs here", [sys.executable, "-m", "kdkernels.info"], 60)
    run("figures", [sys.executable, "bench/report.py"], 45)

    print("\n" + "\n".join(f"{step}: {'passed' if passed else 'FAILED'}" for step, passed in outcomes.items()))
    if results.exists():
        print(f"results: {results}")
    sys.exit(not all(outcomes.values()))


if __name__ == "__main__":
    main()
