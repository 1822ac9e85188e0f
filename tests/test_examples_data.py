"""Readers of official files. The tests write small files in the official formats."""

from __future__ import annotations

import json
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

for package in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(package)

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train_cckd  # noqa: E402
import train_icct  # noqa: E402
import train_lkd  # noqa: E402
import train_semckd  # noqa: E402
import train_tokens  # noqa: E402
from common import data, formats, photographs  # noqa: E402
from example_runs import write_cifar10, write_folders, write_stl10, write_svhn, write_tiny_imagenet  # noqa: E402


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "WORKERS", 0)


def test_stl10_is_read_byte_by_byte(tmp_path: Path) -> None:
    files = write_stl10(tmp_path / "stl10_binary", {"train": 20, "test": 10})
    dataset = data.load("stl10", tmp_path, checked=False)
    for images, part in ((dataset.train, "train"), (dataset.test, "test")):
        raw = files[f"{part}_X.bin"]
        assert images.labels.tolist() == [label - 1 for label in files[f"{part}_y.bin"]]
        for image, channel, row, column in ((3, 2, 5, 90), (7, 0, 95, 1)):
            # the official layout: channel after channel, and in it column after column
            byte = ((image * 3 + channel) * 96 + column) * 96 + row
            assert images.pixels[image, channel, row, column] == raw.ravel()[byte]
    assert (dataset.num_classes, dataset.shape, dataset.class_names[7]) == (10, (3, 96, 96), "monkey")


def test_svhn_is_read_byte_by_byte(tmp_path: Path) -> None:
    files = write_svhn(tmp_path, {"train": 20, "test": 10})
    dataset = data.load("svhn", tmp_path, checked=False)
    for images, part in ((dataset.train, "train"), (dataset.test, "test")):
        content = files[part]
        assert images.labels.tolist() == [0 if label == 10 else label for label in content["y"].ravel()]
        assert np.array_equal(images.pixels[6, 2], content["X"][:, :, 2, 6])
    assert (dataset.num_classes, dataset.shape, dataset.flip) == (10, (3, 32, 32), False)


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_cifar_is_read_from_its_archive_and_from_its_python_version(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    write_cifar10(binary / "cifar-10-batches-bin", 12)
    expected = data.load("cifar10", binary)

    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(binary / "cifar-10-batches-bin", "cifar-10-batches-bin")

    pickled = tmp_path / "pickled" / "cifar-10-batches-py"
    pickled.mkdir(parents=True)
    for number, path in enumerate(sorted((binary / "cifar-10-batches-bin").iterdir())):
        records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        content = {b"data": records[:, 1:].copy(), b"labels": records[:, 0].tolist(), b"batch_label": str(number)}
        (pickled / path.stem).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {number}".encode() for number in range(10)]
    (pickled / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))

    for root in (packed, pickled.parent):
        found = data.load("cifar10", root, checked=False)
        for images, others in ((found.train, expected.train), (found.test, expected.test)):
            assert torch.equal(images.pixels, others.pixels)
            assert torch.equal(images.labels, others.labels)
        with pytest.raises(ValueError, match=r"is not the official file: expected MD5 \w{32}, got \w{32}; --unchecked"):
            data.load("cifar10", root)
    assert found.class_names[3] == "class 3"


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"train is no file of CIFAR-100's Python version: it holds "):
        data.load("cifar100", tmp_path, checked=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("inner", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_is_read_pixel_by_pixel(tmp_path: Path, inner: str) -> None:
    write_tiny_imagenet(tmp_path / inner, classes=3, train=4, test=2)
    dataset = data.load("tiny-imagenet", tmp_path)
    assert dataset.class_names == ("thing 0", "n1", "n2")
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for images in (dataset.train, dataset.test):
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
            assert pixels.unique().tolist() == [50 * label]
    assert len(dataset.test) == 6
    assert dataset.shape == (3, 64, 64)


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-5])


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stl10", remove("test_y.bin"), r"test_y\.bin does not exist; --root must be the folder .* of https://cs"),
        ("stl10", cut("train_X.bin"), r"train_X\.bin must hold 27648 bytes for each of the 10 labels, got 276475"),
        ("stl10", write("test_y.bin", bytes(10)), r"test_y\.bin is corrupt: expected labels 1 to 10, got 0 to 0"),
        ("svhn", remove("train_32x32.mat"), r"train_32x32\.mat does not exist; --root must .* of http://ufldl"),
        ("svhn", cut("test_32x32.mat"), r"test_32x32\.mat cannot be read as a file of SVHN"),
        (
            "tiny-imagenet",
            remove("val/val_annotations.txt"),
            r"val_annotations\.txt does not exist; .* of http://cs231n",
        ),
        ("tiny-imagenet", write("val/val_annotations.txt", b"a.JPEG\tn9\t0"), r"got 'a\.JPEG\\tn9\\t0' in line 1"),
        ("tiny-imagenet", remove("train/n1/images/n1_0.JPEG"), None),
        ("tiny-imagenet", cut("val/images/val_0.JPEG"), r"val_0\.JPEG cannot be read as an image"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, change: Callable[[Path], object], message: str) -> None:
    write_stl10(tmp_path, {"train": 10, "test": 10})
    write_svhn(tmp_path, {"train": 10, "test": 10})
    write_tiny_imagenet(tmp_path, classes=2, train=2, test=1)
    change(tmp_path)
    if message is None:  # any number of images is right
        assert len(data.load(name, tmp_path, checked=False).train) == 3
        return
    with pytest.raises((OSError, ValueError), match=message):
        data.load(name, tmp_path, checked=False)


