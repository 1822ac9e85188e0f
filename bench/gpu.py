"""Measures every loss on a GPU, forward and backward: ``python bench/gpu.py --json FILE``.

Each case is measured twice: launched from Python, as the wall clock has it, and replayed from a CUDA graph, as the
device has it, where below 100 µs nothing else would be measured but the gaps between launches. The fused loss runs on
every backend that can; ``fused`` is the faster one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import bench_congruence
import bench_correlation_congruence
import bench_icc
import bench_kd
import torch
from measure import Loss, provenance, table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import kdkernels
from kdkernels import backends

REPLAYS = 20  # of a graph between two events
SECONDS = 1.0  # for one case, launched or replayed


class Case(NamedTuple):
    name: str
    batch: int
    fused: Loss
    baselines: dict[str, Loss]
    inputs: Callable[[], tuple]
    multiply_adds: Callable[..., float] = lambda *_: 0  # as float32 computes them
    exponentials: Callable[..., float] = lambda *_: 0

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}"


def cases() -> Iterator[Case]:
    """The sizes that the papers name first, then those between them for the plots."""
    kd, lkd, cckd, icct = bench_kd, bench_congruence, bench_correlation_congruence, bench_icc

    def kd_case(batch: int, classes: int) -> Case:
        inputs = functools.partial(logits, batch, classes)
        return Case(f"kd K={classes}", batch, kd.fused, kd.BASELINES, inputs)

    def lkd_case(n: int, *stages: tuple[int, int]) -> Case:
        case = lkd.Case(n, 4, stages)
        name = f"LKD {' '.join(f'{c}x{h}x{h}' for c, h in stages)} k=4"
        return Case(name, n, lkd.fused, lkd.BASELINES, case.inputs, lkd.multiply_adds)

    def cckd_case(batch: int, width: int) -> Case:
        inputs, baselines = functools.partial(cckd.inputs, batch, width), {"textbook": cckd.textbook}
        return Case(f"CCKD d={width}", batch, cckd.fused, baselines, inputs, of_grams)

    def icct_case(batch: int, classes: int) -> Case:
        inputs, baselines = functools.partial(icct.logits, batch, classes), {"textbook": icct.textbook}
        return Case(f"ICCT K={classes}", batch, icct.fused, baselines, inputs, exponentials=of_maps)

    yield from (lkd_case(64, *lkd.CIFAR), lkd_case(1024, (64, 8)))
    yield from (cckd_case(64, 128), cckd_case(8192, 512), icct_case(256, 1000), kd_case(256, 1000))
    yield from (lkd_case(n, (64, 8)) for n in (64, 256, 512))
    yield from (cckd_case(batch, 512) for batch in (256, 1024, 4096))
    yield from (icct_case(batch, 1000) for batch in (16, 64))
    yield from (kd_case(batch, 1000) for batch in (64, 1024))


def of_grams(student: Tensor, _: Tensor) -> float:
    """Two halves of Gram matrices, one gradient."""
    return 2 * student.shape[0] ** 2 * student.shape[1]


def of_maps(student: Tensor, _: Tensor) -> float:
    """One for each entry of either network's maps."""
    return 2 * student.shape[0] * student.shape[1] ** 2


def logits(batch: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes)


def compiled(variants: dict[str, Loss]) -> dict[str, Loss]:
    """The same under torch.compile, each size for itself."""
    return {f"{name}, compiled": torch.compile(loss, dynamic=False) for name, loss in variants.items()}


def on(backend: str, loss: Loss) -> Loss:
    """The loss on one backend."""

    def run(*inputs: object) -> Tensor:
        with kdkernels.use_backend(backend):
            return loss(*inputs)

    return run


def to_gpu(inputs: tuple) -> tuple:
    return tree_map_only(Tensor, lambda x: x.detach().cuda().requires_grad_(x.requires_grad), inputs)


def step(loss: Loss, inputs: tuple) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf.grad = None
    loss(*inputs).backward()


def launched(loss: Loss, inputs: tuple) -> Callable[[], float]:
    """Seconds of one step on the wall clock."""

    def run() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(loss, inputs)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(3):
        run()
    return run


