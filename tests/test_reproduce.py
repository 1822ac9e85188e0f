"""The papers' tables: all names exist, and rows of each paper run on digits and on files of the other data sets."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import reproduce  # noqa: E402
import train_icct  # noqa: E402
import train_lkd  # noqa: E402
import train_semckd  # noqa: E402
from common import data, networks, photographs  # noqa: E402
from example_runs import write_cifar100  # noqa: E402
from papers import TEACHER, Cell, printed  # noqa: E402
from train_cckd import Variant  # noqa: E402

CONFIGURATIONS = reproduce.configurations()
LARGE = ("imagenet", "msmt17", "faces")  # their networks end with -224
METHODS = {"LKD": train_lkd.METHODS, "ICCT": train_icct.METHODS, "SemCKD": train_semckd.METHODS}


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_tables_are_whole() -> None:
    counted = {
        name: {number: len(table.rows) for number, table in paper.tables.items()}
        for name, paper in reproduce.PAPERS.items()
    }
    assert counted == {
        "lkd": {1: 4, 2: 2, 3: 6, 4: 2, 5: 2},
        "cckd": {1: 6, 2: 7, 3: 8, 4: 5, 5: 3, 6: 3, 7: 11},
        "icct": {2: 8, 3: 15, 4: 7, 5: 7, 6: 10, 7: 7},
        "semckd": {2: 10, 3: 10, 4: 10, 6: 1, 7: 9, 8: 9, 9: 12},
    }


@pytest.mark.parametrize("small", [True, False], ids=["digits", "full scale"])
@pytest.mark.parametrize("paper", reproduce.PAPERS)
def test_every_configuration_names_what_there_is(paper: str, small: bool, tmp_path: Path) -> None:
    for configuration in (c for name, c in CONFIGURATIONS.items() if name.startswith(f"{paper}-")):
        scale = "digits" if small else reproduce.SCALES[configuration.table.data]
        arguments = reproduce.build_parser().parse_args(["--data", scale, "--out", str(tmp_path)])
        row = reproduce.Reproduction(configuration, arguments, None)
        assert "Recipe: " in row.explanation()
        for cell in configuration.cells:
            trained = cell.on_digits() if small else cell
            assert {trained.teacher, trained.student} <= networks.NETWORKS.keys()
            assert trained.teacher.endswith("-224") == trained.student.endswith("-224") == (scale in LARGE)
            known = (TEACHER, *METHODS.get(configuration.paper.name, ()))
            assert cell.method in known or (paper == "cckd" and isinstance(cell.method, Variant))
            assert cell.published.keys() <= reproduce.MEASURES.keys()
            assert all(0 < (value[0] if isinstance(value, tuple) else value) < 100 for value in cell.published.values())
            row.recipe(cell)


def test_printed_numbers_are_read() -> None:
    assert printed("a b | 1.5 2±0.25 -\nc|3") == {"a b": [1.5, (2.0, 0.25), None], "c": [3.0]}
    assert Cell("", {}, "t", "s", "m", {"k": 2, "noise": 0.1}).folder == "t-s-k2-noise0.1"


# A short training per paper.
@pytest.mark.parametrize("name", ["lkd-table4-row1", "cckd-table7-row9", "icct-table3-row2", "semckd-table7-row2"])
def test_a_row_of_every_paper_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [name, "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    reproduce.main(command)
    output = capsys.readouterr().out
    content = json.loads((tmp_path / "digits" / f"{name}.json").read_text())
    for cell, of_row in zip(content["cells"], CONFIGURATIONS[name].cells, strict=True):
        assert cell["published"] == {k: list(v) if isinstance(v, tuple) else v for k, v in of_row.published.items()}
        for measure, published in of_row.published.items():
            (measured,) = cell["measured"][measure]
            rows = [line.split("|")[2:4] for line in output.splitlines() if line.startswith(f"| {of_row.column}")]
            assert [reproduce.shown(published), f"{measured:.2f}"] in [[part.strip() for part in row] for row in rows]
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    reproduce.main(command)
    assert checkpoints == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert content == json.loads((tmp_path / "digits" / f"{name}.json").read_text())


def test_a_row_of_faces_runs_with_the_distractors_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main(["cckd-table4-row4", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)])
    (cell,) = json.loads((tmp_path / "digits" / "cckd-table4-row4.json").read_text())["cells"]
    assert (cell["recipe"]["head"], cell["recipe"]["instance"]) == ("arcface", "mimic")
    assert cell["measured"].keys() == {"rank_1_of_10", "rank_1_of_100"}
    assert "too few distractors" in capsys.readouterr().out


def test_both_networks_of_dml_2_start_from_given_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, trunks = [], []
    for name in ("resnet14-half", "resnet8-half"):
        network = networks.build(name, 1, 17)  # other classes
        torch.save({"state_dict": network.state_dict()}, tmp_path / name)
        places.append(f"{name}={tmp_path / name}")
        trunks.append(network.stem[0].weight)
    seen = []
    monkeypatch.setattr(reproduce.train_cckd.CorrelationCongruence, "loss", lambda *parts: seen.extend(parts) or 1 / 0)
    command = ["cckd-table3-row4", "--epochs", "1", "--out", str(tmp_path)]
    with pytest.raises(ZeroDivisionError):
        reproduce.main([*command, "--weights", *places])
    _, variant, student, _, partner = seen
    assert variant == Variant("dml", pretrained=True)
    for embedder, trunk in zip((partner, student), trunks, strict=True):
        assert torch.equal(embedder.network.stem[0].weight, trunk)


def test_torchvisions_weights_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"IMAGENET1K_V1": SimpleNamespace(url="https://a.org/models/resnet18-f3.pth")}
    models = SimpleNamespace(get_model_weights=lambda name: {"resnet18": known}[name])
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"resnet18-f3\.pth: download it from https://a\.org/models/resnet18-f3\.pth"):
        networks.weights_file("torchvision:resnet18")
    with pytest.raises(ValueError, match="no weights of ImageNet for vgg8"):
        networks.weights_file("torchvision:vgg8")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f3.pth").touch()
    assert networks.weights_file("torchvision:resnet18") == tmp_path / "checkpoints" / "resnet18-f3.pth"
    assert networks.weights_file("a/b.pt") == Path("a/b.pt")


def test_error_rates_of_a_generation_are_its_own(tmp_path: Path) -> None:
    reproduce.main(["icct-table3-row3", "--epochs", "1", "--seeds", "1", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "digits" / "icct-table3-row3.json").read_text())
    for cell in content["cells"]:
        run = f"ICCT/resnet8-half-resnet8-half/checkpoints/generation2-{cell['method'].lower()}-seed0.json"
        history = json.loads((tmp_path / "digits" / run).read_text())["history"]
        assert cell["measured"]["test_accuracy"] == [100 - history[-1]["test_accuracy"]]


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_full_scale_takes_the_papers_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train.bin", "test.bin"):
        write_cifar100(tmp_path, name, 64)
    monkeypatch.setitem(networks.NETWORKS, "resnet110", networks.NETWORKS["resnet8-half"])
    place = ["--data", "cifar100", "--root", str(tmp_path), "--out", str(tmp_path)]
    reproduce.main(["lkd-table3-row1", *place, "--epochs", "1", "--seeds", "1", "--set", "temperature=3"])
    (student, _) = json.loads((tmp_path / "cifar100" / "lkd-table3-row1.json").read_text())["cells"]
    assert (student["teacher"], student["student"]) == ("resnet110", "resnet14")
    assert student["recipe"]["temperature"] == 3
    assert student["recipe"]["student_schedule"]["lr"] == train_lkd.RECIPES["paper"].student_schedule.lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a configuration"),
        (["lkd-table9"], "there is no configuration 'lkd-table9'"),
        (["lkd-table2", "--data", "cifar100", "--root", "x"], "lkd-table2-row1 is of ImageNet: give --data imagenet"),
        (["lkd-table1", "--set", "bta=1"], "--set bta: the numbers of LKD's recipe are ['alpha',"),
        (
            ["cckd-table3-row4"],
            "starts from trained weights: give --weights resnet14-half=FILE resnet8-half=FILE, where",
        ),
        (["cckd-table3", "--weights", "x=y"], "expected NETWORK=FILE or NETWORK=torchvision:NAME, got 'x=y'"),
        (["lkd-table1", "--set", "beta"], "expected NAME=NUMBER, got 'beta'"),
        (["lkd-table1", "--data", "cifar100"], "needs --root"),
        (["--scale", "small", "--only", "lkd-table9"], "--only lkd-table9: there is no such table or figure"),
    ],
)
def test_errors_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# How many tables and figures each paper prints, counted in the papers.
PRINTED = {"lkd": (5, 3), "cckd": (7, 4), "icct": (7, 5), "semckd": (9, 7)}
NAMES = [
    f"{paper}-{kind}{number}"
    for paper, counts in PRINTED.items()
    for kind, count in zip(("table", "figure"), counts, strict=True)
    for number in range(1, count + 1)
]


def test_every_table_and_figure_is_listed_with_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    reproduce.main(["--list"])
    output = capsys.readouterr().out
    listed = [line for line in output.splitlines() if "-table" in line or "-figure" in line]
    assert [line.split("|")[1].strip() for line in listed[: len(NAMES)]] == NAMES
    assert all(f"| {name} " in output for name in CONFIGURATIONS)
    for line in listed[: len(NAMES)]:
        _, name, _, here, hours, command, _ = (cell.strip() for cell in line.split("|"))
        trains = command != "nothing to run" and name != "icct-table1"
        assert bool(hours) == trains
        assert here


def test_commands_and_miniatures_have_flags_that_exist() -> None:
    entries = reproduce.catalogue.entries(reproduce.PAPERS, reproduce.SCALES)
    assert list(entries) == NAMES
    parsers = {"reproduce.py": reproduce.build_parser()}
    parsers |= {
        f"train_{name}.py": getattr(reproduce, f"train_{name}").build_parser()
        for name in ("lkd", "cckd", "icct", "semckd")
    }
    for entry in entries.values():
        words = entry.command.split()
        for program, *flags in filter(None, (words[1:], list(entry.small))):
            arguments = parsers[program.removeprefix("examples/")].parse_args(flags)
            for name in getattr(arguments, "names", []):
                assert name in NAMES or name in CONFIGURATIONS
        assert bool(entry.command) == bool(entry.small)


def test_hours_by_hand() -> None:
    """ResNet-20 has 41 million multiply-adds, and ResNet-110 has 253 million, as published."""
    cost, recipe = reproduce.cost, replace(train_lkd.RECIPES["paper"], seeds=2)
    student, teacher = (cost.multiply_adds(name) for name in ("resnet20", "resnet110"))
    assert (student, teacher) == pytest.approx((41e6, 253e6), rel=0.01)
    images = 200 * 50_000
    steps = images / 64 * cost.STEP
    alone = images * 2 * 3 * student / cost.RATE + steps
    taught = images * 2 * (3 * student + teacher) / cost.RATE + steps
    own = images * 2 * 3 * teacher / cost.RATE + steps
    cells = [Cell("", {}, "resnet110", "resnet20", method) for method in ("CE", "KD", TEACHER)]
    assert cost.hours("CIFAR-100", recipe, cells) == pytest.approx((2 * alone + 2 * taught + own) / 3600)


def test_miniatures_run_with_a_line_of_progress_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["icct-table1", "lkd-figure2", "lkd-table4"]
    reproduce.main(["--scale", "small", "--only", *names, "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"[{n}/3] {name}" for n, name in enumerate(names, 1)]
    assert "nothing to run (a drawing of the method" in lines[1]
    table = (tmp_path / "small" / "icct-table1.txt").read_text()
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:4]] == ["CNN-5", "0.36", "0.37"]
    assert "on digits (stand-in)" in (tmp_path / "small" / "lkd-table4.txt").read_text()
    assert (tmp_path / "small" / "lkd-table4" / "digits" / "lkd-table4-row2.json").exists()


def test_a_miniature_that_fails_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: list[str]) -> None:
        raise RuntimeError("no room")

    monkeypatch.setitem(reproduce.PROGRAMS, "train_lkd.py", broken)
    with pytest.raises(SystemExit, match=r"failed: lkd-figure1"):
        reproduce.main(["--scale", "small", "--only", "lkd-figure1", "lkd-figure2", "--out", str(tmp_path)])
    assert "failed: no room" in capsys.readouterr().out


# ----- photographs


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Write a few small images in the folders of three classes. All pixels of class n are n."""
    from PIL import Image

    for part, count in (("train", 4), ("val", 2)):
        for label in range(3):
            (tmp_path / part / f"n{label}").mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (50, 40), (label,) * 3).save(tmp_path / part / f"n{label}" / f"{number}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def no_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "WORKERS", 0)


def test_photographs_are_read_with_their_labels(folders: Path) -> None:
    dataset = data.load("imagenet", folders)
    assert (len(dataset.train), len(dataset.test), dataset.class_names) == (12, 6, ("n0", "n1", "n2"))
    dataset = dataset.only(0.5)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    means, deviations = dataset.mean[:, None, None], dataset.std[:, None, None]
    for batches in (dataset.batches(4, 0, torch.device("cpu"), drop_last=False).epoch(0), dataset.test_batches("cpu")):
        count = 0
        for images, labels in batches:
            pixels = (images * deviations + means) * 255
            expected = labels[:, None, None, None].expand(-1, 3, 224, 224).float()
            torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)
            count += len(labels)
        assert count == 6


