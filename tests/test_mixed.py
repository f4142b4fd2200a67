"""A store made of several tiers keeps the contract of one, and says where its rows are."""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze as cf
from cachefreeze.errors import CorruptRowError, StoreError
from cachefreeze.stores import (
    DeviceStore,
    FieldSpec,
    HDF5Store,
    HostStore,
    MixedStore,
    StoreSpec,
    opening,
    part_of,
    spread,
)
from cachefreeze.stores.base import check_spec
from cachefreeze.testing.specs import assert_same, every_kind, one_field, one_ragged, values
from cachefreeze.testing.stores import StoreTests


def parts(spec, count=3):
    """About equal shares; fewer where there are fewer rows."""
    edges = sorted({0, spec.rows, *(spec.rows * i // count for i in range(1, count))})
    return [part_of(spec, start, stop) for start, stop in pairwise(edges)]


def mixed(spec, folder):
    """Device (here the CPU), host and disk."""
    check_spec(spec)
    makers = (
        lambda part: DeviceStore(part, "cpu"),
        HostStore,
        lambda part: HDF5Store.create(folder / "part.h5", part, fingerprint={"weights": "abc"}),
    )
    return MixedStore(spec, [make(part) for make, part in zip(makers, parts(spec), strict=False)])


class TestMixedStore(StoreTests):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda spec: mixed(spec, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestMixedStoreOnCUDA(StoreTests):
    @pytest.fixture
    def make(self, tmp_path):
        def make(spec):
            first, *rest = parts(spec, 2)
            return MixedStore(spec, [DeviceStore(first, "cuda"), *(HostStore(part) for part in rest)])

        return make


def test_every_row_lies_in_its_tier(tmp_path):
    """Shuffled batches over all tiers come back bit for bit, ragged and uniform; each tier holds its own rows."""
    spec = every_kind(12)
    store = mixed(spec, tmp_path)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    for rows in order.split(5):
        store.write(rows, values(spec, rows))
    assert [part.count for part in store.tiers] == [4, 4, 4]
    for rows in (order, order[:3], torch.tensor([3]), torch.tensor([11, 0, 11, 5])):
        assert_same(store.read(rows), values(spec, rows))


def test_a_bad_row_is_named_by_its_own_number(tmp_path):
    """A flipped bit in the part on disk: the error and verify() name the row of the whole, which is then absent."""
    spec = one_field(rows=12)
    store = mixed(spec, tmp_path)
    everything = torch.arange(12)
    store.write(everything, values(spec, everything))
    on_disk = store.tiers[2]
    on_disk._verified[:] = False
    offset = on_disk._layout.offsets["activation.0"] + 2 * spec.fields[0].item_bytes
    with on_disk.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))
    assert [bad.row for bad in store.verify()] == [10]
    with pytest.raises(CorruptRowError) as caught:
        store.read(torch.tensor([1, 10, 6]))
    assert list(caught.value.rows) == [10]
    assert store.present(torch.tensor([9, 10, 11])).tolist() == [True, False, True]


def test_rows_of_a_reopened_part_are_there(tmp_path):
    """The part on disk is found again; those in memory are absent."""
    spec = one_field(rows=12)
    store = mixed(spec, tmp_path)
    everything = torch.arange(12)
    store.write(everything, values(spec, everything))
    path = store.path
    store.close()
    first, second, _ = parts(spec)
    again = MixedStore(spec, [HostStore(first), HostStore(second), HDF5Store.open(path)])
    assert again.count == 4
    assert again.present(everything).nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_tiers_must_make_up_the_spec():
    """Too few rows, or other fields, are refused."""
    spec = one_field(rows=12)
    with pytest.raises(StoreError, match="do not make up 12"):
        MixedStore(spec, [HostStore(part_of(spec, 0, 4))])
    other = one_field(shape=(9,), rows=12)
    with pytest.raises(StoreError, match="other fields"):
        MixedStore(spec, [HostStore(part_of(spec, 0, 4)), HostStore(part_of(other, 4, 12))])


def test_spread():
    """The fastest tier takes what fits, in whole sixteenths, the last what is left; no room is no store."""
    spec = one_field(shape=(25,), rows=160)  # 100 bytes a row
    assert spread(spec, [16_000, 99_000]) == [160, 0]
    assert spread(spec, [8_999, 99_000]) == [80, 80]
    assert spread(spec, [8_000, 3_000, 99_000]) == [80, 30, 50]
    assert spread(spec, [999, 16_000]) == [0, 160]
    assert spread(spec, [8_000, 7_999]) is None
    ragged = one_ragged(rest=(25,), rows=14)  # lengths 2, 5, 0, 1, 1, 7, 0, twice
    assert spread(ragged, [800, 9_999]) == [4, 10]


@pytest.mark.parametrize("free", [{"device": 0, "host": 2_000, "disk": 10**9}, {"device": 8_000, "host": 10**9}])
def test_auto_spreads_rows(tmp_path, monkeypatch, free):
    """Where no tier holds all rows, or a device holds some, they are spread; what trains is the same to the bit."""
    monkeypatch.setattr(opening, "free_host_bytes", lambda: free["host"])
    monkeypatch.setattr(opening, "free_device_bytes", lambda device: free["device"])
    monkeypatch.setattr(opening, "free_disk_bytes", lambda folder: free.get("disk", 0))
    spec = one_field(shape=(5,), rows=160)  # 3200 bytes
    wanted = opening.Wanted(
        spec=spec, name="train", boundary="fc", fingerprint={"weights": "a"}, attributes={},
        device=torch.device("meta" if free["device"] else "cpu"),
    )  # fmt: skip
    if free["device"]:
        monkeypatch.setattr(opening, "DeviceStore", lambda spec, device: DeviceStore(spec, "cpu"))
        store = opening.open_store("auto", wanted)
        assert [part.tier for part in store.tiers] == ["device", "host"]
        assert [part.spec.rows for part in store.tiers] == [100, 60]
    else:
        assert opening.open_store(f"auto:{tmp_path}", wanted).tier == "hdf5"  # the disk holds all: nothing is spread
        monkeypatch.setattr(opening, "free_disk_bytes", lambda folder: 3_000)
        store = opening.open_store(f"auto:{tmp_path}", wanted)
        assert [part.tier for part in store.tiers] == ["host", "hdf5"]
        assert opening.for_another(store) == f"auto:{tmp_path}"
    everything = torch.arange(160)
    store.write(everything, values(spec, everything))
    assert_same(store.read(everything), values(spec, everything))


def test_a_device_with_no_room_for_a_share_changes_nothing(tmp_path, monkeypatch):
    """Rows go to disk as a whole, as without a device, where the next run finds all of them."""
    monkeypatch.setattr(opening, "free_device_bytes", lambda device: 40)
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 2_000)
    monkeypatch.setattr(opening, "free_disk_bytes", lambda folder: 10**9)
    wanted = opening.Wanted(
        spec=one_field(shape=(5,), rows=160), name="train", boundary="fc", fingerprint={"weights": "a"}, attributes={},
        device=torch.device("meta"),
    )  # fmt: skip
    assert opening.open_store(f"auto:{tmp_path}", wanted).tier == "hdf5"


def test_a_part_on_disk_is_one_samples(tmp_path, monkeypatch):
    """What tells samples of one fingerprint from those of another also does for a part of its rows."""
    monkeypatch.setattr(opening, "free_host_bytes", lambda: 2_000)
    monkeypatch.setattr(opening, "free_disk_bytes", lambda folder: 3_000)
    spec = one_field(shape=(5,), rows=160)
    everything = torch.arange(160)
    for digest in "ab":
        wanted = opening.Wanted(
            spec=spec, name="train", boundary="fc", fingerprint={"rows": digest}, attributes={},
            device=torch.device("cpu"),
        )  # fmt: skip
        with closing(opening.open_store(f"auto:{tmp_path}", wanted)) as store:
            assert store.count == 0
            store.write(everything, values(spec, everything))
            store.commit()


def test_a_share_of_empty_texts_alone_is_refused():
    """No store holds a field without bytes, so such rows cannot be a share of their own."""
    field = FieldSpec.ragged(name="text", lengths=[0, 0, 3], rest=(2,), dtype=torch.float32)
    with pytest.raises(StoreError, match="rows 0 to 1 of ragged 'text' are all empty"):
        part_of(StoreSpec(rows=3, fields=(field,)), 0, 2)


def test_a_share_that_cannot_be_made_takes_the_others_along(monkeypatch):
    """What was opened for a spread store is closed again when a later tier fails."""
    opened = []

    class Opened(HostStore):
        def __init__(self, spec, device):
            super().__init__(spec)
            opened.append(self)

    def full(spec):
        raise StoreError("no memory after all")

    spec = one_field()
    wanted = opening.Wanted(
        spec=spec, name="train", boundary="b", fingerprint={}, attributes={}, device=torch.device("meta")
    )
    monkeypatch.setattr(opening, "free_device_bytes", lambda device: 4 * spec.nbytes - 1)
    monkeypatch.setattr(opening, "DeviceStore", Opened)
    monkeypatch.setattr(opening, "HostStore", full)
    with pytest.raises(StoreError, match="after all"):
        opening.open_store("auto", wanted)
    assert [store.closed for store in opened] == [True]


def test_training_from_a_mixed_store(tmp_path):
    """Losses equal those of a host store, bit for bit, in the fill and after it."""

    def losses(store):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        cf.freeze(model, train_from="2")
        data = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
        engine = cf.Engine(model, store=store)
        train = engine.loader(DataLoader(data, batch_size=6, shuffle=True))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for _ in engine.epochs(3):
            for x, y in train:
                loss = nn.functional.cross_entropy(engine(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        assert train.source == "cached"
        engine.close()
        return found

    fields = (
        FieldSpec(name="activation.0", shape=(8,), dtype=torch.float32),
        FieldSpec(name="field.0", shape=(), dtype=torch.int64),
    )
    assert losses(mixed(StoreSpec(rows=20, fields=fields), tmp_path)) == losses("host")
