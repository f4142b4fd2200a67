"""A staged run that is interrupted anywhere ends, resumed, with the weights of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.cli import main
from cachefreeze.cli.digits import DigitsCNN
from cachefreeze.testing.ragged import Pad, Running, Texts

EPOCHS = 8


class Scale(nn.Module):
    """Rounds alike in every batch, which a small matrix product does not."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.weight


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.ReLU())
        self.b = nn.Sequential(Scale(6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.c = nn.Sequential(Scale(6), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))))


def vectors():
    """A model, samples, their collate function, and a loss."""
    data = TensorDataset(torch.randn(48, 6), torch.randint(0, 3, (48,)))
    return Net(), data, None, functional.cross_entropy


def texts():
    """The same for texts of different lengths, whose loss is the model's own."""
    return Running(), Texts(48), Pad(labels="tags", multiple=4), lambda output, _batch: output["loss"]


def fit(out, *, epochs=EPOCHS, store=None, each=lambda: None, of=vectors):
    """Train from where ``out`` stands to the end."""
    torch.manual_seed(0)
    model, data, collate, loss_fn = of()
    order = torch.Generator().manual_seed(1)
    engine = cf.Engine(model, store or f"hdf5:{out}/cache", schedule=cf.FreezeOut(0.4, "linear"), moves="always")
    train = engine.loader(DataLoader(data, 4, shuffle=True, generator=order, collate_fn=collate))
    val = engine.loader(DataLoader(data, 16, generator=torch.Generator(), collate_fn=collate), name="train")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    engine.attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: each())
    trainer = cf.Trainer(engine, loss_fn, optimizer, out=out)
    report = trainer.fit(train, val, epochs=epochs, resume=True)
    engine.close()
    return report


def same(a, b):
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return all(torch.equal(first[name], second[name]) for name in first)


def forked(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # the parent's thread pool does not exist here
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


LONG = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("of", "kills"),
    [(vectors, 10), pytest.param(vectors, 50, marks=LONG), (texts, 2), pytest.param(texts, 50, marks=LONG)],
)
def test_kill_9_at_any_moment_and_resume(tmp_path, of, kills):
    """Killed at random moments, live, filling, cached, moving, saving; resumed until done; the same bits every time."""
    began = time.monotonic()
    whole = fit(tmp_path / "whole", of=of)
    seconds = time.monotonic() - began
    assert len({epoch.boundary for epoch in whole.epochs}) >= 4, "at least three moves"
    draw = random.Random(7)
    reached = set()
    for turn in range(kills):
        out = tmp_path / str(turn)
        pid = forked(lambda out=out: fit(out, of=of))
        time.sleep(draw.uniform(0.05, 0.95) * seconds)
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = torch.load(out / "state.pt", weights_only=True)["engine"]["epoch"] if (out / "state.pt").exists() else 0
        reached.add(done)
        # kills are to fall within the run, however long that takes on this machine now
        seconds *= 0.8 if status == 0 else 1.2 if done == 0 else 1.0
        assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda out=out: fit(out, of=of)), 0)[1]) == 0
        assert same(tmp_path / "whole", out)
    assert len(reached) >= min(3, kills // 2), f"kills fell into {reached} only"


@pytest.mark.parametrize("of", [vectors, texts])
def test_resumed_at_every_epoch_it_reports_the_same(tmp_path, of):
    whole = fit(tmp_path / "whole", store="host", of=of)
    for _ in range(EPOCHS + 1):
        report = interrupted(tmp_path / "parts", of=of)
        if report is not None:
            break
    assert report is not None
    assert same(tmp_path / "whole", tmp_path / "parts")
    ours, theirs = ([(e.boundary, e.train_loss, e.val_loss) for e in r.epochs] for r in (report, whole))
    assert ours == theirs


class Stop(Exception):  # noqa: N818 - it is no error
    pass


def interrupted(out, of=vectors):
    """Train one epoch and a few steps of the next; the report when it came to the end."""
    steps = 0

    def each():
        nonlocal steps
        steps += 1
        if steps == 12 + 5:
            raise Stop

    try:
        return fit(out, each=each, of=of)
    except Stop:
        return None


def test_the_run_without_a_cache_is_the_same(tmp_path):
    fit(tmp_path / "whole")
    fit(tmp_path / "off", store="off")
    assert same(tmp_path / "whole", tmp_path / "off")


def test_resuming_to_another_length_is_refused(tmp_path):
    assert interrupted(tmp_path) is None
    with pytest.raises(cf.CacheFreezeError, match="same length"):
        fit(tmp_path, epochs=EPOCHS + 1)


@pytest.fixture
def weights(tmp_path):
    """A file of weights, so that no test waits for the digits' pretraining."""
    torch.manual_seed(0)
    save_file(DigitsCNN(classes=5).state_dict(), tmp_path / "w.safetensors")
    return ["--weights", str(tmp_path / "w.safetensors")]


def test_train_with_a_schedule_from_the_command_line(tmp_path, capsys, weights):
    """The same weights with and without a cache, and a report that says where the boundary was."""
    options = [
        "train",
        "--schedule",
        "freezeout",
        "--t0",
        "0.4",
        "--how",
        "linear",
        "--epochs",
        "5",
        "--batch-size",
        "128",
    ]
    for cache in ("off", "hdf5"):
        assert main([*options, *weights, "--cache", cache, "--out", str(tmp_path / cache)]) == 0
    assert same(tmp_path / "off", tmp_path / "hdf5")
    epochs = json.loads((tmp_path / "hdf5" / "report.json").read_text())["epochs"]
    report = json.loads((tmp_path / "hdf5" / "report.json").read_text())
    assert report["moves"], "the decisions and their figures"
    assert {"epoch", "frozen", "before", "after", "seconds_moving", "seconds_staying"} == set(report["moves"][0])
    boundaries = [epoch["boundary"] for epoch in epochs]
    assert boundaries[0] is None
    assert boundaries[-1] == "classifier"
    assert "FreezeOut(t0=0.4" in capsys.readouterr().out


def test_train_takes_stages_from_a_file_and_refuses_what_does_not_go_together(tmp_path, capsys, weights):
    file = tmp_path / "s.yaml"
    file.write_text("0: {epochs: 1}\n1: {train_last: 1}\n")
    out = ["--out", str(tmp_path / "out"), "--batch-size", "256", *weights]
    assert main(["train", "--schedule", str(file), "--epochs", "3", *out]) == 0
    epochs = json.loads((tmp_path / "out" / "report.json").read_text())["epochs"]
    assert [epoch["boundary"] for epoch in epochs] == [None, "classifier", "classifier"]
    assert epochs[0]["source"] == "live"
    capsys.readouterr()
    for wrong, message in (
        (["--schedule", str(file), "--train-last", "1"], "not allowed with"),
        (["--t0", "0.5"], "it is not given"),
        (["--schedule", str(file), "--epochs", "1"], "never reached"),
        (["--schedule", str(file), "--epochs", "4", "--resume", *out], "same length"),
        (["--epochs", "4", "--train-last", "1", "--resume", *out], "another run"),
    ):
        try:
            status = main(["train", "--cache", "off", *wrong])
        except SystemExit as stopped:
            status = stopped.code
        assert (status, message in capsys.readouterr().err) == (2, True), wrong
