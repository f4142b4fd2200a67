"""What ``train``, ``fill`` and ``bench`` share: the options of a job, and the data, model and engine they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import cachefreeze as cf
from cachefreeze.cli import schedules
from cachefreeze.cli.augmentation import Augmented
from cachefreeze.cli.data import Data, load_data
from cachefreeze.cli.digits import PRETRAIN_CLASSES, DigitsCNN, pretrain
from cachefreeze.cli.models import DIGITS_MODEL, build_model
from cachefreeze.engine import Engine
from cachefreeze.errors import CacheFreezeError, UsageError
from cachefreeze.training import Loader


@dataclass
class Job:
    """A model, its data and the engine between them."""

    data: Data
    model: nn.Module
    engine: Engine
    train: Loader
    val: Loader
    out: Path


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def draws(text: str) -> int:
    """How many random draws of a sample are kept: 2 or more."""
    value = _whole(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected 2 or more, got {value}; without the option nothing is random")
    return value


def pixels(text: str) -> int:
    """The side of an image: 1 to 16384."""
    value = positive(text)
    if value > 16384:
        raise argparse.ArgumentTypeError(f"expected 1 to 16384 pixels, got {value}")
    return value


def positive_float(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value <= torch.finfo(torch.float32).max:  # also False for nan
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text}")
    return value


def seed(text: str) -> int:
    """A seed: 0 to 2**63 - 1."""
    value = _whole(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**63 - 1, got {value}")
    return value


def add_arguments(
    parser: argparse.ArgumentParser, *, caches: tuple[str, ...], cache: str, scheduled: bool = False
) -> None:
    """The options that say what is trained on what, and where rows are kept."""
    add_frozen(parser, scheduled=scheduled)
    parser.add_argument("--cache", choices=caches, default=cache, help=f"where rows are kept (default {cache})")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="of hdf5 caches (default: OUT/cache)")
    parser.add_argument(
        "--cache-dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: lossless"
    )
    add_prefix(parser)
    parser.add_argument(
        "--variants", type=draws, metavar="K", help="augment the training images, and cache K draws of each"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<data>-<model>")


def add_frozen(parser: argparse.ArgumentParser, *, scheduled: bool = False) -> None:
    """The options that say what is trained on what, and what of it is frozen."""
    add_model(parser)
    parser.add_argument("--weights", metavar="FILE.safetensors|DEFAULT", help="pretrained weights (default: random)")
    boundary = parser.add_mutually_exclusive_group()
    boundary.add_argument("--train-from", metavar="NAME", help="first module to train (default: the last block)")
    boundary.add_argument("--train-last", type=positive, metavar="N", help="train the last N blocks")
    add_batches(parser)
    if scheduled:
        boundary.add_argument("--schedule", metavar="freezeout|FILE.yaml", help="blocks freeze one after another")
        schedules.add_options(parser)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default 0")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")


def add_prefix(parser: argparse.ArgumentParser) -> None:
    """The option that says how rows are made."""
    parser.add_argument(
        "--prefix",
        choices=("exact", "optimized", "optimized:bfloat16", "optimized:float16"),
        default="exact",
        help="optimized: rows from a faster copy of the frozen part, within a tolerance (default exact)",
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name the data and the model."""
    parser.add_argument(
        "--data", default="digits", metavar="digits|cifar10|DIR", help="default digits; DIR holds train/ and val/"
    )
    parser.add_argument("--model", metavar="NAME", help="a torchvision classifier (default: digits_cnn, resnet18)")


def add_batches(parser: argparse.ArgumentParser) -> None:
    """The options that say what a batch is."""
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="default 64")
    parser.add_argument("--image-size", type=pixels, metavar="N", help="pixels of the square crop")


def model_name(args: argparse.Namespace, data: Data) -> str:
    """The model that was asked for, or the one that goes with the data."""
    return str(args.model or ("digits_cnn" if data.name == "digits" else "resnet18"))


