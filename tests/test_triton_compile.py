"""Every Triton kernel compiles without a device for all supported GPUs. It spills nothing, fits, and uses tensor cores.

The operators are called on CPU tensors, so that the launchers specialise the kernels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1 is set: there is nothing to compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import kdkernels  # noqa: E402
import kdkernels.ops.congruence.library  # noqa: E402
import kdkernels.ops.correlation_congruence.library  # noqa: E402
import kdkernels.ops.similarity_preserving.library  # noqa: E402
from kdkernels import backends  # noqa: E402
from kdkernels.ops import library  # noqa: E402
from kdkernels.ops.shapes import map_shape  # noqa: E402
from kdkernels.types import COMPARISONS  # noqa: E402

ROOMS = [
    import_module(f"kdkernels.ops.{path.parent.name}.triton")
    for path in Path(kdkernels.__file__).parent.glob("ops/*/triton.py")
]
ROOMS.append(import_module("kdkernels.ops.planes"))
ops = torch.ops.kdkernels_triton
ICC_KERNELS = {
    "_sums_kernel",
    "_map_kernel",
    "_compare_kernel",
    "_means_kernel",
    "_pull_back_kernel",
    "_samples_kernel",
    "_samples_backward_kernel",
}
GRAM_KERNELS = {"_gram_kernel", "_fold_parts_kernel", "_gram_backward_kernel"}
DIST_KERNELS = {"_rows_kernel", "_columns_kernel", "_gradient_kernel"}
SP_KERNELS = {"_rows_kernel", "_slopes_kernel"}
LIBRARY_KERNELS = {"_chain_kernel", "_strip_kernel", "_strips_kernel"}
RKD_KERNELS = {"_squares_kernel", "_angles_kernel", "_sides_kernel"}
DIVERGENCE_KERNELS = {"_divergence_kernel", "_divergence_backward_kernel"}
TOP_K_KERNELS = {"_top_k_kernel", "_top_k_backward_kernel"}
TOKEN_KERNELS = {"_log_sums_kernel", "_compare_kernel"}
FEATURE_MSE_KERNELS = {"_errors_kernel", "_gradient_kernel"}
KERNELS = {
    *ICC_KERNELS,
    *TOKEN_KERNELS,
    *GRAM_KERNELS,
    *FEATURE_MSE_KERNELS,
    *SP_KERNELS,
    *LIBRARY_KERNELS,
    "_kd_kernel",
    "_dkd_kernel",
    *DIST_KERNELS,
    *DIVERGENCE_KERNELS,
    *TOP_K_KERNELS,
    *RKD_KERNELS,
    "_bounds_kernel",
    "_pack_kernel",
    "_project_kernel",
    "_resample_backward_kernel",
    "_product_kernel",
    "_fold_kernel",
    "_diagonal_kernel",
    "_kernels_kernel",
}
# The limit of a block's shared memory, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
Stage = Callable[[object, dict], object]
# ptxas sometimes stores one or two registers around a loop. This costs nothing visible, and cannot be predicted.
SPILL_BYTES = 8


class Driver(NamedTuple):
    """The driver functions that a launch calls before the kernel is compiled."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"none, for {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def marks(target: str, rare: bool = False) -> list[pytest.MarkDecorator]:
    """A kernel that compiles for one target nearly always compiles for the others, so the other targets are
    slow tests.
    """
    return [] if target == "sm_90" and not rare else [pytest.mark.slow]


def in_dtypes(*everywhere: torch.dtype, once: tuple[torch.dtype, ...] = ()) -> pytest.MarkDecorator:
    """Return test parameters: some dtypes on every target, others on one target per vendor."""
    cases = [(name, dtype) for dtype in everywhere for name in TARGETS]
    cases += [(name, dtype) for dtype in once for name in ("sm_90", "gfx942")]
    params = [
        pytest.param(TARGETS[name], dtype, id=f"{name}-{dtype}".replace("torch.", ""), marks=marks(name, dtype in once))
        for name, dtype in cases
    ]
    return pytest.mark.parametrize(("target", "dtype"), params, indirect=["target"])


@pytest.fixture(params=[pytest.param(target, id=name, marks=marks(name)) for name, target in TARGETS.items()])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> GPUTarget:
    monkeypatch.setattr(torch.version, "hip", "6.4" if request.param.backend == "hip" else None)
    return request.param


def report_of_ptxas(_: object = None, stages: dict[str, Stage] | None = None, *__: object) -> tuple[str, str]:
    """Keep ptxas's report on a kernel in place of its machine code.

    Triton calls this with the stages of its pipeline to change them, and without stages for a cache key.
    """
    if stages and "cubin" in stages:
        assemble = stages["cubin"]

        def report(source: str, metadata: dict) -> bytes:
            with redirect_stdout(io.StringIO()) as log:
                assemble(source, metadata)
            return log.getvalue().encode()

        stages["cubin"] = report
    return "report of ptxas", "report of ptxas"


def front_end(_: object = None, stages: dict[str, Stage] | None = None, *__: object) -> tuple[str, str]:
    """Leave out every stage except the first, which compiles Python to Triton's intermediate language."""

    def nothing(source: object, metadata: dict) -> str:
        metadata.update(name="", shared=0)
        return ""

    for name in list(stages or ())[1:]:
        stages[name] = nothing
    return "front end", "front end"


@pytest.fixture
def compiled(target: GPUTarget, monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """Return the compiled kernels at their launches."""
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", report_of_ptxas)
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", Driver(target))
    return kernels


@pytest.fixture
def permit_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def names(kernels: list[CompiledKernel]) -> set[str]:
    return {kernel.src.name for kernel in kernels}


def distinct(kernels: list[CompiledKernel]) -> list[CompiledKernel]:
    return list({kernel.hash: kernel for kernel in kernels}.values())


def spilled_bytes(kernel: CompiledKernel) -> int:
    if "amdgcn" in kernel.asm:
        return 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    found = re.findall(r"(\d+) bytes spill stores", kernel.asm["cubin"].decode())
    assert found, "ptxas says nothing of spills"
    return sum(map(int, found))


def check(kernels: list[CompiledKernel], target: GPUTarget, expected: set[str]) -> None:
    assert names(kernels) == expected
    for kernel in distinct(kernels):
        assert kernel.metadata.shared <= SHARED_MEMORY[target.arch], (kernel.src.name, kernel.metadata)
        assert spilled_bytes(kernel) <= SPILL_BYTES, (kernel.src.name, kernel.metadata)


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_kd(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    logits = torch.zeros(8, 1000, dtype=dtype)
    ops.kd(logits, logits, 4.0, 16.0, True, True)
    check(compiled, target, {"_kd_kernel"})


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_dkd(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    logits = torch.zeros(8, 1000, dtype=dtype)
    ops.dkd(logits, logits, torch.zeros(8, dtype=torch.int64), 1.0, 8.0, 4.0, 0, -100, True, True)
    check(compiled, target, {"_dkd_kernel"})


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_dist(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    logits = torch.zeros(8, 1000, dtype=dtype)
    ops.dist(logits, logits, torch.ones(8, dtype=torch.bool), 1.0, 1.0, 1.0, True, True)
    check(compiled, target, DIST_KERNELS)


def diverge(logits: torch.Tensor, kind: int, standardize: bool) -> None:
    ones = torch.ones(logits.shape[:2])
    losses, saved = ops.divergence(logits, logits, ones, kind, 0.5, standardize, True)
    wanted = True, True, True
    ops.divergence_backward(losses, logits, logits, ones, saved, kind, 0.5, standardize, True, *wanted)


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
@pytest.mark.parametrize(("kind", "standardize"), [(0, False), (2, True)])
def test_divergence(
    compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype, kind: int, standardize: bool
) -> None:
    diverge(torch.zeros(2, 4, 32000, dtype=dtype), kind, standardize)
    check(compiled, target, DIVERGENCE_KERNELS)


def choose(logits: torch.Tensor, count: int) -> None:
    indices, ones = torch.arange(count).expand(len(logits), count), torch.ones(len(logits))
    exponents = ops.top_k(logits, indices, ones)
    ops.top_k_backward(exponents, logits, indices, ones, True, True)


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_top_k(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    choose(torch.zeros(8, 32000, dtype=dtype), 64)
    check(compiled, target, TOP_K_KERNELS)


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_rkd(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    rows = torch.zeros(64, 128, dtype=dtype)
    ops.rkd(rows, rows, 25.0, 50.0, True, True)
    check(compiled, target, RKD_KERNELS)


@in_dtypes(torch.float32, once=(torch.float64,))
def test_icc(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    logits = torch.zeros(64, 100, dtype=dtype)
    correlate(logits)
    check(compiled, target, ICC_KERNELS)


def correlate(logits: torch.Tensor) -> None:
    ops.icc_map_backward(ops.icc_map(logits), logits)
    for per_sample in (False, True):
        ops.icc_loss(logits, logits, per_sample, 1.0, True, True)


@in_dtypes(torch.float32, torch.bfloat16, once=(torch.float64,))
def test_gram(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    """The layers of VGG-8 and ResNet-32x4 have a constant stride, and one layer does not."""
    shapes = [(512, 4, 4), (128, 16, 16), (64, 32, 32)]
    layers = [torch.zeros(64, *shape, dtype=dtype) for shape in shapes]
    multiply(layers)
    multiply([layers[0], layers[1][:, :, :, 1:], layers[2].permute(0, 2, 3, 1)])
    check(compiled, target, GRAM_KERNELS)


@in_dtypes(torch.float16, once=(torch.bfloat16,))
def test_gram_beside_float64(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    multiply([torch.zeros(64, 512, dtype=dtype), torch.zeros(64, 512, dtype=torch.float64)])
    check(compiled, target, GRAM_KERNELS)


def multiply(layers: list[torch.Tensor]) -> None:
    ops.gram_backward(ops.gram(layers), layers)


@in_dtypes(torch.float32, once=(torch.float64,))
def test_similarity_preserving(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    x, y = torch.zeros(512, 128, dtype=dtype), torch.zeros(512, 64, dtype=dtype)
    ops.similarity_preserving(x, y, 1.0, False, True, True)
    ops.similarity_preserving(x, y, 1.0, True, True, False)
    others = {"_gram_kernel", "_fold_parts_kernel", "_gram_backward_kernel", "_product_kernel", "_fold_kernel"}
    check(compiled, target, {*SP_KERNELS, *others})


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_feature_mse(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    projected = [torch.zeros(64, c, h, h, dtype=dtype) for c, h in ((64, 16), (128, 16), (256, 16), (64, 4))]
    targets = [torch.zeros(64, c, h, h, dtype=dtype) for c, h in ((64, 32), (128, 16), (256, 8), (64, 32))]
    associate(projected, targets)
    if dtype == torch.float64:
        # Its division is a subroutine. ptxas stores registers around the calls, although most registers are free.
        assert names(compiled) == FEATURE_MSE_KERNELS
    else:
        check(compiled, target, FEATURE_MSE_KERNELS)


def associate(projected: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    weights = torch.zeros(projected[0].shape[0], 1, len(projected))
    loss, _ = ops.feature_mse(projected, targets, weights, 1.0)
    ops.feature_mse_backward(loss, projected, targets, weights, 1.0, [1] * 2 * len(projected))


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
def test_patches(compiled: list[CompiledKernel], target: GPUTarget, channels_last: bool) -> None:
    dtype = torch.bfloat16 if channels_last else torch.float32
    expected = {"_pack_kernel", "_project_kernel"}
    pack_and_back(torch.zeros(4, 16, 32, 32, dtype=dtype), 4, channels_last, None, None, False)
    pack_and_back(torch.zeros(4, 16, 8, 8, dtype=dtype), 2, channels_last, torch.zeros(4, 8, 8), None, False)
    check(compiled, target, expected)
    pack_and_back(torch.zeros(4, 64, 7, 7, dtype=dtype), 3, channels_last, torch.zeros(4, 7, 7), 0.5, True)
    check(compiled, target, {*expected, "_bounds_kernel", "_resample_backward_kernel"})


def pack_and_back(
    features: torch.Tensor, k: int, channels_last: bool, mask: object, threshold: object, resize: bool
) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    features = features.to(memory_format=memory_format)
    rows, norms = ops.patches(features, k, mask, threshold, resize, 1e-8)
    ops.patches_backward(rows, rows, norms, map_shape(features), k, mask, threshold, resize)


def compare(dtype: torch.dtype, feature: bool) -> None:
    """Compile all terms of a loss, with one gradient and with none."""
    x, y = torch.zeros(1024, 256, dtype=dtype), torch.zeros(1024, 64, dtype=dtype)
    for grad in (True, False):
        ops.congruence(x, y, 16, [1.0, 0.5, 0.5, 1.0], [7 * feature] * 3, grad, False)


@in_dtypes(torch.float32, once=(torch.float64,))
def test_congruence(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    compare(dtype, feature=False)
    check(compiled, target, {"_product_kernel"})
    compare(dtype, feature=True)
    check(compiled, target, {"_product_kernel", "_fold_kernel", "_diagonal_kernel"})
    assert not any("tf32" in code(kernel, target) for kernel in compiled), "float32 products must not be rounded"


def test_congruence_on_tensor_cores(compiled: list[CompiledKernel], target: GPUTarget, permit_tf32: None) -> None:
    compare(torch.float32, feature=False)
    compare(torch.float32, feature=True)
    check(compiled, target, {"_product_kernel", "_fold_kernel", "_diagonal_kernel"})
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(target.arch)
    if instruction:
        whole = [kernel for kernel in distinct(compiled) if kernel.metadata.shared >= 32 * 1024]
        assert whole
        assert all(instruction in code(kernel, target) for kernel in whole)


@in_dtypes(torch.float32, once=(torch.float64,))
def test_correlation_congruence(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype) -> None:
    x, y = torch.zeros(256, 128, dtype=dtype), torch.zeros(256, 64, dtype=dtype)
    for kernel in (0, 1, 3):
        for wanted in ((True, False), (True, True), (False, False)):
            ops.correlation_congruence(x, y, kernel, 0.4, 2, False, 1.0, [0] * 3, *wanted)
    check(compiled, target, {"_kernels_kernel", "_product_kernel"})


def test_correlation_congruence_on_tensor_cores(
    compiled: list[CompiledKernel], target: GPUTarget, permit_tf32: None
) -> None:
    x = torch.zeros(256, 128)
    for kernel in (0, 1):
        ops.correlation_congruence(x, x, kernel, 0.4, 2, False, 1.0, [0] * 3, True, True)
    check(compiled, target, {"_kernels_kernel", "_product_kernel"})
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(target.arch)
    comparisons = [kernel for kernel in distinct(compiled) if kernel.src.name == "_kernels_kernel"]
    assert not instruction or all(instruction in code(kernel, target) for kernel in comparisons)


@pytest.fixture
def strips_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend "library" process strips of CPU tensors by Triton, and multiply float32 in planes."""
    monkeypatch.setattr(backends, "_why_not_triton", lambda _: None)
    monkeypatch.setattr(library, "has_bfloat16_tensor_cores", lambda _: True)


def compare_by_library(x: torch.Tensor, y: torch.Tensor) -> None:
    by_library = torch.ops.kdkernels_library
    for wanted in ((True, False), (True, True), (False, False)):
        if x.dtype in (torch.float32, torch.float64):
            by_library.congruence(x, y, 1, [1.0, 0.5, 0.5, 1.0], [0] * 3, *wanted)
        by_library.similarity_preserving(x, y, 1.0, False, *wanted)
        for kernel in (0, 1, 2):
            by_library.correlation_congruence(x, y, kernel, 0.4, 2, True, 1.0, [0] * 3, *wanted)


@in_dtypes(torch.float32, once=(torch.float64, torch.bfloat16))
def test_library(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype, strips_by_triton: None) -> None:
    compare_by_library(torch.zeros(256, 32, dtype=dtype), torch.zeros(256, 16, dtype=dtype))
    expected = {torch.float32: LIBRARY_KERNELS, torch.float64: {"_strip_kernel", "_strips_kernel"}}
    expected = expected.get(dtype, {"_strips_kernel"}) | {"_rows_kernel"}
    if dtype == torch.float64 and target.arch == 90:
        assert names(compiled) == expected  # for sm_90, ptxas stores registers around the exponential
    else:
        check(compiled, target, expected)


def relate(x: torch.Tensor, y: torch.Tensor, comparison: int, clip: int, form: int, wanted: tuple[bool, bool]) -> None:
    numbers = 0.5, 0.5, 0.1
    ops.token_relation(x, y, None, comparison, clip, 1, False, False, True, True, form, *numbers, *wanted)


@in_dtypes(torch.float32, torch.bfloat16, once=(torch.float64,))
@pytest.mark.parametrize("comparison", [pytest.param("mse", marks=pytest.mark.slow), "kl"])
def test_token_relation(compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype, comparison: str) -> None:
    """Both gradients of a clipped comparison need the most registers."""
    x, y = torch.zeros(2, 256, 384, dtype=dtype), torch.zeros(2, 256, 1024, dtype=dtype)
    relate(x, y, COMPARISONS.index(comparison), 1, 0, (True, True))
    expected = TOKEN_KERNELS if comparison == "kl" else {"_compare_kernel"}
    if dtype == torch.float64:
        assert names(compiled) == expected  # ptxas stores registers around the calls of its exponential
    else:
        check(compiled, target, expected)
    if dtype == torch.float32:
        assert not any("tf32" in code(kernel, target) for kernel in compiled), "float32 products must not be rounded"
    instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(target.arch)
    if dtype == torch.bfloat16 and instruction:
        assert all(instruction in code(kernel, target) or "mma.sync" in code(kernel, target) for kernel in compiled)


@in_dtypes(once=(torch.float32, torch.bfloat16))
def test_token_relation_of_queries_and_keys(
    compiled: list[CompiledKernel], target: GPUTarget, dtype: torch.dtype
) -> None:
    """Some queries do not count."""
    queries, keys = torch.zeros(2, 64, 128, dtype=dtype), torch.zeros(2, 256, 128, dtype=dtype)
    masks = torch.ones(2, 64), None
    settings = 3, 0, 2, False, False, True, True, 0.5, 0.5, 0.0, True, True, True, True
    ops.token_relation_pairs(queries, keys, queries, keys, *masks, *settings)
    check(compiled, target, TOKEN_KERNELS)


@pytest.mark.parametrize("target", [TARGETS["sm_90"]], ids=["sm_90"], indirect=True)
def test_sizes_of_one(
    compiled: list[CompiledKernel], target: GPUTarget, monkeypatch: pytest.MonkeyPatch, strips_by_triton: None
) -> None:
    """Unlike interpreted kernels, compiled kernels treat an integer argument of 1 as a constant."""
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", front_end)
    for shape in ((1, 1, 1, 1), (3, 1, 1, 5), (1, 2, 5, 1)):
        maps, mask = torch.zeros(shape), torch.zeros(shape[0], *shape[2:])
        pack_and_back(maps, 1, False, None, None, False)
        pack_and_back(maps, 2, False, mask, 0.5, True)
        multiply([maps, torch.cat([maps, maps], 2)[:, :, 1:]])
        associate([maps, maps], [maps, maps[:, :, :1, :1]])
    multiply([torch.zeros(1, 100)])
    for x, y in ((torch.zeros(1, 1), torch.zeros(1, 3)), (torch.zeros(3, 1), torch.zeros(3, 1))):
        ops.kd(x, x, 4.0, 1.0, True, True)
        ops.dkd(x, x, torch.zeros(len(x), dtype=torch.int64), 1.0, 8.0, 4.0, 0, -100, True, True)
        ops.dist(x, x, None, 1.0, 1.0, 1.0, True, True)
        ops.rkd(x, x, 25.0, 50.0, True, True)
        diverge(x[None], 0, True)
        choose(x, 1)
        correlate(x)
        for feature in (False, True):
            ops.congruence(x, y, 1, [1.0, 0.5, 0.5, 1.0], [7 * feature] * 3, True, True)
            ops.congruence(x, y, 1, [1.0, 0.5, 0.5, 1.0], [7 * feature] * 3, False, False)
            ops.similarity_preserving(x, y, 1.0, feature, True, True)
        for kernel in (0, 1, 3):
            ops.correlation_congruence(x, y, kernel, 0.4, 1, False, 1.0, [0] * 3, True, True)
        compare_by_library(x, y)

        for comparison, form in ((0, 0), (0, 7), (1, 0), (2, 0)):
            relate(x[None], y[None], comparison, 0, form, (True, True))
    assert names(compiled) == KERNELS - {"_fold_kernel"}


def test_no_kernel_is_left_out() -> None:
    assert {name for room in ROOMS for name in vars(room) if name.endswith("_kernel")} == KERNELS


def code(kernel: CompiledKernel, target: GPUTarget) -> str:
    return kernel.asm["amdgcn" if target.backend == "hip" else "ptx"]
