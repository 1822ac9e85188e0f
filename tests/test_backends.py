"""Which backend runs a call, and what holds for the native library as a whole."""

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
from helpers import assert_close, loss_and_gradients, needs_every_library
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels
from kdkernels import backends, local_correlation_loss, native, use_backend
from kdkernels.ops.congruence import congruence
from kdkernels.ops.patches import patches

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(native.why_not(CPU) is not None, reason=str(native.why_not(CPU)))


def maps() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, 4, 4), torch.randn(3, 5, 4, 4)


class NativeCalls(TorchDispatchMode):
    """The native operators called in a block, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "kdkernels":
            self.calls.append((function._opname, args))
        return function(*args, **(kwargs or {}))


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
    with NativeCalls() as log:
        local_correlation_loss(*maps(), 2)
    assert [name for name, _ in log.calls] == ["local_correlation"]  # one call for everything
    with NativeCalls() as log, use_backend("reference"):
        local_correlation_loss(*maps(), 2)
        patches(maps()[0], 2)
        congruence(torch.randn(4, 3), torch.randn(4, 3))
    assert not log.calls
    with NativeCalls() as log, use_backend("reference"), use_backend("native"):
        local_correlation_loss(*maps(), 2)
    assert log.calls
    with NativeCalls() as log, use_backend("reference"):
        local_correlation_loss(*maps(), 2, backend="native")
    assert log.calls  # a call that names its backend gets it


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
    """Shapes can be inferred without data; only the reference runs there."""
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


def test_every_operator_with_cuda_kernels_is_known():
    """Where there is a CUDA source, no room says that there is none."""
    rooms = ROOT / "kdkernels" / "ops"
    on_cuda = {path.stem for path in ROOT.glob("csrc/cuda/*.cu")}
    for room in rooms.glob("*/__init__.py"):
        text = room.read_text()
        if "native.ops." in text:
            assert ('native_on=("cpu",)' in text) == (room.parent.name not in on_cuda), room


def child(*command: str, **environment: str) -> str:
    """What a fresh Python process prints; it must succeed."""
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
    """The native library is loaded by the first call that wants it; torch.compile's machinery and Triton not at all."""
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
    """A file that is no library, or lacks the operators: "auto" computes all the same, "native" says what is wrong."""
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
    """As after an update of the sources without a build."""
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
    assert re.search(r"other sources.*build it again.*kd has the arguments \['student', 'teacher'\]", reason)


# The native library ---------------------------------------------------------------------------------------------------


def operator_arguments() -> dict[str, list[tuple]]:
    """Arguments for every native operator but those of logits, which have their own tests."""
    features, mask = torch.randn(3, 4, 6, 6), torch.rand(3, 6, 6)
    layouts = [
        features,
        features.to(memory_format=torch.channels_last),
        torch.randn(6, 3, 4, 6).permute(1, 2, 0, 3),
        torch.randn(3, 8, 6, 6)[:, ::2],
        torch.randn(1, 4, 1, 6).expand(3, 4, 6, 6),
        torch.randn(3, 1, 6, 6).to(memory_format=torch.channels_last),
        torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last),
    ]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    packed, unpacked, losses, gradients = [], [], [], []
    for i, maps in enumerate(layouts):
        maps = maps.to(dtypes[i % 4])
        own_mask, threshold = ((None, None), (mask[: len(maps)], 0.5))[i % 2]
        resize = i % 3 == 1
        k = [4, 5] if resize else [2, 3]
        packed.append((maps, k[0], own_mask, threshold, resize, 1e-8))
        rows, norms = native.ops.patches(*packed[-1])
        unpacked.append(
            (torch.randn_like(rows), rows, norms, native.map_shape(maps), k[0], own_mask, threshold, resize)
        )
        other = torch.randn(len(maps), 2, 6, 3)
        masks = [] if own_mask is None else [own_mask, own_mask]
        wanted = [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]][i % 3]
        settings = (masks, k, [1.0, 0.5, 2.0], resize, [0, 7, 0] * 2, threshold, resize, 1e-8)
        stages = [maps, maps], [torch.randn(len(maps), 2, 6, 2), other]
        losses.append((*stages, *settings, wanted))
        _, of_rows = native.ops.local_correlation(*losses[-1])
        shapes = [number for stage in (*stages[0], *stages[1]) for number in native.map_shape(stage)]
        gradients.append((torch.ones((), dtype=of_rows[0].dtype), of_rows, shapes, masks, k, threshold, resize))
    x, y = torch.randn(12, 5), torch.randn(4, 12).T
    congruences = [
        (x, y, 3, [1.0, 0.5, 2.0, 0.3], [0, 7, 0], *wanted) for wanted in ((True, True), (True, False), (False, False))
    ]
    return {
        "patches": packed,
        "patches_backward": unpacked,
        "congruence": congruences,
        "local_correlation": losses,
        "local_correlation_backward": gradients,
    }


