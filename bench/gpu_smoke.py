"""Run every loss at one small size on a GPU, against the reference on the CPU: a line of JSON for each.

A loss passes if value and gradients have a relative error of at most 1e-3. This finds kernels that do not run, and
wrong results. The tests measure accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from gpu_check import STOPPED, Log
from helpers import exactly, relative_error, results_of
from losses import LOSSES, runs_on

import kdkernels

PRETENDED = bool(os.environ.get("KDKERNELS_PRETENDED_GPU"))
BATCH, WIDTH = (7, 5) if PRETENDED else (33, 12)  # the interpreter is slow
ALLOWED = 1e-3


def check(name: str, backend: str, device: str) -> dict[str, object]:
    """Return a line of the log. The inputs depend only on the name."""
    torch.manual_seed(sum(map(ord, name)))
    loss = LOSSES[name]
    inputs = [x.requires_grad_() for x in loss.draw(BATCH, WIDTH)]
    with kdkernels.use_backend("reference"):
        expected = results_of(loss.function, *exactly(*inputs))
    begin = time.perf_counter()
    try:
        on_device = [x.detach().to(device).requires_grad_() for x in inputs]
        with kdkernels.use_backend(backend):
            found = results_of(loss._replace(device=device).function, *on_device)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
        result: dict[str, object] = {"ok": max(errors) <= ALLOWED, "error": max(errors)}
    except Exception as error:  # of any kind, so that the other kernels are tried
        result = {"ok": False, "failure": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    seconds = round(time.perf_counter() - begin, 3)
    step = "triton" if backend == "triton" else "smoke"
    return {"step": step, "what": f"{name} ({backend})", **result, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--backends", nargs="+", required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=1, help="processes, because compilers of kernels need a processor")
    arguments = parser.parse_args()
    device = "cpu" if PRETENDED else "cuda"
    end = time.perf_counter() + (600 if PRETENDED else arguments.seconds)
    log = Log(arguments.log)
    known = {line["what"] for line in log.lines() if "ok" in line}
    pairs = itertools.product(arguments.backends, LOSSES)
    wanted = [(name, backend) for backend, name in pairs if runs_on(name, backend, device)]
    wanted = [(name, backend) for name, backend in wanted if f"{name} ({backend})" not in known]
    ok = True
    if arguments.jobs == 1:
        for place, (name, backend) in enumerate(wanted):
            if time.perf_counter() > end:
                print(f"{len(wanted) - place} losses are left")
                sys.exit(STOPPED)
            line = check(name, backend, device)
            ok = ok and bool(line["ok"])
            log.add(**line)
    else:
        with ProcessPoolExecutor(arguments.jobs) as pool:
            for line in pool.map(check, *zip(*wanted, strict=True), itertools.repeat(device)) if wanted else ():
                ok = ok and bool(line["ok"])
                log.add(**line)
    print(f"{len(wanted)} losses on {', '.join(arguments.backends)}: {'all pass' if ok else 'see the log'}")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
