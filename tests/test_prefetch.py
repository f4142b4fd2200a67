"""Reading ahead: the same batches and draws as without, errors where they belong, and no thread that stays."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from test_loader import COUNT, SAMPLERS, Numbered, make_loader, make_model, reseed, visit
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler

import cachefreeze as cf
from cachefreeze.errors import CorruptRowError, LoaderError
from cachefreeze.order import foreseen, with_following
from cachefreeze.prefetch import ReadAhead, side_stream
from cachefreeze.rows import StoredRows


class HandOver:
    """In place of a stream: what is read in the one thread is there for the other."""

    def __init__(self):
        self.asked = []

    def open(self):
        """Nothing is queued on a CPU."""

    def send(self, read, rows):
        assert threading.current_thread() is not threading.main_thread()
        self.asked.append(list(rows))
        return read(rows)

    def take(self, sent):
        return sent


@pytest.fixture
def lane(monkeypatch):
    lane = HandOver()
    monkeypatch.setattr(StoredRows, "lane", lambda self: lane)
    return lane


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cachefreeze")]


BLOCKS = {
    "blocks": lambda: {"sampler": cf.BlockShuffleSampler(range(COUNT), 4, 2)},
    "blocks, own generator": lambda: {
        "sampler": cf.BlockShuffleSampler(range(COUNT), 4, 2, generator=torch.Generator().manual_seed(5))
    },
}


@pytest.mark.parametrize(
    ("name", "stop_after", "workers"),
    [
        *((name, stop_after, 0) for name in [*SAMPLERS, *BLOCKS] for stop_after in (None, 2, 5)),
        ("shuffle, own generator", None, 2),
    ],
)
def test_order_and_draws_are_the_dataloaders(lane, name, stop_after, workers):
    """Also after a break one batch before the end, where a look ahead would come upon the sampler's last draw."""
    options = {**SAMPLERS, **BLOCKS}[name]
    reseed()
    expected = visit(make_loader(options(), num_workers=workers), 3, stop_after)
    reseed()
    loader = make_loader(options(), num_workers=workers)
    cached = cf.Engine(make_model(), "host").loader(loader, name="train")
    cached.rows.fill(DataLoader(Numbered(), 4), None)
    assert visit(cached, 3, stop_after) == expected
    assert bool(lane.asked) == (name not in ("with replacement", "weighted", "eager", "drawing"))
    assert not threads()


@pytest.mark.parametrize("tier", ["host", "hdf5"])
def test_all_batches_but_the_first_are_read_ahead(lane, tmp_path, tier):
    """From the pass on in which the store is full; each is its own memory, and what a pass without gives."""
    engine = cf.Engine(make_model(), f"hdf5:{tmp_path}" if tier == "hdf5" else tier)
    cached = engine.loader(DataLoader(Numbered(), 4, shuffle=True), name="train")
    for _ in cached:
        pass
    assert not lane.asked
    for _ in range(2):
        lane.asked.clear()
        seen = []
        for rows, labels in cached:
            assert torch.equal(rows.tensors[0][:, 0], labels.float())
            seen.append(labels.tolist())
            rows.tensors[0].fill_(-1)
            labels.fill_(-1)
        assert lane.asked == seen[1:]
        assert (cached.source, cached.counts.cached) == ("cached", COUNT)
    engine.close()


def test_what_may_be_pulled_early():
    """Of a permutation drawn from the user's own generator all whole batches; of what is not known, none."""

    class Other(RandomSampler):
        pass

    def of(sampler, size=4):
        return foreseen(BatchSampler(sampler, size, drop_last=False))

    own = torch.Generator()
    assert of(RandomSampler(range(23))) == of(SubsetRandomSampler(range(5), generator=own)) == float("inf")
    assert of(RandomSampler(range(23), generator=own)) == 5
    assert of(RandomSampler(range(24), generator=own)) == 6
    assert of(RandomSampler(range(23), num_samples=50, generator=own)) == 5
    assert of(RandomSampler(range(23), replacement=True)) == of(Other(range(23))) == of([1, 2]) == foreseen([[1]]) == 0


@pytest.mark.parametrize("early", [0, 1, 2, 3, 9])
def test_pairs(early):
    """As many are pulled early as may be, and none is left out or given twice."""
    pulled = []

    def source():
        for rows in ([0], [1], [2]):
            pulled.append(rows)
            yield rows

    seen = []
    for number, (rows, following) in enumerate(with_following(source(), early)):
        assert following == ([number + 1] if number + 2 <= min(early, 3) else None)
        assert len(pulled) == min(3, number + (2 if number + 2 <= early else 1))
        seen.append(rows)
    assert seen == [[0], [1], [2]]


