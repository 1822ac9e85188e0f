"""The ICCT example: objective, scenarios, and whole small runs, with and without interruption."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_icct  # noqa: E402
from common import data, results, training  # noqa: E402
from example_runs import assert_same_checkpoints, recipe_flags, write_cifar100  # noqa: E402


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def quick_embeddings() -> Iterator[None]:
    """Replace t-SNE, which takes much longer than these runs."""
    import sklearn.manifold

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.manifold, "TSNE", functools.partial(sklearn.manifold.TSNE, max_iter=250))
        yield


def recipe(*arguments: str) -> train_icct.Recipe:
    return train_icct.recipe_of(train_icct.build_parser().parse_args(arguments))


def test_the_papers_recipe() -> None:
    paper = recipe("--recipe", "paper")
    schedule = paper.schedule
    assert (schedule.epochs, schedule.milestones, schedule.decay) == (200, (60, 120, 160), 0.2)
    assert schedule.nesterov
    small = paper.schedules["cnn5"]
    assert (small.optimizer, small.batch_size, small.epochs, small.milestones) == ("adam", 256, 140, (40, 80, 120))
    assert recipe("--data", "cifar100").strong == paper.strong
    assert (paper.seeds, paper.median) == (10, True)


# Every flag of the recipe, with the field that it changes.
CHANGES = [
    ("--strong wrn-40-2", "strong", "wrn-40-2"),
    ("--weak vgg8", "weak", "vgg8"),
    ("--again wrn-16-2", "again", "wrn-16-2"),
    ("--seeds 7", "seeds", 7),
    ("--generations 2", "generations", 2),
    ("--share 0.5", "share", 0.5),
    ("--temperature 2", "temperature", 2),
    ("--kd 0.2", "kd", 0.2),
    ("--lt 0.3", "lt", 0.3),
    ("--icct 2.5", "icct", 2.5),
    ("--at 5", "at", 5),
    ("--sp 6", "sp", 6),
    ("--tfkd 0.7", "tfkd", 0.7),
]


@pytest.mark.parametrize(("flags", "field", "value"), CHANGES)
def test_a_flag_changes_its_setting_alone(flags: str, field: str, value: object) -> None:
    paper, changed = (recipe("--recipe", "paper", *more) for more in ([], flags.split()))
    assert getattr(changed, field) == value != getattr(paper, field)
    assert [name for name in vars(paper) if getattr(paper, name) != getattr(changed, name)] == [field]


def test_some_flags_change_every_schedule() -> None:
    given = recipe("--recipe", "paper", "--epochs", "20", "--batch-size", "32")
    strong, weak = given.schedule, given.schedules["cnn5"]
    assert (strong.epochs, strong.milestones, strong.batch_size) == (20, (6, 12, 16), 32)
    assert (weak.epochs, weak.milestones, weak.batch_size) == (20, (6, 11, 17), 32)


def test_every_flag_is_tested() -> None:
    tested = {flags.split()[0] for flags, _, _ in CHANGES} | {"--epochs", "--batch-size", "--methods"}
    assert recipe_flags(train_icct.build_parser()) == tested


@pytest.mark.parametrize("method", train_icct.METHODS)
def test_the_objective(tmp_path: Path, method: str) -> None:
    flags = ["--out", str(tmp_path), "--icct", "0.7", "--kd", "0.3", "--tfkd", "0.2"]
    arguments = train_icct.build_parser().parse_args(flags)
    settings = train_icct.recipe_of(arguments)
    experiment = train_icct.InterClassCorrelation(arguments, settings, data.load("digits"))
    student, teacher = experiment.network("cnn5-quarter").eval(), experiment.network("resnet8-half").eval()
    images, labels = torch.randn(9, 1, 16, 16), torch.randint(10, (9,))
    losses = experiment.loss(train_icct.METHODS[method], student, teacher)(images, labels)
    (z, f), (z_t, f_t) = student(images), teacher(images)
    stages, stages_t = f, f_t
    f, f_t = f[-1], f_t[-1]
    expected = F.cross_entropy(z, labels)
    kd = 16 * F.kl_div((z / 4).log_softmax(1), (z_t / 4).softmax(1), reduction="batchmean")
    if method == "KD":
        expected = expected + 0.3 * kd
    if method == "Tf-KD":
        expected = 0.8 * expected + 0.2 * kd
    if method == "LT":
        expected = expected + settings.lt * (z - z_t).square().mean()
    if "ICCT" in method:
        m, m_t = ((x[:, :, None] * x[:, None]).softmax(2).mean(0) for x in (z, z_t))
        expected = expected + 0.7 * (m_t * (m_t / m).log()).sum(1).mean()
    if method.endswith("AT"):
        for own, theirs in zip(stages, stages_t, strict=True):
            side = min(own.shape[-1], theirs.shape[-1])
            attention, other = (
                F.normalize(F.adaptive_avg_pool2d(x.square(), side).sum(1).flatten(1)) for x in (own, theirs)
            )
            expected = expected + settings.at * (attention - other).square().mean()
    if method.endswith("SP"):
        gram, other = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (f, f_t))
        expected = expected + settings.sp * (gram - other).square().mean()
    torch.testing.assert_close(losses["loss"], expected, rtol=1e-4, atol=1e-5)


# ----- the whole example

SMALL = ["--seeds", "1", "--epochs", "2", "--generations", "2", "--share", "0.1", "--threads", "1"]
SMALL += ["--strong", "resnet8-half", "--weak", "cnn5-quarter"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("icct")
    train_icct.main([*SMALL, "--out", str(out)])
    return out


def run_of(out: Path, name: str) -> dict:
    return json.loads((out / "checkpoints" / f"{name}.json").read_text())


def test_the_example_writes_tables_numbers_and_figures(whole_run: Path) -> None:
    content = json.loads((whole_run / "results.json").read_text())
    table = (whole_run / "table.md").read_text()
    for scenario in ("strong-to-weak", "weak-to-strong"):
        assert content[scenario].keys() == {"teacher", "CE", "KD", "LT", "ICCT"}
        for name in ("KD", "LT", "ICCT"):
            history = run_of(whole_run, f"{scenario}-{name.lower()}-seed0")["history"]
            assert [record["epoch"] for record in history] == [1, 2]
            assert [history[-1]["test_accuracy"]] == content[scenario][name]
            assert results.spread(content[scenario][name]) in table
    assert np.shape(content["born-again"]["ICCT"]) == (1, 2)
    for generation in (1, 2):
        history = run_of(whole_run, f"generation{generation}-icct-seed0")["history"]
        assert history[-1]["test_accuracy"] == content["born-again"]["ICCT"][0][generation - 1]
    assert all(scenario in table for scenario in train_icct.SCENARIOS)
    drawn = {path.name for path in (whole_run / "figures").iterdir()}
    assert drawn == {
        *(f"{scenario}-{what}.png" for scenario in train_icct.SCENARIOS for what in ("maps", "features")),
        "strong-to-weak-curves.png",
        "weak-to-strong-curves.png",
    }
    from matplotlib.image import imread

    for name in drawn:
        picture = imread(whole_run / "figures" / name)
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


def test_generations_teach_each_other(whole_run: Path) -> None:
    """Every student stores its teacher, which is the student of the previous generation."""
    for method in ("kd", "lt", "icct"):
        names = ["ce-cnn5-quarter-seed0", *(f"generation{number}-{method}-seed0" for number in (1, 2))]
        for teacher, student in pairwise(names):
            network = train_icct.networks.build("cnn5-quarter", 1, 10)
            training.load_weights(network, whole_run / "checkpoints" / f"{teacher}.pt")
            assert training.fingerprint(network) == run_of(whole_run, student)["settings"]["teacher"]


class Interrupted(BaseException):
    pass


def test_an_interrupted_run_goes_on_bit_for_bit(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is interrupted in the second epoch of the second generation."""
    measure, calls = train_icct.InterClassCorrelation.measure, 0

    def interrupted(self, classify):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interrupted
        return measure(self, classify)

    few = [*SMALL, "--scenario", "born-again", "--methods", "ICCT", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train_icct.InterClassCorrelation, "measure", interrupted)
        with pytest.raises(Interrupted):
            train_icct.main(few)
    assert len(training.read(tmp_path / "checkpoints" / "generation2-icct-seed0.pt")["history"]) == 1
    train_icct.main(few)
    names = ["ce-cnn5-quarter-seed0", "generation1-icct-seed0", "generation2-icct-seed0"]
    assert_same_checkpoints(tmp_path, whole_run, names)


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_the_example_on_cifar100(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        write_cifar100(tmp_path, name, 200)
    sizes = ["--epochs", "1", "--seeds", "1", "--batch-size", "32", "--scenario", "weak-to-strong"]
    names = ["--weak", "cnn5", "--strong", "resnet8-half", "--methods", "CE", "ICCT", "ICCT+SP"]
    train_icct.main(["--data", "cifar100", "--root", str(tmp_path), "--out", str(tmp_path), *sizes, *names])
    weak = run_of(tmp_path, "teacher-cnn5")["settings"]
    assert (weak["optimizer"], weak["batch_size"], weak["decay"]) == ("adam", 32, 0.2)
    history = run_of(tmp_path, "weak-to-strong-icct+sp-seed0")["history"]
    assert history[0]["icct"] > 0
    assert history[0]["sp"] > 0
