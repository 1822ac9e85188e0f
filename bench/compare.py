"""Fused against textbook, on this machine and now: time of forward + backward, and peak extra memory.

``python bench/compare.py`` measures the sizes of the LKD paper on CIFAR. The benchmarks import the rest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import textbook
import torch
from torch import Tensor
from tqdm import tqdm

import kdkernels
from kdkernels import info

Loss = Callable[[list[Tensor], list[Tensor], int], Tensor]
HOPELESS = 10  # a variant this many times slower than another is not measured again


class Case(NamedTuple):
    """Features of ``stages`` (channels, side) for both networks, n images, k x k patches."""

    n: int
    k: int
    stages: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"n={self.n} {' '.join(f'{c}x{h}x{h}' for c, h in self.stages)} k={self.k}"

    def inputs(self, n: int | None = None) -> tuple[list[Tensor], list[Tensor], int]:
        shapes = [(n or self.n, c, h, h) for c, h in self.stages]
        return [torch.randn(s, requires_grad=True) for s in shapes], [torch.randn(s) for s in shapes], self.k


CIFAR = ((16, 32), (32, 16), (64, 8))
PAPER = (Case(64, 4, CIFAR), Case(256, 4, ((64, 8),)), Case(512, 4, ((64, 8),)))


def fused(student: list[Tensor], teacher: list[Tensor], k: int) -> Tensor:
    return kdkernels.local_correlation_loss(student, teacher, k, partition="resize")


VARIANTS: dict[str, Loss] = {"fused": fused, "textbook": textbook.textbook, "full Gram": textbook.full_gram}


def compiled(variants: dict[str, Loss]) -> dict[str, Loss]:
    """The baselines under torch.compile."""
    return {f"{name}, compiled": torch.compile(loss) for name, loss in variants.items() if name != "fused"}


def step(loss: Loss, student: list[Tensor], teacher: list[Tensor], k: int) -> float:
    """Seconds of one forward and backward pass."""
    for features in student:
        features.grad = None
    begin = time.perf_counter()
    loss(student, teacher, k).backward()
    return time.perf_counter() - begin


def interleaved(steps: dict[str, Callable[[], float]], seconds: float, least: int = 3) -> Iterator[dict[str, float]]:
    """Rounds of one step of each variant until the time is up. A first call of each is left out."""
    for run in steps.values():
        run()
    end = time.perf_counter() + seconds
    best, rounds = dict.fromkeys(steps, float("inf")), 0
    while rounds < least or time.perf_counter() < end:
        fastest = min(best.values())
        times = {name: run() for name, run in steps.items() if rounds == 0 or best[name] < HOPELESS * fastest}
        best.update({name: min(best[name], value) for name, value in times.items()})
        rounds += 1
        yield times


def medians(steps: dict[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Each variant's median over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for measured in interleaved(steps, seconds):
        for name, value in measured.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_extra_memory(name: str, case: Case) -> int:
    """Bytes by which a child process grows, at its peak, from inputs that are there to a loss and its gradient."""
    request = json.dumps({"variant": name, "case": case})
    child = subprocess.run([sys.executable, __file__, "--child", request], capture_output=True, text=True, check=True)
    return int(child.stdout)


def _peak_in_this_process(name: str, case: Case) -> int:
    step(VARIANTS[name], *case.inputs(n=2))
    inputs = case.inputs()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    step(VARIANTS[name], *inputs)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def provenance() -> dict[str, str]:
    """Machine, versions, commit and date of a measurement."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        **{name.strip(): value for name, value in info.rows()},
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="measure the baselines under torch.compile too")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the measurement of each size")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        request = json.loads(arguments.child)
        n, k, stages = request["case"]
        print(_peak_in_this_process(request["variant"], Case(n, k, tuple(map(tuple, stages)))))
        return

    variants = VARIANTS | (compiled(VARIANTS) if arguments.compile else {})
    results, rows = [], []
    for case in tqdm(PAPER, desc="fused against textbook", leave=False):
        inputs = case.inputs()
        times = medians({name: partial(step, loss, *inputs) for name, loss in variants.items()}, arguments.seconds)
        memory = {name: peak_extra_memory(name, case) for name in VARIANTS}
        results.append({"case": str(case), "seconds": times, "peak extra bytes": memory})
        for name, seconds in times.items():
            extra = f"{memory[name] / 2**20:.0f} MiB" if name in memory else ""
            ratio = f"{seconds / times['fused']:.1f}x"
            rows.append((str(case) if name == "fused" else "", name, f"{seconds * 1e3:.2f} ms", ratio, extra))
    print("\nOne loss, forward and backward: medians of interleaved repeats, and the memory it needs at its peak.\n")
    print(table(("LKD at", "", "time", "of fused", "extra memory"), rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({**provenance(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
