"""Measure every loss on a GPU, forward and backward: ``python bench/gpu.py --json FILE``.

Each case is measured twice: launched from Python with the wall clock, and replayed from a CUDA graph with the device's
clock. Below 100 µs, the wall clock measures only the gaps between launches. The fused loss runs on every backend that
can run. ``fused`` is the faster of them.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_congruence
import bench_correlation_congruence
import bench_feature_mse
import bench_gram
import bench_icc
import bench_kd
import bench_patches
import bench_similarity_preserving
import gpu_check
import results
import torch
from measure import Case, Loss, Work, compiled, forget_gradients, gradient_bytes, interleaved, limit, provenance, table
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import kdkernels
from kdkernels import backends

PRETENDED = bool(os.environ.get("KDKERNELS_PRETENDED_GPU"))
if PRETENDED:
    import pretended_gpu

    pretended_gpu.install()

REPLAYS = 20  # graph replays between two events
SECONDS = 0.01 if PRETENDED else 1.0  # per case, launched or replayed
CLOCK_RATE = 13  # CU_DEVICE_ATTRIBUTE_CLOCK_RATE in cuda.h
LONG = 0.1  # seconds; a longer step is not captured, because its launches do not matter


def cases() -> list[Case]:
    """Return the cases in rounds: the sizes for GPUs only, then the headline cases, then the rest. A round has every
    operator.
    """
    lkd, cckd, icc, kd = bench_congruence, bench_correlation_congruence, bench_icc, bench_kd
    large = {
        lkd: [lkd.case(1024, 4, (64, 8), headline=True)],
        cckd: [cckd.case(8192, 512, headline=True)],
        icc: [icc.case(256, 1000, headline=True)],
        kd: [kd.case(256, 1000, headline=True)],
    }
    queues = []
    for module in (lkd, cckd, icc, bench_gram, bench_feature_mse, kd, bench_similarity_preserving, bench_patches):
        first = large.get(module, [])
        shared = [case for case in module.CASES if str(case) not in map(str, first)]
        queues.append([*first, *sorted(shared, key=lambda case: not case.headline)])
    return [case for turn in itertools.zip_longest(*queues) for case in turn if case is not None]


def on(backend: str, loss: Loss) -> Loss:
    """Return the loss on one backend."""

    def run(*inputs: object) -> Tensor:
        with kdkernels.use_backend(backend):
            return loss(*inputs)

    return run


def to_gpu(inputs: tuple) -> tuple:
    """Copy inputs to the GPU. A tensor that occurs twice, such as a teacher's map in SemCKD, is copied once."""
    moved = {
        id(x): x.detach().cuda().requires_grad_(x.requires_grad) for x in tree_leaves(inputs) if isinstance(x, Tensor)
    }
    return tree_map_only(Tensor, lambda x: moved[id(x)], inputs)


def step(loss: Loss, inputs: tuple) -> None:
    forget_gradients(inputs)
    loss(*inputs).backward()


def launched(loss: Loss, inputs: tuple) -> Callable[[], float]:
    """Return the seconds of one step on the wall clock."""

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
    """Return the seconds of one step on the device, in a graph."""
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
    forget_gradients(inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, inputs)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - gradient_bytes(inputs))


