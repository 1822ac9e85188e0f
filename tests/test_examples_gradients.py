"""The measurement of gradients: norms, medians and what is said about them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("bench", "examples")]

import gradients  # noqa: E402
from common import data  # noqa: E402


def test_a_norm_by_hand() -> None:
    x, y, unused = (torch.nn.Parameter(torch.tensor(value)) for value in ([1.0, 2.0], [3.0], [4.0]))
    # The gradients are 2x = (2, 4) and 2y = 6: 4 + 16 + 36 = 56.
    assert gradients.norm(x.square().sum() + y.square().sum(), [x, y, unused]) == pytest.approx(56**0.5)


@pytest.mark.parametrize(
    ("weights", "start", "later", "said"),
    [
        ([0.001, 0.1], 100.0, 100.0, "yes"),
        ([0.001, 0.1], 100.0, 99.0, "in part"),
        ([0.003], 1.0, 2.0, "no"),
        ([400.0], 1.0, 0.5, "no"),
    ],
)
def test_a_range_moves_training_if_both_ends_do(weights: list[float], start: float, later: float, said: str) -> None:
    row = {"method": "LKD", "recipe": "paper", "reading": "sum over n² (Eq. 2)", "weights": weights}
    row["ratio for a weight of 1"] = {"start": start, "after one epoch": later}
    cells = gradients.table([row])["rows"][0]
    assert cells[2] == "**sum over n² (Eq. 2)**"
    (other,) = gradients.table([row | {"reading": "mean of each relation"}])["rows"]
    assert other[2] == "mean of each relation"
    assert cells[-1] == said


@pytest.mark.parametrize("method", gradients.METHODS)
def test_a_ratio_is_linear_in_what_the_reading_scales(tmp_path: Path, method: str) -> None:
    """A sum over n² and a mean differ by the factor that their names promise, to KD's same gradient."""
    dataset = data.load("digits").only(0.1)
    study = gradients.experiment(method, "demo", dataset, tmp_path, epochs=1)
    recipe = study.recipe
    teacher = (
        study.embedder(recipe.teacher)
        if method == "CCKD"
        else study.network(getattr(recipe, "teacher", None) or recipe.strong)
    )
    teacher.requires_grad_(False).eval()
    batches = list(dataset.batches(16, 0, study.device).epoch(0))[:2]
    found = {}
    for reduction in ("sum", {"LKD": "batchmean"}.get(method, "mean")):
        study.recipe = gradients.replace(recipe, reduction=reduction)
        found[reduction] = gradients.ratios(method, study, teacher, batches, None)
    large, small = found.values()
    factor = {"LKD": 16**2, "CCKD": 16**2, "ICCT": 10, "SemCKD": 16 * 4}[method]  # n², n², K, b·s_L
    assert large / small == pytest.approx(factor, rel=1e-3)
