"""How the benchmarks measure: variants interleaved in one run, medians, and peak memory in a child process.

A variant is a loss as a function of the inputs of a case; the first of a dictionary of them is the fused one.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kdkernels import info

Loss = Callable[..., Tensor]
HOPELESS = 10  # a variant this many times slower than another is not measured again
SECONDS = 3.0

torch._dynamo.config.recompile_limit = 64  # beyond it torch.compile silently runs eager code


def compiled(variants: dict[str, Loss]) -> dict[str, Loss]:
    """The same functions under torch.compile."""
    return {f"{name}, compiled": torch.compile(loss) for name, loss in variants.items()}


def step(loss: Loss, *inputs: object) -> float:
    """Seconds of one forward and backward pass."""
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf.grad = None
    begin = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - begin


def interleaved(steps: dict[str, Callable[[], float]], seconds: float, least: int = 5) -> Iterator[dict[str, float]]:
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


def medians(variants: dict[str, Loss], inputs: tuple, seconds: float = SECONDS) -> dict[str, float]:
    """Each variant's median over interleaved rounds."""
    steps = {name: functools.partial(step, loss, *inputs) for name, loss in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for measured in interleaved(steps, seconds):
        for name, value in measured.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    benchmark,
    variants: dict[str, Loss],
    inputs: tuple,
    *,
    limit: float | None = None,
    peaks: dict[str, int] | None = None,
) -> None:
    """Time the fused variant by pytest-benchmark, every other one in turn before each of its rounds.

    Notes the ratio to the best of the others; the fraction reached of ``limit``, the seconds that the machine needs at
    its measured rates; and the bytes each variant needs at its peak.
    """
    (fused, loss), *rest = variants.items()
    others = {name: functools.partial(step, other, *inputs) for name, other in rest}
    step(loss, *inputs)
    first = {name: min(run(), run()) for name, run in others.items()}
    others = {name: run for name, run in others.items() if first[name] < HOPELESS * min(first.values())}
    times: dict[str, list[float]] = {name: [] for name in others}

    def step_the_others() -> None:
        for name, run in others.items():
            times[name].append(run())

    rounds = max(5, min(300, int(SECONDS / sum(first[name] for name in others))))
    benchmark.pedantic(functools.partial(step, loss, *inputs), setup=step_the_others, rounds=rounds)
    seconds = first | {name: statistics.median(values) for name, values in times.items()}
    best = min(seconds, key=seconds.__getitem__)
    own = benchmark.stats.stats.median
    note = {"fused ms": own * 1e3, "best of the others": best, "its ms": seconds[best] * 1e3}
    note["ratio"] = seconds[best] / own
    if limit is not None:
        note["share of the limit"] = limit / own
    if peaks is not None:
        note |= {"fused MiB": peaks[fused] / 2**20, "largest MiB": max(peaks.values()) / 2**20}
        note["peak extra bytes"] = peaks
    note["seconds"] = {fused: own} | seconds
    benchmark.extra_info.update(note)


def peaks(variants: dict[str, Loss], inputs: Callable[..., tuple], *case: object) -> dict[str, int]:
    """``peak_extra_memory`` of each variant."""
    return {name: peak_extra_memory(loss, inputs, *case) for name, loss in variants.items()}


def peak_extra_memory(loss: Loss, inputs: Callable[..., tuple], *case: object) -> int:
    """Bytes by which a child process grows, at its peak, from inputs that are there to a loss and its gradient.

    ``loss`` and ``inputs``, which makes the inputs of a case, are functions of a module: the child imports them.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(sender, loss, inputs, case))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the child that measured {loss.__name__} ended with code {child.exitcode}") from None
    finally:
        child.join()


def _measure_memory(sender: Connection, loss: Loss, inputs: Callable[..., tuple], case: tuple) -> None:
    tensors = inputs(*case)
    step(lambda x: x.sum(), torch.ones(1, requires_grad=True))  # what the first backward pass of a process loads
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    step(loss, *tensors)
    sender.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@functools.cache
def gemm_rate() -> float:
    """Multiply-adds per second of torch.mm at 2048² in float32."""
    a, b = torch.randn(2, 2048, 2048)
    return 2048**3 / _median_seconds(lambda: torch.mm(a, b))


@functools.cache
def bandwidth() -> float:
    """Bytes per second of copying memory that no cache holds, read and written bytes both counted."""
    a = torch.randn(2**26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _median_seconds(lambda: b.copy_(a))


def _median_seconds(run: Callable[[], object]) -> float:
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    run()
    return statistics.median(seconds() for _ in range(12))


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
