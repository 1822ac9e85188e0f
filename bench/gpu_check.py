"""Check and measure on a machine with a GPU, offline, in sittings of a few minutes: ``make gpu-check``.

The first sitting runs the steps below in their order, and stops when its minutes are over. ``--resume`` goes on where
it stopped. Every result is written as soon as it is known, a line of JSON each, so a sitting may end at any moment.

1. libraries: take the prebuilt libraries of ``make gpu-prebuilt`` from build/gpu, or build for this GPU.
2. smoke: every CUDA kernel and every library product at one small size, against the reference.
3. headline: the benchmarks at the headline sizes.
4. triton: every Triton kernel at one small size. They compile first, so they come later.
5. tests: a sample of the tests that need a GPU.
6. memcheck: compute-sanitizer on the native kernels.
7. tuning: other tuning numbers.

``--rehearse`` runs the same steps on the CPU with a pretended GPU (``bench/pretended_gpu.py``) and Triton's
interpreter. Its clock adds the seconds that each step should take on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
PREBUILT = ROOT / "build" / "gpu" / "kdkernels"
MOST_BYTES = 64 * 2**20  # of what travels to a machine


class Step(NamedTuple):
    """A step, and the seconds that it may take in one sitting. ``least``: it is not started with less time."""

    name: str
    seconds: float
    least: float


STEPS = (
    Step("libraries", 10, 5),
    Step("smoke", 30, 10),
    Step("headline", 150, 20),
    Step("triton", 60, 20),
    Step("tests", 120, 30),
    Step("memcheck", 60, 30),
    Step("tuning", 120, 30),
)
NAMES = [step.name for step in STEPS]
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


class Log:
    """A file with a line of JSON for each result. A step is done if its last line says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **result: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def done(self) -> set[str]:
        return {line["step"] for line in self.lines() if line.get("outcome") in ("passed", "failed", "skipped")}


def command(step: str, seconds: float, results: Path, log: Log, rehearse: bool) -> list[object] | None:
    """Return the command of a step. It is None if something that the step needs is missing."""
    python, minutes = sys.executable, max(0.2, (seconds - 5) / 60)
    smoke = [python, "bench/gpu_smoke.py", "--log", log.path, "--seconds", seconds]
    if step == "libraries":
        return [python, "bench/gpu_check.py", "--take-libraries"]
    if step == "smoke":
        return [*smoke, "--backends", "native", "library"]
    if step == "triton":
        return [*smoke, "--backends", "triton", "--jobs", 1 if rehearse else 8]
    if step == "headline":
        short = ["--only", "KD K=1000, batch 64"] if rehearse else []
        return [python, "bench/gpu.py", "--json", results, "--headline", "--resume", "--minutes", minutes, *short]
    if step == "tests":
        where = ["tests/interpreter/test_interpreted_triton.py"] if rehearse else ["-m", "gpu", "tests/gpu"]
        plugin = ["-p", "gpu_sample", "--share", 40, "--log", log.path, "--stop-after", seconds - 5]
        return [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *where]
    if step == "tuning":
        file = results.parent / "tuning" / results.name
        return [python, "bench/tune.py", "--json", file, "--minutes", minutes, *(["--only", "kd"] if rehearse else [])]
    if rehearse:
        return [python, "tests/gpu/small_grid.py"]
    sanitizer = next(filter(None, map(shutil.which, SANITIZER)), None)
    options = ["--tool", "memcheck", "--error-exitcode", "1", "--print-limit", "5"]
    return [sanitizer, *options, python, "tests/gpu/small_grid.py"] if sanitizer else None


def variables(step: str, rehearse: bool) -> dict[str, str]:
    found = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "bench", ROOT / "tests"))), "PYTHONUNBUFFERED": "1"}
    if step == "memcheck":
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that every allocation has its own bounds
    if rehearse:
        found |= {"KDKERNELS_PRETENDED_GPU": "1", "OMP_NUM_THREADS": "1"}
        if step in ("triton", "tests"):
            found["TRITON_INTERPRET"] = "1"
    return found


