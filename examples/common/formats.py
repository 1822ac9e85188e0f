"""Official files of labelled images: Fashion-MNIST's IDX files, CIFAR-10 and CIFAR-100, STL-10, SVHN.

Every reader raises ``FileNotFoundError`` or ``ValueError``, which name the file and what is wrong with it. MD5 sums are
the ones that CIFAR's page and torchvision publish. ``checked=False`` reads files with other sums.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import pickle
import tarfile
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 32  # of a CIFAR image
UNSIGNED_BYTES = 8  # the third byte of an IDX file


@dataclass(frozen=True)
class Cifar:
    """One version of CIFAR: the bytes before the pixels of a record are labels. The last one is used.

    Args:
        md5: the sum of the archive at ``url``.
        labels: the name and the number of classes of each label.
        train, test: the files with the number of their records.
        names: the file with the names of the classes.
        pickled: the folder of the Python version.
        pickled_names: the file of the Python version with the names of the classes, and their key in it.
        pickled_md5: the sums of the files of the Python version.
    """

    name: str
    url: str
    md5: str
    folder: str
    labels: Sequence[tuple[str, int]]
    train: Sequence[tuple[str, int]]
    test: Sequence[tuple[str, int]]
    names: str
    pickled: str
    pickled_names: tuple[str, bytes]
    pickled_md5: Mapping[str, str] = field(repr=False)

    @property
    def classes(self) -> int:
        return self.labels[-1][1]

    @property
    def archive(self) -> str:
        return self.url.rpartition("/")[2]


CIFAR10 = Cifar(
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-batches-bin",
    (("the", 10),),
    tuple((f"data_batch_{number}.bin", 10_000) for number in range(1, 6)),
    (("test_batch.bin", 10_000),),
    "batches.meta.txt",
    "cifar-10-batches-py",
    ("batches.meta", b"label_names"),
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Cifar(
    "CIFAR-100",
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8",
    "cifar-100-binary",
    (("coarse", 20), ("fine", 100)),
    (("train.bin", 50_000),),
    (("test.bin", 10_000),),
    "fine_label_names.txt",
    "cifar-100-python",
    ("meta", b"fine_label_names"),
    {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
HOW_TO_GET_FASHION_MNIST = (
    "on Debian, 'apt-get install dataset-fashion-mnist' puts the files where they are found; "
    "elsewhere give --root the folder with the four IDX files of https://github.com/zalandoresearch/fashion-mnist"
)
# SHA-256 of the content, not of its compression.
FASHION_MNIST_CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_MNIST_COUNTS = {"train": 60_000, "t10k": 10_000}


STL10_SIDE = 96
STL10_URL = "https://cs.stanford.edu/~acoates/stl10/"
STL10_FOLDER = "stl10_binary"
STL10_MD5 = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
SVHN_URL = "http://ufldl.stanford.edu/housenumbers/"
SVHN_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


def read_cifar(root: Path, version: Cifar, *, checked: bool = True) -> tuple[np.ndarray, ...]:
    """The pixels, n x 3 x 32 x 32, and the labels of the training images, then of the test images.

    ``root`` has the files of the binary version, their folder, their archive, or the folder of the Python version. Sums
    are published for the archive and for the Python version.
    """
    files = {name: root / name for name, _ in (*version.train, *version.test)}
    first = version.train[0][0]
    if not files[first].exists():
        if (root / version.folder).is_dir():
            files = {name: root / version.folder / name for name in files}
        elif (root / version.archive).is_file():
            contents = _archived(root / version.archive, version.md5, checked)
            where = f"{root / version.archive}/{version.folder}"
            read = [(Path(where, name), contents.get(f"{version.folder}/{name}")) for name in files]
            return _joined(version, [cifar_records(path, content, version) for path, content in read])
        elif (root / version.pickled).is_dir():
            folder = root / version.pickled
            names = [name for name in version.pickled_md5 if name != version.pickled_names[0]]
            return _joined(version, [_pickled_records(folder / name, version, checked) for name in names])
    read = [(path, path.read_bytes() if path.is_file() else None) for path in files.values()]
    return _joined(version, [cifar_records(path, content, version) for path, content in read])


def _joined(version: Cifar, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    training = len(version.train)
    return tuple(
        np.concatenate(arrays) for files in (parts[:training], parts[training:]) for arrays in zip(*files, strict=True)
    )


def _archived(path: Path, md5: str, checked: bool) -> dict[str, bytes]:
    """The files of an archive by name."""
    content = _with_md5(path, md5, checked)
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            return {file.name: archive.extractfile(file).read() for file in archive if file.isfile()}
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def cifar_records(path: Path, content: bytes | None, version: Cifar) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and the labels of records of one byte per label and 3 x 32 x 32 pixels."""
    if content is None:
        raise FileNotFoundError(f"{path} does not exist; unpack {version.url} there")
    raw = np.frombuffer(content, dtype=np.uint8)
    size = len(version.labels) + 3 * SIDE * SIDE
    count, rest = divmod(len(raw), size)
    if rest or not count:
        raise ValueError(
            f"{path} is truncated or not {version.name}'s binary version: expected records of {size} bytes, "
            f"got {count} of them and {rest} bytes more"
        )
    records = raw.reshape(count, size)
    for column, (what, classes) in enumerate(version.labels):
        wrong = np.flatnonzero(records[:, column] >= classes)
        if len(wrong):
            raise ValueError(
                f"{path} is corrupt: record {wrong[0]} has {what} label {records[wrong[0], column]}, "
                f"expected 0 to {classes - 1}"
            )
    _expect(path, count, dict([*version.train, *version.test]).get(path.name, count))
    labels = len(version.labels)
    return records[:, labels:].reshape(count, 3, SIDE, SIDE).copy(), records[:, labels - 1].astype(np.int64)


