"""Every CUDA kernel compiles for every architecture, without a GPU and with any PyTorch, and spills no register."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# CUDA 13.0 stores one register of the first kernel for sm_120 and loads it back, with 64 registers per thread as with
# 80. It does so for sm_90 around the calls of division and square root in float64, with 48 registers. In two kernels
# with products of tiles, it does so outside of their loops.
SPILLS = {
    ("120", "pair_gradients_kernelIf"): 8,
    ("90", "dist_columns_kernelId"): 16,
    ("80", "product_kernelIfLb1EfE"): 28,
    ("100", "gram_kernelIfE"): 8,
    ("120", "gram_kernelIfE"): 16,
}
# The shared memory of a block without a request for more. host.h requests more, up to its limit.
STATIC_SHARED_MEMORY = 48 * 1024
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="there is no CUDA compiler nvcc")


class Kernel(NamedTuple):
    name: str
    architecture: str
    spilled_bytes: int
    shared_bytes: int


def included(source: Path) -> set[Path]:
    """Return the file and all files of the repository that it includes, directly or indirectly."""
    names = re.findall(r'^#include "(.*)"', source.read_text(), re.MULTILINE)
    paths = ((source.parent / name).resolve() for name in names)
    return {source}.union(*(included(path) for path in paths if path.exists()))


def compile_report(source: Path) -> str:
    """Return ptxas's report on the kernels of a source. It is cached until a source changes."""
    command = [NVCC, "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-isystem", f"{Path(torch.__file__).parent}/include", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command += ["--threads", "2", "-c", str(source), "-o", "/dev/null"]
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, " ".join(command), *(path.read_text() for path in sorted(included(source)))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    report = ROOT / "build" / "cuda_compile" / f"{source.stem}-{digest}.txt"
    if not report.exists():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
        report.parent.mkdir(parents=True, exist_ok=True)
        for old in report.parent.glob(f"{source.stem}-*"):
            old.unlink()
        report.write_text(done.stderr)
    return report.read_text()


def kernels(report: str) -> list[Kernel]:
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used \d+ registers([^\n]*)"
    )
    found = []
    for name, architecture, stores, loads, rest in re.findall(pattern, report, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found.append(Kernel(name, architecture, int(stores) + int(loads), int(shared[1]) if shared else 0))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path) -> None:
    found = kernels(compile_report(source))
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES)
    for kernel in found:
        known = (size for (at, name), size in SPILLS.items() if at == kernel.architecture and name in kernel.name)
        assert kernel.spilled_bytes <= sum(known), kernel
        assert kernel.shared_bytes <= STATIC_SHARED_MEMORY, kernel


def test_the_report_is_understood() -> None:
    """The report shows the spills of a kernel that must spill."""
    found = kernels(
        "ptxas info    : Compiling entry function '_Z1f' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1f\n"
        "    40 bytes stack frame, 36 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem\n"
    )
    assert found == [Kernel("_Z1f", "90", 48, 1024)]
