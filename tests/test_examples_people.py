"""Persons and faces: official files, the protocols of the benchmarks, the losses, and whole small runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

for package in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_cckd  # noqa: E402
from common import data, heads, people, photographs, ranking  # noqa: E402
from example_runs import write_faces, write_image, write_market1501, write_msmt17  # noqa: E402

import kdkernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*where the official one holds")


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "WORKERS", 0)


# ----- files


@pytest.mark.parametrize("inner", ["", "Market-1501-v15.09.15"])
def test_market1501_is_read_by_names(tmp_path: Path, inner: str) -> None:
    write_market1501(tmp_path / inner)
    dataset = people.market1501(tmp_path)
    assert dataset.class_names == ("0001", "0003", "0005", "0007")
    assert dataset.train.labels.bincount().tolist() == [6] * 4
    assert dataset.test.labels.tolist() == [2, 2, 4, 4, 6, 6, 8, 8]
    assert dataset.test.cameras.tolist() == [1, 2] * 4
    assert dataset.gallery.labels.tolist()[:2] == [-1, 0]
    assert dataset.gallery.cameras.tolist()[:4] == [1, 2, 1, 1]
    assert len(dataset.gallery) == 2 + 4 * 2 * 2
    assert dataset.shape == (3, 256, 128)
    (pixels,) = dataset.pixels(dataset.test[2:3]).unique()
    assert abs(int(pixels) - 100) <= 2  # person 4, as a JPEG


@pytest.mark.parametrize("version", ["", "MSMT17_V1"])
def test_msmt17_is_read_by_its_lists(tmp_path: Path, version: str) -> None:
    write_msmt17(tmp_path / version)
    dataset = people.msmt17(tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert dataset.train.cameras.tolist() == [1, 2] * 6
    assert dataset.test.labels.tolist() == dataset.gallery.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all(path.is_file() for part in (dataset.train, dataset.test, dataset.gallery) for path in part.paths)


def test_faces_are_read_by_folders(tmp_path: Path) -> None:
    write_faces(tmp_path)
    dataset = people.faces(tmp_path)
    assert dataset.class_names == ("m.0", "m.1", "m.2")
    assert len(dataset.train) == len(dataset.test) == 9
    assert len(dataset.distractors) == len(set(dataset.distractors.paths)) == 12
    assert dataset.distractors.paths == people.faces(tmp_path).distractors.paths
    assert dataset.shape == (3, 112, 112)


@pytest.mark.parametrize(
    ("read", "write", "change", "message"),
    [
        (people.market1501, write_market1501, "rm query/*", "query holds no image"),
        (
            people.market1501,
            write_market1501,
            "mv query/0002_c1s1_000000_00.jpg query/two.jpg",
            "must have a name such",
        ),
        (people.market1501, write_market1501, "mv query/0002_c1s1_000000_00.jpg query/0000_c1s1_000000_00.jpg", "junk"),
        (people.market1501, write_market1501, "rm -r query", "query does not exist"),
        (people.msmt17, write_msmt17, "rm list_val.txt", r"list_val\.txt does not exist"),
        (people.msmt17, write_msmt17, "echo a.jpg 3 >list_val.txt", r"list_val\.txt must hold lines .* in line 1"),
        (people.faces, write_faces, "rm -r distractors", "distractors holds no image"),
        (people.faces, write_faces, "rm -r probes", "probes does not exist"),
    ],
)
def test_a_wrong_file_of_people_is_named(
    tmp_path: Path, read: Callable[[Path], object], write: Callable[[Path], None], change: str, message: str
) -> None:
    write(tmp_path)
    subprocess.run(change, shell=True, cwd=tmp_path, check=True)
    with pytest.raises((OSError, ValueError), match=message):
        read(tmp_path)


@pytest.mark.parametrize("name", data.PEOPLE)
def test_people_that_are_not_there_are_told_where_to_get(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist; .*--root must be the folder holding .*https?://"):
        data.load(name, tmp_path)


def test_held_out_persons_are_found_by_other_cameras(tmp_path: Path) -> None:
    write_market1501(tmp_path, persons=6, cameras=3)
    whole = people.market1501(tmp_path)
    held = whole.hold_out(0.34)
    assert held.num_classes == 4
    assert held.train.labels.unique().tolist() == [0, 1, 2, 3]
    kept, asked = ({path.name[:4] for path in part.paths} for part in (held.train, held.gallery))
    assert kept == set(held.class_names)
    assert not kept & asked
    assert asked == {path.name[:4] for path in held.test.paths}
    assert len(held.test) == 2 * 3
    assert len(held.gallery) == 2 * 9


def test_windows_of_persons_are_inside_the_bordered_image(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png", 200, (64, 128))
    files = photographs.Files((tmp_path / "1.png",) * 3, torch.zeros(3, dtype=torch.int64))
    reader = photographs.Reader(files, seed=torch.randint(2**31, ()).item(), size=(32, 16), padding=5)
    seen = torch.stack([reader[number][0] for number in range(3)])
    assert seen.shape == (3, 3, 32, 16)
    assert set(seen.unique().tolist()) <= {0, 200}
    assert (seen == 200).float().mean() >= 27 * 11 / (32 * 16)
    assert torch.equal(seen[1], reader[1][0])


# ----- protocols


def by_the_program(cosines: Tensor, good: Tensor, junk: Tensor) -> tuple[int, float]:
    """Return the rank of the first hit and the average precision of one query, as a program for one ranking."""
    rank = hits = 0
    first, area, recall, precision = 0, 0.0, 0.0, 1.0
    for index in cosines.argsort(descending=True).tolist():
        if junk[index]:
            continue
        rank += 1
        if good[index]:
            hits += 1
            first = first or rank
        now = hits / int(good.sum())
        area += (now - recall) * (precision + hits / rank) / 2
        recall, precision = now, hits / rank
    return first, area


def test_re_identification_against_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "CHUNK", 7)
    queries = torch.randn(20, 4, dtype=torch.float64), torch.randint(1, 5, (20,)), torch.randint(3, (20,))
    gallery = torch.randn(60, 4, dtype=torch.float64), torch.randint(-1, 6, (60,)), torch.randint(3, (60,))
    firsts, areas = [], []
    for embedding, who, camera in zip(*queries, strict=True):
        same = gallery[1] == who
        junk = (gallery[1] == -1) | (same & (gallery[2] == camera))
        if (same & ~junk).any():
            cosines = F.cosine_similarity(embedding[None], gallery[0])
            first, area = by_the_program(cosines, same & ~junk, junk)
            firsts.append(first)
            areas.append(area)
    found = ranking.re_identification(queries, gallery)
    assert found["rank_1"] == pytest.approx(100 * np.mean([first == 1 for first in firsts]))
    assert found["rank_5"] == pytest.approx(100 * np.mean([first <= 5 for first in firsts]))
    assert found["map"] == pytest.approx(100 * np.mean(areas))


def test_re_identification_by_hand() -> None:
    def at(*degrees: float) -> Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()], 1)

    query = at(0), torch.tensor([3]), torch.tensor([1])
    # nearest first: junk, the person from the same camera, a distractor, the person, another one, the person
    gallery = at(1, 2, 3, 4, 5, 6), torch.tensor([-1, 3, 0, 3, 8, 3]), torch.tensor([2, 1, 2, 2, 2, 4])
    area = ((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    assert ranking.re_identification(query, gallery) == pytest.approx({"rank_1": 0, "rank_5": 100, "map": 100 * area})
    gallery = at(4, 5), torch.tensor([3, 0]), torch.tensor([2, 2])
    assert ranking.re_identification(query, gallery) == pytest.approx({"rank_1": 100, "rank_5": 100, "map": 100})
    with pytest.raises(ValueError, match="no query has an image of its person from another camera"):
        ranking.re_identification(query, (at(4), torch.tensor([3]), torch.tensor([1])))


def test_identification_against_the_definition() -> None:
    probes, distractors = torch.randn(52, 3, dtype=torch.float64).split([12, 40])
    labels = torch.arange(12) % 4
    cosine = F.cosine_similarity(torch.cat([probes, distractors])[:, None], probes[None], dim=2)
    expected = {}
    for count in (3, 10, 40):
        trials = [
            all(cosine[j, i] > cosine[12 + d, i] for d in range(count))
            for i in range(12)
            for j in range(12)
            if i != j and labels[i] == labels[j]
        ]
        expected[f"rank_1_of_{count}"] = 100 * np.mean(trials)
    assert ranking.identification(probes, labels, distractors, (3, 10, 40), chunk=4) == pytest.approx(expected)
    assert ranking.powers_of_ten(3000) == [10, 100, 1000]
    assert ranking.powers_of_ten(10**9)[-1] == 10**6
    assert ranking.powers_of_ten(7) == [7]


# ----- losses


def test_arcface_adds_the_margin_to_the_angle() -> None:
    head = heads.CosineClassifier(6, 5, scale=16.0).double()
    embeddings, labels = torch.randn(9, 6, dtype=torch.float64), torch.randint(5, (9,))
    logits = head(embeddings)
    cosines = F.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(logits, 16 * cosines)
    angles = cosines.acos()
    rows = []
    for row, label in zip(angles, labels.tolist(), strict=True):
        turned = 16 * row.cos()
        beyond = row[label] + 0.5 > math.pi
        turned[label] = 16 * (row[label].cos() - 0.5 * math.sin(0.5) if beyond else (row[label] + 0.5).cos())
        rows.append(turned)
    expected = F.cross_entropy(torch.stack(rows), labels)
    assert heads.arcface_loss(logits, labels, 16.0, 0.5).item() == pytest.approx(expected.item(), rel=1e-4)
    assert heads.arcface_loss(logits, labels, 16.0, 0.0).item() == pytest.approx(
        F.cross_entropy(logits, labels).item(), rel=1e-4
    )


def test_arcface_at_both_ends_of_the_circle_has_finite_gradients() -> None:
    logits = torch.tensor([[8.0, 1.0], [-8.0, 1.0]], requires_grad=True)
    heads.arcface_loss(logits, torch.tensor([0, 0]), 8.0, 0.5).backward()
    assert logits.grad.isfinite().all()


def test_triplets_are_the_hardest_of_the_batch() -> None:
    embeddings, labels = torch.randn(10, 4, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    losses = []
    for i in range(9):  # the last one has no other image of its class
        distances = [(embeddings[i] - embeddings[j]).norm().item() for j in range(10)]
        positive = max(distances[j] for j in range(10) if labels[j] == labels[i] and j != i)
        negative = min(distances[j] for j in range(10) if labels[j] != labels[i])
        losses.append(max(0.0, 0.3 + positive - negative))
    loss = heads.triplet_loss(embeddings, labels, 0.3)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    loss.backward()
    assert embeddings.grad.isfinite().all()


def test_triplets_of_equal_embeddings_and_of_one_class() -> None:
    embeddings = torch.ones(4, 3, requires_grad=True)
    loss = heads.triplet_loss(embeddings, torch.tensor([0, 0, 1, 1]), 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(0.3, abs=1e-5)
    assert embeddings.grad.isfinite().all()
    assert heads.triplet_loss(embeddings, torch.zeros(4, dtype=torch.int64), 0.3).item() == 0


def test_mimic_is_eq_2() -> None:
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    assert heads.mimic_loss(x, y).item() == pytest.approx(sum((x[i] - y[i]).norm().item() ** 2 for i in range(5)) / 5)


def test_taylors_coefficients_in_eq_8_are_eq_9() -> None:
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    taylor = [math.exp(-0.8) * 0.8**p / math.factorial(p) for p in range(3)]
    for reduction in ("mean", "sum"):
        expected = kdkernels.correlation_congruence_loss(x, y, gamma=0.4, order=2, reduction=reduction)
        found = heads.polynomial_congruence(x, y, taylor, normalize=True, reduction=reduction)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    x, y = x.float(), y.float()
    expected = ((3 - (x @ x.T) ** 3) - (3 - (y @ y.T) ** 3)).square().mean()
    found = heads.polynomial_congruence(x, y, (3, 0, 0, -1), normalize=False, reduction="mean")
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


# ----- the whole example


def command(tmp_path: Path, name: str, *more: str) -> list[str]:
    sizes = ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--batch-size", "6", "--samples", "2"]
    place = ["--data", name, "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    return [*place, *sizes, "--teacher", "resnet8-half", "--student", "resnet8-quarter", *more]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small images, and batches of teachers too."""
    monkeypatch.setattr(people, "PERSON", (32, 16))
    monkeypatch.setattr(people, "FACE", (24, 24))
    for name, recipe in train_cckd.RECIPES.items():
        schedule = replace(recipe.teacher_schedule, batch_size=6)
        monkeypatch.setitem(train_cckd.RECIPES, name, replace(recipe, teacher_schedule=schedule))


