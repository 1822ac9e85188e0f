"""The examples: data files, networks, training that survives a kill, and a whole small run."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import common  # noqa: E402
import train_cckd  # noqa: E402
import train_icct  # noqa: E402
import train_lkd  # noqa: E402
import train_semckd  # noqa: E402
from common import data, figures, formats, networks, options, results, training  # noqa: E402
from example_runs import assert_equal, idx, write_cifar10, write_cifar100, write_fashion_mnist  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ----- data


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
@pytest.mark.parametrize("inner", ["", "cifar-100-binary"])
def test_cifar100_is_read_byte_by_byte(tmp_path: Path, inner: str) -> None:
    train, test = (
        write_cifar100(tmp_path / inner, name, count) for name, count in (("train.bin", 130), ("test.bin", 7))
    )
    dataset = data.load("cifar100", tmp_path)
    for images, records in ((dataset.train, train), (dataset.test, test)):
        assert images.labels.tolist() == records[:, 1].tolist()
        for image, channel, row, column in ((0, 0, 0, 0), (3, 1, 5, 7), (6, 2, 31, 31)):
            expected = records[image, 2 + channel * 1024 + row * 32 + column]
            assert images.pixels[image, channel, row, column] == expected
    normalised = dataset.normalise(dataset.train.pixels)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert (dataset.num_classes, dataset.channels, dataset.padding, dataset.flip) == (100, 3, 4, True)


def test_a_count_that_is_not_the_official_one_is_told(tmp_path: Path) -> None:
    write_cifar100(tmp_path, "test.bin", 3)
    with pytest.warns(UserWarning, match=r"test\.bin holds 3 images where the official file holds 10000"):
        formats.cifar_records(tmp_path / "test.bin", (tmp_path / "test.bin").read_bytes(), formats.CIFAR100)


@pytest.mark.parametrize(
    ("cut", "got"), [(1, "2 of them and 3073 bytes more"), (3074 * 3, "0 of them and 0 bytes more")]
)
def test_a_truncated_file_is_named(tmp_path: Path, cut: int, got: str) -> None:
    write_cifar100(tmp_path, "train.bin", 3)
    path = tmp_path / "train.bin"
    path.write_bytes(path.read_bytes()[: 3 * 3074 - cut])
    with pytest.raises(ValueError, match=rf"train\.bin is truncated.*records of 3074 bytes, got {got}"):
        formats.cifar_records(path, path.read_bytes(), formats.CIFAR100)


@pytest.mark.parametrize(("column", "what", "value"), [(0, "coarse", 20), (1, "fine", 100)])
def test_a_corrupt_label_is_named(tmp_path: Path, column: int, what: str, value: int) -> None:
    records = write_cifar100(tmp_path, "train.bin", 5)
    records[3, column] = value
    records.tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=rf"train\.bin is corrupt: record 3 has {what} label {value}, expected 0 to"):
        formats.cifar_records(tmp_path / "train.bin", (tmp_path / "train.bin").read_bytes(), formats.CIFAR100)


def test_class_names_that_are_not_a_hundred_are_named(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        write_cifar100(tmp_path, name, 3)
    names = tmp_path / "fine_label_names.txt"
    names.write_bytes(b"apple\nbear\n\xff")
    official = "where the official file holds"
    with (
        pytest.warns(UserWarning, match=official),
        pytest.raises(ValueError, match=r"names\.txt is .* expected 100 names, got 3"),
    ):
        data.load("cifar100", tmp_path)
    names.write_text("\n".join(f"class{i}" for i in range(100)))
    with pytest.warns(UserWarning, match=official):
        assert data.load("cifar100", tmp_path).class_names[99] == "class99"


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_byte_by_byte(tmp_path: Path, inner: str) -> None:
    files = write_cifar10(tmp_path / inner, 20)
    dataset = data.load("cifar10", tmp_path)
    train = np.concatenate([files[f"data_batch_{number}.bin"] for number in range(1, 6)])
    for images, records in ((dataset.train, train), (dataset.test, files["test_batch.bin"])):
        assert images.labels.tolist() == records[:, 0].tolist()
        assert images.pixels.flatten(1).numpy().tobytes() == records[:, 1:].tobytes()
    assert (dataset.num_classes, dataset.shape) == (10, (3, 32, 32))
    (tmp_path / inner / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin does not exist; unpack https://.*cifar-10-binary"):
        data.load("cifar10", tmp_path)


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_byte_by_byte(tmp_path: Path, packed: bool) -> None:
    arrays = write_fashion_mnist(tmp_path, {"train": 30, "t10k": 20}, packed=packed)
    dataset = data.load("fashion-mnist", tmp_path)
    for images, part in ((dataset.train, "train"), (dataset.test, "t10k")):
        pixels = arrays[f"{part}-images-idx3-ubyte"]
        assert images.labels.tolist() == arrays[f"{part}-labels-idx1-ubyte"].tolist()
        assert np.array_equal(images.pixels[:, 0, 2:-2, 2:-2], pixels)
        assert images.pixels.sum() == pixels.sum()  # the border is empty
    assert (dataset.num_classes, dataset.shape) == (10, (1, 32, 32))


def test_fashion_mnist_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_lkd.main(["--data", "fashion-mnist", "--root", str(tmp_path)])
    told = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz does not exist; on Debian, 'apt-get install dataset-fashion-mnist'" in told


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda content: content[:-9], "train-images.*truncated or corrupt"),
        ("t10k-images-idx3-ubyte.gz", lambda _: b"no gzip", "t10k-images.*truncated or corrupt"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(7, np.uint8))[:-1], "expected 7 values .*, got 6"),
        ("t10k-labels-idx1-ubyte", lambda _: b"\x00\x00\x0d\x01", "no IDX file of bytes: it starts with 00 00 0d 01"),
        ("t10k-labels-idx1-ubyte", lambda _: b"", "no IDX file of bytes: it starts with nothing"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.full(7, 10, np.uint8)), "expected labels 0 to 9, got 10"),
        ("t10k-labels-idx1-ubyte", lambda _: idx(np.zeros(6, np.uint8)), r"got shapes \(7, 28, 28\) and \(6,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_a_broken_idx_file_is_named(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    """A file without .gz is read in place of the packed file."""
    write_fashion_mnist(tmp_path, {"train": 10, "t10k": 7})
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(ValueError, match=message):
        data.load("fashion-mnist", tmp_path)


def test_a_file_of_the_official_length_has_the_official_checksum(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, {"t10k": 10_000}, packed=False)
    with pytest.raises(
        ValueError, match=r"t10k-images-idx3-ubyte is corrupt: expected SHA-256 5b4141f0\w*, got \w{64}"
    ):
        formats.read_fashion_mnist(tmp_path, "t10k")


@pytest.mark.skipif(not formats.FASHION_MNIST_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_installed_fashion_mnist_is_the_official_one() -> None:
    """The four checksums match, and there is no warning about counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.load("fashion-mnist")
    assert (len(dataset.train), len(dataset.test)) == (60_000, 10_000)
    assert dataset.train.labels.bincount().tolist() == [6000] * 10


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
@pytest.mark.parametrize(
    ("example", "flags"),
    [
        (train_lkd, ["--teacher-epochs", "1", "--methods", "KD"]),
        (train_cckd, ["--teacher-epochs", "1", "--study", "samplers"]),
        (train_icct, ["--scenario", "strong-to-weak", "--methods", "ICCT"]),
        (train_semckd, ["--teacher-epochs", "1", "--studies", "methods", "--methods", "SemCKD"]),
    ],
    ids=["lkd", "cckd", "icct", "semckd"],
)
def test_every_example_trains_on_real_images(tmp_path: Path, example: ModuleType, flags: list[str], name: str) -> None:
    write_cifar10(tmp_path, 20)
    write_fashion_mnist(tmp_path, {"train": 100, "t10k": 20})
    small = ["--recipe", "demo", "--epochs", "1", "--seeds", "1", "--batch-size", "20", "--share", "1"]
    example.main(["--data", name, "--root", str(tmp_path), "--out", str(tmp_path / "out"), *small, *flags])
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["data"]["data"] == name
    assert content["data"]["images"] == [100, 20]


