"""The three stores keep one contract, example by example and as state machines against a dict."""

from __future__ import annotations

import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cachefreeze.errors import StoreError, StoreSpaceError, UsageError
from cachefreeze.stores import memory
from cachefreeze.stores.base import FieldSpec, Store, StoreSpec
from cachefreeze.stores.codec import Rounding, stored_dtype
from cachefreeze.stores.hdf5 import HDF5Store
from cachefreeze.stores.memory import DeviceStore, HostStore
from cachefreeze.stores.ragged import Lengths
from cachefreeze.testing.specs import (
    ROWS,
    assert_same,
    lengths_of,
    one_field,
    one_ragged,
    rows_of,
    values,
    with_rubbish,
)
from cachefreeze.testing.stores import StoreTests

SPEC = StoreSpec(
    rows=9,
    fields=(
        FieldSpec(name="activation.0", shape=(3, 2), dtype=torch.bfloat16),
        FieldSpec(name="field.1", shape=(), dtype=torch.int64),
        FieldSpec(name="field.mask", shape=(5,), dtype=torch.bool),
        FieldSpec.ragged(name="ragged.0", lengths=[3, 0, 1, 1, 4, 0, 0, 2, 1], rest=(2,), dtype=torch.float16),
    ),
)


def needs_cuda(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test))


class TestHostStore(StoreTests):
    @pytest.fixture
    def make(self):
        return HostStore


class TestDeviceStore(StoreTests):
    @pytest.fixture
    def make(self):
        return lambda spec: DeviceStore(spec, "cpu")


@needs_cuda
class TestCUDADeviceStore(StoreTests):
    @pytest.fixture
    def make(self):
        return lambda spec: DeviceStore(spec, "cuda")


class TestHDF5Store(StoreTests):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda spec: HDF5Store.create(tmp_path / "rows.h5", spec, fingerprint={"weights": "abc"})


class TestHDF5StoreByPread(StoreTests):
    @pytest.fixture
    def make(self, tmp_path):
        return lambda spec: HDF5Store.create(tmp_path / "rows.h5", spec, fingerprint={"weights": "abc"}, io="pread")


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls leaves a store equal to a dict of rows."""

    def __init__(self):
        super().__init__()
        self.model: dict[int, int] = {}  # row: seed of its values
        self.store = self.make()

    def make(self) -> Store:
        raise NotImplementedError

    @rule(rows=st.lists(st.integers(0, SPEC.rows - 1), unique=True), seed=st.integers(0, 5))
    def write(self, rows, seed):
        index = torch.tensor(rows, dtype=torch.int64)
        self.store.write(index, with_rubbish(SPEC, index, values(SPEC, index, seed), more=seed))
        self.model |= dict.fromkeys(rows, seed)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1))
        got = self.store.read(torch.tensor(rows))
        by_seed = {seed: values(SPEC, torch.tensor(rows), seed) for seed in set(self.model.values())}
        expected = {name: tensor.clone() for name, tensor in next(iter(by_seed.values())).items()}
        for at, row in enumerate(rows):
            for name, tensor in by_seed[self.model[row]].items():
                expected[name][at] = tensor[at]
        assert_same(got, expected)
        for tensor in got.values():
            tensor.zero_()

    @rule(row=st.integers(0, SPEC.rows - 1))
    def read_absent(self, row):
        if row not in self.model:
            with pytest.raises(StoreError):
                self.store.read(rows_of(row))

    @rule(row=st.integers(0, SPEC.rows - 1))
    def forget(self, row):
        self.store.forget(rows_of(row))
        self.model.pop(row, None)

    @rule()
    def commit(self):
        self.store.commit()
        assert self.store.verify() == []

    @invariant()
    def presence_agrees(self):
        assert self.store.present(torch.arange(SPEC.rows)).tolist() == [row in self.model for row in range(SPEC.rows)]
        assert self.store.count == len(self.model)

    def teardown(self):
        self.store.close()


class HostMachine(StoreMachine):
    def make(self):
        return HostStore(SPEC)


class DeviceMachine(StoreMachine):
    def make(self):
        return DeviceStore(SPEC, "cpu")


class HDF5Machine(StoreMachine):
    def make(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "rows.h5"
        self.forgotten: dict[int, int] = {}
        return HDF5Store.create(self.path, SPEC, fingerprint={"a": "b"})

    @rule(row=st.integers(0, SPEC.rows - 1))
    def forget(self, row):
        """Forgetting is this process's affair: after a reopen the row is there again."""
        self.store.forget(rows_of(row))
        if row in self.model:
            self.forgotten[row] = self.model.pop(row)

    @rule(verify=st.sampled_from(["first", "always", "never"]), io=st.sampled_from(["mmap", "pread"]))
    def reopen(self, verify, io):
        self.store.close()
        self.store = HDF5Store.open(self.path, verify=verify, io=io)
        assert self.store.writable
        self.model = self.forgotten | self.model
        self.forgotten = {}

    def teardown(self):
        super().teardown()
        self.folder.cleanup()