def _pickled_records(path: Path, version: Cifar, checked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The pixels and the labels of a file of the Python version."""
    content = _unpickled(path, version, checked)
    labels = content.get(b"fine_labels", content.get(b"labels"))
    pixels = content.get(b"data")
    if labels is None or not isinstance(pixels, np.ndarray) or pixels.shape != (len(labels), 3 * SIDE * SIDE):
        raise ValueError(f"{path} must hold pixels of n x {3 * SIDE * SIDE} and n labels, got {sorted(content)}")
    labels = np.asarray(labels, np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < version.classes:
        raise ValueError(f"{path} is corrupt: expected labels 0 to {version.classes - 1}, got {labels.max()}")
    return pixels.reshape(-1, 3, SIDE, SIDE), labels


def _unpickled(path: Path, version: Cifar, checked: bool) -> dict[bytes, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; unpack {version.url.replace('binary', 'python')} there")
    raw = _with_md5(path, version.pickled_md5[path.name], checked)
    try:
        content = _Arrays(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged file raises exceptions of many types
        raise ValueError(f"{path} is no file of {version.name}'s Python version: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


class _Arrays(pickle.Unpickler):
    """Loads NumPy arrays and plain values. Other objects could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": np.empty(0).__reduce__()[0],
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": codecs.encode,
        }
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, expected arrays")
        return known[name]


def read_cifar_names(root: Path, version: Cifar, *, checked: bool = True) -> tuple[str, ...]:
    """The names of the classes; their numbers if no file has the names."""
    path, pickled = root / version.names, root / version.pickled / version.pickled_names[0]
    for folder in (root, root / version.folder):
        if (folder / version.names).is_file():
            path = folder / version.names
    if path.is_file():
        names = tuple(path.read_text(errors="replace").split())
    elif pickled.is_file():
        names = tuple(name.decode() for name in _unpickled(pickled, version, checked)[version.pickled_names[1]])
    else:
        return tuple(map(str, range(version.classes)))
    if len(names) != version.classes:
        raise ValueError(f"{path} is truncated or corrupt: expected {version.classes} names, got {len(names)}")
    return names


