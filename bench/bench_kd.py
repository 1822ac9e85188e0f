"""kd's loss against eager and compiled PyTorch: ``pytest bench/bench_kd.py``. Measured as in bench_congruence.py."""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels

TEMPERATURE = 4.0
ROUNDS = 300

torch._dynamo.config.recompile_limit = 64  # beyond it torch.compile silently runs eager code


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    p = F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), p, reduction="batchmean") * TEMPERATURE**2


def log_target(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = F.log_softmax(teacher / TEMPERATURE, dim=1)
    log_q = F.log_softmax(student / TEMPERATURE, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.kd_loss(student, teacher, temperature=TEMPERATURE)


EAGER = {"textbook": textbook, "log target": log_target}
OTHERS = EAGER | {f"{name}, compiled": torch.compile(loss) for name, loss in EAGER.items()}


@pytest.mark.parametrize("classes", [10, 100, 1000])
@pytest.mark.parametrize("batch", [1, 64, 256, 1024])
def test_kd(benchmark, batch, classes):
    student, teacher = torch.randn(batch, classes, requires_grad=True), torch.randn(batch, classes)
    times: dict[str, list[float]] = {name: [] for name in OTHERS}

    def step(loss) -> float:
        student.grad = None
        begin = time.perf_counter()
        loss(student, teacher).backward()
        return time.perf_counter() - begin

    def step_the_others() -> None:
        for name, loss in OTHERS.items():
            times[name].append(step(loss))

    for loss in OTHERS.values():
        step(loss)
    benchmark.pedantic(partial(step, fused), setup=step_the_others, rounds=ROUNDS, warmup_rounds=5)
    medians = {name: statistics.median(values[5:]) for name, values in times.items()}
    best = min(medians, key=medians.__getitem__)
    fused_seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        {
            "best of the others": best,
            "its us": medians[best] * 1e6,
            "fused us": fused_seconds * 1e6,
            "ratio": medians[best] / fused_seconds,
        }
    )
