"""The example of token relations: networks, objective, and whole small runs, with and without interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_tokens  # noqa: E402
from common import data, training  # noqa: E402
from common.networks.vit import VITS, vit  # noqa: E402
from example_runs import assert_same_checkpoints  # noqa: E402

SMALL = ["--epochs", "2", "--teacher-epochs", "1", "--seeds", "2", "--share", "0.2", "--teacher", "vit-tiny"]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("shape", "positions"), [((1, 8, 8), 16), ((1, 28, 28), 49), ((3, 32, 32), 64)])
def test_transformers_return_the_tokens_of_every_block(name, shape, positions):
    width, depth, _ = VITS[name]
    logits, layers = vit(name, shape, 10)(torch.randn(2, *shape))
    assert logits.shape == (2, 10)
    assert [tuple(layer.shape) for layer in layers] == [(2, positions, width)] * depth


@pytest.mark.parametrize("name", train_tokens.METHODS)
def test_the_objective(name, tmp_path):
    arguments = train_tokens.build_parser().parse_args(["--out", str(tmp_path)])
    settings = train_tokens.recipe_of(arguments)
    dataset = data.load("digits")
    experiment = train_tokens.TokenRelations(arguments, settings, dataset)
    student, teacher = (vit(name, dataset.shape, 10) for name in ("vit-tiny", "vit-small"))
    images, labels = dataset.normalise(dataset.train.pixels[:8]), dataset.train.labels[:8]
    losses = experiment.student_loss(name, student, teacher)(images, labels)
    (own, tokens), (theirs, targets) = student(images), teacher(images)
    expected = F.cross_entropy(own, labels)
    if name != "CE":
        t = settings.temperature
        kd = t**2 * F.kl_div((own / t).log_softmax(1), (theirs / t).softmax(1), reduction="batchmean")
        expected = (1 - settings.alpha) * expected + settings.alpha * kd
    s, r = (u @ u.mT for u in (F.normalize(x[-1], dim=2) for x in (tokens, targets)))
    if name == "KD + MSE":
        expected = expected + settings.mse * (s - r).square().mean()
    if name == "KD + hinge":
        expected = expected + settings.hinge * ((s - r).abs() - settings.margin).relu().mean()
    if name == "KD + KL":
        p, q = ((x / settings.relation_temperature).log_softmax(2) for x in (s, r))
        expected = expected + settings.kl * (q.exp() * (q - p)).sum(2).mean()
    torch.testing.assert_close(losses["loss"], expected)


def test_a_run_and_its_continuation(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_tokens.main([*SMALL, "--out", str(whole)])
    content = json.loads((whole / "results.json").read_text())
    assert content["test_accuracy"].keys() == {"teacher", *train_tokens.METHODS}
    differences = content["mean difference of token similarities to the teacher's"]
    assert differences["teacher"] == 0 < differences["student, before"]
    assert {path.name for path in (whole / "figures").iterdir()} == {"curves.png", "tokens.png"}
    assert "| KD + MSE" in capsys.readouterr().out
    history = training.read(whole / "checkpoints" / "kd+mse-seed0.pt")["history"]
    assert history[-1]["relation"] > 0
    train_tokens.main([*SMALL, "--out", str(parts), "--methods", "CE", "KD + MSE"])
    train_tokens.main([*SMALL, "--out", str(parts)])
    assert_same_checkpoints(parts, whole, [path.stem for path in (whole / "checkpoints").glob("*.pt")])
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