_SETTINGS = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHostMachine = HostMachine.TestCase
TestDeviceMachine = DeviceMachine.TestCase
TestHDF5Machine = HDF5Machine.TestCase
for _case in (TestHostMachine, TestDeviceMachine, TestHDF5Machine):
    _case.settings = _SETTINGS
del _case  # pytest would collect it a second time


@pytest.mark.parametrize("make", [HostStore, lambda spec: DeviceStore(spec, "cpu")], ids=["host", "device"])
class TestMemory:
    def test_too_large(self, make):
        """What cannot fit is refused at once, with both numbers."""
        with pytest.raises(StoreSpaceError, match=r"need 4,000,000,000,000,000 bytes on cpu, [\d,]+ are free"):
            make(one_field((10**6,), rows=10**9))

    def test_allocator_refuses(self, make, monkeypatch):
        """Where the system does not say what is free, the allocator's refusal becomes the same error."""
        monkeypatch.setattr(memory, "_MEMINFO", Path("/nonexistent"))
        with pytest.raises(StoreSpaceError, match="unknown"):
            make(one_field((10**11,), rows=10**6))

    def test_free_is_compared_with_need(self, make, monkeypatch, tmp_path):
        """One byte too few is too few; enough is enough."""
        (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 2 kB\n")
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        make(one_field((1,), torch.uint8, rows=2048))
        with pytest.raises(StoreSpaceError, match="2,048 are free"):
            make(one_field((1,), torch.uint8, rows=2049))


def test_a_device_that_does_not_say_what_is_free():
    """Its allocator decides; its pages are its own affair."""
    store = DeviceStore(one_field(), "meta")
    assert store.device.type == "meta"
    assert memory.free_device_bytes(store.device) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinning works with CUDA")
def test_pin_needs_cuda():
    """Asking for pinned memory where there is none is an error, not a slow batch."""
    with pytest.raises(UsageError, match="CUDA"):
        HostStore(one_field(), pin=True)


@needs_cuda
class TestCUDA:
    def test_host_batches_are_pinned(self):
        """With CUDA present batches can travel while the device computes."""
        store = HostStore(SPEC)
        store.write(torch.arange(9), values(SPEC, torch.arange(9)))
        assert all(tensor.is_pinned() for tensor in store.read(rows_of(1)).values())
        assert not any(tensor.is_pinned() for tensor in HostStore(SPEC, pin=False).read(rows_of()).values())

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # a prototype, as torch says once
    def test_device_store_does_not_synchronise(self):
        """Neither reading nor writing waits for the device."""
        store = DeviceStore(SPEC, "cuda")
        rows = torch.arange(9)
        batch = values(SPEC, rows)
        torch.cuda.set_sync_debug_mode("error")
        try:
            store.write(rows, batch)
            got = store.read(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same(got, batch)
        assert all(tensor.device == store.device for tensor in got.values())


class TestLengths:
    """How long the rows of a ragged field are."""

    def test_where_items_lie(self):
        """Rows follow each other without gaps; padding points behind the last item."""
        lengths = Lengths([2, 0, 3])
        assert (len(lengths), lengths.total, lengths.longest) == (3, 5, 3)
        assert lengths.values.tolist() == [2, 0, 3]
        rows = rows_of(2, 0, 1)
        assert lengths.of(rows).tolist() == [3, 2, 0]
        assert lengths.starts(rows).tolist() == [2, 0, 2]
        assert lengths.positions(rows, 3).tolist() == [[2, 3, 4], [0, 1, 5], [5, 5, 5]]
        assert lengths.mask(rows, 2).tolist() == [[True, True], [True, True], [False, False]]
        assert [lengths.width(rows_of(*some)) for some in ((), (1,), (0, 1), (2, 2))] == [0, 0, 2, 3]

    def test_compared_by_value(self):
        """Equal lengths are equal, whatever they were made from; a spec with them can be a key."""
        some = [Lengths([1, 2]), Lengths(torch.tensor([1, 2], dtype=torch.int32)), Lengths(np.array([1, 2], "<u4"))]
        assert len(set(some)) == 1
        assert some[0] == some[1] == some[2] == pickle.loads(pickle.dumps(some[0]))
        for other in ([2, 1], [1, 2, 0], [1], []):
            assert Lengths(other) != some[0]
        assert some[0] != [1, 2]
        assert one_ragged() == one_ragged()
        assert hash(one_ragged()) == hash(one_ragged())
        assert one_ragged() != replace(one_ragged(), rows=ROWS + 1)

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([1, -1], "got -1 for row 1"),
            ([1.0, 2.0], "float64"),
            ([True, False], "bool"),
            ([[1, 2]], "shape"),
            (3, "shape"),
            ([2**70], "object"),
            ([2**62, 2**62], "more than"),
            (np.array([2**63], np.uint64), "0 or more"),
        ],
    )
    def test_refused(self, bad, message):
        """Lengths that are no counts, or too many to add up, are named."""
        with pytest.raises(StoreError, match=message):
            Lengths(bad)

    def test_shown(self):
        """Errors and info name a ragged field by its longest row."""
        assert str(one_ragged().fields[0]) == "activation.0 (0..7, 3) float32"
        assert str(one_field().fields[0]) == "activation.0 (2, 3) float32"
        assert repr(Lengths([1, 2000])) == "Lengths(2 rows, longest 2,000, 2,001 items)"


