"""Public names and command-line options are a contract: a change of either shows here."""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys

import cachefreeze as cf
from cachefreeze.cli import parser


def test_public_names():
    assert sorted(cf.__all__) == [
        "AllButLast", "Block", "BlockShuffleSampler", "Boundary", "BoundaryPlan", "BoundaryTensor", "CacheFreezeError",
        "CacheManager", "DeviceStore", "Engine", "FieldSpec", "FreezeAtZeroLR", "FreezeOut",
        "GradientChange", "GradualUnfreezing",
        "HDF5Store", "HostStore", "Optimized", "Parts", "Plan", "Plasticity", "Rows", "Stage", "Stages", "Store",
        "StoreSpec", "Trainer", "blocks", "freeze", "plan", "split", "unfreeze",
    ]  # fmt: skip
    assert all(hasattr(cf, name) for name in cf.__all__)


def names(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_signatures():
    assert names(cf.freeze) == ["model", "train_from", "train_last", "modules", "example_inputs", "stochastic"]
    assert names(cf.unfreeze) == ["model", "modules", "example_inputs"]
    assert names(cf.blocks) == ["model", "example_inputs"]
    assert names(cf.split) == ["model", "example_inputs", "train_from"]
    assert names(cf.Engine) == ["model", "store", "schedule", "moves", "autocast", "dtype", "prefix", "epochs"]
    assert names(cf.plan) == [
        "model", "train_loader", "store", "epochs", "inputs", "view", "assume_deterministic", "autocast", "loss_fn",
        "optimizer",
    ]  # fmt: skip
    loader = ["dataloader", "inputs", "name", "view", "version", "assume_deterministic", "variants", "seed"]
    assert names(cf.Engine.loader) == loader
    assert names(cf.CacheManager.loader) == loader
    assert names(cf.Engine.attach) == ["optimizer"]
    assert names(cf.Engine.epochs) == ["total", "steps_per_epoch"]
    assert names(cf.Trainer) == ["engine", "loss_fn", "optimizer", "out", "config", "progress", "on_epoch"]
    assert names(cf.Trainer.fit) == ["train", "val", "epochs", "resume"]


JOB = [
    "--data", "--model", "--weights", "--train-from", "--train-last", "--batch-size", "--image-size", "--seed",
    "--device", "--cache", "--cache-dir", "--cache-dtype", "--prefix", "--variants", "--out",
]  # fmt: skip


SCHEDULE = ["--schedule", "--t0", "--how", "--unscaled"]


def test_command_line_options():
    verbs = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    options = {
        verb: [name for action in made._actions for name in action.option_strings if name not in ("-h", "--help")]
        for verb, made in verbs.items()
    }
    assert options == {
        "train": [*JOB[:7], *SCHEDULE, *JOB[7:], "--epochs", "--lr", "--optimizer", "--resume", "--report", "--plot"],
        "plan": [
            "--data",
            "--model",
            "--batch-size",
            "--image-size",
            "--epochs",
            "--lr",
            "--schedule",
            "--write",
            "--t0",
            "--how",
            "--unscaled",
            "--plot",
            "--device",
            "--cache-dir",
            "--json",
        ],
        "fill": JOB,
        "info": [],
        "verify": [],
        "clean": ["--dry-run", "--older-than", "--max-bytes"],
        "bench": [
            *JOB[:9],
            "--samples",
            "--workers",
            "--rounds",
            "--fills",
            "--epochs",
            "--prefix",
            "--cache-dir",
            "--json",
            "--plot",
        ],
    }


def test_importing_the_package_imports_no_optional_package():
    optional = "('torchvision', 'sklearn', 'PIL', 'h5py', 'matplotlib')"
    code = f"import sys, cachefreeze; print([m for m in {optional} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