def test_a_damaged_row_is_computed_and_counted(lane, tmp_path):
    """A row whose bytes changed is found by the thread, repaired, and its batch is right."""
    engine = cf.Engine(make_model(), f"hdf5:{tmp_path}")
    cached = engine.loader(DataLoader(Numbered(), 4), name="train")
    list(cached)
    engine.close()
    engine = cf.Engine(make_model(), f"hdf5:{tmp_path}")
    cached = engine.loader(DataLoader(Numbered(), 4), name="train")
    store = cached.rows.store
    column = next(column for column in store._columns if column.field.name == "activation.0")
    with store.path.open("r+b") as file:
        file.seek(int(column.spans(torch.tensor([9]))[0][0]))
        file.write(b"\xff\xff\x01")
    for rows, labels in cached:
        assert torch.equal(rows.tensors[0][:, 0], labels.float())
    assert (cached.counts.repaired, cached.counts.computed, cached.counts.cached) == (1, 1, COUNT - 1)
    assert [8, 9, 10, 11] in lane.asked
    for _ in cached:
        pass
    assert (cached.counts.repaired, cached.counts.cached) == (0, COUNT)
    engine.close()


def test_errors_surface_at_their_batch(lane, monkeypatch):
    """What the read of a batch raises, and a sampler's index that is none, arrive when that batch is asked for."""
    engine = cf.Engine(make_model(), "host")
    engine.loader(DataLoader(Numbered(), 4), name="train").rows.fill(DataLoader(Numbered(), 4), None)
    cached = engine.loader(DataLoader(Numbered(), 4), name="train")
    read = cached.rows.store.read

    def failing(rows):
        if 8 in rows.tolist():
            raise OSError("the disk is gone")
        return read(rows)

    monkeypatch.setattr(cached.rows.store, "read", failing)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012  the loop itself is what raises
        for _, labels in cached:
            seen.append(labels.tolist())
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not threads()
    monkeypatch.undo()
    seen = []
    beyond = SubsetRandomSampler([*range(4), COUNT], generator=torch.Generator().manual_seed(0))
    wrong = engine.loader(DataLoader(Numbered(), 1, sampler=beyond), name="train")
    monkeypatch.setattr(StoredRows, "lane", lambda self: lane)
    with pytest.raises(LoaderError, match=f"sample {COUNT} "):  # noqa: PT012  as above
        for _, labels in wrong:
            seen += labels.tolist()
    order = list(SubsetRandomSampler([*range(4), COUNT], generator=torch.Generator().manual_seed(0)))
    assert seen == order[: order.index(COUNT)]


def test_no_thread_stays(lane):
    """Not after a pass, a break, an exception in the loop, or a generator that is closed half way."""
    engine = cf.Engine(make_model(), "host")
    cached = engine.loader(DataLoader(Numbered(), 4), name="train")
    cached.rows.fill(DataLoader(Numbered(), 4), None)
    before = threading.active_count()
    for _ in cached:
        assert len(threads()) == 1
        break
    assert threading.active_count() == before
    with pytest.raises(KeyError):  # noqa: PT012  the loop itself is what raises
        for _ in cached:
            raise KeyError
    half = iter(cached)
    next(half)
    half.close()
    assert threading.active_count() == before


def test_nothing_is_read_ahead_on_a_cpu():
    """There is nothing to send, and waking a thread costs more than the copy."""
    engine = cf.Engine(make_model(), "host")
    cached = engine.loader(DataLoader(Numbered(), 4), name="train")
    cached.rows.fill(DataLoader(Numbered(), 4), None)
    assert cached.rows.lane() is None
    for _ in cached:
        assert not threads()


def test_an_error_is_raised_once():
    """After it the next batch can be asked for."""

    def read(rows):
        if rows == [0]:
            raise CorruptRowError("no", rows=[0])
        return {"x": torch.tensor(rows)}

    with ReadAhead(read, HandOver()) as ahead:
        assert ahead.take() is None
        ahead.ask([0])
        with pytest.raises(CorruptRowError):
            ahead.take()
        ahead.ask([1])
        assert ahead.take()["x"].tolist() == [1]


def test_a_sampler_s_error_belongs_to_the_next_batch():
    """The batch before it is given first."""

    def source():
        yield [0]
        raise KeyError("no more")

    pairs = with_following(source(), 9)
    assert next(pairs) == ([0], None)
    with pytest.raises(KeyError):
        next(pairs)


def test_passes_share_a_stream(monkeypatch):
    """A stream has memory of its own, and torch's 32 come round again: to the one that a step is recorded on."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    side_stream.cache_clear()
    rows = SimpleNamespace(prefix=SimpleNamespace(device=torch.device("cuda", 0)), store=SimpleNamespace(tier="host"))
    lanes = [StoredRows.lane(rows) for _ in range(3)]
    side_stream.cache_clear()
    assert lanes[0] is lanes[1] is lanes[2] is not None
