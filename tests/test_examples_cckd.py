"""The CCKD example: loss, samplers, measures, and whole small runs, with and without interruption."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_cckd  # noqa: E402
from common import data, results, training  # noqa: E402
from example_runs import assert_same_checkpoints, recipe_flags, write_cifar100  # noqa: E402
from train_cckd import STUDIES, Variant  # noqa: E402


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(*more: str):
    return train_cckd.build_parser().parse_args(more)


def recipe(*more: str) -> train_cckd.Recipe:
    return train_cckd.recipe_of(arguments(*more))


def experiment(out: Path, *more: str) -> train_cckd.CorrelationCongruence:
    parsed = arguments("--out", str(out), "--threads", "1", *more)
    return train_cckd.CorrelationCongruence(parsed, train_cckd.recipe_of(parsed), data.load("digits"))


def test_the_papers_recipe() -> None:
    paper = recipe("--recipe", "paper")
    assert paper == recipe("--data", "cifar100")
    assert (paper.alpha, paper.beta, paper.gamma, paper.features, paper.samples) == (0, 0.003, 0.4, 128, 4)
    assert (paper.normalize, paper.reduction) == (True, "sum")
    assert (paper.teacher, paper.student, paper.temperature, paper.share) == ("resnet110", "resnet20", 4, 1)
    for schedule in (paper.teacher_schedule, paper.student_schedule):
        assert schedule == training.Schedule(200, 0.1, (80, 120, 160), batch_size=64, momentum=0.9, weight_decay=5e-4)
    assert Variant() == Variant("cc", "cur", "taylor_rbf", 2)


# Every flag of the recipe, with the field that it changes.
CHANGES = [
    ("--teacher resnet14", "teacher", "resnet14"),
    ("--student wrn-16-1", "student", "wrn-16-1"),
    ("--seeds 7", "seeds", 7),
    ("--epochs 20", "student_schedule", training.Schedule(20, 0.1, (8, 12, 16))),
    ("--teacher-epochs 10", "teacher_schedule", training.Schedule(10, 0.1, (4, 6, 8))),
    ("--features 16", "features", 16),
    ("--share 0.5", "share", 0.5),
    ("--seen 0.3", "seen", 0.3),
    ("--alpha 0.1", "alpha", 0.1),
    ("--temperature 2", "temperature", 2),
    ("--beta 0.5", "beta", 0.5),
    ("--gamma 0.7", "gamma", 0.7),
    ("--sp 3", "sp", 3),
    ("--at 4", "at", 4),
    ("--samples 8", "samples", 8),
    ("--superclasses 30", "superclasses", 30),
    ("--adv 2", "adv", 2),
    ("--head arcface", "head", "arcface"),
    ("--scale 30", "scale", 30),
    ("--margin 0.3", "margin", 0.3),
    ("--triplet 1", "triplet", 1),
    ("--triplet-margin 0.5", "triplet_margin", 0.5),
    ("--instance mimic", "instance", "mimic"),
    ("--coefficients 0.1 0.2 0.3", "coefficients", (0.1, 0.2, 0.3)),
]


@pytest.mark.parametrize(("flags", "field", "value"), CHANGES)
def test_a_flag_changes_its_setting_alone(flags: str, field: str, value: object) -> None:
    paper, changed = (recipe("--recipe", "paper", *more) for more in ([], flags.split()))
    assert getattr(changed, field) == value != getattr(paper, field)
    assert [name for name in vars(paper) if getattr(paper, name) != getattr(changed, name)] == [field]


def test_some_flags_change_every_schedule() -> None:
    given = recipe("--recipe", "paper", "--batch-size", "32", "--lr", "0.3")
    for schedule in (given.teacher_schedule, given.student_schedule):
        assert schedule == training.Schedule(200, 0.3, (80, 120, 160), batch_size=32)


def test_every_flag_is_tested() -> None:
    tested = {flags.split()[0] for flags, _, _ in CHANGES} | {"--batch-size", "--lr"}
    assert recipe_flags(train_cckd.build_parser()) == tested


def taylor(gamma: float, order: int, x: Tensor) -> Tensor:
    unit = x / x.norm(dim=1, keepdim=True)
    terms = [(2 * gamma * unit @ unit.T) ** p / math.factorial(p) for p in range(order + 1)]
    return math.exp(-2 * gamma) * sum(terms)


VARIANTS = {variant.name: variant for study in STUDIES.values() for variant in study.values()}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_the_loss_is_eq_7(tmp_path: Path, variant: Variant) -> None:
    study = experiment(
        tmp_path, "--alpha", "0.3", "--beta", "5", "--sp", "7", "--at", "9", "--adv", "11", "--gamma", "0.6"
    )
    student, teacher = (study.embedder(name).eval() for name in ("resnet8-half", "resnet14-half"))
    images, labels = torch.randn(9, 1, 16, 16), torch.randint(10, (9,))
    partner = study.partner(variant)
    losses = study.loss(variant, student, teacher, partner)(images, labels)
    loss = losses["loss"]
    (z, x, stages), (z_t, y, stages_t) = student(images), teacher(images)
    assert x.shape == y.shape == (9, 128)
    expected = ce = F.cross_entropy(z, labels)
    if variant.loss == "dml":
        peer = partner(images)[0]
        pairs = ((z, peer), (peer, z))
        mutual = [F.kl_div(a.log_softmax(1), b.softmax(1), reduction="batchmean") for a, b in pairs]
        expected = ce + F.cross_entropy(peer, labels) + sum(mutual)
        assert losses["dml"].item() == pytest.approx((ce + mutual[0]).item(), rel=1e-4)
    elif variant.loss != "ce":
        kd = 16 * F.kl_div((z / 4).log_softmax(1), (z_t / 4).softmax(1), reduction="batchmean")
        expected = 0.3 * ce + 0.7 * kd
    if variant.loss == "sp":
        gram, gram_t = (F.normalize(f.flatten(1) @ f.flatten(1).T) for f in (stages[-1], stages_t[-1]))
        expected = expected + 7 * (gram - gram_t).square().mean()
    if variant.loss == "at":
        for own, theirs in zip(stages[1:], stages_t[1:], strict=True):
            q, q_t = (F.normalize(f.square().sum(1).flatten(1)) for f in (own, theirs))
            expected = expected + 9 * (q - q_t).square().mean()
    if variant.loss == "adv":
        expected = expected + 11 * partner(x, y) + partner.discriminator_loss(x, y)
    if variant.loss == "cc":
        x, y = F.normalize(x), F.normalize(y)
        kernel = {
            "taylor_rbf": lambda x: taylor(0.6, variant.order, x),
            "rbf": lambda x: torch.exp(-0.6 * (x[:, None] - x).square().sum(2)),
            "bilinear": lambda x: x @ x.T,
            "mmd": lambda x: (x.mean(1)[:, None] - x.mean(1)).abs(),
        }[variant.kernel]
        expected = expected + 5 * (kernel(x) - kernel(y)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_studies_share_their_students() -> None:
    assert STUDIES["methods"]["CCKD"] == STUDIES["samplers"]["class-uniform"] == STUDIES["orders"]["P = 2"]
    assert STUDIES["metrics"]["Gaussian, P = 2"] == Variant()
    assert len(VARIANTS) == 14


@pytest.mark.parametrize(("task", "classes"), [("classification", 10), ("retrieval", 6)])
def test_batches_are_as_large_whatever_composes_them(tmp_path: Path, task: str, classes: int) -> None:
    study = experiment(tmp_path, "--task", task, "--superclasses", "15")
    teacher, labels = study.embedder("resnet8-half").eval(), study.few.train.labels
    assert study.few.num_classes == classes
    assert study.recipe.student_schedule.batch_size == 4 * classes
    assert study.sampler("uniform", 0, teacher) is None
    for batch in study.sampler("cur", 0, teacher):
        assert labels[batch].bincount().tolist() == [4] * classes
    superclasses = study.sampler("sur", 0, teacher)
    assert len(superclasses.labels.unique()) == 15
    for batch in superclasses:
        groups = superclasses.labels[batch].view(classes, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == classes


def test_classes_never_seen_are_never_seen(tmp_path: Path) -> None:
    whole, study = data.load("digits"), experiment(tmp_path, "--task", "retrieval", "--seen", "0.4")
    assert study.dataset.class_names == ("0", "1", "2", "3")
    assert study.unseen.class_names == ("4", "5", "6", "7", "8", "9")
    assert study.embedder("resnet8-half").classifier.out_features == 4
    asked = {image.numpy().tobytes() for image in study.unseen.test.pixels}
    assert asked == {image.numpy().tobytes() for image in whole.test.pixels[whole.test.labels >= 4]}
    known = {image.numpy().tobytes() for image in whole.train.pixels[whole.train.labels < 4]}
    assert all(image.numpy().tobytes() in known for image in study.few.train.pixels)


# ----- what is measured


def at(*degrees: float) -> Tensor:
    """Return points at angles of a circle, with any length."""
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.rand(len(degrees), 1).add(0.5)


def test_retrieval_of_a_few_points() -> None:
    # By cosine the others come in the order: of a (0°): b a, of a (25°): b a, of b (10°): a a and no other b.
    assert train_cckd.retrieval(at(0, 25, 10), torch.tensor([4, 4, 7])) == pytest.approx(
        {"rank_1": 0, "rank_5": 100, "map": 50}
    )
    # Of a (0°): a b a, of a (10°): a b a, of b (30°): a a a, left out, of a (60°): b a a.
    found = train_cckd.retrieval(at(0, 10, 30, 60), torch.tensor([0, 0, 1, 0]))
    first, last = (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2
    assert found == pytest.approx({"rank_1": 200 / 3, "rank_5": 100, "map": 100 * (2 * first + last) / 3})


def test_five_are_asked_for_rank_5() -> None:
    """Two images of a class have other images between them. For one, the other is at ranks 6 and 5. For the other, at
    ranks 7 and 6.
    """
    angles, labels = (0, 10, 11, 12, 13, 14, 24.5, 30), torch.tensor([0, 1, 2, 3, 4, 5, 0, 6])
    found = train_cckd.retrieval(at(*angles), labels)
    assert found == pytest.approx({"rank_1": 0, "rank_5": 0, "map": 50 * (1 / 6 + 1 / 7)})
    fewer = [0, 1, 2, 3, 4, 6, 7]
    found = train_cckd.retrieval(at(*(angles[i] for i in fewer)), labels[fewer])
    assert found == pytest.approx({"rank_1": 0, "rank_5": 50, "map": 50 * (1 / 5 + 1 / 6)})


def test_retrieval_against_the_definition() -> None:
    embeddings, labels = torch.randn(40, 3), torch.randint(5, (40,))
    unit = F.normalize(embeddings.double())
    precisions, firsts, fives = [], [], []
    for i in range(40):
        others = sorted((j for j in range(40) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        hits = [labels[j] == labels[i] for j in others]
        places = [place for place, hit in enumerate(hits, 1) if hit]
        precisions.append(sum(n / place for n, place in enumerate(places, 1)) / len(places))
        firsts.append(places[0] <= 1)
        fives.append(places[0] <= 5)
    expected = {"rank_1": sum(firsts), "rank_5": sum(fives), "map": sum(precisions)}
    found = train_cckd.retrieval(embeddings, labels)
    assert found == pytest.approx({name: 100 * value / 40 for name, value in expected.items()}, rel=1e-6)


def test_mean_cosines_within_and_between_classes() -> None:
    within, between = train_cckd.mean_cosines(at(0, 60, 90), torch.tensor([0, 0, 1]))
    assert within == pytest.approx(0.5, abs=1e-6)
    assert between == pytest.approx((0 + 3**0.5 / 2) / 2, abs=1e-6)


# ----- the whole example

SMALL = ["--epochs", "2", "--teacher-epochs", "1", "--seeds", "1", "--share", "0.1", "--threads", "1"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cckd")
    train_cckd.main([*SMALL, "--out", str(out)])
    return out


def test_the_example_writes_tables_numbers_and_figures(whole_run: Path) -> None:
    content = json.loads((whole_run / "results.json").read_text())
    table = (whole_run / "table.md").read_text()
    for study in train_cckd.DEFAULT_STUDIES:
        variants = STUDIES[study]
        assert content[study].keys() == variants.keys()
        for label, variant in variants.items():
            run = json.loads((whole_run / "checkpoints" / f"{variant.name}-seed0.json").read_text())
            assert [record["epoch"] for record in run["history"]] == [1, 2]
            assert [run["history"][-1]["test_accuracy"]] == content[study][label]["test_accuracy"]
            assert results.spread(content[study][label]["test_accuracy"]) in table
    from matplotlib.image import imread

    for name in ("curves", "cosines"):
        picture = imread(whole_run / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


def test_a_finished_run_is_read_not_repeated(whole_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole_run / "results.json").read_bytes()
    train_cckd.main([*SMALL, "--out", str(whole_run)])
    output = capsys.readouterr().out
    assert output.count("finished before") == len(list((whole_run / "checkpoints").glob("*.pt")))
    assert (whole_run / "table.md").read_text().strip() in output
    assert (whole_run / "results.json").read_bytes() == before


class Interrupted(BaseException):
    pass


def test_an_interrupted_run_goes_on_bit_for_bit(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is interrupted in the second epoch of a student with a sampler."""
    evaluate, calls = train_cckd.CorrelationCongruence.evaluate, 0

    def interrupted(self, network):
        nonlocal calls
        calls += 1
        if calls == 7:  # after the teacher's epoch, two of each of two students, and one of the third
            raise Interrupted
        return evaluate(self, network)

    few = [*SMALL, "--study", "samplers", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train_cckd.CorrelationCongruence, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            train_cckd.main(few)
    assert len(training.read(tmp_path / "checkpoints" / "cc-sur-taylor_rbf-order2-seed0.pt")["history"]) == 1
    train_cckd.main(few)
    names = [path.stem for path in (tmp_path / "checkpoints").glob("*.pt")]
    assert len(names) == 4
    assert_same_checkpoints(tmp_path, whole_run, names)


def test_embeddings_find_classes_never_seen(tmp_path: Path) -> None:
    study = ["--task", "retrieval", "--study", "methods"]
    train_cckd.main([*SMALL, *study, "--share", "0.25", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["methods"].keys() == {"CE", "KD", "SP", "CCKD"}
    for found in content["methods"].values():
        assert found.keys() == {"rank_1", "rank_5", "map"}
        assert 25 < found["rank_1"][0] <= found["rank_5"][0] <= 100
    assert "mAP, %" in (tmp_path / "table.md").read_text()


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_the_example_on_cifar100(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        write_cifar100(tmp_path, name, 300, classes=25)
    sizes = ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--batch-size", "8", "--superclasses", "9"]
    names = ["--teacher", "resnet14", "--student", "resnet8-half", "--samples", "2", "--study", "samplers"]
    train_cckd.main(["--data", "cifar100", "--root", str(tmp_path), "--out", str(tmp_path), *sizes, *names])
    run = training.read(tmp_path / "checkpoints" / "cc-cur-taylor_rbf-order2-seed0.pt")
    assert run["settings"]["beta"] == 0.003
    assert run["history"][0]["cc"] > 0
