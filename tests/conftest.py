"""What all tests share: one thread, skips that say why, and the shared data."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of commands that tests run: threads would wait for each other
# tqdm's own lock is shared with forked children: one that is killed with it in hand would stop every bar here for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def slept_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time passes in sleeps, and a microsecond at every look: what is measured is not what else the machine does."""
    from cachefreeze.measuring.speeds import speed_of

    speed_of.cache_clear()  # known once a process: of real time before, and of this one behind
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def look() -> float:
        sleep(1e-6)
        return now

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", look)
    yield
    speed_of.cache_clear()


@pytest.fixture(scope="session")
def _pretrained_digits() -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    return {}


@pytest.fixture
def pretrained_once(
    _pretrained_digits: dict[tuple[int, int], dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digits' network is pretrained once per seed and image size, not in every command of every test."""
    from cachefreeze.cli import job

    def pretrain(model: torch.nn.Module, *, seed: int, image_size: int) -> None:
        key = seed, image_size
        own = {name: value for name, value in model.state_dict().items() if name.startswith("classifier.")}
        if key not in _pretrained_digits:
            digits_pretrain(model, seed=seed, image_size=image_size)
            _pretrained_digits[key] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict({**_pretrained_digits[key], **own})

    digits_pretrain = job.pretrain
    monkeypatch.setattr(job, "pretrain", pretrain)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared photos and weights: CACHEFREEZE_DATA, else ../shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    found = Path(os.environ.get("CACHEFREEZE_DATA") or beside)
    if not found.is_dir():
        pytest.skip(f"no data folder {found}; set CACHEFREEZE_DATA")
    return found
