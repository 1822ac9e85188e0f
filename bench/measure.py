"""Measurements of the benchmarks: interleaved variants in one run, medians, and peak memory in a child process.

A variant is a loss as a function of the inputs of a case.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import importlib.util
import math
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kdkernels import info, native

Loss = Callable[..., Tensor]
HOPELESS = 10  # a variant this many times slower than another is not measured again
SECONDS = 3.0
SHORT = 5e-3  # a shorter loss is slower after another loss, whose code and data fill the caches
AGREEMENT = 1e-3  # relative to a norm; float32 textbook versions lose digits that the fused versions keep

torch._dynamo.config.recompile_limit = 64  # beyond this limit, torch.compile silently runs eager code


def keep_freed_memory() -> None:
    """Let this process keep what it frees from now on. Otherwise, glibc takes new pages for every large result, and
    their first writes can take longer than the loss.
    """
    trim_threshold, most_mappings = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # other C libraries have none
        libc.malloc_trim(0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(most_mappings, 0)


class Work(NamedTuple):
    """The minimal work of a loss and its gradient, or the work of a machine per second."""

    bytes: float = 0
    multiply_adds: float = 0
    exponentials: float = 0


class Case(NamedTuple):
    """A loss at one size.

    ``inputs`` makes the inputs from ``arguments``. It and the losses are functions of a module, because child processes
    that measure memory import them. ``fused.__module__`` has the name of the operator.
    """

    loss: str
    batch: int
    inputs: Callable[..., tuple]
    arguments: tuple
    fused: Loss
    baselines: dict[str, Loss]
    work: Callable[..., Work] | None = None
    uncompiled: dict[str, Loss] = {}  # noqa: RUF012 what torch.compile cannot take, or takes minutes for
    headline: bool = False
    agreement: float = AGREEMENT

    def __str__(self) -> str:
        return f"{self.loss}, batch {self.batch}"

    def others(self) -> dict[str, Loss]:
        return self.baselines | self.uncompiled

    def record(self) -> dict[str, object]:
        """Return the record of the case for a file of results."""
        operator = self.fused.__module__.removeprefix("bench_")
        parameters = {"loss": self.loss, "batch": self.batch}
        return {"case": str(self), "operator": operator, "parameters": parameters, "headline": self.headline}


def where_installed(keops: Loss) -> dict[str, Loss]:
    """Return the KeOps variant if pykeops is installed. Its first call compiles for a minute."""
    return {"KeOps": keops} if importlib.util.find_spec("pykeops") else {}


def compiled(variants: dict[str, Loss]) -> dict[str, Loss]:
    """Return the same functions under torch.compile, compiled for each size."""
    return {f"{name}, compiled": torch.compile(loss, dynamic=False) for name, loss in variants.items()}


def step(loss: Loss, *inputs: object) -> float:
    """Return the seconds of one forward and backward pass. For a short pass, measure the second call in a row."""
    seconds = _pass(loss, inputs)
    return _pass(loss, inputs) if seconds < SHORT else seconds


def _pass(loss: Loss, inputs: tuple) -> float:
    forget_gradients(inputs)
    begin = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - begin


def forget_gradients(inputs: tuple) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf.grad = None


def interleaved(steps: dict[str, Callable[[], float]], seconds: float, least: int = 5) -> Iterator[dict[str, float]]:
    """Yield rounds of one step per variant until the time is up. The first call of each variant is not counted."""
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
    """Return each variant's median over interleaved rounds."""
    steps = {name: functools.partial(step, loss, *inputs) for name, loss in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for measured in interleaved(steps, seconds):
        for name, value in measured.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(benchmark, case: Case, seconds: float = SECONDS, memory: bool = True) -> None:
    """Time the fused variant with pytest-benchmark, and every other variant before each of its rounds.

    The order of the variants changes from round to round. Before the first round, every variant must agree with the
    fused variant. The notes have the ratio to the best other variant, the share of the processor's peak
    and, on demand, each variant's peak memory.
    """
    keep_freed_memory()
    torch.compiler.reset()
    inputs = case.inputs(*case.arguments)
    variants = case.others() | compiled(case.baselines)
    agree(case, variants, inputs)
    others = {name: functools.partial(step, other, *inputs) for name, other in variants.items()}
    first = {name: min(run(), run()) for name, run in others.items()}
    others = {name: run for name, run in others.items() if first[name] < HOPELESS * min(first.values())}
    times: dict[str, list[float]] = {name: [] for name in others}

    def step_the_others() -> None:
        for name in random.sample(list(others), len(others)):
            times[name].append(others[name]())
        if own < SHORT:
            _pass(case.fused, inputs)
        forget_gradients(inputs)

    own = step(case.fused, *inputs)
    rounds = max(5, min(300, int(seconds / (own + sum(first[name] for name in others)))))
    benchmark.pedantic(lambda: case.fused(*inputs).backward(), setup=step_the_others, rounds=rounds)
    own = benchmark.stats.stats.median
    measured = first | {name: statistics.median(values) for name, values in times.items()}
    note: dict[str, object] = {"fused ms": own * 1e3}
    if measured:
        best = min(measured, key=measured.__getitem__)
        note |= {"best of the others": best, "its ms": measured[best] * 1e3, "ratio": measured[best] / own}
    if case.work is not None:
        note["share of the peak"] = limit(case, inputs, machine_rates()) / own
    note |= case.record() | {"seconds": {"fused": own} | measured}
    if memory:
        needed = peaks({"fused": case.fused} | case.others(), case.inputs, *case.arguments)
        note |= {"fused MiB": needed["fused"] / 2**20, "largest MiB": max(needed.values()) / 2**20}
        note["peak extra bytes"] = needed
    benchmark.extra_info.update(note)


def agree(case: Case, variants: dict[str, Loss], inputs: tuple) -> None:
    """Raise if a variant computes another loss or gradient than the fused variant."""
    value, gradients = _result(case.fused, inputs)
    for name, loss in variants.items():
        other, slopes = _result(loss, inputs)
        errors = [_difference(value, other), *map(_difference, gradients, slopes)]
        if case.agreement < math.inf and not max(errors) < case.agreement:
            raise AssertionError(f"{case}: {name} differs from fused by {max(errors):.1e} of its norm")


def _result(loss: Loss, inputs: tuple) -> tuple[Tensor, list[Tensor]]:
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    value = loss(*inputs)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def peaks(variants: dict[str, Loss], inputs: Callable[..., tuple], *case: object) -> dict[str, int]:
    """Return ``peak_extra_memory`` of each variant."""
    return {name: peak_extra_memory(loss, inputs, *case) for name, loss in variants.items()}


def peak_extra_memory(loss: Loss, inputs: Callable[..., tuple], *case: object) -> int:
    """Return by how many bytes a child process grows at its peak, without the gradients, while it computes a loss and
    gradients.

    ``loss`` and ``inputs``, which makes the inputs of a case, are functions of a module, because the child imports
    them.
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
    step(lambda x: x.sum(), torch.ones(1, requires_grad=True))  # loads what the first backward pass of a process needs
    ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory would be used again without being counted
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step(loss, *tensors)
    sender.send(max(0, _status("VmHWM") - before - gradient_bytes(tensors)))


def gradient_bytes(inputs: tuple) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def limit(case: Case, inputs: tuple, rates: Work) -> float:
    """Return the minimal seconds at these rates. Inputs are read, and their gradients are written."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    least = Work(bytes=sum(tensor.nbytes * (2 if tensor.requires_grad else 1) for tensor in tensors))
    needed = case.work(*inputs)
    return max(amount / rate for work in (least, needed) for amount, rate in zip(work, rates, strict=True))


@functools.cache
def machine_rates() -> Work:
    """Return this processor's peak: bytes of a copy, multiply-adds in registers, and exponentials in the L1 cache."""
    return Work(bandwidth(), rate("multiply_adds", 20_000_000), rate("exponentials", 20_000))


@functools.cache
def bandwidth() -> float:
    """Return the bytes per second of a copy that no cache holds. Bytes read and bytes written both count."""
    a = torch.randn(2**26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _median_seconds(lambda: b.copy_(a))


@functools.cache
def rate(name: str, rounds: int) -> float:
    """Return how much all threads together compute in a second by a function of rates.cpp."""
    run = getattr(_rates(), name)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        rates = []
        for _ in range(5):
            begin = time.perf_counter()
            count = sum(pool.map(run, [rounds] * threads))
            rates.append(count / (time.perf_counter() - begin))
    return max(rates)


@functools.cache
def _rates() -> ctypes.CDLL:
    """Compile rates.cpp for the instruction set of the library that is in use."""
    flags = {"avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma", "avx2": "-mavx2 -mfma", "default": ""}
    level = native.cpu_library().stem.removeprefix("_native_cpu_")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "rates.so")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
        source = Path(__file__).with_name("rates.cpp")
        subprocess.run([*compiler, *flags[level].split(), "-shared", "-fPIC", source, "-o", library], check=True)
        loaded = ctypes.CDLL(library)
    for run in (loaded.exponentials, loaded.multiply_adds):
        run.argtypes, run.restype = [ctypes.c_int64], ctypes.c_int64
    return loaded


def _median_seconds(run: Callable[[], object]) -> float:
    def seconds() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    run()
    return statistics.median(seconds() for _ in range(12))


def provenance() -> dict[str, str]:
    """Return machine, versions, commit and date of a measurement."""
    return {
        **{name.strip(): value for name, value in info.rows()},
        "commit": os.environ.get("COMMIT") or _commit() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Return the commit. It is empty without git or without a repository."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
