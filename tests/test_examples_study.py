"""The studies: equal trials, a test set that is looked at once, runs that go on, and differences that are paired."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("bench", "examples")]

import large_batch  # noqa: E402
import study  # noqa: E402
from common import networks  # noqa: E402
from example_runs import write_fashion_mnist  # noqa: E402

EVERY = [*study.SHARED, *(variant for method in study.STUDIES.values() for variant in study.variants(method))]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "studies")
    monkeypatch.setattr(study, "FIGURES", tmp_path / "figures")


def invented(variant: str, share: float, settings: dict, seed: int) -> float:
    """Return an accuracy that depends on what a run is, and on nothing else."""
    return 50 + torch.tensor([hash((variant, share, str(settings), seed)) % 1000]).item() / 100


@pytest.fixture
def conducted(monkeypatch: pytest.MonkeyPatch) -> list[study.Run]:
    """Every run that is trained, which takes no time here."""
    runs = []

    def conduct(_: object, run: study.Run) -> study.Run:
        runs.append(run)
        return run | {"accuracy": invented(run["variant"], run["share"], run["settings"], run["seed"])}

    monkeypatch.setattr(study, "conduct", conduct)
    monkeypatch.setattr(study, "load", lambda root: None)
    return runs


@pytest.mark.parametrize("variant", EVERY)
def test_every_method_has_eight_trials(variant: str) -> None:
    kd = {"temperature": 4.0, "kd": 0.9}
    tried = study.trials(variant, kd)
    assert len(tried) == len({str(settings) for settings in tried}) == 8
    assert all(kd.items() <= settings.items() for settings in tried) == variant.startswith("KD + ")


def test_a_study_trains_what_is_missing_and_nothing_twice(conducted: list[study.Run]) -> None:
    study.main(["--method", "lkd", "--shares", "0.05", "--seeds", "2"])
    variants = [*study.SHARED, "LKD", "KD + LKD"]
    assert len(conducted) == len(variants) * (8 + 2)
    for variant in variants:
        own = [run for run in conducted if run["variant"] == variant]
        assert [run["phase"] for run in own] == 8 * ["trial"] + 2 * ["final"]
        best = max(own[:8], key=lambda run: invented(variant, 0.05, run["settings"], run["seed"]))
        assert [(run["settings"], run["seed"]) for run in own[8:]] == [(best["settings"], seed) for seed in (0, 1)]
        assert best["seed"] not in (0, 1)
    count = len(conducted)
    study.main(["--method", "lkd", "--shares", "0.05", "--seeds", "3"])
    assert [run["seed"] for run in conducted[count:]] == [2] * len(variants)
    count = len(conducted)
    study.main(["--method", "icct", "--shares", "0.05", "--seeds", "3"])
    assert {run["variant"] for run in conducted[count:]} == {"ICCT", "KD + ICCT"}


def test_no_run_starts_after_the_minutes(conducted: list[study.Run], capsys: pytest.CaptureFixture[str]) -> None:
    study.main(["--shares", "0.01", "--minutes", "0"])
    assert not conducted
    assert "goes on from here" in capsys.readouterr().out


def test_tables_pair_the_seeds(conducted: list[study.Run]) -> None:
    study.main(["--method", "cckd", "--shares", "0.2", "--seeds", "4"])
    content = json.loads((study.RESULTS / "cckd.json").read_text())
    rows = {row[1]: row for row in content["tables"][0]["rows"]}
    assert list(rows) == [*study.SHARED, "CCKD", "KD + CCKD"]
    kd, own = (study.finals(variant, 0.2) for variant in ("KD", "KD + CCKD"))
    expected = study.compare([own[seed] for seed in range(4)], [kd[seed] for seed in range(4)])
    assert rows["KD + CCKD"][4:] == [str(expected), f"{expected.p:.2g}"]
    assert rows["KD"][2:3] + rows["KD"][4:] == ["4", "", ""]
    assert (study.FIGURES / "cckd.svg").exists()


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
@pytest.mark.parametrize("variant", EVERY)
def test_a_student_of_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """It learns from its share only, is measured on held-out images in a trial and on test images at the end."""
    write_fashion_mnist(tmp_path, {"train": 200, "t10k": 30})
    monkeypatch.setattr(study, "TRAIN", 140)
    monkeypatch.setattr(study, "HELD_OUT", 40)
    monkeypatch.setattr(study, "STEPS", {1.0: 2})
    monkeypatch.setattr(study, "teacher_of", lambda dataset: networks.build(study.TEACHER, 1, 10).eval())
    world = study.load(tmp_path)
    assert (len(world.dataset.train), len(world.dataset.test), len(world.test)) == (140, 40, 30)
    assert world.dataset.shape == (1, 16, 16)
    settings = study.trials(variant, {"temperature": 4.0, "kd": 0.9})[0]
    run = {"variant": variant, "share": 1.0, "settings": settings, "seed": 0}
    measured = []
    monkeypatch.setattr(study, "accuracy", lambda network, dataset: measured.append(len(dataset.test)) or 1.0)
    for phase in ("trial", "final"):
        study.conduct(world, run | {"phase": phase})
    assert measured == [40, 30]
    first, second = (study.train(world, variant, 1.0, settings, 3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", study.TRANSFERS)
def test_fused_and_textbook_losses_that_are_measured_agree(method: str) -> None:
    values = []
    for loss in (study.fused, study.textbook):
        student, own, theirs = study.inputs(method)
        value = loss(student, own, theirs)
        value.backward()
        leaves = [own.logits, own.embedding, *own.stages]
        values.append([value, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(values[0]) == len(values[1]) > 1
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_cost_stands_below_the_table(conducted: list[study.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"date": "2026-11-29T00:00", "seconds": {"fused": 1e-3, "textbook": 4e-3}}
    measured["peak extra bytes"] = {"fused": 2**20, "textbook": 2**23}
    monkeypatch.setattr(study, "cost", lambda method, origin: measured)
    study.main(["--method", "icct", "--cost"])
    assert not conducted
    content = json.loads((study.RESULTS / "icct.json").read_text())
    assert content["tables"][1]["rows"] == [["fused", "1.00", "1.00"], ["textbook", "4.00", "8.00"]]


# The batch that only fused code holds -------------------------------------------------------------------------------


def test_pieces_of_a_batch_are_compared_one_by_one() -> None:
    student, teacher = torch.randn(8, 3, 16, 16), torch.randn(8, 5, 16, 16)
    pieces = [large_batch.relation(s, t, 1) for s, t in zip(student.split(2), teacher.split(2), strict=True)]
    torch.testing.assert_close(large_batch.relation(student, teacher, 4), torch.stack(pieces).mean())
    torch.testing.assert_close(large_batch.relation(student, teacher, 1), large_batch.textbook(student, teacher))


def test_large_batches_have_equal_trials_and_paired_finals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[study.Run] = []

    def conduct(_: object, run: study.Run) -> study.Run:
        trained.append(run)
        return run | {"accuracy": invented(run["variant"], 1.0, run["settings"], run["seed"])}

    monkeypatch.setattr(large_batch, "FILE", tmp_path / "large-batch.json")
    monkeypatch.setattr(large_batch, "conduct", conduct)
    monkeypatch.setattr(large_batch, "memory", lambda: {"small": 2**30, "large": 2**30})
    monkeypatch.setattr(study, "load", lambda root: None)
    large_batch.main(["--seeds", "3", "--minutes", "0"])
    assert not trained
    for _ in range(2):
        large_batch.main(["--seeds", "3"])
        assert len(trained) == 3 * (4 + 3)
    kd = [run for run in trained if run["variant"] == "KD" and run["phase"] == "final"]
    for run in trained:
        assert run["variant"] == "KD" or kd[0]["settings"].items() <= run["settings"].items()
    content = json.loads(large_batch.FILE.read_text())
    accuracy, cost = content["tables"]
    assert [row[1] for row in accuracy["rows"]] == ["3"] * 3
    assert cost["rows"][2][1] == "4,096"