def make_job(args: argparse.Namespace) -> Job:
    """Build everything that the options describe, cheap checks first."""
    device = device_of(args.device)
    if args.cache == "device" and device.type == "cpu":
        raise UsageError("--cache device keeps rows in GPU memory, and --device is cpu; use --cache host")
    if args.variants is not None and args.cache == "off":
        raise UsageError("--variants says how many draws are cached, and --cache is off; leave one of them out")
    data = load_data(args.data, image_size=args.image_size)
    name = model_name(args, data)
    out = args.out if args.out is not None else Path("runs") / f"{data.name}-{name}"
    torch.manual_seed(args.seed)
    schedule = schedules.make_schedule(args) if hasattr(args, "schedule") else None
    model = make_model(name, args, data)
    if schedule is None:
        freeze_model(model, args, data)
    make_folder(out)
    engine = Engine(
        model.to(device),
        _store(args, out),
        schedule=schedule,
        dtype=args.cache_dtype,
        prefix=args.prefix,
        epochs=getattr(args, "epochs", None),
    )
    order = torch.Generator().manual_seed(args.seed)
    images = data.train if args.variants is None else Augmented(data.train, flip=data.name != "digits")
    train = DataLoader(images, args.batch_size, shuffle=True, generator=order)
    val = DataLoader(data.val, args.batch_size, generator=torch.Generator())
    return Job(
        data=data,
        model=model,
        engine=engine,
        train=engine.loader(train, name="train", version=data.name, variants=args.variants, seed=args.seed),
        val=engine.loader(val, name="val", version=data.name),
        out=out,
    )


def configuration(args: argparse.Namespace, job: Job) -> Mapping[str, str]:
    """What decides the result of a run, as its checkpoint remembers it. The cache is not among it."""
    return {
        "data": job.data.name,
        "model": type(job.model).__name__,
        "boundary": str(job.engine.boundary) if args.schedule is None else "scheduled",
        "schedule": str(job.engine.schedule),
        "image_size": str(job.data.image_size),
        "batch_size": str(args.batch_size),
        "optimizer": args.optimizer,
        "lr": repr(args.lr),
        "seed": str(args.seed),
        "weights": Path(args.weights).name if args.weights else "random",
        "variants": str(args.variants),
    }


def make_folder(path: Path) -> None:
    """Make a folder, or say why it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path}: {error.strerror}; choose another one") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {path} is not writable; choose another one")


def check_file(option: str, path: Path | None) -> None:
    """Refuse a place where no file can be written, before the work whose result it is for; make its folder."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file")
    make_folder(path.parent)


def device_of(name: str | None) -> torch.device:
    """The device of a name; None for the best there is."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; use cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: CUDA is not available here; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    return found


def _store(args: argparse.Namespace, out: Path) -> str:
    if args.cache in ("auto", "hdf5"):
        return f"{args.cache}:{args.cache_dir if args.cache_dir is not None else out / 'cache'}"
    if args.cache_dir is not None:
        raise UsageError(f"--cache-dir is for --cache hdf5 or auto, and --cache is {args.cache}")
    return str(args.cache)


def make_model(name: str, args: argparse.Namespace, data: Data) -> nn.Module:
    """The model that was asked for, on the CPU, nothing frozen; the digits' own is pretrained."""
    model = build_model(name, weights=args.weights, classes=len(data.classes))
    if isinstance(model, DigitsCNN) and args.weights is None and data.name == "digits":
        print(f"pretraining {DIGITS_MODEL} on the digits {', '.join(map(str, PRETRAIN_CLASSES))}", flush=True)
        pretrain(model, seed=args.seed, image_size=data.image_size)
    return model


def freeze_model(model: nn.Module, args: argparse.Namespace, data: Data) -> None:
    """Freeze what the options say."""
    with running_on(model, data) as example:
        if args.train_from is not None:
            cf.freeze(model, args.train_from, example_inputs=example)
        else:
            cf.freeze(model, train_last=args.train_last or 1, example_inputs=example)


@contextmanager
def running_on(model: nn.Module, data: Data) -> Iterator[Tensor]:
    """Two images of the data's size; what goes wrong when the model runs on them is the size's fault."""
    size = data.image_size
    try:
        yield torch.zeros(2, 3, size, size)
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, CacheFreezeError):
            raise
        reason = "".join(str(error).strip().splitlines()[:1])[:200]
        raise UsageError(
            f"{type(model).__name__} cannot run on images of {size} px ({reason}); choose another --image-size"
        ) from error
