"""Compare the tuning numbers of the kernels with other numbers: ``python bench/tune.py --json FILE``.

The numbers are in kdkernels/ops/tuning.py for Triton and in csrc/cuda/tuning.cuh for CUDA. Each setting is measured in
its own process, at the headline sizes, in CUDA graphs. If a setting is faster, a person writes it into the tables, with
the file as the reason.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import gpu
import results
import torch
from measure import provenance, table

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 7
# Triton: the operator, the name of the number in its module, and the values to try.
SHAPES = [
    ("gram", "PROGRAMS", (256, 1024)),
    ("congruence", "PROGRAMS", (128, 512)),
    ("congruence", "SPLIT_DEPTH", (128, 512)),
    ("feature_mse", "BLOCK", (128, 512, 1024)),
    ("feature_mse", "WARPS", (2, 8)),
    ("icc", "BLOCK", (16, 64)),
    ("kd", "MAX_BLOCK", (1024, 8192)),
    ("patches", "ROW_BLOCK", (1024, 8192)),
    ("similarity_preserving", "TILE", ((16, 64), (32, 128))),
    # The number depends on dtype and precision. Only the float32 number is tried.
    ("congruence", "TILES", ((32, 32, 32), (64, 32, 16), (128, 64, 16), (128, 128, 16))),
    ("gram", "TILES", ((32, 32, 4), (64, 32, 4), (128, 16, 8))),
]
FLOAT32 = {"congruence": (torch.float32, "ieee"), "gram": torch.float32}
# CUDA: the operator of each number in a line of kTunings, and the factors to try.
OPERATORS = {"gram": "gram", "product": "congruence", "error": "feature_mse"}
FACTORS = (0.5, 2.0, 4.0)


class Trial(NamedTuple):
    """A setting of an operator's backend. The variables are the environment of the process that measures it."""

    operator: str
    backend: str
    setting: str = "present"
    variables: dict[str, str] = {}  # noqa: RUF012


def present() -> dict[str, int]:
    """Return the first line of kTunings, by field name."""
    text = (ROOT / "csrc" / "cuda" / "tuning.cuh").read_text()
    fields = re.search(r"struct Tuning \{(.*?)\};", text, re.DOTALL)[1]
    names = [name for line in re.findall(r"int64_t ([\w, ]+);", fields) for name in line.split(", ")]
    numbers = re.search(r"kTunings\[\] = \{\s*\{([\d, ]+)\}", text)[1]
    return dict(zip(names, map(int, numbers.split(", ")), strict=True))


def trials() -> list[Trial]:
    numbers = {name: number for name, number in present().items() if name != "capability"}
    operators = dict.fromkeys(OPERATORS.values())
    found = [Trial(operator, "native") for operator in operators]
    for name, number in numbers.items():
        for factor in FACTORS:
            line = " ".join(str(int(x)) for x in (numbers | {name: number * factor}).values())
            setting = f"{name} = {int(number * factor)}"
            found.append(Trial(OPERATORS[name.split("_")[0]], "native", setting, {"KDKERNELS_TUNING": line}))
    found += [Trial(operator, "triton") for operator in dict.fromkeys(operator for operator, *_ in SHAPES)]
    for operator, name, values in SHAPES:
        found += [
            Trial(operator, "triton", f"{name} = {value}", {"TRIED": json.dumps([name, value])}) for value in values
        ]
    return found


def apply(operator: str, name: str, value: object) -> None:
    """Replace a Triton number."""
    module = importlib.import_module(f"kdkernels.ops.{operator}.triton")
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    value = tuple(value) if isinstance(value, list) else value
    if name == "TILES":
        module.TILES[FLOAT32[operator]] = value
    else:
        setattr(module, name, value)


def seconds(operator: str, backend: str) -> dict[str, float]:
    """Return the seconds of every headline case: forward and backward on one backend, in a CUDA graph."""
    if "TRIED" in os.environ:
        apply(operator, *json.loads(os.environ["TRIED"]))
    times = {}
    for case in importlib.import_module(f"bench_{operator}").CASES:
        if case.headline:
            run = gpu.replayed(gpu.on(backend, case.fused), gpu.to_gpu(case.inputs(*case.arguments)))
            times[str(case)] = statistics.median(run() for _ in range(REPEATS))
    return times


def measured(trial: Trial) -> dict[str, float]:
    """Measure in another process. The result is empty if the setting does not run, for example without enough shared
    memory.
    """
    command = [sys.executable, __file__, "--measure", trial.operator, trial.backend]
    done = subprocess.run(
        command, env=os.environ | trial.variables, capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        print(f"{trial.operator}, {trial.backend}, {trial.setting}: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file after each setting")
    parser.add_argument("--minutes", type=float, default=20, help="start no setting after this time")
    parser.add_argument("--only", default="", help="operators whose names contain this")
    parser.add_argument("--measure", nargs=2, metavar=("OPERATOR", "BACKEND"), help="only this one, as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here: nothing was measured on one")
        return
    if arguments.measure:
        print(json.dumps(seconds(*arguments.measure)))
        return
    end = time.perf_counter() + 60 * arguments.minutes
    before: dict[tuple[str, str, str], float] = {}
    rows, found = [], []
    try:
        for trial in trials():
            if arguments.only not in trial.operator:
                continue
            if time.perf_counter() > end:
                break
            for case, value in measured(trial).items():
                key = trial.operator, trial.backend, case
                ratio = before.setdefault(key, value) / value
                rows.append((case, f"{trial.backend}, {trial.setting}", f"{value * 1e6:.1f} µs", f"{ratio:.2f}x"))
                found.append({"case": case, "backend": trial.backend, "setting": trial.setting, "seconds": value})
            if arguments.json:
                origin = provenance() | {"processor": torch.cuda.get_device_name(0)}
                results.write(arguments.json, origin | {"results": found})
    finally:  # also after an interruption
        print(table(("forward + backward, in a CUDA graph", "setting", "time", "faster than at present"), rows))


if __name__ == "__main__":
    main()
