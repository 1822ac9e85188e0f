"""The SemCKD example: its recipe, its loss, and a whole small run, interrupted and not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels.nn import SemCKDLoss

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_semckd  # noqa: E402
from common import data, networks, results, training  # noqa: E402
from train_semckd import Setting  # noqa: E402


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(*more: str):
    return train_semckd.build_parser().parse_args(more)


def recipe(*more: str) -> train_semckd.Recipe:
    return train_semckd.recipe_of(arguments(*more))


def experiment(out: Path, *more: str) -> train_semckd.CrossLayer:
    parsed = arguments("--out", str(out), "--threads", "1", *more)
    return train_semckd.CrossLayer(parsed, train_semckd.recipe_of(parsed), data.load("digits"))


def test_the_papers_recipe() -> None:
    paper = recipe("--recipe", "paper")
    assert paper == recipe("--data", "cifar100")
    assert (paper.teacher, paper.student, paper.temperature, paper.beta, paper.seeds) == (
        "resnet32x4",
        "vgg8",
        4,
        400,
        4,
    )
    for schedule in (paper.teacher_schedule, paper.student_schedule):
        assert schedule == training.Schedule(240, 0.05, (150, 180, 210), batch_size=64, momentum=0.9, weight_decay=5e-4)
    assert paper.betas == (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1100)
    assert paper.shares == (0.25, 0.5, 0.75, 1)
    assert paper.noises == (0, 0.1, 0.2, 0.3, 0.4, 0.5)


def test_flags_override_the_recipe() -> None:
    changed = recipe(
        "--recipe", "paper", "--student", "mobilenetv2", "--betas", "0", "7", "--beta-at", "3", "--epochs", "24"
    )
    assert changed.student_schedule == training.Schedule(24, 0.01, (15, 18, 21))
    assert changed.teacher_schedule.lr == 0.05
    assert (changed.betas, changed.beta_at) == ((0, 7), 3)
    assert recipe("--student", "shufflenetv1", "--lr", "0.3").student_schedule.lr == 0.3
    with pytest.raises(SystemExit):
        arguments("--noises", "1.2")


def test_studies_share_their_students(tmp_path: Path) -> None:
    study = experiment(tmp_path, "--methods", "KD", "SemCKD", "--betas", "0", "5", "400", "--beta", "400").settings
    base = [Setting("KD", 0.25), Setting("SemCKD", 0.25)]
    assert study("methods") == base
    assert study("beta") == [base[0], Setting("SemCKD", 0.25, beta=5), base[1]]
    assert base[0] in study("few-shot")
    assert base[1] in study("noisy")
    assert len(study("noisy")) == 2 * len(recipe().noises)


@pytest.mark.parametrize("name", train_semckd.METHODS)
def test_the_loss_is_eq_3(tmp_path: Path, name: str) -> None:
    flags = ["--beta", "3", "--beta-fitnet", "4", "--beta-at", "5", "--beta-sp", "6", "--batch-size", "8"]
    study = experiment(tmp_path, *flags)
    student, teacher = study.network(study.recipe.student), study.network(study.recipe.teacher).eval()
    method, images, labels = train_semckd.METHODS[name], torch.randn(6, 1, 16, 16), torch.randint(10, (6,))
    with train_semckd.capture(student, method) as own, train_semckd.capture(teacher, method) as theirs:
        transfer = study.transfer(method, student, teacher, own, theirs) if method.transfer else None
        losses = study.student_loss(Setting(name, 0.25), student, teacher, own, theirs, transfer)(images, labels)
        features = own.features, theirs.features if method.kd else None
    (logits, stages), (teacher_logits, teacher_stages) = student(images), teacher(images)
    if method.before_relu:
        assert all((maps < 0).any() for group in features for maps in group)
        stages, teacher_stages = features
    expected = F.cross_entropy(logits, labels)
    if name != "CE":
        p, q = (torch.log_softmax(values.double() / 4, 1) for values in (teacher_logits, logits))
        expected = expected + 16 * (p.exp() * (p - q)).sum(1).mean()
    with kdkernels.use_backend("reference"):
        if name == "FitNet":
            expected = expected + 4 * kdkernels.hint_loss(transfer_regressor(transfer)(stages[1]), teacher_stages[1])
        elif name == "AT":
            expected = expected + 5 * kdkernels.attention_transfer_loss(stages[:3], teacher_stages)
        elif name == "SP":
            expected = expected + 6 * kdkernels.similarity_preserving_loss(stages[3], teacher_stages[2])
        elif method.transfer == "embeddings":
            compare = {
                "PKT": kdkernels.probabilistic_transfer_loss,
                "RKD": kdkernels.relational_kd_loss,
                "CC": kdkernels.correlation_congruence_loss,
            }[name]
            embeddings = (f[-1].mean((2, 3)) for f in (stages, teacher_stages))
            expected = expected + getattr(study.recipe, method.beta) * compare(*embeddings)
        elif method.transfer == "all pairs":
            calibration = transfer.module
            for part, value in {"allocation": "attention", "mlp": True, "similarity": True, "projection": True}.items():
                assert getattr(calibration, part) == dict(method.without).get(part, value)
            assert calibration.temperature == (4 if "tau" in name else 1)
            expected = expected + 3 * SemCKDLoss()(*calibration(stages, teacher_stages))
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def transfer_regressor(transfer: train_semckd.Transfer) -> torch.nn.Module:
    (regressor,) = (module for module in transfer.module.modules() if isinstance(module, torch.nn.Conv2d))
    return regressor


def test_a_grid_shows_mean_and_deviation() -> None:
    grid = results.grid("x", {"a": [[1.0, 3.0], [2.0]]}, ["one", "two"], title="above")
    shown = results.report([grid]).splitlines()
    assert shown[:2] == ["above", ""]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[2:]][2:] == [
        ["a", "2.00 ± 1.41", "2.00"]
    ]


# ----- the whole example

SIZES = ["--epochs", "2", "--teacher-epochs", "1", "--seeds", "1", "--threads", "1", "--methods", "CE", "SemCKD"]
STUDIES = ["--studies", "methods", "beta", "few-shot", "noisy", "--betas", "0", "5", "--shares", "0.1"]
WHOLE = [*SIZES, *STUDIES, "--noises", "0.3"]
RUNS = [
    f"{name}-seed0"
    for name in ("ce", "kd", "semckd", "semckd-beta-5", "ce-share-0.1", "semckd-share-0.1", "semckd-noise-0.3")
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train_semckd.main([*WHOLE, "--out", str(out)])
    return out


def test_the_example_writes_tables_numbers_and_figures(whole_run: Path) -> None:
    content = json.loads((whole_run / "results.json").read_text())
    accuracy = content["test_accuracy"]
    assert accuracy.keys() == {"teacher", "methods", "beta", "few-shot", "noisy"}
    tables = (whole_run / "tables.md").read_text()
    for name in RUNS:
        run = json.loads((whole_run / "checkpoints" / f"{name}.json").read_text())
        assert [record["epoch"] for record in run["history"]] == [1, 2]
        assert results.spread([run["history"][-1]["test_accuracy"]]) in tables
        attention = run["history"][-1].get("attention")
        assert (attention is not None) == name.startswith("semckd")
        if attention:
            assert [sum(layer) for layer in attention] == pytest.approx([1] * 4, abs=1e-5)
    assert accuracy["beta"].keys() == {"KD", "SemCKD beta 5"}
    assert content["layer match"].keys() == {"SemCKD"}
    from matplotlib.image import imread

    for name in ("curves", "attention", "beta"):
        picture = imread(whole_run / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


class Interrupted(BaseException):
    pass


def test_an_interrupted_run_goes_on_bit_for_bit(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, calls = train_semckd.CrossLayer.evaluate, 0

    def interrupted(self, *rest):
        nonlocal calls
        calls += 1
        if calls == 4:  # after SemCKD's first epoch
            raise Interrupted
        return evaluate(self, *rest)

    few = [*SIZES, "--studies", "methods", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train_semckd.CrossLayer, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            train_semckd.main(few)
    assert len(training.read(tmp_path / "checkpoints" / "semckd-seed0.pt")["history"]) == 1
    train_semckd.main(few)
    for name in ("teacher", "ce-seed0", "semckd-seed0"):
        one, other = (training.read(out / "checkpoints" / f"{name}.pt") for out in (tmp_path, whole_run))
        assert one["history"] == other["history"]
        assert one["module"].keys() == other["module"].keys()
        assert all(torch.equal(value, other["module"][key]) for key, value in one["module"].items())


def test_a_finished_run_is_read_not_repeated(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_semckd.main([*WHOLE, "--out", str(whole_run)])
    output = capsys.readouterr().out
    assert output.count("finished before") == len(list((whole_run / "checkpoints").glob("*.pt")))
    assert (whole_run / "tables.md").read_text().strip() in output


def test_maps_are_captured_of_every_kind_of_network() -> None:
    kinds = ("resnet8-half", "resnext11-small", "wrn-10-1", "cnn5", "vgg8-eighth", "resnet18-224")
    for name in (*kinds, "shufflenetv1-quarter", "shufflenetv2-quarter", "mobilenetv2-eighth"):
        network = networks.build(name, 3, 10).eval()
        with train_semckd.capture(network, train_semckd.METHODS["KD"]) as capture:
            _, stages = network(torch.randn(2, 3, 32, 32))
            assert all(map(torch.equal, capture.features, stages))