def replayed(loss: Loss, inputs: tuple) -> Callable[[], float]:
    """Seconds of one step on the device, in a graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(loss, inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(loss, inputs)

    def run() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        graph.replay()
        events[0].record()
        for _ in range(REPLAYS):
            graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3 / REPLAYS

    return run


def peak_extra_memory(loss: Loss, inputs: tuple) -> int:
    step(loss, inputs)
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def medians(steps: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Each one's median over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or min(map(len, times.values())) < 5:
        for name, run in steps.items():
            times[name].append(run())
    return {name: statistics.median(values) for name, values in times.items()}


def attempt(variants: dict[str, Loss], prepare: Callable[[Loss], object], failures: dict[str, str]) -> dict:
    """What can be prepared; why the rest cannot."""
    prepared = {name: _attempt(name, loss, prepare, failures) for name, loss in variants.items()}
    return {name: ready for name, ready in prepared.items() if name not in failures}


def _attempt(name: str, loss: Loss, prepare: Callable[[Loss], object], failures: dict[str, str]) -> object:
    try:
        return prepare(loss)
    except Exception as error:  # of whatever: the other variants are to be measured all the same
        failures[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        torch.cuda.synchronize()


def measure(case: Case, rates: dict[str, float]) -> Iterator[dict]:
    inputs = to_gpu(case.inputs())
    tensor = next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    failures: dict[str, str] = {}
    ours = [b for b in ("native", "triton") if backends.why_not(b, tensor) is None]
    variants = {backend: on(backend, case.fused) for backend in ours} | case.baselines | compiled(case.baselines)
    memory = attempt(variants, lambda loss: peak_extra_memory(loss, inputs), failures)
    variants = {name: loss for name, loss in variants.items() if name in memory}
    floor = sum(x.nbytes * (2 if x.requires_grad else 1) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    limit = max(
        floor / rates["bytes per second"],
        case.multiply_adds(*inputs) / rates["float32 multiply-adds per second"],
        case.exponentials(*inputs) / rates["exponentials per second"],
    )
    for how, prepare in (("", launched), (", in a CUDA graph", replayed)):
        steps = attempt(variants, lambda loss, prepare=prepare: prepare(loss, inputs), failures)
        seconds = medians(steps)
        own = {backend: seconds.pop(backend) for backend in ours if backend in seconds}
        if not own:
            yield {"case": f"{case}{how}", "seconds of baselines": seconds, "failed": failures, "headline": False}
            continue
        best = min(own, key=own.__getitem__)
        peaks = {name: memory[name] for name in seconds} | {"fused": memory[best]}
        yield {
            "case": f"{case}{how}",
            "parameters": {"loss": case.name + how, "batch": case.batch},
            "seconds": {"fused": own[best]} | seconds,
            "seconds by backend": own,
            "peak extra bytes": peaks,
            "share of the limit": limit / own[best],
            "failed": failures,
        }


def machine_rates() -> dict[str, float]:
    """What this GPU reaches: bytes moved, products in float32's accuracy, which is a third of tf32's, exponentials."""

    def rate(work: float, run: Callable[[], object]) -> float:
        graph = replayed_call(run)
        return work / statistics.median(graph() for _ in range(5))

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda")
    result = torch.empty_like(a)
    # 16 a cycle on every multiprocessor, in NVIDIA's tables of throughputs for compute capability 8.0 to 10.0.
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1_980_000) * 1e3
    rates = {"bytes per second": rate(2 * source.nbytes, lambda: target.copy_(source))}
    rates["float32 multiply-adds per second without tensor cores"] = rate(8192**3, lambda: torch.mm(a, b, out=result))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    rates["tf32 multiply-adds per second"] = rate(8192**3, lambda: torch.mm(a, b, out=result))
    torch.set_float32_matmul_precision(before)
    rates["float32 multiply-adds per second"] = max(
        rates["float32 multiply-adds per second without tensor cores"], rates["tf32 multiply-adds per second"] / 3
    )
    rates["exponentials per second"] = 16 * properties.multi_processor_count * clock
    return rates


def replayed_call(run: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        run()
        events[0].record()
        for _ in range(3):
            run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3 / 3

    seconds()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file, after each case anew")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--minutes", type=float, default=4, help="begin no case later than this")
    arguments = parser.parse_args()
    end = time.perf_counter() + 60 * arguments.minutes
    rates = machine_rates()
    results: list[dict] = []
    for case in cases():
        if arguments.only not in str(case) or time.perf_counter() > end:
            continue
        results += measure(case, rates)
        if arguments.json:
            content = {**provenance(), "processor": torch.cuda.get_device_name(0), "rates": rates, "results": results}
            arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    rows = []
    for result in results:
        seconds = result.get("seconds by backend", {}) | result.get("seconds", result.get("seconds of baselines"))
        first = seconds.pop("fused", None)
        for i, (name, value) in enumerate(seconds.items()):
            ratio = f"{value / first:.1f}x" if first else ""
            rows.append((result["case"] if i == 0 else "", name, f"{value * 1e6:.0f} µs", ratio))
        rows += [("", f"{name} failed", reason[:60], "") for name, reason in result["failed"].items()]
    print(table(("forward + backward", "", "time", "of the fastest fused"), rows))


if __name__ == "__main__":
    main()