def take_libraries() -> None:
    """Use the prebuilt libraries, or build for this GPU if they have no code for it or their size forbids the trip."""
    from kdkernels import info

    major, minor = torch.cuda.get_device_capability()
    cuda = PREBUILT / "_native_cuda.so"
    wanted = {f"sm_{major}{minor}", f"sm_{major}{minor}a"}
    if not wanted & set(info._architectures(cuda)):
        settings = {"KDKERNELS_BUILD": "cuda", "KDKERNELS_CUDA_ARCHS": f"{major}{minor}"}
        build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        sys.exit(subprocess.run(build, cwd=ROOT, env=os.environ | settings).returncode)
    size = sum(path.stat().st_size for path in PREBUILT.glob("*.so"))
    print(f"prebuilt libraries: {size / 2**20:.1f} MiB")
    if os.environ.get("KDKERNELS_PRETENDED_GPU"):
        sys.exit(size > MOST_BYTES)
    for path in PREBUILT.glob("*.so"):
        shutil.copy2(path, ROOT / "kdkernels")
    subprocess.run([sys.executable, "-m", "kdkernels.info"], cwd=ROOT)
    check = "from kdkernels import native; import sys, torch; sys.exit(native.why_not(torch.device('cuda', 0)))"
    sys.exit(subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode)


def run(arguments: list[object], limit: float, environment: dict[str, str]) -> str:
    """Run a step, pass on its output, and return its outcome."""
    everything = os.environ | environment
    process = subprocess.Popen([str(part) for part in arguments], cwd=ROOT, env=everything, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = STOPPED
        process.send_signal(signal.SIGINT)  # so that pytest still reports the failures
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its child processes
        process.wait()
    return {0: "passed", STOPPED: "stopped"}.get(code, "failed")


STOPPED = 75  # the exit status of a step that has more to do


def sitting(log: Log, results: Path, minutes: float, only: list[str], rehearse: bool) -> bool:
    """Run the steps that are not done, as far as the minutes go. Return whether all are done."""
    left, done = 60 * minutes, log.done()
    for step in STEPS:
        if step.name not in only or step.name in done:
            continue
        if left < step.least:
            log.add(step=step.name, outcome="not started", seconds_left=round(left))
            print(f"== {step.name}: {left:.0f} s are left, it goes on with --resume ==", flush=True)
            continue
        seconds = min(step.seconds, left)
        what = command(step.name, seconds, results, log, rehearse)
        print(f"\n== {step.name}, at most {seconds:.0f} s ==", flush=True)
        begin = time.perf_counter()
        limit = 900.0 if rehearse else seconds  # the CPU is slower than what it pretends to be
        outcome = run(what, limit, variables(step.name, rehearse)) if what else "skipped"
        wall = time.perf_counter() - begin
        if rehearse and seconds < step.seconds and outcome == "passed":
            outcome = "stopped"  # on a GPU, the time would have been over
        left -= seconds if rehearse else wall
        log.add(step=step.name, outcome=outcome, wall_seconds=round(wall, 1), seconds_left=round(left))
        print(f"== {step.name}: {outcome}, {wall:.0f} s ==", flush=True)
    return set(only) <= log.done()


def summary(log: Log) -> str:
    """Return a line for each step: its outcomes in all sittings, and how many results it has."""
    lines = []
    for step in STEPS:
        own = [line for line in log.lines() if line["step"] == step.name]
        outcomes = [line["outcome"] for line in own if "outcome" in line]
        checked = [line for line in own if "ok" in line]
        failures = [line["what"] for line in checked if not line["ok"]]
        text = f"{step.name}: {', '.join(outcomes) or 'not reached'}; {len(checked)} results"
        lines.append(text + (f", FAILED: {', '.join(failures[:5])}" if failures else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=6, help="of this sitting")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="only these steps")
    parser.add_argument("--resume", action="store_true", help="go on with the newest log of this device")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with a pretended GPU")
    parser.add_argument("--take-libraries", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["KDKERNELS_PRETENDED_GPU"] = "1"
    if os.environ.get("KDKERNELS_PRETENDED_GPU"):
        import pretended_gpu

        pretended_gpu.install()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a GPU, and PyTorch sees none; --rehearse runs the same steps on the CPU")
    if arguments.take_libraries:
        take_libraries()
        return
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = arguments.results.resolve()
    today = datetime.datetime.now(datetime.timezone.utc).date()
    log = Log(folder / "checks" / f"{device}-{today}.jsonl")
    if arguments.resume:
        earlier = sorted((folder / "checks").glob(f"{device}-*.jsonl"))
        if not earlier:
            sys.exit(f"--resume needs the log of a first sitting, and {folder / 'checks'} has none of {device}")
        log = Log(earlier[-1])
    elif log.path.exists():
        log.path.unlink()
    results = folder / f"{log.path.stem}.json"
    complete = sitting(log, results, arguments.minutes, arguments.only, arguments.rehearse)
    if not arguments.rehearse:
        run([sys.executable, "bench/report.py"], 45, variables("figures", rehearse=False))
    print("\n" + summary(log))
    print(f"results: {log.path}" + ("" if complete else "; there is more to do with --resume"))
    failed = [line for line in log.lines() if line.get("outcome") == "failed" or line.get("ok") is False]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
