"""ICCT's loss against the textbook version, eager and compiled: ``pytest bench/bench_icc.py``.

Measured as in bench_kd.py. The limit is this machine's rate of exponentials: of our own, over numbers in the first
cache, on all threads. The loss needs 2·b·K² of them, one for every entry of every sample's two correlations.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from measure import compare, peaks
from torch import Tensor

import kdkernels
from kdkernels import native

FOLDER = Path(__file__).parent


def fused(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.inter_class_correlation_loss(student, teacher)


def fused_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    return kdkernels.inter_class_correlation_loss(student, teacher, per_sample=True)


def correlations(logits: Tensor) -> Tensor:
    return torch.softmax(logits[:, :, None] * logits[:, None, :], dim=2)


def textbook(student: Tensor, teacher: Tensor) -> Tensor:
    m_s, m_t = correlations(student).mean(0), correlations(teacher).mean(0)
    return (m_t * (m_t.log() - m_s.log())).sum() / len(m_s)


def textbook_per_sample(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = correlations(student), correlations(teacher)
    return (p * (p.log() - q.log())).sum() / (p.shape[0] * p.shape[1])


VARIANTS = {"fused": fused, "textbook": textbook}
COMPILED = {"textbook, compiled": torch.compile(textbook, dynamic=False)}
PER_SAMPLE = {"fused": fused_per_sample, "textbook": textbook_per_sample}
COMPILED_PER_SAMPLE = {"textbook, compiled": torch.compile(textbook_per_sample, dynamic=False)}


def logits(b: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(b, classes, requires_grad=True), torch.randn(b, classes)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
@pytest.mark.parametrize("b", [1, 16, 64, 256])
def test_map(benchmark, b, classes):
    memory = peaks(VARIANTS, logits, b, classes) if b == 64 and classes >= 100 else None
    compare(benchmark, VARIANTS | COMPILED, logits(b, classes), limit=limit(b, classes), peaks=memory)


@pytest.mark.parametrize("classes", [100, 1000])
def test_per_sample(benchmark, classes):
    memory = peaks(PER_SAMPLE, logits, 64, classes)
    variants = PER_SAMPLE | COMPILED_PER_SAMPLE
    compare(benchmark, variants, logits(64, classes), limit=limit(64, classes), peaks=memory)


def test_many_classes(benchmark):
    """Where the textbook version would need more than 20 GiB."""
    memory = peaks({"fused": fused}, logits, 8, 10000)
    inputs = logits(8, 10000)

    def step() -> None:
        fused(*inputs).backward()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    own = benchmark.stats.stats.median
    note = {"fused ms": own * 1e3, "share of the limit": limit(8, 10000) / own, "fused MiB": memory["fused"] / 2**20}
    benchmark.extra_info.update(note | {"peak extra bytes": memory, "seconds": {"fused": own}, "headline": False})


def limit(b: int, classes: int) -> float:
    return 2 * b * classes**2 / exp_rate()


@functools.cache
def exp_rate() -> float:
    """Exponentials per second of csrc/cpu/exp.h, all threads together."""
    flags = {"avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma", "avx2": "-mavx2 -mfma", "default": ""}
    level = native.library().stem.removeprefix("_native_cpu_")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "exp_rate.so")
        compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math"]
        source = FOLDER / "exp_rate.cpp"
        subprocess.run([*compiler, *flags[level].split(), "-shared", "-fPIC", source, "-o", library], check=True)
        run = ctypes.CDLL(library).exponentials
    run.argtypes, run.restype = [ctypes.c_int64], ctypes.c_int64
    threads, rounds = torch.get_num_threads(), 20000
    with ThreadPoolExecutor(threads) as pool:
        rates = []
        for _ in range(5):
            begin = time.perf_counter()
            count = sum(pool.map(run, [rounds] * threads))
            rates.append(count / (time.perf_counter() - begin))
    return max(rates)