@pytest.mark.parametrize(("name", "write"), [("market1501", write_market1501), ("msmt17", write_msmt17)])
def test_persons_are_found(tmp_path: Path, small: None, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    train_cckd.main(command(tmp_path, name, "--study", "compared", "--triplet", "1"))
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["recipe"]["features"] == 256
    assert content["compared"].keys() == {"DML", "AT", "Adv"}
    for found in [*content["compared"].values(), {key: [value] for key, value in content["teacher"].items()}]:
        assert found.keys() == {"rank_1", "rank_5", "map"}
        assert 0 <= found["rank_1"][0] <= found["rank_5"][0] <= 100
    run = json.loads((tmp_path / "out" / "checkpoints" / "adv-cur-seed0.json").read_text())
    assert run["settings"]["triplet"] == 1
    assert "adv" in run["history"][0]


def test_faces_are_found_among_distractors(tmp_path: Path, small: None) -> None:
    write_faces(tmp_path)
    train_cckd.main(command(tmp_path, "faces", "--study", "methods"))
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["methods"]["CCKD"].keys() == {"rank_1_of_10"}
    run = json.loads((tmp_path / "out" / "checkpoints" / "cc-cur-taylor_rbf-order2-seed0.json").read_text())
    assert (run["settings"]["head"], run["settings"]["instance"]) == ("arcface", "mimic")
    record = run["history"][0]
    assert record["loss"] == pytest.approx(record["mimic"] + 0.003 * record["cc"], rel=1e-4)  # alpha is 0
    assert "rank-1 of 10, %" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "figures" / "curves.png").is_file()


def test_digits_are_identified_with_the_coefficients_of_eq_8(tmp_path: Path) -> None:
    sizes = ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--share", "0.1", "--threads", "1"]
    task = ["--task", "identification", "--head", "arcface", "--scale", "16", "--instance", "mimic"]
    study = ["--study", "methods", "--coefficients", "0", "1", "1"]
    train_cckd.main([*sizes, *task, *study, "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["methods"]["CCKD"].keys() == {"rank_1_of_10", "rank_1_of_100"}
    run = json.loads((tmp_path / "checkpoints" / "cc-cur-taylor_rbf-order2-seed0.json").read_text())
    assert run["settings"]["coefficients"] == [0, 1, 1]


def test_people_have_their_own_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_market1501(tmp_path)
    with pytest.raises(SystemExit):
        train_cckd.main(command(tmp_path, "market1501", "--task", "classification"))
    assert "--task must be retrieval for market1501, got classification" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_compare_the_samples_of_both(seed: int) -> None:
    script = Path(__file__).parent / "distributed" / "heads.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(script), str(seed)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
