"""What building says where there is no compiler for CUDA, and what a source distribution holds."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, asked for nothing but the version."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_of(version: str, folder: Path) -> None:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.88\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_nvcc_must_fit_torch(setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.defpath)
    if not (Path("/usr/bin/nvcc").exists() or Path("/bin/nvcc").exists()):
        with pytest.raises(setup.NoCompilerError, match="no CUDA compiler nvcc"):
            setup.find_nvcc("13.0")
    nvcc_of("12.8", tmp_path)
    with pytest.raises(setup.NoCompilerError, match=r"torch was built with CUDA 13.0, but .*nvcc is of CUDA 12.8"):
        setup.find_nvcc("13.0")
    nvcc_of("13.1", tmp_path)
    assert setup.find_nvcc("13.0") == str(tmp_path / "bin" / "nvcc")


@pytest.mark.parametrize("line", ["cuda: Optional[str] = '13.0'", 'cuda = "13.0"'])
def test_the_cuda_of_a_torch(setup: ModuleType, tmp_path: Path, line: str) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    assert setup.cuda_version(tmp_path) is None  # the libraries are missing
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert setup.cuda_version(tmp_path) == "13.0"
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert setup.cuda_version(tmp_path) is None


def test_architectures(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KDKERNELS_CUDA_ARCHS", raising=False)
    content = setup.cuda_ninja_file("nvcc", Path("torch"))
    assert all(f"code=sm_{arch}" in content for arch in (80, 86, 89, 90, 100))
    assert "code=compute_90" in content
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "80;86")
    content = setup.cuda_ninja_file("nvcc", Path("torch"))
    assert "code=compute_86" in content
    assert "sm_90" not in content


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    """It builds, tests, measures and documents the package: everything but what is made from it."""
    copy, dist = tmp_path / "copy", tmp_path / "dist"
    made = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.pyc")
    shutil.copytree(ROOT, copy, ignore=made)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(dist)]
    subprocess.run(command, cwd=copy, env=os.environ | {"KDKERNELS_BUILD": "0"}, check=True)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/library.cpp", "tests/test_build.py", "bench/results/cpu.json", "docs/index.md"} <= files
    assert files - held == set()
    assert not [name for name in held if name.endswith(".so")]
