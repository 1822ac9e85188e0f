"""One wheel serves every Python and every PyTorch: it has no Python symbol, and uses PyTorch's stable C functions only.

The wheel is installed into new environments without a compiler. KDKERNELS_WHEEL_PYTHONS names further interpreters that
have a PyTorch, separated by colons; each gets the same wheel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from kdkernels import native

ROOT = Path(__file__).parents[1]
PYTHONS = [sys.executable, *filter(None, os.environ.get("KDKERNELS_WHEEL_PYTHONS", "").split(os.pathsep))]
OTHERS = [f"python3.{minor}" for minor in range(10, 16) if minor != sys.version_info.minor]
LOSSES = """
import pathlib, sys
import torch, kdkernels
assert pathlib.Path(kdkernels.__file__).is_relative_to(sys.prefix), kdkernels.__file__
torch.manual_seed(0)
maps = torch.randn(2, 8, 6, 4, 4).unbind()
logits = torch.randn(2, 8, 10).unbind()
for loss, (student, teacher), more in (
    (kdkernels.local_correlation_loss, maps, (2,)),
    (kdkernels.similarity_preserving_loss, maps, ()),
    (kdkernels.correlation_congruence_loss, logits, ()),
    (kdkernels.inter_class_correlation_loss, logits, ()),
    (kdkernels.kd_loss, logits, ()),
):
    results = []
    for backend in ("native", "reference"):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, *more, backend=backend)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
print("torch", torch.__version__)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="there is no native library"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the libraries that were built here; ninja compiles only what has changed since."""
    folder = tmp_path_factory.mktemp("wheel")
    built = [path.stem.removeprefix("_native_cpu_") for path in native.built() if "_cpu_" in path.name]
    commands = [
        *("egg_info", "--egg-base", folder, "build", "--build-base", folder / "build"),
        *("bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder / "dist"),
    ]
    environment = os.environ | {"KDKERNELS_BUILD": "1", "KDKERNELS_CPU_ISAS": ";".join(built)}
    subprocess.run([sys.executable, "setup.py", "--quiet", *commands], cwd=ROOT, env=environment, check=True)
    (path,) = (folder / "dist").glob("*.whl")
    return path


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def installed(wheel: Path, python: str, folder: Path) -> Path:
    """Return the Python of a new environment that has the wheel and nothing else."""
    run(python, "-m", "venv", "--without-pip", folder)
    inside = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", inside, "install", "--quiet", "--no-index", "--no-deps", wheel)
    return inside


def find(name: str) -> str | None:
    """Return an interpreter on the path or among pyenv's that starts and has venv."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}.*/bin/{name}"))
    for python in filter(None, [shutil.which(name), *map(str, pyenv)]):
        if subprocess.run([python, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return python
    return None


def folder_of_packages(python: str | Path) -> str:
    return run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()


def test_tags_and_content(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {path.name for path in native.built()} <= {name.removeprefix("kdkernels/") for name in names}
    assert "kdkernels/py.typed" in names


def test_no_symbol_of_python_nor_of_pytorchs_cpp(wheel: Path, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    libraries = list(tmp_path.rglob("*.so"))
    assert libraries
    for library in libraries:
        listing = run("nm", "--dynamic", "--undefined-only", library)
        symbols = set(re.findall(r"\b[Uw] (\w+)", listing))
        assert any(name.startswith("aoti_torch_") for name in symbols)
        assert not [name for name in symbols if name.startswith(("Py", "_Py"))]
        assert not [name for name in symbols if re.match(r"_ZN\w*?(2at|3c10|5torch)", name)]


@pytest.mark.parametrize("python", PYTHONS)
def test_losses_of_the_wheel(wheel: Path, tmp_path: Path, python: str) -> None:
    inside = installed(wheel, python, tmp_path / "env")
    # PyTorch comes from the interpreter that was named, but its editable packages do not.
    Path(folder_of_packages(inside), "torch.pth").write_text(folder_of_packages(python))
    report = run(inside, "-I", "-c", LOSSES, PATH=str(tmp_path))
    assert report.startswith("torch ")


@pytest.mark.parametrize("library", PYTHONS)
@pytest.mark.parametrize("name", OTHERS)
def test_another_python_calls_the_wheel(wheel: Path, tmp_path: Path, name: str, library: str) -> None:
    """It needs no PyTorch of its own: it loads the libtorch of one that has."""
    python = find(name)
    if python is None:
        pytest.skip(f"there is no {name}")
    inside = installed(wheel, python, tmp_path / "env")
    libtorch = Path(folder_of_packages(library), "torch", "lib")
    path = Path(folder_of_packages(inside), "kdkernels", native.cpu_library().name)
    report = run(inside, ROOT / "tests" / "call_operator.py", libtorch, path)
    assert report.startswith(name.replace("python", "Python "))
