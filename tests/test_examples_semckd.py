"""The SemCKD example: recipe, loss, and a whole small run, with and without interruption."""

from __future__ import annotations

import copy
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels.nn import HKDLoss, IRGLoss, SemCKDLoss

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import papers  # noqa: E402
import train_semckd  # noqa: E402
from common import data, networks, probing, results, training  # noqa: E402
from papers import semckd  # noqa: E402
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
    assert paper.betas_crd == (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5)
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
    crd = experiment(tmp_path, "--betas", "5", "--betas-crd", "0.5", "0.8").settings("beta")[1:]
    assert crd == [Setting("CRD", 0.25, beta=0.5), Setting("CRD", 0.25)]
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
        setting = Setting(name, 0.25)
        transfer = study.transfer(method, student, teacher, own, theirs, setting) if method.transfer else None
        contrast = study.contrast(student, teacher, study.dataset) if method.contrast else None
        loss = study.student_loss(setting, student, teacher, own, theirs, transfer, contrast)
        if contrast:  # each image counts with its number, and its label is known
            numbers = torch.randperm(len(contrast.labels))[:6]
            labels, memory = contrast.labels[numbers], copy.deepcopy(contrast.crd)
        state = torch.get_rng_state()
        losses = loss(images, numbers if contrast else labels)
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
        elif name == "VID":
            layers = zip(transfer.module, stages[:3], teacher_stages, strict=True)
            expected = expected + sum(vid(own, theirs) for vid, own, theirs in layers)
        elif method.transfer == "embeddings":
            compare = {
                "PKT": kdkernels.probabilistic_transfer_loss,
                "RKD": kdkernels.relational_kd_loss,
                "IRG": IRGLoss(),
                "CC": kdkernels.correlation_congruence_loss,
            }[name]
            embeddings = (f[-1].mean((2, 3)) for f in (stages, teacher_stages))
            expected = expected + getattr(study.recipe, method.beta) * compare(*embeddings)
        elif name == "HKD":
            weights = (study.recipe.beta_hkd * w for w in (100, 1, 1))
            expected = expected + HKDLoss(weights=list(weights))(stages[:3], teacher_stages)
        elif name == "MGD":  # maps of 8 and 4 pixels
            assert transfer.pairs == [(0, 1), (1, 2)]
            expected = expected + study.recipe.beta_mgd * transfer.module(stages[:2], teacher_stages[1:])
        if method.transfer == "all pairs":
            calibration = transfer.module
            for part, value in {"allocation": "attention", "mlp": True, "similarity": True, "projection": True}.items():
                assert getattr(calibration, part) == dict(method.without).get(part, value)
            assert calibration.temperature == (4 if "tau" in name else 1)
            expected = expected + 3 * SemCKDLoss()(*calibration(stages, teacher_stages))
    if contrast:
        torch.set_rng_state(state)
        negatives = (contrast.labels != labels[:, None]).float().multinomial(study.recipe.negatives)
        assert (contrast.labels[negatives] != labels[:, None]).all()
        embeddings = (f[-1].mean((2, 3)) for f in (stages, teacher_stages))
        expected = expected + 0.8 * memory(*embeddings, numbers, negatives)
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_papers_baselines_train_and_change_what_they_own(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = ["HKD", "MGD", "IRG", "CRD", "SemCKD+CRD"]
    few = ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--share", "0.1", "--threads", "1"]
    train_semckd.main([*few, "--studies", "methods", "--methods", *names, "--out", str(tmp_path)])
    trained = {path.stem.removesuffix("-seed0"): training.read(path)["module"] for path in tmp_path.rglob("*seed0.pt")}
    assert trained.keys() == {name.lower() for name in names}
    assert "HKD" in capsys.readouterr().out
    (auxiliary,) = tmp_path.rglob("hkd-seed0-auxiliary.pt")
    assert training.read(auxiliary)["settings"]["network"] == "vgg8-quarter"
    assigned = trained["mgd"]["transfer.assigned0"]
    assert sorted(assigned.tolist()) == list(range(len(assigned))) != assigned.tolist()
    for name in ("crd", "semckd+crd"):
        norms = trained[name]["contrast.crd.student_memory"].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_layers_of_equal_size_match_in_their_order() -> None:
    own, theirs = [(16, 8, 8), (32, 4, 4), (64, 2, 2)], [(8, 16, 16), (16, 8, 8), (64, 4, 4), (32, 2, 2)]
    assert train_semckd.matching(own, theirs) == [(0, 1), (1, 2)]
    with pytest.raises(train_semckd.NoMatchError, match="leave MGD out of --methods"):
        train_semckd.matching(own, [(8, 8, 8)])


def test_mgd_has_layers_where_the_paper_has_a_number_and_hkd_a_double_of_every_student() -> None:
    @functools.cache
    def shapes(name: str) -> list[tuple[int, ...]]:
        with torch.device("meta"):
            stages = networks.build(name, 3, 100).eval()(torch.empty(1, 3, 32, 32))[1]
        return [tuple(maps.shape[1:]) for maps in stages]

    for table, pairs in ((semckd.TABLE_2, semckd.PAIRS_2), (semckd.TABLE_3, semckd.PAIRS_3)):
        for (teacher, student), number in zip(pairs, papers.printed(table)["MGD"], strict=True):
            try:
                matched = train_semckd.matching(shapes(student), shapes(teacher))
            except train_semckd.NoMatchError:
                matched = []
            assert bool(matched) == (number is not None)
            double = shapes(networks.DOUBLES[student])
            assert double == [(2 * channels, *size) for channels, *size in shapes(student)]


@pytest.mark.parametrize("pair", [(0, 2), (3, 0)])
def test_one_pair_of_layers_has_all_the_attention(tmp_path: Path, pair: tuple[int, int]) -> None:
    study = experiment(tmp_path, "--batch-size", "6")
    student, teacher = study.network(study.recipe.student), study.network(study.recipe.teacher).eval()
    method, setting = train_semckd.METHODS["SemCKD"], Setting("SemCKD", 0.25, pair=pair)
    with train_semckd.capture(student, method) as own, train_semckd.capture(teacher, method) as theirs:
        transfer = study.transfer(method, student, teacher, own, theirs, setting)
        images = torch.randn(6, 1, 16, 16)
        student(images), teacher(images)
        value = transfer.loss(own.features, theirs.features)
        (i, j), calibration = pair, transfer.module
        projected, targets, weights = calibration([own.features[i]], [theirs.features[j]])
    assert torch.equal(weights, torch.ones(6, 1, 1))
    maps = projected[0][0], targets[0][0]
    side = min(part.shape[-1] for part in maps)
    projected, target = (F.adaptive_avg_pool2d(part, side) for part in maps)
    assert value.item() == pytest.approx(F.mse_loss(projected, target).item(), rel=1e-4)
    assert transfer.pairs == [pair]


def test_grad_cam_is_what_a_class_owes_to_the_last_maps() -> None:
    network = networks.build("resnet8-half", 1, 10).eval()
    images, labels = torch.randn(3, 1, 16, 16), torch.tensor([2, 5, 2])
    seen = train_semckd.grad_cam(network, images, labels)
    maps = network(images)[1][-1].detach()
    # The classifier is linear on the mean of the maps: the gradient of a logit is its weights, over the positions.
    weights = network.classifier.weight[labels].detach() / maps[0, 0].numel()
    expected = torch.einsum("nc,nchw->nhw", weights, maps).relu()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)


