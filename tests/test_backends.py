"""The choice of the backend of a call, and properties of the whole native library."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import KernelCalls, assert_close, loss_and_gradients, needs_every_library
from torch import Tensor

import kdkernels
from kdkernels import backends, local_correlation_loss, native, use_backend
from kdkernels.ops import operator
from kdkernels.ops.congruence import congruence
from kdkernels.ops.patches import patches

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(native.why_not(CPU) is not None, reason=str(native.why_not(CPU)))


def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4)


# Choosing a backend ---------------------------------------------------------------------------------------------------


def test_auto_is_native_on_the_cpu_where_it_is_built():
    expected = "reference" if native.why_not(CPU) else "native"
    assert backends.choose("auto", torch.empty(0)) == expected


def test_auto_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda device: "the native library was not built")
    student, teacher = maps()
    assert backends.choose("auto", student) == "reference"
    assert local_correlation_loss(student, teacher, 2) > 0
    with pytest.raises(RuntimeError, match=r"backend='native'.*was not built"):
        local_correlation_loss(student, teacher, 2, backend="native")


@pytest.mark.parametrize(
    ("running", "expected"),
    [({"native", "triton"}, "native"), ({"triton"}, "triton"), ({"native"}, "native"), (set(), "reference")],
)
def test_auto_on_a_gpu_takes_the_first_that_runs(monkeypatch, running, expected):
    monkeypatch.setattr(backends, "why_not", lambda name, *_, **__: None if name in running else "not here")
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert backends.choose("auto", on_gpu) == expected


@needs_native
def test_a_block_chooses_for_the_calls_in_it():
    with KernelCalls() as log:
        local_correlation_loss(*maps(), 2)
    assert log.names == ["local_correlation"]  # one call for everything
    with KernelCalls() as log, use_backend("reference"):
        local_correlation_loss(*maps(), 2)
        patches(maps()[0], 2)
        congruence(torch.randn(4, 3), torch.randn(4, 3))
    assert not log.calls
    with KernelCalls() as log, use_backend("reference"), use_backend("native"):
        local_correlation_loss(*maps(), 2)
    assert log.calls
    with KernelCalls() as log, use_backend("reference"):
        local_correlation_loss(*maps(), 2, backend="native")
    assert log.calls  # a call gets the backend that it names


def test_a_block_ends_with_its_choice():
    for name in ("reference", "auto"):
        with use_backend("reference"), pytest.raises(ZeroDivisionError), use_backend(name):
            raise ZeroDivisionError
    assert backends._default == "auto"


def test_unknown_backends_are_named():
    for attempt in (lambda: local_correlation_loss(*maps(), 2, backend="cpp"), lambda: use_backend("cpp").__enter__()):
        with pytest.raises(ValueError, match=r"backend.*'native'.*'cpp'"):
            attempt()
    assert backends._default == "auto"


@pytest.mark.skipif(backends.why_not("triton", torch.empty(0)) is None, reason="Triton's interpreter is on")
def test_triton_without_a_gpu_says_why():
    attempts = (
        lambda: local_correlation_loss(*maps(), 2, backend="triton"),
        lambda: patches(maps()[0], 2, backend="triton"),
        lambda: congruence(torch.randn(4, 3), torch.randn(4, 3), backend="triton"),
    )
    for attempt in attempts:
        with pytest.raises(RuntimeError, match=r"backend='triton'.*(GPU|not installed)"):
            attempt()
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend='triton'"):
        local_correlation_loss(*maps(), 2)


def test_meta_tensors_are_not_native():
    """Shapes can be inferred without data. Only the reference runs there."""
    student, teacher = (x.to("meta") for x in maps())
    loss = local_correlation_loss(student, teacher, 2)
    assert loss.device.type == "meta"
    assert loss.shape == ()
    with pytest.raises(RuntimeError, match=r"backend='native'.*meta"):
        local_correlation_loss(student, teacher, 2, backend="native")


def test_operators_without_cuda_kernels_say_so(monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 0)

    monkeypatch.setattr(native, "why_not", lambda device: None)
    assert backends.choose("native", OnCuda()) == "native"
    with pytest.raises(RuntimeError, match="no native kernels for cuda tensors yet"):
        backends.choose("native", OnCuda(), native_on=("cpu",))


def test_every_operator_says_where_it_has_kernels():
    """The sources agree: a CUDA file where there are native kernels for CUDA, a Triton file where there are such."""
    for name, described in operator.OPERATORS.items():
        room = ROOT / "kdkernels" / "ops" / name
        assert (ROOT / "csrc" / "cpu" / f"{name}.cpp").exists() == ("cpu" in described.native)
        assert (ROOT / "csrc" / "cuda" / f"{name}.cu").exists() == ("cuda" in described.native)
        # LKD composes the Triton kernels of patches and congruence.
        assert (room / "triton.py").exists() == (described.triton and name != "local_correlation")
    assert {path.parent.name for path in ROOT.glob("kdkernels/ops/*/fake.py")} == set(operator.OPERATORS)


def child(*command: str, **environment: str) -> str:
    """Return the output of a new Python process, which must succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_importing_loads_no_library_and_no_compiler():
    """The first call that needs the native library loads it. Importing loads neither torch.compile's modules nor
    Triton.
    """
    script = (
        "import sys, kdkernels; print([m for m in sys.modules if m.split('.')[0] == 'triton' or m == 'torch._dynamo'])"
    )
    script += "; print('_native_cpu' in open('/proc/self/maps').read())"
    assert child("-c", script).split("\n")[:2] == ["[]", "False"]


