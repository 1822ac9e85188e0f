"""The CPU kernels compile for aarch64, use its vector instructions, and a sample of them is right in an emulator."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NATIVE = platform.machine() == "aarch64"
PREFIX = "" if NATIVE else "aarch64-linux-gnu-"
COMPILER, EMULATOR = shutil.which(f"{PREFIX}g++"), [] if NATIVE else [shutil.which("qemu-aarch64")]
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"),
    *("-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-isystem", str(Path(torch.__file__).parent / "include"), f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{ROOT / 'csrc'}"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no g++ for aarch64 (Debian: g++-aarch64-linux-gnu)"),
]


def compile(*arguments: object) -> None:
    done = subprocess.run([COMPILER, *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "warning" not in done.stderr


@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/**/cpu/*.cpp")), ids=lambda path: path.stem)
def test_compiles_without_a_warning(source: Path) -> None:
    compile("-c", source, "-o", os.devnull)


def test_register_tiles_stay_in_vector_registers(tmp_path: Path) -> None:
    """The innermost loop of a product multiplies vectors by lanes and keeps its 20 sums in registers."""
    (tmp_path / "tile.cpp").write_text(
        '#include "gemm.h"\n'
        "template void kdkernels::gemm_detail::tile<float, kdkernels::gemm_detail::MR>"
        "(int64_t, const float*, const float*, float*, int64_t, bool);\n"
    )
    compile("-S", tmp_path / "tile.cpp", "-o", tmp_path / "tile.s")
    body = (tmp_path / "tile.s").read_text()
    loops = re.findall(r"^(\.L\d+):\n((?:\t.*\n)+?)\tb\.?\w*\t\1\n", body, re.MULTILINE)
    (loop,) = (text for _, text in loops if "fmla" in text)
    assert len(re.findall(r"\tfmla\tv\d+\.4s", loop)) == 20
    assert not re.search(r"\t(str|stp)\t|\[sp", loop)


@pytest.mark.skipif(EMULATOR == [None], reason="there is no qemu-aarch64 (Debian: qemu-user)")
def test_a_sample_of_the_kernels_is_right(tmp_path: Path) -> None:
    compile("-static", ROOT / "tests" / "aarch64" / "sample.cpp", "-o", tmp_path / "sample")
    done = subprocess.run([*EMULATOR, tmp_path / "sample"], capture_output=True, text=True, check=True)
    errors = {name: float(error) for name, error in re.findall(r"^(.*) (\S+)$", done.stdout, re.MULTILINE)}
    assert errors.keys() == {f"{dtype} {kernel}" for dtype in ("float32", "float64") for kernel in ("product", "exp")}
    for name, error in errors.items():
        assert error <= (2e-6 if "32" in name else 1e-14), (name, error)