def test_data_errors_are_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "needs --root"),
        (["--root", str(tmp_path)], f"{tmp_path}/train.bin does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train_lkd.main(["--data", "cifar100", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root", "cifar"], "--root is of no use to --data digits"),
        (["--device", "abacus"], "argument --device: Expected one of cpu, cuda"),
        (["--backend", "triton", "--device", "cpu"], "argument --backend: backend='triton' cannot run here"),
        (["--lr", "-1"], "argument --lr: expected a number above 0, got -1"),
        (["--temperature", "nan"], "argument --temperature: expected a number above 0, got nan"),
        (["--share", "2"], "argument --share: expected a number in [0, 1], got 2"),
        (["--batch-size", "5000"], "batch_size=5000 is more than the 1198 training images"),
    ],
)
def test_what_cannot_be_done_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_lkd.main(["--out", str(tmp_path), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_digits_are_real_and_whole() -> None:
    from sklearn.datasets import load_digits

    dataset = data.load("digits")
    assert len(dataset.train) + len(dataset.test) == len(load_digits().target)
    assert dataset.train.pixels.shape[1:] == (1, 16, 16)
    # Every class is split equally, and every digit keeps its ink at any place.
    share = dataset.test.labels.bincount() / (dataset.test.labels.bincount() + dataset.train.labels.bincount())
    assert ((share - 1 / 3).abs() < 0.01).all()
    ink = torch.cat([dataset.train.pixels, dataset.test.pixels]).double().sum((1, 2, 3)).sum()
    assert ink / (load_digits().images.sum() * 255 / 16 * (12 / 8) ** 2) == pytest.approx(1, abs=0.01)


def test_held_out_images_are_training_images() -> None:
    dataset = data.load("digits")
    held = dataset.hold_out()
    assert len(held.train) + len(held.test) == len(dataset.train)
    known = {image.numpy().tobytes() for image in dataset.train.pixels}
    assert all(image.numpy().tobytes() in known for image in held.test.pixels)
    assert len(dataset.only(0.1).train) == pytest.approx(0.1 * len(dataset.train), abs=5)


def numbered(count: int, side: int = 6) -> data.Dataset:
    """Return images whose pixels encode image and place. The label is the index."""
    pixels = (torch.arange(count * side * side) % 251 + 1).to(torch.uint8).view(count, 1, side, side)
    images = data.Images(pixels, torch.arange(count))
    return data.Dataset(images, images, tuple(map(str, range(count))), torch.zeros(1), torch.ones(1), 2, True)


def test_crops_are_windows_of_the_bordered_image_some_mirrored() -> None:
    dataset = numbered(40)
    bordered = F.pad(dataset.train.pixels, [2] * 4)[:, 0]
    crops = data.crop(bordered[:, None], 6, torch.Generator().manual_seed(torch.randint(2**31, ()).item()), flip=True)
    windows = bordered.unfold(1, 6, 1).unfold(2, 6, 1).flatten(1, 2)
    plain = (windows == crops).all((2, 3)).any(1)
    mirrored = (windows.flip(3) == crops).all((2, 3)).any(1)
    assert (plain | mirrored).all()
    assert plain.any()
    assert mirrored.any()


def test_an_epoch_depends_on_seed_and_number_alone_and_shows_no_image_twice() -> None:
    dataset = numbered(40)
    batches = data.Batches(dataset, 16, 3, CPU)
    first = list(batches.epoch(0))
    assert len(first) == len(batches) == 2
    labels = torch.cat([labels for _, labels in first])
    assert len(labels.unique()) == 32
    list(batches.epoch(1))
    again, other, reseeded = (
        list(b.epoch(e)) for b, e in ((batches, 0), (batches, 1), (data.Batches(dataset, 16, 4, CPU), 0))
    )
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])
    assert not torch.equal(first[0][1], reseeded[0][1])
    with pytest.raises(ValueError, match="batch_size=41 is more than the 40 training images"):
        data.Batches(dataset, 41, 0, CPU)