def test_another_process_loads_an_exported_program(tmp_path):
    class Loss(torch.nn.Module):
        def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            return kdkernels.local_correlation_loss(student, teacher, 2, reduction="mean")

    maps, path = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64), tmp_path / "loss.pt2"
    with torch.no_grad():
        batches = {0: torch.export.Dim("batch")}
        torch.export.save(torch.export.export(Loss(), (*maps,), dynamic_shapes=(batches, batches)), path)
    torch.save(maps[:, :3].clone(), tmp_path / "maps.pt")
    script = f"""
import kdkernels, torch
kdkernels.load_operators()
print(torch.export.load({str(path)!r}).module()(*torch.load({str(tmp_path / "maps.pt")!r})).item())
"""
    assert float(child("-c", script)) == pytest.approx(Loss()(*maps[:, :3]).item(), rel=1e-12)


def test_a_library_that_does_not_load_is_explained(tmp_path):
    """If a file is not a library, or has no operators, "auto" still computes, and "native" says what is wrong."""
    script = f"""
import pathlib, torch, kdkernels
from kdkernels import native
folder = native._FOLDER = pathlib.Path({str(tmp_path)!r})
x = torch.randn(2, 3, 4, 4)
for content in (None, b"not a library", pathlib.Path(torch._C.__file__).read_bytes()):
    native._load.cache_clear()
    if content:
        native.cpu_library().write_bytes(content)
    kdkernels.local_correlation_loss(x, x, 2)
    try:
        kdkernels.local_correlation_loss(x, x, 2, backend="native")
    except RuntimeError as error:
        print(error)
"""
    first, second, third, *_ = child("-c", script).split("\n")
    assert "not built" in first
    assert "does not load" in second
    assert "built from other sources" in third


def test_a_library_whose_operators_take_other_arguments_is_explained(tmp_path):
    """This happens after an update of the sources without a build."""
    script = f"""
import pathlib, torch
from torch import library
from kdkernels import native
native._FOLDER = pathlib.Path({str(tmp_path)!r})
native.cpu_library().write_bytes(pathlib.Path(torch._C.__file__).read_bytes())  # any library that loads
operators = library.Library("kdkernels", "DEF")
operators.define("kd(Tensor student, Tensor teacher) -> Tensor")
print(native.why_not(torch.device("cpu")))
"""
    reason = child("-c", script)
    assert re.search(
        r"other sources.*build it again.*it declares kdkernels::kd\(Tensor student, Tensor teacher\) -> Tensor", reason
    )


# The native library ---------------------------------------------------------------------------------------------------


OPERATORS = ("patches", "patches_backward", "congruence", "local_correlation", "local_correlation_backward")


@pytest.mark.parametrize(
    "allow",
    [
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    ],
    ids=["high", "medium", "allow_tf32", "fp32_precision"],
)
def test_tf32_by_whichever_of_pytorchs_settings(allow):
    """Compiled code follows a change of the setting too."""
    compiled = torch.compile(lambda x: x + native.allows_tf32(), backend="eager", fullgraph=True)
    zero = torch.zeros(())
    assert not native.allows_tf32()
    assert compiled(zero) == 0
    try:
        allow()
        assert native.allows_tf32()
        assert compiled(zero) == 1
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not native.allows_tf32()