@pytest.mark.parametrize("make", [HostStore, lambda spec: DeviceStore(spec, "cpu")], ids=["host", "device"])
def test_ragged_rows_take_their_own_length(make):
    """In memory ragged rows take one item more than the sum of their lengths."""
    store = make(one_ragged((1000,)))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in store._data.values())
    assert kept == store.nbytes + 4000 == (sum(lengths_of()) + 1) * 4000


@pytest.mark.parametrize("wanted", ["int8", "double", torch.int8, torch.float64])
def test_rows_are_kept_in_few_dtypes(wanted):
    """Anything but the three that rows may be narrowed to is named, as a string or a dtype."""
    with pytest.raises(UsageError, match="expected one of auto, float32, float16, bfloat16"):
        stored_dtype(torch.float32, wanted)
    assert stored_dtype(torch.float32, torch.bfloat16) == stored_dtype(torch.float32, "bfloat16") == torch.bfloat16
    assert stored_dtype(torch.int64, "float16") == torch.int64
    assert stored_dtype(torch.float16, "float32") == torch.float16


def test_rounding_is_measured_until_enough_is():
    """Nothing is claimed before a row was seen; what is not finite counts for nothing; later rows are not looked at."""
    rounding = Rounding()
    assert rounding.relative is None
    rounding.add(torch.full((1024, 2), float("inf")), torch.full((1024, 2), float("inf")))
    assert rounding.relative == 0.0
    rounding.add(torch.ones(8, 2), torch.zeros(8, 2))
    assert (rounding.rows, rounding.relative) == (1024, 0.0)
