"""LKD's loss against what one would write oneself, eager and compiled: ``pytest bench/bench_congruence.py``.

pytest-benchmark times the fused loss; before each of its rounds every other variant takes one step, so that all are
measured side by side. Each case notes the ratio to the best of the others, and the share of this machine's
matrix-product rate that the multiply-adds of the chosen form come to.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
import torch
from compare import CIFAR, HOPELESS, PAPER, VARIANTS, Case, compiled, fused, step

import kdkernels

NAMED = (*PAPER, Case(64, 3, ((512, 7),)))
GRID = tuple(
    Case(n, k, (stage,))
    for stage in (CIFAR[0], CIFAR[2], (256, 8), (512, 7))
    for k in (1, 2, 4)
    for n in (1, 8, 64, 256, 512)
)
SECONDS = 3.0

torch._dynamo.config.recompile_limit = 64  # beyond it torch.compile silently runs eager code
COMPILED = compiled(VARIANTS)


@pytest.fixture(scope="module")
def gemm_rate() -> float:
    """Multiply-adds per second of torch.mm at 2048² in float32."""
    a, b = torch.randn(2, 2048, 2048)

    def seconds() -> float:
        begin = time.perf_counter()
        torch.mm(a, b)
        return time.perf_counter() - begin

    return 2048**3 / statistics.median(seconds() for _ in range(12))


@pytest.mark.parametrize("case", NAMED, ids=str)
def test_named(benchmark, gemm_rate, case):
    measure(benchmark, gemm_rate, case)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(benchmark, gemm_rate, case):
    measure(benchmark, gemm_rate, case)


def measure(benchmark, gemm_rate: float, case: Case) -> None:
    torch.manual_seed(0)
    inputs = case.inputs()
    others = {name: partial(step, loss, *inputs) for name, loss in (VARIANTS | COMPILED).items() if loss is not fused}
    times: dict[str, list[float]] = {name: [] for name in others}
    step(fused, *inputs)
    first = {name: min(run(), run()) for name, run in others.items()}
    others = {name: run for name, run in others.items() if first[name] < HOPELESS * min(first.values())}

    def step_the_others() -> None:
        for name, run in others.items():
            times[name].append(run())

    rounds = max(5, min(200, int(SECONDS / sum(first[name] for name in others))))
    benchmark.pedantic(partial(step, fused, *inputs), setup=step_the_others, rounds=rounds)
    seconds = benchmark.stats.stats.median
    medians = {name: statistics.median(values) if values else first[name] for name, values in times.items()}
    best = min(medians, key=medians.__getitem__)
    benchmark.extra_info.update(
        {
            "best of the others": best,
            "its ms": medians[best] * 1e3,
            "fused ms": seconds * 1e3,
            "ratio": medians[best] / seconds,
            "share of GEMM rate": useful(case) / seconds / gemm_rate,
        }
    )


def useful(case: Case) -> int:
    """Multiply-adds of loss and student's gradient in the form that is chosen, symmetric products counted by halves."""
    student, teacher, k = case.inputs()
    stages = kdkernels.explain("local_correlation_loss", student, teacher, k, partition="resize").stages
    return sum(part.count * part.costs[part.form] for sums in stages for part in sums)
