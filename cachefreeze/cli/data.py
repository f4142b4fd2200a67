"""The data catalogue: digits, CIFAR-10, and any image folder. Deterministic, without augmentation."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cachefreeze.cli import digits
from cachefreeze.cli.optional import demo_package
from cachefreeze.errors import UsageError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR10_SIZE, _FOLDER_SIZE = 32, 224
_CIFAR10_FILE = Path("cifar10", "cifar10_jpeg_60k.npz")
_SPLITS = ("train", "val")
_SHOWN_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and validation samples: float32 images (3, S, S), normalised, and integer labels.

    Attributes:
        name: For folders of results and for the report.
        train: Map-style dataset; picklable, holds no open file.
        val: Likewise.
        classes: Names, in the order of the labels.
        image_size: S, in pixels.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    image_size: int


def load_data(name: str, *, image_size: int | None = None) -> Data:
    """Load ``digits``, ``cifar10`` or an image folder with ``train/<class>/`` and ``val/<class>/``.

    Args:
        name: ``digits``, ``cifar10`` or the path of a folder (``./digits`` for one of that name).
        image_size: Side of the square samples in pixels; None for 8, 32 and 224.

    Raises:
        UsageError: There is no such data; says what is expected where. Datasets raise it too, for a damaged image.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size={image_size}: expected 1 pixel or more")
    if name == "digits":
        return _digits(image_size or digits.IMAGE_SIZE)
    if name == "cifar10":
        return _cifar10(image_size or _CIFAR10_SIZE)
    return _folder(name, image_size or _FOLDER_SIZE)


class JpegImages(Dataset[tuple[Tensor, int]]):
    """Images kept as the bytes of their JPEG files, end to end in one array, and decoded one by one."""

    def __init__(self, encoded: Any, offsets: Any, labels: Any, transform: Any) -> None:
        self.encoded = encoded
        self.offsets = offsets
        self.targets = [int(label) for label in labels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        image = _decode(io.BytesIO(self.encoded[start:end].tobytes()), f"image {index} of {_CIFAR10_FILE.name}")
        return self.transform(image), self.targets[index]


def open_image(path: str) -> Any:
    """Decode one file to RGB.

    Raises:
        UsageError: It cannot be decoded, or not to its end; names the file.
    """
    return _decode(path, path)


def _decode(source: Any, name: str) -> Any:
    image = demo_package("PIL.Image")
    try:
        with image.open(source) as opened:
            return opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything: OSError, SyntaxError, zlib.error
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UsageError(f"{name} cannot be read as an image ({reason}); repair or remove it") from error


def _transform(image_size: int) -> Any:
    """Shorter side resized, centre crop, ImageNet normalisation."""
    transforms = demo_package("torchvision.transforms")
    return transforms.Compose(
        [
            transforms.Resize(image_size),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )


def _digits(image_size: int) -> Data:
    return Data(
        name="digits",
        train=digits.Digits(digits.TRANSFER_CLASSES, train=True, image_size=image_size),
        val=digits.Digits(digits.TRANSFER_CLASSES, train=False, image_size=image_size),
        classes=tuple(str(label) for label in digits.TRANSFER_CLASSES),
        image_size=image_size,
    )


def _cifar10(image_size: int) -> Data:
    packed = Path(os.environ.get("CACHEFREEZE_DATA") or "../shared/data") / _CIFAR10_FILE
    read = _packed_cifar10 if packed.is_file() else _downloaded_cifar10
    train, val, classes = read(packed, _transform(image_size))
    return Data(name="cifar10", train=train, val=val, classes=classes, image_size=image_size)


def _packed_cifar10(packed: Path, transform: Any) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]:
    try:
        # opened here, because numpy leaves a damaged archive open
        with packed.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            train, val = (
                JpegImages(arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"], arrays[f"{split}_labels"], transform)
                for split in ("train", "test")
            )
            return train, val, tuple(str(name) for name in arrays["classes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{packed} cannot be read ({error}); expected the arrays train_jpeg, train_offsets, train_labels, the same "
            "for test, and classes; repair it, or point CACHEFREEZE_DATA elsewhere to download CIFAR-10"
        ) from error


def _downloaded_cifar10(packed: Path, transform: Any) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...]]:
    datasets = demo_package("torchvision.datasets")
    root = Path(os.environ.get("CACHEFREEZE_HOME") or "~/.cache/cachefreeze").expanduser()
    try:
        # some versions of torchvision tell on stdout that files are there; stdout is for results
        with contextlib.redirect_stdout(sys.stderr):
            train, val = (
                datasets.CIFAR10(root, train=train, transform=transform, download=True) for train in (True, False)
            )
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise UsageError(
            f"--data cifar10: the download to {root} failed ({error or type(error).__name__}), and there is no "
            f"{packed}; allow the download (CACHEFREEZE_HOME sets its folder), or set CACHEFREEZE_DATA to a folder "
            f"that holds {_CIFAR10_FILE}"
        ) from error
    return train, val, tuple(train.classes)


def _folder(name: str, image_size: int) -> Data:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"--data {name}: no such folder; expected digits, cifar10, or a folder with train/<class>/ and val/<class>/"
        )
    classes = {split: _classes(folder, split) for split in _SPLITS}
    if classes["train"] != classes["val"]:
        only = {
            split: sorted(set(classes[split]) - set(classes[other])) for split, other in (_SPLITS, reversed(_SPLITS))
        }
        found = "; ".join(f"only in {split}/: {_listed(names)}" for split, names in only.items() if names)
        raise UsageError(f"--data {name}: train/ and val/ need folders of the same classes; {found}")
    transform = _transform(image_size)
    train, val = (_images(folder, split, transform) for split in _SPLITS)
    return Data(
        name=folder.resolve().name or "images",
        train=train,
        val=val,
        classes=tuple(classes["train"]),
        image_size=image_size,
    )


def _classes(folder: Path, split: str) -> list[str]:
    place = folder / split
    if not place.is_dir():
        raise UsageError(f"--data {folder} has no folder {split}/; expected train/<class>/… and val/<class>/…")
    try:
        found = sorted(entry.name for entry in place.iterdir() if entry.is_dir())
    except OSError as error:
        raise UsageError(f"--data {folder}: {split}/ cannot be listed ({error.strerror})") from error
    if not found:
        raise UsageError(f"--data {folder}: {split}/ holds no class; expected a folder of images for each class")
    return found


def _images(folder: Path, split: str, transform: Any) -> Any:
    datasets = demo_package("torchvision.datasets")
    images = datasets.ImageFolder(str(folder / split), transform=transform, loader=open_image, allow_empty=True)
    filled = set(images.targets)
    empty = [f"{split}/{name}/" for name, label in images.class_to_idx.items() if label not in filled]
    if empty:
        raise UsageError(
            f"--data {folder}: no image in {_listed(empty)}; expected files such as .jpg or .png; "
            "add some, or remove the folder from train/ and val/"
        )
    return images


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_CLASSES]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN_CLASSES else "")