def test_views_of_other_data_look_like_those_the_network_knows() -> None:
    digits = data.load("digits")
    colours = data.Images(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    other = data.in_memory(colours, colours, ("a", "b"), padding=0, flip=False)
    (seen,) = probing.Views(digits, other, torch.device("cpu")).of(other.test)
    pixels = (seen * digits.std[:, None, None] + digits.mean[:, None, None]) * 255
    expected = F.interpolate(colours.pixels.float(), 16, mode="bilinear", antialias=True).mean(1, keepdim=True)
    torch.testing.assert_close(pixels, expected, rtol=1e-3, atol=1e-2)


def test_a_linear_classifier_separates_what_is_separable() -> None:
    class Brightness(torch.nn.Module):
        """A network whose features are the mean and the square of the brightness."""

        def forward(self, images: torch.Tensor) -> tuple[None, list[torch.Tensor]]:
            return None, [images]

        def pool(self, images: torch.Tensor) -> torch.Tensor:
            brightness = images.mean((1, 2, 3))
            return torch.stack([brightness, brightness.square()], 1)

    labels = torch.arange(30) % 3
    greys = (80 * labels + torch.randint(20, (30,))).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    images = data.Images(greys, labels)
    target = data.in_memory(images, images, ("dark", "grey", "bright"), padding=0, flip=False)
    views = probing.Views(target, target, torch.device("cpu"))
    assert probing.linear_accuracy(Brightness(), views) == 100
    only_dark = replace(target, train=replace(images, labels=torch.zeros_like(labels)))
    assert probing.linear_accuracy(Brightness(), replace(views, target=only_dark)) == pytest.approx(100 / 3)


def test_improvements_of_several_runs_are_points(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = {train_semckd.IMPROVEMENT: {"KD": 40.0, "AT": math.inf}}
    (tmp_path / "other" / "results.json").write_text(json.dumps(other))
    study = experiment(tmp_path, "--methods", "CE", "KD", "AT", "SemCKD", "--runs", str(tmp_path / "other"))
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_semckd.figures, "points", lambda path, values, title: seen.update(values))
        study.draw_improvements({"KD": 20.0})
    assert seen == {"KD": [20, 40]}


def transfer_regressor(transfer: train_semckd.Transfer) -> torch.nn.Module:
    (regressor,) = (module for module in transfer.module.modules() if isinstance(module, torch.nn.Conv2d))
    return regressor


def test_a_grid_shows_medians() -> None:
    grid = results.grid("x", {"a": [[1.0, 3.0, 7.0], [2.0]]}, ["one", "two"], median=True)
    assert "3.00 (1.00 to 7.00) | 2.00" in results.report([grid])


def test_a_grid_shows_mean_and_deviation() -> None:
    grid = results.grid("x", {"a": [[1.0, 3.0], [2.0]]}, ["one", "two"], title="above")
    shown = results.report([grid]).splitlines()
    assert shown[:2] == ["above", ""]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[2:]][2:] == [
        ["a", "2.00 ± 1.41", "2.00"]
    ]


