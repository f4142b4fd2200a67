"""The data catalogue: digits, CIFAR-10, and any image folder. Deterministic, without augmentation."""

from __future__ import annotations

import io
import os
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


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and validation samples: float32 images (3, S, S), normalised, and integer labels.

    Attributes:
        name: For folders of results and for the report.
        train: Map-style dataset.
        val: Likewise.
        classes: Names, in the order of the labels.
        image_size: S, in pixels.
    """

    name: str
    train: Any
    val: Any
    classes: tuple[str, ...]
    image_size: int


def load_data(name: str, *, image_size: int | None = None) -> Data:
    """Load ``digits``, ``cifar10`` or an image folder with ``train/<class>/`` and ``val/<class>/``.

    Raises:
        UsageError: There is no such data; says what is expected where.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size={image_size}: expected 1 pixel or more")
    if name == "digits":
        return _digits(image_size or digits.IMAGE_SIZE)
    if name == "cifar10":
        return _cifar10(image_size or 32)
    return _folder(Path(name).expanduser(), image_size or 224)


class JpegImages(Dataset[tuple[Tensor, int]]):
    """Images kept as the bytes of their JPEG files, end to end in one array."""

    def __init__(self, encoded: Any, offsets: Any, labels: Any, transform: Any) -> None:
        self.encoded = encoded
        self.offsets = offsets
        self.targets = [int(label) for label in labels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = demo_package("PIL.Image")
        encoded = self.encoded[int(self.offsets[index]) : int(self.offsets[index + 1])].tobytes()
        with image.open(io.BytesIO(encoded)) as opened:
            return self.transform(opened.convert("RGB")), self.targets[index]


def open_image(path: str) -> Any:
    """Decode one file to RGB.

    Raises:
        UsageError: It cannot be decoded; names the file.
    """
    image = demo_package("PIL.Image")
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as an image ({error}); repair or remove it") from error


def _digits(image_size: int) -> Data:
    if image_size < digits.IMAGE_SIZE:
        raise UsageError(f"--image-size {image_size}: the digits are {digits.IMAGE_SIZE} px; use that or more")
    return Data(
        name="digits",
        train=digits.digits(digits.TRANSFER_CLASSES, train=True, image_size=image_size),
        val=digits.digits(digits.TRANSFER_CLASSES, train=False, image_size=image_size),
        classes=tuple(str(label) for label in digits.TRANSFER_CLASSES),
        image_size=image_size,
    )


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


def _cifar10(image_size: int) -> Data:
    transform = _transform(image_size)
    packed = Path(os.environ.get("CACHEFREEZE_DATA", "../shared/data")) / "cifar10" / "cifar10_jpeg_60k.npz"
    if packed.is_file():
        with np.load(packed, allow_pickle=False) as arrays:
            train, val = (
                JpegImages(arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"], arrays[f"{split}_labels"], transform)
                for split in ("train", "test")
            )
            classes = tuple(str(name) for name in arrays["classes"])
        return Data(name="cifar10", train=train, val=val, classes=classes, image_size=image_size)
    datasets = demo_package("torchvision.datasets")
    root = Path(os.environ.get("CACHEFREEZE_HOME", "~/.cache/cachefreeze")).expanduser()
    try:
        downloaded = [
            datasets.CIFAR10(root, train=split, transform=transform, download=True) for split in (True, False)
        ]
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"CIFAR-10 cannot be downloaded to {root} ({error}); put its files there, or set CACHEFREEZE_DATA to a "
            "folder that holds cifar10/cifar10_jpeg_60k.npz"
        ) from error
    first, second = downloaded
    return Data(name="cifar10", train=first, val=second, classes=tuple(first.classes), image_size=image_size)


def _folder(folder: Path, image_size: int) -> Data:
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: no such folder; expected digits, cifar10, or a folder with train/ and val/")
    for split in ("train", "val"):
        if not (folder / split).is_dir():
            raise UsageError(f"--data {folder} has no folder {split}/; expected train/<class>/… and val/<class>/…")
    datasets = demo_package("torchvision.datasets")
    transform = _transform(image_size)
    loaded = {}
    for split in ("train", "val"):
        try:
            loaded[split] = datasets.ImageFolder(str(folder / split), transform=transform, loader=open_image)
        except FileNotFoundError as error:
            raise UsageError(f"--data {folder}: {error}; expected images in {split}/<class>/") from error
    train, val = loaded["train"], loaded["val"]
    if train.classes != val.classes:
        raise UsageError(
            f"--data {folder}: train/ has the classes {', '.join(train.classes)}, val/ has {', '.join(val.classes)}; "
            "they must be the same"
        )
    name = folder.resolve().name
    return Data(name=name, train=train, val=val, classes=tuple(train.classes), image_size=image_size)