def read_stl10(root: Path, part: str, *, checked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, n x 3 x 96 x 96, and the labels of the part "train" or "test". The files have labels from 1 and
    images column by column.
    """
    if not (root / f"{part}_X.bin").exists() and (root / STL10_FOLDER).is_dir():
        root = root / STL10_FOLDER
    raw, labels = (
        np.frombuffer(_with_md5(path, STL10_MD5[path.name], checked), np.uint8)
        for path in (root / f"{part}_X.bin", root / f"{part}_y.bin")
    )
    size = 3 * STL10_SIDE**2
    if len(raw) != len(labels) * size or not len(labels):
        raise ValueError(
            f"{root / part}_X.bin must hold {size} bytes for each of the {len(labels)} labels, got {len(raw)} bytes"
        )
    if not 1 <= labels.min() <= labels.max() <= 10:
        raise ValueError(
            f"{root / part}_y.bin is corrupt: expected labels 1 to 10, got {labels.min()} to {labels.max()}"
        )
    columns_first = raw.reshape(-1, 3, STL10_SIDE, STL10_SIDE)
    return np.ascontiguousarray(columns_first.transpose(0, 1, 3, 2)), labels.astype(np.int64) - 1


def read_svhn(root: Path, part: str, *, checked: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, n x 3 x 32 x 32, and the labels of the part "train" or "test" of cropped digits. The files have label
    10 for the digit 0.
    """
    from scipy.io import loadmat

    path = root / f"{part}_32x32.mat"
    raw = _with_md5(path, SVHN_MD5[path.name], checked)
    try:
        content = loadmat(io.BytesIO(raw))
        pixels, labels = content["X"], content["y"].ravel()
    except Exception as error:  # a damaged file raises exceptions of many types
        raise ValueError(f"{path} cannot be read as a file of SVHN: {error}") from error
    if pixels.shape != (SIDE, SIDE, 3, len(labels)) or not len(labels):
        raise ValueError(f"{path} must hold X of 32 x 32 x 3 x n and n labels, got {pixels.shape} and {len(labels)}")
    if not 1 <= labels.min() <= labels.max() <= 10:
        raise ValueError(f"{path} is corrupt: expected labels 1 to 10, got {labels.min()} to {labels.max()}")
    return np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)), labels.astype(np.int64) % 10


def _with_md5(path: Path, md5: str, checked: bool) -> bytes:
    """The content of a file whose sum is published."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest() if checked else md5
    if found != md5:
        raise ValueError(
            f"{path} is not the official file: expected MD5 {md5}, got {found}; --unchecked reads it nevertheless"
        )
    return content


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The pixels, n x 28 x 28, and the labels of the part "train" or "t10k"."""
    pixels, labels = (_read_official_idx(folder, f"{part}-{what}-ubyte") for what in ("images-idx3", "labels-idx1"))
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise ValueError(
            f"{folder}: {part} must hold images and one label for each, got shapes {pixels.shape} and {labels.shape}"
        )
    if labels.max() >= 10:
        raise ValueError(f"{folder}: {part} is corrupt: expected labels 0 to 9, got {labels.max()}")
    _expect(folder / f"{part}-images-idx3-ubyte", len(labels), FASHION_MNIST_COUNTS[part])
    return pixels, labels.astype(np.int64)


def _read_official_idx(folder: Path, name: str) -> np.ndarray:
    """The array of the file ``name`` or ``name.gz``. A file as long as the official one must have its checksum."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise FileNotFoundError(f"{packed} does not exist; {HOW_TO_GET_FASHION_MNIST}")
    content = _content(path)
    array = read_idx(path, content)
    official = len(array) == FASHION_MNIST_COUNTS[name.partition("-")[0]]
    if official and (found := hashlib.sha256(content).hexdigest()) != FASHION_MNIST_CHECKSUMS[name]:
        raise ValueError(f"{path} is corrupt: expected SHA-256 {FASHION_MNIST_CHECKSUMS[name]}, got {found}")
    return array


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def read_idx(path: Path, content: bytes) -> np.ndarray:
    """The array of bytes in an IDX file: two zeros, the type, the number of dimensions, the sizes, the values."""
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:3] != bytes([0, 0, UNSIGNED_BYTES]) or not dimensions or len(content) < start:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {content[:4].hex(' ') or 'nothing'}")
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int)
    if not shape.all() or len(content) - start != shape.prod():
        raise ValueError(
            f"{path} is truncated or corrupt: expected {shape.prod()} values of shape {tuple(shape.tolist())}, "
            f"got {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _expect(path: Path, count: int, expected: int) -> None:
    if count != expected:
        warnings.warn(f"{path} holds {count} images where the official file holds {expected}", stacklevel=3)