# ----- the whole example

SIZES = ["--epochs", "2", "--teacher-epochs", "1", "--seeds", "1", "--threads", "1", "--methods", "CE", "SemCKD"]
STUDIES = ["--studies", "methods", "beta", "few-shot", "noisy", "--shares", "0.1"]
BETAS = ["--betas", "0", "5", "--betas-crd", "0.5", "0.8"]
WHOLE = [*SIZES, *STUDIES, *BETAS, "--noises", "0.3"]
RUNS = [
    f"{name}-seed0"
    for name in (
        *("ce", "kd", "semckd", "semckd-beta-5", "crd-beta-0.5", "crd"),
        *("ce-share-0.1", "semckd-share-0.1", "semckd-noise-0.3"),
    )
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
    tables = (whole_run / "table.md").read_text()
    for name in RUNS:
        run = json.loads((whole_run / "checkpoints" / f"{name}.json").read_text())
        assert [record["epoch"] for record in run["history"]] == [1, 2]
        assert results.spread([run["history"][-1]["test_accuracy"]]) in tables
        attention = run["history"][-1].get("attention")
        assert (attention is not None) == name.startswith("semckd")
        if attention:
            assert [sum(layer) for layer in attention] == pytest.approx([1] * 4, abs=1e-5)
    assert accuracy["beta"].keys() == {"KD", "SemCKD beta 5", "CRD beta 0.5", "CRD"}
    assert content["layer match"].keys() == {"SemCKD"}
    from matplotlib.image import imread

    for name in ("curves", "attention", "beta", "beta-crd", "grad-cam"):
        picture = imread(whole_run / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


def test_the_papers_figures_are_drawn_from_the_files_of_a_run(whole_run: Path, tmp_path: Path) -> None:
    few = ["--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--share", "0.1", "--threads", "1"]
    studies = ["--studies", "methods", "pairs", "tau", "transfer", "--taus", "0.5"]
    more = ["--methods", "CE", "KD", "SemCKD", "--transfer-data", "digits", "--student", "cnn5-quarter"]
    train_semckd.main([*few, *studies, *more, "--runs", str(whole_run), "--out", str(tmp_path)])
    content = json.loads((tmp_path / "results.json").read_text())
    accuracy = content["test_accuracy"]
    pairs = {f"SemCKD layers {i}-{j}" for i in (1, 2, 3) for j in (1, 2, 3)}
    assert accuracy["pairs"].keys() == {"KD", "SemCKD"} | pairs
    soft = {f"{name} tau 0.5" for name in train_semckd.SOFTENED}
    assert accuracy["tau"].keys() == {"SemCKD"} | soft
    assert content["transfer"].keys() == {"teacher", "CE", "KD", "SemCKD"}
    assert content[train_semckd.IMPROVEMENT].keys() == {"KD"}
    from matplotlib.image import imread

    # Without a gain of KD over CE, there is no relative improvement over KD.
    drawn = ["improvement"] if math.isfinite(content[train_semckd.IMPROVEMENT]["KD"]) else []
    for name in ("pairs", "tau", "transfer", "grad-cam", *drawn):
        picture = imread(tmp_path / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


def test_a_run_that_is_not_there_is_named(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--studies", "transfer"], "--studies transfer needs --transfer-data"),
        (
            ["--studies", "methods", "--runs", str(tmp_path)],
            f"--runs: {tmp_path} has no relative improvement of SemCKD",
        ),
    ):
        with pytest.raises(SystemExit):
            train_semckd.main([*SIZES, *more, "--out", str(whole_run)])
        assert message in capsys.readouterr().err


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
    assert (whole_run / "table.md").read_text().strip() in output


def test_maps_are_captured_of_every_kind_of_network() -> None:
    kinds = ("resnet8-half", "resnext11-small", "wrn-10-1", "cnn5", "vgg8-eighth", "resnet18-224")
    for name in (*kinds, "shufflenetv1-quarter", "shufflenetv2-quarter", "mobilenetv2-eighth"):
        network = networks.build(name, 3, 10).eval()
        with train_semckd.capture(network, train_semckd.METHODS["KD"]) as capture:
            _, stages = network(torch.randn(2, 3, 32, 32))
            assert all(map(torch.equal, capture.features, stages))
