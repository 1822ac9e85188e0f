"""Predict the time of every headline loss on GPUs that have not been measured: ``python bench/predict.py``.

Every number here is a prediction. It comes from counted work (launches, bytes, products, exponentials) and from rates
that others measured or that NVIDIA names. ``bench/results/predictions.json`` holds the result. As soon as ``make
gpu-check`` has measured a machine, the file of its results stands in the place of its predictions in the documentation.
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import NamedTuple

import gpu
import results
from measure import Case, Work, limit, table

from kdkernels.ops import tuning

FILE = Path(__file__).resolve().parent / "results" / "predictions.json"
SOURCES = {
    "bfloat16 products": "780 TFLOP/s by torch on an H100 SXM at 4224 x 2048 x 8192: "
    "https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405",
    "bandwidth": "3.35 TB/s (H100 SXM) and 4.8 TB/s (H200), NVIDIA's data sheets; a copy reaches about 0.9 of it",
    "exponentials": "16 per cycle and multiprocessor (CUDA C++ Programming Guide), 132 x 1.755 GHz",
    "launch": "3 µs per kernel that does not overlap, an assumption",
    "cache": "5.5 TB/s from the L2 cache, an assumption",
    "CUDA tiles": "54 TFLOP/s with the accuracy of float32, counted for earlier loops with 11.7 instructions per HMMA",
    "Triton tiles": "30 TFLOP/s in float32 without tensor cores, an assumption",
}
LAUNCH = 3e-6
CACHE = 5.5e12
PRODUCTS = 780e12
TILES = 54e12
TRITON = 30e12
PLANES = 6  # bfloat16 products for one float32 product
REACHED = 0.85  # of the limit, by kernels that only move bytes or take exponentials


class Machine(NamedTuple):
    name: str
    rates: Work  # bytes, multiply-adds with float32 accuracy, exponentials


# Two floating-point operations are one multiply-add.
MACHINES = [
    Machine(name, Work(0.9 * bandwidth, PRODUCTS / PLANES / 2, 16 * 132 * 1.755e9))
    for name, bandwidth in (("NVIDIA H100", 3.35e12), ("NVIDIA H200", 4.8e12))
]


class Products(NamedTuple):
    """The products of a loss: rows, columns of both networks, and multiply-adds with the accuracy of float32."""

    rows: int
    columns: int
    multiply_adds: float


def by_library(work: Products, machine: Machine) -> float:
    """Return the seconds by PyTorch's products, in strips of D."""
    products = 2 * PLANES * work.multiply_adds / PRODUCTS
    # An entry is written, changed by the second network, read, written in three planes, and read for two products.
    entries = work.rows**2 / 2 * (4 + 8 + 4 + 6 + 2 * 12) / CACHE
    planes = work.rows * work.columns * (4 + 14) / machine.rates.bytes
    launches = 10 + 14 * -(-(work.rows**2) // tuning.LIBRARY_STRIP)
    # Launches overlap with products, because the processor is ahead of the GPU.
    return max(products + entries + planes, LAUNCH * launches)


def by_library_features(work: Products, machine: Machine) -> float:
    """Return the seconds of the feature form, which has no strips."""
    planes = work.rows * work.columns * (4 + 14) / machine.rates.bytes
    return max(2 * PLANES * work.multiply_adds / PRODUCTS + planes, 40 * LAUNCH)


def by_kernels(work: Products, rate: float) -> float:
    """Return the seconds by CUDA's or Triton's tiles, which process D in registers."""
    return 4 * LAUNCH + 2 * work.multiply_adds / rate


def cross_over(columns: int) -> int:
    """Return the rows from which the library is predicted to be faster than CUDA, for networks of equal width."""
    for rows in range(64, 2**16, 64):
        work = Products(rows, columns, rows**2 * columns)
        if by_library(work, MACHINES[0]) < by_kernels(work, TILES):
            return rows
    return 2**16


def predict(case: Case, machine: Machine) -> dict[str, object]:
    """Return the predicted time of a case, with the backend that "auto" takes."""
    inputs = case.inputs(*case.arguments)
    least = limit(case, inputs, machine.rates)
    operator = case.fused.__module__.removeprefix("bench_")
    sizes = {"congruence": tuning.LARGE_GRAM, "correlation_congruence": tuning.LARGE_GRAM}
    large = (sizes | {"similarity_preserving": tuning.LARGE_SIMILARITY}).get(operator)
    if large is None:
        backend, seconds = "CUDA", 4 * LAUNCH + least / REACHED
    else:
        needed = case.work(*inputs).multiply_adds
        of_stages = [x if isinstance(x, list) else [x] for x in inputs[:2]]
        side = inputs[2] if operator == "congruence" else 1
        rows = len(of_stages[0][0]) * side**2
        columns = max(sum(maps[0].numel() for maps in pair) // side**2 for pair in zip(*of_stages, strict=True))
        work = Products(rows, columns, needed)
        counted = rows if operator == "similarity_preserving" else math.isqrt(int(needed / columns))
        backend = "library" if counted >= large.rows and columns >= large.columns else "CUDA"
        if backend == "library":
            in_features = operator != "correlation_congruence" and needed < rows**2 * columns / 2
            seconds = (by_library_features if in_features else by_library)(work, machine)
        elif operator == "similarity_preserving":
            backend, seconds = "Triton", by_kernels(work, TRITON)
        else:
            seconds = by_kernels(work, TILES)
    return {
        "case": str(case),
        "machine": machine.name,
        "prediction": True,
        "backend": backend,
        "seconds": seconds,
        "limit": least,
        "share of the limit": least / seconds,
    }


def main() -> None:
    cases = [case for case in gpu.cases() if case.headline and case.work is not None]
    found = [predict(case, machine) for case in cases for machine in MACHINES]
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results.write(FILE, {"prediction": True, "date": date, "sources": SOURCES, "results": found})
    rows = [
        (r["case"], r["machine"], r["backend"], f"{1e6 * r['seconds']:.0f} µs", f"{r['share of the limit']:.0%}")
        for r in found
    ]
    print(table(("predicted, not measured", "machine", "backend", "time", "of the limit"), rows))
    crossings = {columns: cross_over(columns) for columns in (128, 256, 512, 1024, 2048)}
    print("rows from which the library is predicted to be faster, by columns:", crossings)


if __name__ == "__main__":
    main()
