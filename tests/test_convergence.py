"""Students of the fused kernels and of the references have the same losses, step by step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdkernels import backends

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "examples")]

import convergence  # noqa: E402
from common import data  # noqa: E402

STEPS = 3
FACTORS = {"LKD": "beta", "CCKD": "beta", "ICCT": "icct", "SemCKD": "beta"}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def losses(
    method: str, backend: str, seed: int, precision: torch.dtype, teacher: nn.Module, out: Path, factor: float = 1.0
) -> np.ndarray:
    """Return the losses of the first steps on batches of digits. The method's own term is multiplied by ``factor``."""
    dataset = data.load("digits")
    study = convergence.experiment(method, backend, out, replace(dataset, test=dataset.test[torch.arange(9)]))
    field = FACTORS[method]
    study.recipe = replace(study.recipe, **{field: factor * getattr(study.recipe, field)})
    return np.array(convergence.train(method, study, teacher, seed, precision, STEPS, 1)["loss"])


@pytest.mark.skipif(backends.why_not("native", torch.empty(0)) is not None, reason="the native library is not built")
@pytest.mark.parametrize("method", convergence.EXAMPLES)
def test_the_first_steps_agree(method: str, seed: int, tmp_path: Path) -> None:
    """They agree up to rounding. A term with another weight does not agree."""
    study = convergence.experiment(method, "reference", tmp_path, data.load("digits"))
    teacher = (study.embedder if method == "CCKD" else study.network)("resnet14-half").requires_grad_(False).eval()
    teacher.classifier.weight.mul_(10)  # as confident as a trained one

    def run(backend: str, precision: torch.dtype, number: int = seed, factor: float = 1.0) -> np.ndarray:
        return losses(method, backend, number, precision, teacher, tmp_path, factor)

    exact, fused = (run(backend, torch.float32) for backend in ("reference", "native"))
    half, fused_half = (run(backend, torch.bfloat16) for backend in ("reference", "native"))
    wrong, other = run("native", torch.float32, factor=1.1), run("reference", torch.float32, seed + 1)
    first, noise = slice(2), np.abs(other - exact).mean()
    np.testing.assert_allclose(fused[first], exact[first], rtol=1e-5)
    assert (np.abs(wrong - exact) > 1e-4 * exact)[first].any()  # the second step may agree by chance
    assert np.abs(fused - exact).mean() < 0.1 * noise
    assert np.abs(fused_half - half).mean() < 0.1 * noise


def test_a_nudge_is_a_unit_in_the_last_place() -> None:
    layer = nn.Linear(9, 9)
    before = layer.weight.detach().clone()
    convergence.nudge(layer)
    units = layer.weight.detach().view(torch.int32) - before.view(torch.int32)
    assert units.abs().unique().tolist() == [1]
    assert (layer.weight > before).all()


def test_distance_and_bias_are_measured_in_seeds() -> None:
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    own = random.normal(size=(40, 50)) + np.linspace(3, 1, 50)
    again = random.normal(size=(40, 50)) + np.linspace(3, 1, 50)
    apart = convergence.parity(own, again)
    assert apart["distance"] == pytest.approx(1, abs=0.1)
    assert abs(apart["bias"]) < 0.2
    assert convergence.parity(own, own) == {"distance": 0, "bias": 0}
    shifted = convergence.parity(own, own + 0.5)
    assert shifted["bias"] == pytest.approx(0.5, abs=0.05)