def test_the_last_batch_is_smaller_if_it_is_kept() -> None:
    for count, sizes in ((40, [16, 16, 8]), (32, [16, 16])):
        batches = data.Batches(numbered(count), 16, 3, CPU, drop_last=False)
        labels = [labels for _, labels in batches.epoch(0)]
        assert [len(part) for part in labels] == sizes
        assert len(batches) == len(sizes)
        assert len(torch.cat(labels).unique()) == count


def test_a_share_of_the_labels_is_wrong() -> None:
    dataset = data.load("digits")
    noisy = dataset.mislabelled(0.3)
    changed = noisy.train.labels != dataset.train.labels
    assert changed.sum() == round(0.3 * len(dataset.train))
    assert noisy.train.labels.unique().tolist() == list(range(10))
    assert torch.equal(noisy.train.pixels, dataset.train.pixels)
    assert torch.equal(noisy.test.labels, dataset.test.labels)
    assert torch.equal(noisy.train.labels, dataset.mislabelled(0.3).train.labels)
    assert torch.equal(dataset.mislabelled(0.0).train.labels, dataset.train.labels)


# ----- networks


def narrow_resnet_size(width: int, blocks: int) -> int:
    """Return the number of parameters of a ResNet with ``width``, 2 and 4 times ``width`` channels."""

    def block(inputs: int, outputs: int) -> int:
        shortcut = inputs * outputs + 2 * outputs if inputs != outputs else 0
        return 9 * outputs * (inputs + outputs) + 4 * outputs + shortcut

    channels = (width, 2 * width, 4 * width)
    stages = sum(block(max(c // 2, width), c) + (blocks - 1) * block(c, c) for c in channels)
    return 9 * 3 * width + 2 * width + stages + (channels[-1] + 1) * 100


def vgg_size(layers: int, width: int) -> int:
    """Return the number of parameters of a VGG: five stages of ``layers`` layers, the first with ``width`` channels."""
    widths = [3, *(min(width << stage, 8 * width) for stage in range(5) for _ in range(layers))]
    return sum(9 * a * b + 3 * b for a, b in pairwise(widths)) + (widths[-1] + 1) * 100


def wide_resnet_size(depth: int, width: int) -> int:
    """Return the number of parameters of a wide ResNet."""

    def block(inputs: int, outputs: int) -> int:
        shortcut = inputs * outputs if inputs != outputs else 0
        return 9 * outputs * (inputs + outputs) + 2 * (inputs + outputs) + shortcut

    channels = [16 * width, 32 * width, 64 * width]
    blocks = (depth - 4) // 6
    stages = sum(block(a, b) + (blocks - 1) * block(b, b) for a, b in pairwise([16, *channels]))
    return 9 * 3 * 16 + stages + 2 * channels[-1] + (channels[-1] + 1) * 100


def basic_resnet_size(depths: tuple[int, ...], width: int) -> int:
    """Return the number of parameters of a ResNet for photographs with basic blocks and stages of ``width``, 2, 4 and 8
    times ``width``.
    """

    def block(inputs: int, outputs: int, shortcut: bool) -> int:
        return 9 * outputs * (inputs + outputs) + 4 * outputs + shortcut * (inputs * outputs + 2 * outputs)

    channels = [width << index for index in range(4)]
    stages = sum(
        block(a, b, a != b) + (depth - 1) * block(b, b, False)
        for depth, (a, b) in zip(depths, pairwise([64, *channels]), strict=True)
    )
    return 49 * 3 * 64 + 128 + stages + 1000 * (channels[-1] + 1)


RESNET, VGG, SHUFFLENET, MOBILENET, CNN = (32, 16, 8), (16, 8, 4, 4), (16, 8, 4), (16, 8, 4, 2), (16, 8, 4)
PHOTOGRAPHS = (56, 28, 14, 7)
BASIC, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)


# The papers' networks have the sizes published with the results on CIFAR-100. The networks for photographs have
# torchvision's sizes. The ICCT paper counts ResNet-101 and ResNeXt-29 with ten classes, 184 320 or 92 160 weights and
# 90 biases less. Unlike torchvision's, this MobileNetV2 expands in its first block too, by 32 x 32 weights and a batch
# norm. No paper has the sizes of resnet8x8 and of the ShuffleNets and MobileNets of other widths.
@pytest.mark.parametrize(
    ("name", "parameters", "channels", "sides"),
    [
        ("resnet8-quarter", narrow_resnet_size(4, 1), (4, 8, 16), RESNET),
        ("resnet8-half", narrow_resnet_size(8, 1), (8, 16, 32), RESNET),
        ("resnet8", narrow_resnet_size(16, 1), (16, 32, 64), RESNET),
        ("resnet14-half", narrow_resnet_size(8, 2), (8, 16, 32), RESNET),
        ("resnet14", 181_108, (16, 32, 64), RESNET),
        ("resnet20", 278_324, (16, 32, 64), RESNET),
        ("resnet110", 1_736_564, (16, 32, 64), RESNET),
        ("resnet8x4", 1_233_540, (64, 128, 256), RESNET),
        ("resnet8x8", 4_875_428, (128, 256, 512), RESNET),
        ("resnet32x4", 7_433_860, (64, 128, 256), RESNET),
        ("resnet18", 11_220_132, (64, 128, 256, 512), (32, 16, 8, 4)),
        ("resnet50", 23_520_842 + 184_320 + 90, BOTTLENECK, (32, 16, 8, 4)),
        ("resnet101", 42_512_970 + 184_320 + 90, BOTTLENECK, (32, 16, 8, 4)),
        ("resnext29", 34_426_698 + 92_160 + 90, (256, 512, 1024), RESNET),
        ("resnext11-small", 20_172, (16, 32, 64), RESNET),
        ("wrn-10-1", wide_resnet_size(10, 1), (16, 32, 64), RESNET),
        ("wrn-10-2", wide_resnet_size(10, 2), (32, 64, 128), RESNET),
        ("wrn-16-4", wide_resnet_size(16, 4), (64, 128, 256), RESNET),
        ("wrn-16-10", wide_resnet_size(16, 10), (160, 320, 640), RESNET),
        ("wrn-28-2", wide_resnet_size(28, 2), (32, 64, 128), RESNET),
        ("wrn-28-10", 36_536_884, (160, 320, 640), RESNET),
        ("cnn5-quarter", 13_572, (8, 16, 32), CNN),
        ("cnn5", 368_868, (32, 64, 128), CNN),
        ("wrn-16-1", 180_916, (16, 32, 64), RESNET),
        ("wrn-16-2", 703_284, (32, 64, 128), RESNET),
        ("wrn-40-2", 2_255_156, (32, 64, 128), RESNET),
        ("vgg8-eighth", vgg_size(1, 8), (16, 32, 64, 64), VGG),
        ("vgg8-quarter", vgg_size(1, 16), (32, 64, 128, 128), VGG),
        ("vgg8", 3_965_028, (128, 256, 512, 512), VGG),
        ("vgg8-double", vgg_size(1, 128), (256, 512, 1024, 1024), VGG),
        ("vgg13-eighth", 154_700, (16, 32, 64, 64), VGG),
        ("vgg13-quarter", vgg_size(2, 16), (32, 64, 128, 128), VGG),
        ("vgg13", 9_462_180, (128, 256, 512, 512), VGG),
        ("vgg13-double", vgg_size(2, 128), (256, 512, 1024, 1024), VGG),
        ("shufflenetv1", 949_258, (240, 480, 960), SHUFFLENET),
        ("shufflenetv1-double", 3_520_918, (480, 960, 1920), SHUFFLENET),
        ("shufflenetv2", 1_355_528, (116, 232, 464), SHUFFLENET),
        ("shufflenetv2-double", 5_134_276, (232, 464, 928), SHUFFLENET),
        ("mobilenetv2", 812_836, (12, 16, 48, 160), MOBILENET),
        ("shufflenetv1-quarter", 85_213, (60, 120, 240), SHUFFLENET),
        ("shufflenetv1-half", 271_828, (120, 240, 480), SHUFFLENET),
        ("shufflenetv2-quarter", 96_676, (32, 64, 128), SHUFFLENET),
        ("shufflenetv2-half", 337_764, (64, 128, 256), SHUFFLENET),
        ("mobilenetv2-eighth", 57_178, (3, 4, 12, 40), MOBILENET),
        ("mobilenetv2-quarter", 178_124, (6, 8, 24, 80), MOBILENET),
        ("mobilenetv2-full", 3_504_872 + 1088 - 900 * 1281, (24, 32, 96, 320), MOBILENET),
        ("resnet18-224", 11_689_512, BASIC, PHOTOGRAPHS),
        ("resnet34-224", 21_797_672, BASIC, PHOTOGRAPHS),
        ("resnet50-224", 25_557_032, BOTTLENECK, PHOTOGRAPHS),
        ("resnext101-224", 83_455_272, BOTTLENECK, PHOTOGRAPHS),
        ("wrn-18-2-224", basic_resnet_size((2, 2, 2, 2), 128), (128, 256, 512, 1024), PHOTOGRAPHS),
        ("wrn-34-2-224", basic_resnet_size((3, 4, 6, 3), 128), (128, 256, 512, 1024), PHOTOGRAPHS),
        ("shufflenetv2-half-224", 1_366_792, (48, 96, 192), PHOTOGRAPHS[1:]),
        ("shufflenetv2-224", 3_377_128, (96, 192, 384), PHOTOGRAPHS[1:]),
        ("mobilenetv2-224", 812_836 + 900 * 1281, (12, 16, 48, 160), PHOTOGRAPHS),
        ("mobilenetv2-full-224", 3_504_872 + 1088, (24, 32, 96, 320), PHOTOGRAPHS),
    ],
)
def test_networks_have_their_papers_sizes(
    name: str, parameters: int, channels: tuple[int, ...], sides: tuple[int, ...]
) -> None:
    """Only shapes are computed, without memory."""
    photographs = name.endswith("-224")
    with torch.device("meta"):
        network = networks.build(name, 3, 1000 if photographs else 100)
        logits, stages = network(torch.randn(2, 3, *[224 if photographs else 32] * 2))
    assert networks.parameter_count(network) == parameters
    assert network.channels == channels
    assert logits.shape == (2, network.classifier.out_features)
    assert [stage.shape for stage in stages] == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]


def test_shuffled_channels_take_turns_and_half_of_them_pass_a_unit_by() -> None:
    from common.networks import shufflenet, staged

    features = torch.arange(6.0).view(1, 6, 1, 1)
    assert staged.ChannelShuffle(2)(features).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    features = torch.randn(2, 8, 4, 4)
    assert torch.equal(shufflenet.UnitV2(8, 8, 1)(features)[:, ::2], features[:, :4])


def test_strided_shortcuts_have_the_gradient_of_a_strided_convolution() -> None:
    """With fewer channels than a vector and in channels_last, where oneDNN's own gradient is wrong."""
    from common.networks import staged

    shortcut = staged.conv1x1(4, 8, 2)
    features = torch.randn(64, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    plain = shortcut.weight.detach().double().requires_grad_()
    for _ in range(10):  # memory beyond the end is not always in use
        shortcut.zero_grad()
        result = shortcut(features)
        slope = torch.randn_like(result)
        result.backward(slope)
    expected = F.conv2d(features.double().contiguous(), plain, stride=2)
    expected.backward(slope.double().contiguous())
    torch.testing.assert_close(result, expected.float())
    torch.testing.assert_close(shortcut.weight.grad, plain.grad.float(), rtol=1e-4, atol=1e-3)


def test_every_network_is_tested() -> None:
    marks = test_networks_have_their_papers_sizes.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(networks.NETWORKS)


# ----- training


class Tiny(nn.Module):
    """A network that draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(64, 40)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.classifier(self.body(images)), None


class Interrupted(BaseException):
    pass


def fit_tiny(checkpoint: Path, *, stop_after: int | None = None, **settings: object) -> tuple[Tiny, training.History]:
    torch.manual_seed(5)
    dataset = numbered(40)
    network = Tiny()
    evaluations = 0

    def evaluate() -> dict[str, float]:
        nonlocal evaluations
        evaluations += 1
        if stop_after is not None and evaluations > stop_after:
            raise Interrupted
        return training.measure(lambda images: network(images)[0], dataset, CPU)

    def loss(images: Tensor, labels: Tensor) -> training.Losses:
        return {"loss": F.cross_entropy(network(images)[0], labels)}

    schedule = training.Schedule(epochs=5, lr=0.1, milestones=(2, 4), batch_size=8)
    batches = data.Batches(dataset, 8, 0, CPU)
    return network, training.fit("tiny", network, loss, batches, schedule, evaluate, checkpoint, settings)


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    network, history = fit_tiny(tmp_path / "whole.pt")
    with pytest.raises(Interrupted):
        fit_tiny(tmp_path / "parts.pt", stop_after=stop_after)
    torch.manual_seed(0)
    resumed, resumed_history = fit_tiny(tmp_path / "parts.pt")
    assert resumed_history == history
    assert_equal(resumed.state_dict(), network.state_dict())
    assert_equal(training.read(tmp_path / "parts.pt"), training.read(tmp_path / "whole.pt"))
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert [record["lr"] for record in history] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_a_write_cut_short_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    training.replace_file(path, lambda temporary: temporary.write_text("whole"))

    def cut_short(temporary: Path) -> None:
        temporary.write_text("ha")
        raise Interrupted

    with pytest.raises(Interrupted):
        training.replace_file(path, cut_short)
    assert path.read_text() == "whole"


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit_tiny(tmp_path / "tiny.pt", beta=0.1)
    with pytest.raises(training.CheckpointError, match=r"tiny\.pt was trained with beta=0\.1 \(now 0\.2\)"):
        fit_tiny(tmp_path / "tiny.pt", beta=0.2)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    fit_tiny(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(training.CheckpointError, match=r"tiny\.pt cannot be read as a checkpoint"):
        fit_tiny(path)


def test_a_checkpoint_with_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    fit_tiny(path)
    content = bytearray(path.read_bytes())
    weight = training.read(path)["module"]["classifier.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(training.CheckpointError, match=r"tiny\.pt cannot be read as a checkpoint: .* checksum"):
        fit_tiny(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"module": {}}, r"is no checkpoint of this training: it has no history, optimizer, rng, scheduler, settings"),
        ([1, 2], "must hold a dictionary, got list"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "tiny.pt")
    with pytest.raises(training.CheckpointError, match=rf"tiny\.pt {message}"):
        fit_tiny(tmp_path / "tiny.pt")


@pytest.mark.parametrize(
    "other", [{"module": {}}, {"optimizer": {}}, {"scheduler": 5}, {"rng": torch.zeros(3)}], ids=str
)
def test_a_checkpoint_of_something_else_is_named(tmp_path: Path, other: dict) -> None:
    path = tmp_path / "tiny.pt"
    fit_tiny(path)
    torch.save(training.read(path) | other, path)
    with pytest.raises(training.CheckpointError, match=r"tiny\.pt does not hold what this training saves"):
        fit_tiny(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    torch.save({"settings": Interrupted()}, path)
    with pytest.raises(training.CheckpointError, match="cannot be read"):
        fit_tiny(path)


def test_weights_are_loaded_from_a_checkpoint_or_a_state_dictionary(tmp_path: Path) -> None:
    network, _ = fit_tiny(tmp_path / "tiny.pt")
    torch.save(network.state_dict(), tmp_path / "state.pt")
    for name in ("tiny.pt", "state.pt"):
        other = Tiny()
        assert training.fingerprint(other) != training.fingerprint(network)
        training.load_weights(other, tmp_path / name)
        assert training.fingerprint(other) == training.fingerprint(network)
    with pytest.raises(training.CheckpointError, match=r"state\.pt does not fit this network:"):
        training.load_weights(networks.build("resnet14", 1, 10), tmp_path / "state.pt")


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of a DataParallel module of another program, without counters."""
    kept = [name for name in state if not name.endswith("num_batches_tracked")]
    return {f"module.layer{i}.{name.rpartition('.')[2]}": state[name] for i, name in enumerate(kept)}


def test_weights_of_other_programs_are_loaded_in_the_order_of_their_layers(tmp_path: Path) -> None:
    network, other = (networks.build("resnet14", 3, 10) for _ in range(2))
    network(torch.randn(4, 3, 8, 8))
    torch.save({"epoch": 3, "model": renamed(network.state_dict())}, tmp_path / "model.pth")
    training.load_weights(other, tmp_path / "model.pth")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(other.eval()(images)[0], network.eval()(images)[0])


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = renamed(networks.build("resnet14", 3, 10).state_dict())
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(training.CheckpointError) as error:
        training.load_weights(networks.build("resnet14", 1, 10), tmp_path / "model.pth")
    lines = str(error.value).splitlines()
    assert lines[0].endswith("model.pth does not fit this network:")
    assert lines[1:] == ["  expected stem.0.weight (16, 1, 3, 3), got layer0.weight (16, 3, 3, 3)"]
    with pytest.raises(training.CheckpointError, match=r"and \d+ more"):
        training.load_weights(networks.build("resnet20", 3, 10), tmp_path / "model.pth")
    shuffle = networks.build("shufflenetv1-quarter", 3, 10)
    torch.save(renamed(shuffle.state_dict()), tmp_path / "model.pth")
    with pytest.raises(training.CheckpointError, match="shuffle channels in another order"):
        training.load_weights(shuffle, tmp_path / "model.pth")


def test_measuring_one_and_several_classifiers() -> None:
    dataset = numbered(40)
    logits = torch.randn(3, 40, 40)
    several = training.measure(lambda _: logits, dataset, CPU)
    for index in range(3):
        one = training.measure(lambda _, index=index: logits[index], dataset, CPU)
        assert one["test_loss"] == pytest.approx(F.cross_entropy(logits[index], dataset.test.labels).item(), rel=1e-5)
        assert one["test_accuracy"] == pytest.approx(100 * (logits[index].argmax(1) == torch.arange(40)).float().mean())
        assert (one["test_accuracy"], one["test_loss"]) == pytest.approx(
            (several["test_accuracy"][index], several["test_loss"][index])
        )


# ----- recipe, loss and table


def recipe(*arguments: str) -> train_lkd.Recipe:
    return train_lkd.recipe_of(train_lkd.build_parser().parse_args(arguments))


def test_the_papers_recipe() -> None:
    paper = recipe("--recipe", "paper")
    assert paper == recipe("--data", "cifar100")
    assert (paper.k, paper.alpha, paper.temperature, paper.threshold, paper.share) == (4, 1, 4, 0, 1)
    assert 0.001 <= paper.beta <= 0.1
    assert (paper.scale, paper.reduction, paper.partition) == (False, "batchmean", "split")  # Eq. 1, Eq. 2, section 3.3
    student, caat = paper.student_schedule, paper.caat_schedule
    assert (student.epochs, student.lr, student.milestones) == (200, 0.1, (80, 120, 160))
    assert (caat.epochs, caat.lr, caat.milestones) == (60, 0.05, (30, 40, 50))
    assert {(s.batch_size, s.momentum, s.weight_decay) for s in (student, caat)} == {(64, 0.9, 5e-4)}


def test_flags_override_the_recipe() -> None:
    changed = recipe(
        "--recipe", "paper", "--epochs", "20", "--beta", "0.01", "--teacher", "wrn-40-2", "--batch-size", "32"
    )
    assert changed.student_schedule == training.Schedule(20, 0.1, (8, 12, 16), batch_size=32)
    assert changed.teacher_schedule.epochs == 200
    assert (changed.beta, changed.teacher, changed.student) == (0.01, "wrn-40-2", "resnet20")


@pytest.mark.parametrize("recipe_name", ["demo", "paper"])
@pytest.mark.parametrize("name", train_lkd.METHODS)
def test_the_loss_is_eq_11(tmp_path: Path, name: str, recipe_name: str) -> None:
    flags = ["--recipe", recipe_name, "--teacher", "resnet14-half", "--student", "resnet8-half"]
    flags += ["--out", str(tmp_path), "--alpha", "0.3", "--beta", "0.01", "--threshold", "0.5"]
    arguments = train_lkd.build_parser().parse_args(flags)
    settings = train_lkd.recipe_of(arguments)
    experiment = train_lkd.LocalCorrelation(arguments, settings, data.load("digits"))
    student, teacher = (networks.build(n, 1, 10).eval() for n in (settings.student, settings.teacher))
    caat = nn.ModuleList(kdkernels.nn.ClassAwareAttention(c, 10).freeze() for c in teacher.channels)
    images, labels = torch.randn(6, 1, 16, 16), torch.randint(10, (6,))
    method = train_lkd.METHODS[name]
    losses = experiment.student_loss(method, student, teacher, caat)(images, labels)

    (logits, stages), (teacher_logits, teacher_stages) = student(images), teacher(images)
    expected = F.cross_entropy(logits, labels)
    if name != "CE":
        p, q = (torch.log_softmax(values.double() / 4, 1) for values in (teacher_logits, logits))
        scale = {"demo": 16, "paper": 1}[recipe_name]  # the paper's Eq. 1 has no T²
        expected = 0.7 * expected + 0.3 * scale * (p.exp() * (p - q)).sum(1).mean()
    masks = None
    if name == "LKD+CAAT":
        masks = [mask(stage) for mask, stage in zip(caat, teacher_stages, strict=True)]
    if name == "LKD+AT":
        masks = [torch.sigmoid((stage**2).sum(1)) for stage in teacher_stages]
    if name == "LKD+Grad-CAM":
        masks = experiment.masks(method, images, labels, teacher, teacher_stages, None)
    weights = {"intra": (1, 0, 0), "inter-same": (0, 1, 0), "inter-diff": (0, 0, 1)}.get(name, (1, 1, 1))
    with kdkernels.use_backend("reference"):
        if "LKD" in name or "int" in name:
            expected = expected + 0.01 * kdkernels.local_correlation_loss(
                stages,
                teacher_stages,
                4,
                weights=weights,
                mask=masks,
                threshold=0.5 if masks else None,
                partition={"demo": "exact", "paper": "split"}[recipe_name],
            )
        if name in ("AT", "SP", "CC"):
            (f, f_t), weight = (stages[-1], teacher_stages[-1]), getattr(settings, name.lower())
            expected = (
                expected
                + weight
                * {
                    "AT": lambda: kdkernels.attention_transfer_loss(stages, teacher_stages),
                    "SP": lambda: kdkernels.similarity_preserving_loss(f, f_t),
                    "CC": lambda: kdkernels.correlation_congruence_loss(f.mean((2, 3)), f_t.mean((2, 3))),
                }[name]()
            )
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def grad_cam(teacher: nn.Module, stage: int, image: Tensor, label: Tensor) -> Tensor:
    """Return Grad-CAM by finite differences: the derivative of the logit with respect to each channel's mean."""
    maps, step = teacher(image[None])[1], 1e-4
    weights = []
    for channel in range(maps[stage].shape[1]):
        logits = []
        for sign in (1, -1):
            changed = maps[stage].clone()
            changed[0, channel] += sign * step
            for later in teacher.stages[stage + 1 :]:
                changed = later(changed)
            logits.append(teacher.classifier(teacher.pool(changed))[0, label])
        weights.append((logits[0] - logits[1]) / (2 * step))
    area = maps[stage][0, 0].numel()
    cam = sum(weight / area * channel for weight, channel in zip(weights, maps[stage][0], strict=True))
    return cam.relu().sigmoid()


def test_grad_cam_is_what_the_logit_owes_to_a_position(tmp_path: Path) -> None:
    arguments = train_lkd.build_parser().parse_args(["--out", str(tmp_path)])
    experiment = train_lkd.LocalCorrelation(arguments, train_lkd.recipe_of(arguments), data.load("digits"))
    teacher = networks.build("resnet8-half", 1, 10).double().requires_grad_(False).eval()
    images, labels = torch.randn(2, 1, 16, 16, dtype=torch.float64), torch.randint(10, (2,))
    stages = teacher(images)[1]
    masks = experiment.masks(train_lkd.METHODS["LKD+Grad-CAM"], images, labels, teacher, stages, None)
    for stage in range(3):
        for number in range(2):
            expected = grad_cam(teacher, stage, images[number], labels[number])
            torch.testing.assert_close(masks[stage][number], expected, rtol=1e-4, atol=1e-6)


def test_the_table_shows_mean_deviation_and_paired_gain() -> None:
    methods = {"KD": [90.0, 92.0, 94.0], "LKD": [91.0, 94.0, 94.0]}
    table = results.report([results.table(("big", 99.0), methods, baseline="KD")])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[2:] == [
        ["teacher (big)", "99.00", ""],
        ["KD", "92.00 ± 2.00", ""],
        ["LKD", "93.00 ± 1.73", "+1.00 [-1.48, +3.48]"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_intervals_by_hand() -> None:
    """Three differences 1, 2, 0: mean 1, deviation 1, t of two degrees of freedom 4.3027 at 97.5 %."""
    c = results.compare([91.0, 94.0, 94.0], [90.0, 92.0, 94.0])
    assert c.mean == pytest.approx(1)
    assert (c.low, c.high) == pytest.approx((1 - 4.30265 / 3**0.5, 1 + 4.30265 / 3**0.5), rel=1e-5)
    # With two degrees of freedom, P(|T| > t) = 1 - t / sqrt(t² + 2); here t = sqrt(3).
    assert c.p == pytest.approx(1 - (3 / 5) ** 0.5)
    # Five differences: mean 0.2, squares of deviations 2, standard error sqrt(2 / 4 / 5) = 0.3162, t at 97.5 % 2.7764.
    c = results.compare([0.2, 1.2, 0.2, 0.2, -0.8], [0.0] * 5)
    assert (c.mean, c.low, c.high) == pytest.approx(
        (0.2, 0.2 - 0.316228 * 2.776445, 0.2 + 0.316228 * 2.776445), rel=1e-5
    )
    assert results.compare([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0, 1)


def test_the_overlap_of_histograms() -> None:
    features = torch.randn(5, 3, 8, 8)
    density = train_lkd.density(features, 4)
    assert train_lkd.overlap(density, density) == pytest.approx(1)
    assert train_lkd.overlap(density, np.roll(density, 50)) < 1
    # Without the cosine of each patch with itself, no cosine is near 1.
    assert density[-1] == 0
    assert train_lkd.density(features, 3).sum() > 0  # like the loss, resized if k does not divide the map


def test_the_drawn_box_bounds_what_exceeds_the_threshold() -> None:
    inside = np.zeros((8, 6), dtype=bool)
    assert figures._box(inside) == (0, 8, 0, 6)
    inside[2, 3] = inside[5, 1] = True
    assert figures._box(inside) == (2, 6, 1, 4)


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match="The examples need tqdm, not installed here"):
        importlib.reload(common)


# ----- the whole example

ARGUMENTS = ["--epochs", "3", "--teacher-epochs", "2", "--caat-epochs", "1", "--seeds", "2", "--threads", "1"]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(EXAMPLES / "train_lkd.py"), *ARGUMENTS, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("whole")
    return out, finish(start(out))


def test_the_example_writes_table_numbers_and_figures(whole_run: tuple[Path, str]) -> None:
    out, output = whole_run
    content = json.loads((out / "results.json").read_text())
    accuracy = content["test_accuracy"]
    assert accuracy.keys() == {"teacher", *train_lkd.DEFAULT_METHODS}
    assert (out / "table.md").read_text().strip() in output
    for name in train_lkd.DEFAULT_METHODS:
        assert results.spread(accuracy[name]) in output
        for seed in range(2):
            run = json.loads((out / "checkpoints" / f"{name.lower()}-seed{seed}.json").read_text())
            assert [record["epoch"] for record in run["history"]] == [1, 2, 3]
            assert run["history"][-1]["test_accuracy"] == accuracy[name][seed]
            assert ("lkd" in run["history"][0]) == ("LKD" in name)
    from matplotlib.image import imread

    for name in ("curves", "cosines", "masks"):
        picture = imread(out / "figures" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 0.05


def test_a_finished_run_is_read_not_repeated(whole_run: tuple[Path, str]) -> None:
    out, output = whole_run
    before = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*.pt")}
    again = finish(start(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*.pt")} == before
    assert again.count("finished before") == len(before)
    assert (out / "table.md").read_text().strip() in again


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    whole, _ = whole_run
    for name, interruption in (("teacher", signal.SIGINT), ("lkd-seed0", signal.SIGKILL)):
        process = start(tmp_path)
        wait_for(tmp_path / "checkpoints" / f"{name}.pt", process)
        process.send_signal(interruption)
        _, errors = process.communicate()
        assert "Traceback" not in errors
    finish(start(tmp_path))
    for path in (whole / "checkpoints").glob("*.pt"):
        assert_equal(training.read(tmp_path / "checkpoints" / path.name), training.read(path))
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()


@pytest.mark.slow
def test_students_trained_side_by_side_are_the_same(whole_run: tuple[Path, str], tmp_path: Path) -> None:
    whole, output = whole_run
    process = start(tmp_path, "--jobs", "2")
    wait_for(tmp_path / "checkpoints" / "kd-seed0.pt", process)
    process.kill()
    process.communicate(timeout=60)
    again = finish(start(tmp_path, "--jobs", "2"))
    for path in (whole / "checkpoints").glob("*.pt"):
        assert_equal(training.read(tmp_path / "checkpoints" / path.name), training.read(path))
    assert (tmp_path / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    students = [line.partition(":")[0] for line in output.splitlines() if " seed " in line]
    assert sorted(line.partition(":")[0] for line in again.splitlines() if " seed " in line) == sorted(students)


@pytest.mark.slow
def test_an_interrupted_run_side_by_side_ends_all_its_processes(tmp_path: Path) -> None:
    process = start(tmp_path, "--jobs", "2", "--epochs", "1000")
    wait_for(tmp_path / "checkpoints" / "ce-seed0.pt", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # waits until no process has the output open
    assert "Traceback" not in errors
    assert "Interrupted. The same command goes on" in errors


def test_torchrun_and_jobs_exclude_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train_lkd.main(["--jobs", "2"])
    assert "--jobs must be 1 under torchrun" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*where the official file holds")
def test_the_example_on_cifar100_with_a_loaded_teacher(tmp_path: Path) -> None:
    for name in ("train.bin", "test.bin"):
        write_cifar100(tmp_path, name, 70)
    teacher = networks.build("resnet14", 3, 100)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    places = ["--root", str(tmp_path), "--out", str(tmp_path), "--teacher", str(tmp_path / "teacher.pt")]
    sizes = ["--epochs", "1", "--caat-epochs", "1", "--seeds", "1", "--batch-size", "16", "--methods", "LKD+CAAT"]
    train_lkd.main(["--data", "cifar100", "--teacher", "resnet14", "--student", "wrn-16-1", *places, *sizes])
    run = training.read(tmp_path / "checkpoints" / "lkd+caat-seed0.pt")
    assert run["settings"]["teacher"] == training.fingerprint(teacher)
    assert run["history"][0]["lkd"] > 0
    assert not (tmp_path / "checkpoints" / "teacher.pt").exists()


def test_runs_of_other_settings_are_kept_until_fresh(
    whole_run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(whole_run[0] / "checkpoints", checkpoints)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        train_lkd.main([*ARGUMENTS, "--teacher-epochs", "7", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "teacher.pt was trained with epochs=2 (now 7)" in message
    assert "--fresh" in message
    assert list(checkpoints.iterdir())
    options.forget(tmp_path)
    assert not list(checkpoints.iterdir())
    assert (tmp_path / "mine.txt").exists()