OPERATORS = ("patches", "patches_backward", "congruence", "local_correlation", "local_correlation_backward")


@needs_native
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    for arguments in operator_arguments()[name]:
        library.opcheck(getattr(native.ops, name).default, arguments)


@needs_native
def test_every_operator_is_checked():
    declared = {s.name.removeprefix("kdkernels::") for s in torch._C._jit_get_all_schemas() if "kdkernels::" in s.name}
    elsewhere = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert declared == {*OPERATORS, *re.findall(r"opcheck\(\s*native\.ops\.(\w+)\.default", elsewhere)}


@needs_native
def test_without_gradient_none_is_computed():
    """Validation under no_grad does not pay for a backward pass."""
    student, teacher = (x.requires_grad_() for x in maps())
    with NativeCalls() as log, torch.no_grad():
        local_correlation_loss(student, teacher, 2, backend="native")
    with NativeCalls() as of_detached:
        local_correlation_loss(student.detach(), teacher.detach(), 2, backend="native")
    for (_, arguments), (_, plain) in zip(log.calls, of_detached.calls, strict=True):
        assert list(arguments[-1]) == [0, 0]
        assert arguments[5] == plain[5]  # nor is the form chosen as if it were


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
    """Compiled code follows a change of the setting, too."""
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


@needs_native
@pytest.mark.parametrize("form", ["auto", "gram", "feature"])
def test_any_number_of_threads(form):
    """Work is shared out by sizes that fit no block: the result stays right, and bitwise the same from run to run."""
    student, teacher = torch.randn(13, 6, 9, 9, requires_grad=True), torch.randn(13, 40, 6, 6, requires_grad=True)
    settings = {"weights": (0.5, 2, 1), "form": form, "mask": torch.rand(13, 6, 6), "threshold": 0.7}

    def run(backend: str) -> tuple[Tensor, list[Tensor]]:
        return loss_and_gradients(
            lambda s, t: local_correlation_loss(s, t, 3, backend=backend, **settings), student, teacher
        )

    expected, gradients = run("reference")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7, 20):
            torch.set_num_threads(count)
            (loss, of_native), (again, once_more) = run("native"), run("native")
            assert torch.equal(loss, again)
            assert all(torch.equal(a, b) for a, b in zip(of_native, once_more, strict=True))
            assert_close(loss, expected, "loss")
            for gradient, correct in zip(of_native, gradients, strict=True):
                assert_close(gradient, correct, "gradient")
    finally:
        torch.set_num_threads(threads)


@needs_native
@needs_every_library
@pytest.mark.parametrize(("level", "amx"), [("avx512", "1"), ("avx512", "0"), ("avx2", "1"), ("default", "1")])
def test_every_instruction_set(level, amx):
    """The library of each: built, chosen as PyTorch chooses its own, and right."""
    if level == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    script = "from kdkernels import native; print(native.cpu_library().name, native.cpu_library().exists())"
    chosen = child("-c", script, ATEN_CPU_CAPABILITY=level).split()
    assert chosen == [f"_native_cpu_{level}.so", "True"]
    tests = ["tests/test_local_correlation.py", "tests/test_patches.py", "tests/test_congruence.py"]
    which = "native and (random_problems or test_shapes or half_precision or test_mask or test_many_rows)"
    report = child(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        which,
        ATEN_CPU_CAPABILITY=level,
        KDKERNELS_AMX=amx,
    )
    assert " passed" in report
    assert "skipped" not in report


def test_offsets_beyond_32_bits(backend, tmp_path):
    """Images more than 2³¹ elements apart, in a sparse file of which only they exist."""
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
        "cross_layer_mse": ([[maps]], [[maps]], torch.ones(3, 1, 1)),
        "inter_class_correlation": (logits,),
        "local_correlation": (maps, 3),
        "local_correlation_loss": (maps, maps, 3),
        "similarity_matrices": ([maps],),
        "teacher_free_kd_loss": (logits, logits, labels),
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