def test_parts_of_photographs_are_inside_and_varied(folders: Path) -> None:
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    parts = [photographs.random_part(50, 40, random) for _ in range(200)]
    assert all(0 <= left < right <= 50 and 0 <= top < bottom <= 40 for left, top, right, bottom in parts)
    areas = [(right - left) * (bottom - top) / 2000 for left, top, right, bottom in parts]
    assert min(areas) < 0.2
    assert max(areas) > 0.8
    assert photographs.middle(256, 300) == (16, 38, 240, 262)
    from PIL import Image

    for path in (folders / "train").rglob("*.png"):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    batches = data.load("imagenet", folders).batches(4, 0, torch.device("cpu"))
    (first, labels), (again, same), (other, _) = (next(batches.epoch(number)) for number in (0, 0, 1))
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "val does not exist; it must hold a folder of images per class"),
        (lambda root: shutil.rmtree(root / "val" / "n1"), "must hold the same classes, got n1 in one only"),
        (lambda root: [path.unlink() for path in (root / "train" / "n2").iterdir()], "n2 holds no image"),
    ],
)
def test_a_folder_that_is_wrong_is_named(folders: Path, change: Callable[[Path], object], message: str) -> None:
    change(folders)
    with pytest.raises((OSError, ValueError), match=message):
        data.load("imagenet", folders)


