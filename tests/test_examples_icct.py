"""The ICCT example: its objective, its scenarios, and whole small runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_icct  # noqa: E402
from common import data, training  # noqa: E402

SMALL = ["--seeds", "1", "--epochs", "2", "--generations", "2", "--share", "0.1"]
SMALL += ["--strong", "cnn5-quarter", "--weak", "cnn5-quarter"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def recipe(*arguments: str) -> train_icct.Recipe:
    return train_icct.recipe_of(train_icct.build_parser().parse_args(arguments))


def test_the_papers_recipe() -> None:
    paper = recipe("--recipe", "paper")
    schedule = paper.schedules["wrn-28-10"]
    assert (schedule.epochs, schedule.milestones, schedule.decay) == (200, (60, 120, 160), 0.2)
    assert schedule.nesterov
    small = paper.schedules["cnn5"]
    assert (small.optimizer, small.batch_size, small.epochs, small.milestones) == ("adam", 256, 140, (40, 80, 120))
    assert recipe("--data", "cifar100").strong == paper.strong


def test_flags_override_the_recipe() -> None:
    given = recipe("--epochs", "6", "--icct", "2.5", "--weak", "resnet8-half", "--batch-size", "32")
    assert given.icct == 2.5
    assert given.schedules["resnet8-half"].epochs == 6
    assert given.schedules["resnet14-half"].batch_size == 32


@pytest.mark.parametrize("method", train_icct.METHODS)
def test_the_objective(tmp_path: Path, method: str) -> None:
    arguments = train_icct.build_parser().parse_args(["--out", str(tmp_path), "--icct", "0.7", "--kd", "0.3"])
    settings = train_icct.recipe_of(arguments)
    experiment = train_icct.InterClassCorrelation(arguments, settings, data.load("digits"))
    student, teacher = experiment.network("cnn5-quarter").eval(), experiment.network("resnet8-half").eval()
    images, labels = torch.randn(9, 1, 16, 16), torch.randint(10, (9,))
    losses = experiment.loss(train_icct.METHODS[method], student, teacher)(images, labels)
    (z, f), (z_t, f_t) = student(images), teacher(images)
    f, f_t = f[-1], f_t[-1]
    expected = F.cross_entropy(z, labels)
    if method == "KD":
        expected = expected + 0.3 * 16 * F.kl_div((z / 4).log_softmax(1), (z_t / 4).softmax(1), reduction="batchmean")
    if method == "LT":
        expected = expected + settings.lt * (z - z_t).square().mean()
    if "ICCT" in method:
        m, m_t = ((x[:, :, None] * x[:, None]).softmax(2).mean(0) for x in (z, z_t))
        expected = expected + 0.7 * (m_t * (m_t / m).log()).sum(1).mean()
    if "AT" in method:
        attention, other = (F.normalize(F.adaptive_avg_pool2d(x.square(), 2).sum(1).flatten(1)) for x in (f, f_t))
        expected = expected + settings.at * (attention - other).square().mean()
    if "SP" in method:
        gram, other = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (f, f_t))
        expected = expected + settings.sp * (gram - other).square().mean()
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("icct")
    train_icct.main([*SMALL, "--out", str(out)])
    return out


def test_the_example_writes_tables_numbers_and_figures(whole_run: Path) -> None:
    results = json.loads((whole_run / "results.json").read_text())
    for scenario in ("strong-to-weak", "weak-to-strong"):
        assert results[scenario].keys() == {"teacher", "CE", "KD", "LT", "ICCT"}
    assert np.shape(results["born-again"]["ICCT"]) == (1, 2)
    table = (whole_run / "table.md").read_text()
    assert all(scenario in table for scenario in train_icct.SCENARIOS)
    drawn = {path.name for path in (whole_run / "figures").iterdir()}
    assert drawn == {
        *(f"{scenario}-{what}.png" for scenario in train_icct.SCENARIOS for what in ("maps", "features")),
        "strong-to-weak-curves.png",
        "weak-to-strong-curves.png",
    }


def test_generations_teach_each_other(whole_run: Path) -> None:
    """Every student remembers which teacher it had: the one of the generation before."""
    first = settings_of(whole_run, "generation1-icct-seed0")
    second = settings_of(whole_run, "generation2-icct-seed0")
    assert first["teacher"] != second["teacher"]
    student = training.read(whole_run / "checkpoints" / "generation1-icct-seed0.pt")["module"]
    network = train_icct.networks.build("cnn5-quarter", 1, 10)
    network.load_state_dict(student)
    assert training.fingerprint(network) == second["teacher"]


def settings_of(out: Path, name: str) -> dict:
    return json.loads((out / "checkpoints" / f"{name}.json").read_text())["settings"]


def test_an_interrupted_run_goes_on_bit_for_bit(whole_run: Path, tmp_path: Path) -> None:
    """A student of one epoch less, as a kill leaves it, and no file of those after it."""
    out = tmp_path / "icct"
    shutil.copytree(whole_run, out)
    for name in ("generation2-icct-seed0", "weak-to-strong-icct-seed0"):
        (out / "checkpoints" / f"{name}.pt").unlink()
    (out / "results.json").unlink()
    train_icct.main([*SMALL, "--out", str(out)])
    assert (out / "results.json").read_text() == (whole_run / "results.json").read_text()