def medians(steps: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return each variant's median over interleaved rounds."""
    times: dict[str, list[float]] = defaultdict(list)
    for measured in interleaved(steps, SECONDS) if steps else ():
        for name, value in measured.items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def attempt(variants: dict[str, Loss], prepare: Callable[[Loss], object], failures: dict[str, str]) -> dict:
    """Return the variants that could be prepared, and why the others could not."""
    prepared = {name: _attempt(name, loss, prepare, failures) for name, loss in variants.items()}
    return {name: ready for name, ready in prepared.items() if name not in failures}


def _attempt(name: str, loss: Loss, prepare: Callable[[Loss], object], failures: dict[str, str]) -> object:
    try:
        return prepare(loss)
    except Exception as error:  # of any kind, so that the other variants are measured
        failures[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        torch.cuda.synchronize()


def that_fit(variants: dict[str, Loss], memory: dict[str, int], failures: dict[str, str]) -> dict[str, Loss]:
    """Return the variants whose graphs fit in memory together. A graph keeps the memory of a step. The largest are left
    out.
    """
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    left = free
    fitting = set()
    for name in sorted(variants, key=memory.__getitem__):
        left -= memory[name]
        if left > 0:
            fitting.add(name)
        else:
            needed, all_of_it = (f"{count / 2**30:.1f} GiB" for count in (memory[name], free))
            failures[name] = f"no room for a graph of {needed}: all of them share {all_of_it}"
    return {name: loss for name, loss in variants.items() if name in fitting}


def measure(case: Case, rates: Work) -> Iterator[dict]:
    torch.compiler.reset()
    inputs = to_gpu(case.inputs(*case.arguments))
    tensor = next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    failures: dict[str, str] = {}
    ours = [b for b in ("native", "triton", "library") if backends.why_not(b, tensor, library=True) is None]
    variants = {backend: on(backend, case.fused) for backend in ours} | case.others()
    if not PRETENDED:
        variants |= compiled(case.baselines)
    memory = attempt(variants, lambda loss: peak_extra_memory(loss, inputs), failures)
    variants = {name: loss for name, loss in variants.items() if name in memory}
    if "no form by PyTorch's matrix products" in failures.get("library", ""):
        del failures["library"]
    for how, prepare in (("", launched), (", in a CUDA graph", replayed)):
        if prepare is replayed:
            variants = that_fit(variants, {name: memory[name] + gradient_bytes(inputs) for name in variants}, failures)
        steps = attempt(variants, lambda loss, prepare=prepare: prepare(loss, inputs), failures)
        seconds = medians(steps)
        variants = {name: loss for name, loss in variants.items() if seconds.get(name, LONG) < LONG}
        own = {backend: seconds.pop(backend) for backend in ours if backend in seconds}
        if not own:
            yield case.record() | {"case": f"{case}{how}", "seconds": seconds, "failed": dict(failures)}
            continue
        best = min(own, key=own.__getitem__)
        peaks = {name: memory[name] for name in seconds} | {"fused": memory[best]}
        share = {} if case.work is None else {"share of the limit": limit(case, inputs, rates) / own[best]}
        yield {
            **case.record(),
            "case": f"{case}{how}",
            "parameters": {"loss": case.loss + how, "batch": case.batch},
            "seconds": {"fused": own[best]} | seconds,
            "seconds by backend": own,
            "peak extra bytes": peaks,
            "failed": dict(failures),
        } | share


def machine_rates() -> Work:
    """Return this GPU's rates: bytes, products with float32 accuracy (a third of the tf32 rate), and exponentials."""

    def rate(work: float, run: Callable[[], object]) -> float:
        graph = replayed_call(run)
        return work / statistics.median(graph() for _ in range(5))

    if PRETENDED:
        return Work(1.0, 1.0, 1.0)
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda")
    result = torch.empty_like(a)
    # NVIDIA's throughput tables give 16 per cycle and multiprocessor for compute capability 8.0 to 10.0.
    exponentials = 16 * torch.cuda.get_device_properties(0).multi_processor_count * clock_rate()
    exact = rate(8192**3, lambda: torch.mm(a, b, out=result))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    tf32 = rate(8192**3, lambda: torch.mm(a, b, out=result))
    torch.set_float32_matmul_precision(before)
    moved = rate(2 * source.nbytes, lambda: target.copy_(source))
    return Work(moved, max(exact, tf32 / 3), exponentials)


def clock_rate() -> float:
    """Return cycles per second from the driver, because the device properties lack them since CUDA 13."""
    driver, gpu, kilohertz = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
    failure = driver.cuDeviceGet(ctypes.byref(gpu), 0)
    failure = failure or driver.cuDeviceGetAttribute(ctypes.byref(kilohertz), CLOCK_RATE, gpu)
    if failure:
        raise RuntimeError(f"the CUDA driver does not say how fast the GPU's clock is: error {failure}")
    return kilohertz.value * 1e3


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
    parser.add_argument("--json", type=Path, help="write the results to this file after each case")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--minutes", type=float, default=4, help="start no case after this time")
    parser.add_argument("--headline", action="store_true", help="only the headline cases")
    parser.add_argument("--resume", action="store_true", help="leave out the cases that the file has")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here: nothing was measured on one")
        return
    end = time.perf_counter() + 60 * arguments.minutes
    known = set()
    if arguments.resume and arguments.json.exists():
        known = {case["case"] for case in results.read(arguments.json)["results"]}
    wanted = [case for case in cases() if arguments.only in str(case) and str(case) not in known]
    wanted = [case for case in wanted if case.headline or not arguments.headline]
    rates = machine_rates()
    origin = provenance() | {"processor": torch.cuda.get_device_name(0), "rates": rates._asdict()}
    rows = []
    try:
        for place, case in enumerate(wanted):
            if time.perf_counter() > end:
                print(f"{len(wanted) - place} cases are left")
                sys.exit(gpu_check.STOPPED)
            measured = list(measure(case, rates))
            if arguments.json:
                results.add(arguments.json, origin, measured)
            for result in measured:
                rows += lines(result)
    finally:  # also after an interruption
        print(table(("forward + backward", "", "time", "of the fastest fused"), rows))


def lines(result: dict) -> Iterator[tuple[str, ...]]:
    """Return the lines to print: every variant's time, and why other variants have none."""
    seconds = result.get("seconds by backend", {}) | result["seconds"]
    fused = seconds.pop("fused", None)
    for i, (name, value) in enumerate(seconds.items()):
        ratio = f"{value / fused:.1f}x" if fused else ""
        yield result["case"] if i == 0 else "", name, f"{value * 1e6:.0f} µs", ratio
    for name, reason in result["failed"].items():
        yield "", f"{name} failed", reason[:60], ""


if __name__ == "__main__":
    main()