@pytest.mark.parametrize("name", ["svhn", "stl10"])
def test_a_file_that_is_not_the_official_one_is_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    {"svhn": write_svhn, "stl10": write_stl10}[name](tmp_path, {"train": 10, "test": 10})
    with pytest.raises(SystemExit):
        train_lkd.main(["--data", name, "--root", str(tmp_path)])
    assert "is not the official file: expected MD5" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in data.SETS if name not in data.SMALL])
def test_a_folder_that_is_not_given_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_lkd.main(["--data", name])
    told = " ".join(capsys.readouterr().err.split())
    assert f"--data {name} needs --root: the folder holding " in told
    assert "://" in told  # where to get the files


def test_published_sums_have_the_length_of_md5() -> None:
    sums = [*formats.STL10_MD5.values(), *formats.SVHN_MD5.values()]
    for version in (formats.CIFAR10, formats.CIFAR100):
        sums += [version.md5, *version.pickled_md5.values()]
    assert len(set(sums)) == len(sums) == 4 + 2 + 8 + 4
    assert all(len(bytes.fromhex(text)) == 16 for text in sums)


TAUGHT = ["--teacher-epochs", "1"]
RUNS = [
    (train_lkd, "svhn", [*TAUGHT, "--methods", "KD"]),
    (train_icct, "stl10", ["--scenario", "strong-to-weak", "--methods", "CE"]),
    (train_tokens, "tiny-imagenet", [*TAUGHT, "--methods", "KD"]),
    (train_semckd, "imagenet", [*TAUGHT, "--studies", "methods", "--methods", "SemCKD"]),
    (train_lkd, "imagenet", [*TAUGHT, "--methods", "LKD"]),
    (train_icct, "imagenet", ["--scenario", "strong-to-weak", "--methods", "CE"]),
    # SUR finds the superclasses of images in folders.
    (train_cckd, "imagenet", [*TAUGHT, "--study", "samplers", "--superclasses", "3", "--samples", "2"]),
]


@pytest.mark.parametrize(("example", "name", "flags"), RUNS, ids=lambda value: getattr(value, "__name__", None))
def test_examples_train_on_official_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: ModuleType, name: str, flags: list[str]
) -> None:
    monkeypatch.setattr(photographs, "SIDE", 32)
    per_class = 22 if example is train_cckd else 7  # its teacher has batches of 64
    if name == "tiny-imagenet":
        write_tiny_imagenet(tmp_path, classes=3, train=per_class, test=2)
    elif name == "imagenet":
        write_folders(tmp_path, classes=3, train=per_class, test=2)
    else:
        {"svhn": write_svhn, "stl10": write_stl10}[name](tmp_path, {"train": 3 * per_class, "test": 6})
    small = ["--recipe", "demo", "--epochs", "1", "--seeds", "1", "--batch-size", "6", "--share", "1", "--unchecked"]
    example.main(["--data", name, "--root", str(tmp_path), "--out", str(tmp_path / "out"), *small, *flags])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["data"] == {**content["data"], "data": name, "images": [3 * per_class, 6]}
    assert list((tmp_path / "out" / "figures").glob("*.png"))