@pytest.mark.slow
@needs_native
@needs_every_library
@pytest.mark.parametrize(("level", "amx"), [("avx512", "1"), ("avx512", "0"), ("avx2", "1"), ("default", "1")])
def test_every_instruction_set(level, amx):
    """The library of each instruction set is built, chosen as PyTorch chooses its own, and computes right results."""
    if level == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    script = "from kdkernels import native; print(native.cpu_library().name, native.cpu_library().exists())"
    chosen = child("-c", script, ATEN_CPU_CAPABILITY=level).split()
    assert chosen == [f"_native_cpu_{level}.so", "True"]
    files = ("contracts", "local_correlation", "patches", "congruence", "icc")
    which = (
        "native and not (logit_mse or pkt or attention_transfer) and (test_dtypes or test_sizes or not_a_number"
        " or random_problems or test_shapes or half_precision or test_mask or test_many_rows or confident"
        " or matches_the_definition)"
    )
    report = child(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/test_{name}.py" for name in files),
        "-k",
        which,
        ATEN_CPU_CAPABILITY=level,
        KDKERNELS_AMX=amx,
    )
    assert " passed" in report
    assert "skipped" not in report


def test_offsets_beyond_32_bits(backend, tmp_path):
    """Images are more than 2³¹ elements apart, in a sparse file that contains only them."""
    apart = 2**31 + 64
    storage = torch.from_file(str(tmp_path / "features"), shared=True, size=apart + 4 * 4 * 4, dtype=torch.float32)
    student, teacher = storage.as_strided((2, 4, 4, 4), (apart, 16, 4, 1)), torch.randn(2, 5, 4, 4)
    student.copy_(torch.randn(2, 4, 4, 4))
    near, far = (
        loss_and_gradients(
            lambda s: local_correlation_loss(s, teacher, 2, backend=backend), s.detach().requires_grad_()
        )
        for s in (student.contiguous(), student)
    )
    assert_close(far[0], near[0])
    assert_close(far[1][0], near[1][0])


# What explain says ----------------------------------------------------------------------------------------------------


def test_explain_knows_every_function_that_has_backends():
    logits, maps, labels = torch.randn(3, 4), torch.randn(3, 4, 6, 6), torch.tensor([0, 3, 1])
    arguments = {
        "attention_transfer_loss": (maps, maps),
        "cross_layer_mse": ([[maps]], [[maps]], torch.ones(3, 1, 1)),
        "inter_class_correlation": (logits,),
        "local_correlation": (maps, 3),
        "local_correlation_loss": (maps, maps, 3),
        "similarity_matrices": ([maps],),
        "teacher_free_kd_loss": (logits, logits, labels),
        "channel_wise_loss": (maps, maps),
        "dkd_loss": (logits, logits, labels),
        "contrastive_relation_loss": (logits,) * 4,
        "token_relation_loss": (maps[..., 0], maps[..., 0]),
        "hint_loss": (maps, maps),
    }
    for name in kdkernels.functional.__all__:
        if "backend" in inspect.signature(getattr(kdkernels, name)).parameters:
            given = arguments.get(name, (logits, logits))
            assert f"{name}: reference backend" in str(kdkernels.explain(name, *given, backend="reference"))
            with pytest.raises((TypeError, ValueError), match="must "):
                kdkernels.explain(name, *(x[..., 0] if isinstance(x, torch.Tensor) else [] for x in given))


def test_explain_names_backend_form_and_costs():
    small, large = (torch.randn(2, 64, 8, 8), torch.randn(2, 32, 8, 8)), (torch.randn(256, 2, 8, 8),) * 2
    for (student, teacher), form in ((small, "gram"), (large, "feature")):
        student = student.clone().requires_grad_()
        told = str(kdkernels.explain("local_correlation_loss", student, teacher, 4, backend="reference"))
        assert "reference" in told
        assert form in told
        for candidate in ("gram", "feature"):
            assert candidate in told
        assert any(character.isdigit() for character in told)
    with pytest.raises(ValueError, match=r"name.*'no_such_loss'"):
        kdkernels.explain("no_such_loss", *small, 4)
    with pytest.raises(ValueError, match="batch"):
        kdkernels.explain("local_correlation_loss", small[0], large[0], 4)