def test_half_a_photograph_is_named(folders: Path) -> None:
    path = folders / "val" / "n1" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"n1/0\.png cannot be read as an image: .*truncated"):
        list(data.load("imagenet", folders).test_batches("cpu"))


def test_a_row_of_imagenet_runs(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "SIDE", 32)
    for name in ("resnet34-224", "resnet18-224"):
        monkeypatch.setitem(networks.NETWORKS, name, networks.NETWORKS["resnet8-half"])
    table = CONFIGURATIONS["lkd-table2-row2"].table
    schedules = ("teacher_schedule", "caat_schedule", "student_schedule")
    small = {name: replace(table.recipe[name], batch_size=6) for name in schedules}
    paper = replace(reproduce.PAPERS["lkd"], tables={2: replace(table, recipe=table.recipe | small)})
    monkeypatch.setitem(reproduce.PAPERS, "lkd", paper)
    place = ["--data", "imagenet", "--root", str(folders), "--out", str(folders)]
    reproduce.main(["lkd-table2-row2", *place, "--epochs", "1"])
    content = json.loads((folders / "imagenet" / "lkd-table2-row2.json").read_text())
    assert [cell["column"] for cell in content["cells"]] == ["CE", "KD", "AT", "SP", "CC", "LKD", "Teacher"]
    assert [cell["measured"] for cell in content["cells"]] == [{"test_top_5": [100]}] * 7  # of three classes
