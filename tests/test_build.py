"""The messages of a build without a CUDA compiler, and the content of a source distribution."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import kdkernels
from kdkernels import native

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return setup.py as a module, run with ``--version``."""
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
    assert all(f"code=sm_{arch}" in content for arch in (80, 86, 89, 90, 100, 120))
    assert "code=compute_90" in content
    monkeypatch.setenv("KDKERNELS_CUDA_ARCHS", "80;86")
    content = setup.cuda_ninja_file("nvcc", Path("torch"))
    assert "code=compute_86" in content
    assert "sm_90" not in content


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma f16c avx2 avx512f avx512dq avx512bw avx512vl", "avx512"),
        ("fma f16c avx2 avx512f", "avx2"),
        ("avx", "default"),
    ],
)
def test_the_instruction_set_of_a_processor(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, expected: str
) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t\t:\n")
    assert setup.native_isa(cpuinfo) == expected


def test_the_instruction_set_of_this_processor_is_that_which_is_loaded(setup: ModuleType) -> None:
    assert setup.name_of_library(setup.native_isa()) == native.cpu_library().name


def test_an_unknown_instruction_set_is_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_CPU_ISAS", "avx1024")
    with pytest.raises(setup.BuildError, match=r"KDKERNELS_CPU_ISAS must name some of .*default, got avx1024"):
        setup.compile_cpu()


def test_source_distribution_is_complete(tmp_path: Path) -> None:
    """It can build, test, measure and document the package. Only generated files are missing."""
    copy, dist = tmp_path / "copy", tmp_path / "dist"
    made = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "*.pyc")
    shutil.copytree(ROOT, copy, ignore=made)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(dist)]
    subprocess.run(command, cwd=copy, env=os.environ | {"KDKERNELS_BUILD": "0"}, check=True)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/cpu/kd.cpp", "tests/test_build.py", "bench/results/cpu.json", "docs/index.md"} <= files
    assert files - held == set()
    assert not [name for name in held if name.endswith(".so")]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CITATION.cff", r"^version: (\S+)$"),
        ("CHANGELOG.md", r"^## (\S+)"),
        ("recipe/conda/recipe.yaml", r'^  version: "(.*)"$'),
    ],
)
def test_every_file_names_the_same_version(file: str, pattern: str) -> None:
    assert re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1] == kdkernels.__version__


def test_a_label_tells_wheels_of_one_version_apart(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"KDKERNELS_VERSION_LABEL": "+cpu"}, check=True)
    information = (tmp_path / "kdkernels.egg-info" / "PKG-INFO").read_text()
    assert f"\nVersion: {kdkernels.__version__}+cpu\n" in information
    assert "Project-URL: Homepage, https://github.com/kdkernels/kdkernels" in information


def test_workflows_use_what_the_repository_has() -> None:
    """A renamed make target or file would otherwise fail only after the push."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    if not workflows:
        pytest.skip("a source distribution has no workflows")
    called = {target for text in workflows.values() for target in re.findall(r"\bmake ([a-z-]+)", text)}
    assert called <= targets
    files = {file for text in workflows.values() for file in re.findall(r"\b(?:tests|csrc|kdkernels)/[\w./]+\w", text)}
    assert [file for file in files if not (ROOT / file).exists()] == []
