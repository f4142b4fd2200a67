"""The conformance suite of stores: subclass :class:`StoreTests`, say how a store is made, run pytest.

Example:
    >>> class TestMyStore(StoreTests):
    ...     @pytest.fixture
    ...     def make(self):
    ...         return MyStore
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cachefreeze.errors import StoreError
from cachefreeze.stores.base import FieldSpec, Store, StoreSpec
from cachefreeze.stores.ragged import Lengths
from cachefreeze.testing.specs import (
    DTYPES,
    ROWS,
    assert_same,
    every_kind,
    lengths_of,
    one_field,
    one_ragged,
    rows_of,
    values,
    with_rubbish,
)

Make = Callable[[StoreSpec], Store]


class StoreTests:
    """What every store promises. The fixture ``make`` turns a spec into a new, empty, writable store."""

    @pytest.fixture
    def make(self) -> Make:
        """Override: how a store is made."""
        raise NotImplementedError("override the fixture 'make'")

    def filled(self, make: Make, spec: StoreSpec) -> Store:
        """A store with every row written."""
        store = make(spec)
        everything = torch.arange(spec.rows)
        store.write(everything, values(spec, everything))
        return store

    def test_new_store_is_empty(self, make: Make) -> None:
        """A new store has room for its rows and none of them."""
        spec = one_field()
        store = make(spec)
        assert store.spec == spec
        assert store.count == 0
        assert store.writable
        assert store.nbytes == ROWS * 24
        assert store.tier in ("device", "host", "hdf5", "mixed")
        assert not store.present(torch.arange(ROWS)).any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5)], ids=str)
    def test_every_dtype_and_shape(self, make: Make, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Rows of any dtype and rank, scalars included, come back bit for bit."""
        spec = one_field(shape, dtype)
        store = self.filled(make, spec)
        rows = rows_of(5, 0, 11)
        assert_same(store.read(rows), values(spec, rows))

    def test_many_fields(self, make: Make) -> None:
        """Fields of different dtypes do not touch each other."""
        spec = every_kind()
        store = self.filled(make, spec)
        assert_same(store.read(torch.arange(ROWS)), values(spec, torch.arange(ROWS)))
        assert store.nbytes == spec.nbytes

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("rest", [(), (1,), (3,), (2, 3)], ids=str)
    def test_ragged_dtypes_and_shapes(self, make: Make, dtype: torch.dtype, rest: tuple[int, ...]) -> None:
        """Rows of different lengths come back bit for bit, padded with zeros to the longest that was asked for."""
        spec = one_ragged(rest, dtype)
        store = self.filled(make, spec)
        for rows in (rows_of(5, 0, 11), rows_of(3, 4, 3), rows_of(6, 0), rows_of(2), rows_of(2, 6, 9)):
            assert_same(store.read(rows), values(spec, rows))
        assert store.read(rows_of(3))["activation.0"].shape == (1, 1, *rest)
        assert store.read(rows_of(2, 9))["activation.0"].shape == (2, 0, *rest)
        assert store.nbytes == sum(lengths_of()) * math.prod(rest) * dtype.itemsize

    def test_ragged_padding_is_ignored(self, make: Make) -> None:
        """What lies beyond a row's length in a write reaches no row; what a read pads with is zero."""
        spec = every_kind()
        store = make(spec)
        for rows in (rows_of(5, 1, 9, 2, 3), rows_of(4, 0, 6), rows_of(7, 8, 10, 11)):
            store.write(rows, with_rubbish(spec, rows, values(spec, rows)))
            got = store.read(rows)
            assert_same(got, values(spec, rows))
            for tensor in got.values():  # the caller may write into padding too
                tensor.fill_(1)
        everything = torch.arange(ROWS)
        assert_same(store.read(everything), values(spec, everything))
        assert store.verify() == []

    def test_ragged_neighbours(self, make: Make) -> None:
        """Rewriting a ragged row of any length touches no other row, one item away as it lies."""
        spec = one_ragged()
        store = self.filled(make, spec)
        everything = torch.arange(ROWS)
        for row in range(ROWS):
            store.write(rows_of(row), values(spec, rows_of(row), seed=1))
            expected = values(spec, everything)["activation.0"]
            expected[: row + 1] = values(spec, everything, seed=1)["activation.0"][: row + 1]
            assert_same(store.read(everything), {"activation.0": expected})

    def test_special_values(self, make: Make) -> None:
        """NaN, infinities and negative zero are bits like any other."""
        store = make(one_field((4,), torch.float32))
        batch = {"activation.0": torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0]])}
        store.write(rows_of(3), batch)
        assert_same(store.read(rows_of(3)), batch)

    def test_expected_rows(self, make: Make) -> None:
        """Rows that are expected, in any order, are what they were, and absent ones are no error."""
        spec = every_kind()
        store = make(spec)
        store.expect(torch.arange(ROWS))
        assert store.count == 0
        store.write(rows_of(2, 7), values(spec, rows_of(2, 7)))
        store.expect(rows_of(7, 2, 7, 0))
        assert_same(store.read(rows_of(7, 2)), values(spec, rows_of(7, 2)))
        with pytest.raises(StoreError):
            store.expect(rows_of(ROWS))

    def test_order_and_duplicates(self, make: Make) -> None:
        """A batch has the order asked for, and a row as often as asked for."""
        spec = one_field()
        store = self.filled(make, spec)
        rows = rows_of(7, 2, 7, 0, 11, 2)
        assert_same(store.read(rows), values(spec, rows))

    def test_write_order(self, make: Make) -> None:
        """Rows may be written in any order, runs and jumps mixed."""
        spec = every_kind()
        store = make(spec)
        rows = rows_of(9, 10, 11, 0, 5, 4, 1, 2, 3)
        store.write(rows, values(spec, rows))
        assert store.count == len(rows)
        assert_same(store.read(rows.sort().values), values(spec, rows.sort().values))
        assert store.present(rows_of(6, 7, 8, 9)).tolist() == [False, False, False, True]

    def test_reads_are_fresh(self, make: Make) -> None:
        """Writing into a batch, as an in-place layer does, harms neither the store nor another batch."""
        spec = one_field()
        store = self.filled(make, spec)
        rows = torch.arange(ROWS)
        first, second = store.read(rows), store.read(rows)
        first["activation.0"].zero_()
        assert_same(second, values(spec, rows))
        assert_same(store.read(rows), values(spec, rows))

    def test_writes_are_copied(self, make: Make) -> None:
        """The caller may reuse the tensors that it wrote, and the row indices."""
        spec = one_field()
        store = make(spec)
        rows = torch.arange(ROWS)
        batch = values(spec, rows)
        store.write(rows, batch)
        batch["activation.0"].zero_()
        assert_same(store.read(rows), values(spec, rows))
        rows.zero_()
        assert store.count == ROWS

    def test_batches_need_no_gradient(self, make: Make) -> None:
        """Writing a tensor that requires grad stores its values; what is read carries no graph."""
        store = make(one_field((2,)))
        store.write(rows_of(1), {"activation.0": torch.ones(1, 2, requires_grad=True) * 3})
        got = store.read(rows_of(1))["activation.0"]
        assert not got.requires_grad
        assert got.tolist() == [[3.0, 3.0]]

    def test_odd_strides(self, make: Make) -> None:
        """Transposed and expanded tensors, and strided row indices, are written by value."""
        store = make(one_field((2, 3)))
        batch = torch.arange(12.0).reshape(2, 3, 2).transpose(1, 2)
        store.write(rows_of(4, 0, 6, 0)[::2], {"activation.0": batch})
        assert torch.equal(store.read(rows_of(4, 6))["activation.0"].cpu(), batch)
        store.write(rows_of(8, 9), {"activation.0": torch.ones(1, 1, 1).expand(2, 2, 3)})
        assert torch.equal(store.read(rows_of(9))["activation.0"].cpu(), torch.ones(1, 2, 3))

    def test_empty_index(self, make: Make) -> None:
        """No rows are a batch of no rows, not an error."""
        spec = every_kind()
        store = make(spec)
        none = rows_of()
        store.write(none, values(spec, none))
        assert store.count == 0
        assert_same(store.read(none), values(spec, none))
        assert store.present(none).shape == (0,)
        store.forget(none)

    def test_absent_row(self, make: Make) -> None:
        """A row that was never written cannot be read, not even among others that were."""
        spec = one_field()
        store = make(spec)
        store.write(rows_of(1, 2), values(spec, rows_of(1, 2)))
        assert store.present(rows_of(0, 1, 2, 3)).tolist() == [False, True, True, False]
        with pytest.raises(StoreError, match="row 3 is absent"):
            store.read(rows_of(1, 3))

    def test_forget(self, make: Make) -> None:
        """A forgotten row is absent until it is written again."""
        spec = one_field()
        store = self.filled(make, spec)
        store.forget(rows_of(4, 4))
        assert store.count == ROWS - 1
        assert not store.present(rows_of(4)).any()
        with pytest.raises(StoreError, match="absent"):
            store.read(rows_of(4))
        store.write(rows_of(4), values(spec, rows_of(4), seed=1))
        assert_same(store.read(rows_of(4)), values(spec, rows_of(4), seed=1))
        assert_same(store.read(rows_of(3, 5)), values(spec, rows_of(3, 5)))

    def test_claim(self, make: Make) -> None:
        """Absent rows may be claimed, again and as often as asked for; present rows need nobody to compute them."""
        spec = one_field()
        store = make(spec)
        store.write(rows_of(1, 2), values(spec, rows_of(1, 2)))
        for _ in range(2):
            assert store.claim(rows_of(0, 1, 3, 3, 2)).tolist() == [True, False, True, True, False]
        assert store.claim(rows_of()).shape == (0,)
        store.release(rows_of(0, 0, 1, 5))
        store.write(rows_of(3, 4), values(spec, rows_of(3, 4)))
        assert store.claim(rows_of(0, 3, 4)).tolist() == [True, False, False]
        assert_same(store.read(rows_of(4, 1, 3)), values(spec, rows_of(4, 1, 3)))

    def test_overwrite(self, make: Make) -> None:
        """Writing a present row replaces it and no other."""
        spec = every_kind()
        store = self.filled(make, spec)
        store.write(rows_of(6), values(spec, rows_of(6), seed=2))
        assert_same(store.read(rows_of(6)), values(spec, rows_of(6), seed=2))
        assert_same(store.read(rows_of(5, 7)), values(spec, rows_of(5, 7)))
        assert store.count == ROWS

    def test_present_is_a_copy(self, make: Make) -> None:
        """What present() returns is the caller's."""
        store = make(one_field())
        store.present(torch.arange(ROWS)).fill_(True)
        assert store.count == 0

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"activation.0": torch.zeros(2, 2, 4)}, "expected"),
            ({"activation.0": torch.zeros(1, 2, 3)}, "expected"),
            ({"activation.0": torch.zeros(2, 6)}, "expected"),
            ({"activation.0": torch.zeros(2, 2, 3, dtype=torch.float64)}, "float64"),
            ({"activation.1": torch.zeros(2, 2, 3)}, "fields"),
            ({"activation.0": torch.zeros(2, 2, 3), "more": torch.zeros(2)}, "fields"),
            ({}, "fields"),
        ],
    )
    def test_batch_must_fit(self, make: Make, batch: dict[str, Tensor], message: str) -> None:
        """A batch of another shape, dtype or set of fields is refused and changes nothing."""
        store = make(one_field())
        with pytest.raises(StoreError, match=message):
            store.write(rows_of(0, 1), batch)
        assert store.count == 0

    @pytest.mark.parametrize(
        "batch",
        [
            torch.zeros(2, 4, 3),
            torch.zeros(2, 5),
            torch.zeros(2, 5, 4),
            torch.zeros(3, 5, 3),
            torch.zeros(2, 5, 3, 1),
            torch.zeros(2, 5, 3, dtype=torch.float64),
            torch.zeros(6),
        ],
        ids=lambda batch: f"{tuple(batch.shape)} {batch.dtype}",
    )
    def test_ragged_batch_must_fit(self, make: Make, batch: Tensor) -> None:
        """A ragged batch narrower than its longest row, or of another item, is refused and changes nothing."""
        store = make(one_ragged())
        with pytest.raises(StoreError, match=r"expected \(2, 5, 3\) torch.float32: a ragged field"):
            store.write(rows_of(0, 1), {"activation.0": batch})
        assert store.count == 0

    @pytest.mark.parametrize(
        "rows",
        [
            torch.tensor([-1]),
            torch.tensor([ROWS]),
            torch.tensor([0, 2**40]),
            torch.tensor([0], dtype=torch.int32),
            torch.tensor([0.0]),
            torch.tensor([True]),
            torch.tensor(0),
            torch.tensor([[0]]),
        ],
        ids=str,
    )
    def test_rows_must_fit(self, make: Make, rows: Tensor) -> None:
        """Indices of another range, dtype or rank are refused by every method that takes them."""
        spec = one_field()
        store = self.filled(make, spec)
        for call in (store.read, store.present, store.forget, store.claim, store.release):
            with pytest.raises(StoreError, match="rows must"):
                call(rows)
        with pytest.raises(StoreError, match="rows must"):
            store.write(rows, values(spec, rows_of(0)))
        assert store.count == ROWS

    def test_row_twice_in_a_write(self, make: Make) -> None:
        """Two values for one row are refused: which one would count?"""
        store = make(one_field())
        with pytest.raises(StoreError, match="twice"):
            store.write(rows_of(1, 1), {"activation.0": torch.zeros(2, 2, 3)})
        assert store.count == 0

    @pytest.mark.parametrize(
        "spec",
        [
            one_field(rows=0),
            one_field(shape=(3, 0)),
            StoreSpec(rows=3, fields=()),
            StoreSpec(rows=3, fields=one_field().fields * 2),
            StoreSpec(rows=3, fields=(FieldSpec.ragged(name="a", lengths=[0, 0, 0], rest=(2,), dtype=torch.int8),)),
            StoreSpec(rows=3, fields=(FieldSpec.ragged(name="a", lengths=[1, 2], rest=(2,), dtype=torch.int8),)),
            StoreSpec(rows=3, fields=(FieldSpec(name="a", shape=(3,), dtype=torch.int8, lengths=Lengths([1, 2, 1])),)),
            StoreSpec(rows=3, fields=(FieldSpec(name="a", shape=(), dtype=torch.int8, lengths=Lengths([1, 2, 1])),)),
        ],
        ids=[
            "no rows", "no bytes", "no fields", "a name twice",
            "all empty", "too few lengths", "another longest", "no dimension",
        ],
    )  # fmt: skip
    def test_spec_must_make_sense(self, make: Make, spec: StoreSpec) -> None:
        """A spec that holds nothing, one name twice, or lengths that contradict it, is refused by name."""
        message = r"rows=0|no bytes|at least one field|name of its own|a length for each of 3 rows"
        with pytest.raises(StoreError, match=message):
            make(spec)

    def test_commit_and_verify(self, make: Make) -> None:
        """An undamaged store has no bad rows, before and after a commit."""
        store = self.filled(make, every_kind())
        assert store.verify() == []
        store.commit()
        assert store.verify() == []

    def test_read_only(self, make: Make) -> None:
        """A store that is not writable is read and not written."""
        spec = one_field()
        store = self.filled(make, spec)
        store.writable = False
        with pytest.raises(StoreError, match="read-only"):
            store.write(rows_of(0), values(spec, rows_of(0), seed=1))
        with pytest.raises(StoreError, match="read-only"):
            store.claim(rows_of(0))
        assert_same(store.read(rows_of(0)), values(spec, rows_of(0)))

    def test_closed(self, make: Make) -> None:
        """A closed store refuses every call, says so, and may be closed again; its batches live on."""
        spec = one_field()
        store = self.filled(make, spec)
        batch = store.read(rows_of(2))
        store.close()
        store.close()
        for call in (
            lambda: store.read(rows_of(2)),
            lambda: store.write(rows_of(2), values(spec, rows_of(2))),
            lambda: store.present(rows_of(2)),
            lambda: store.forget(rows_of(2)),
            lambda: store.claim(rows_of(2)),
            lambda: store.release(rows_of(2)),
            store.commit,
            store.verify,
        ):
            with pytest.raises(StoreError, match="closed"):
                call()
        assert_same(batch, values(spec, rows_of(2)))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    def test_batch_from_another_device(self, make: Make) -> None:
        """A batch may lie on another device than the store."""
        spec = every_kind()
        store = make(spec)
        rows = torch.arange(ROWS)
        store.write(rows, {name: tensor.cuda() for name, tensor in values(spec, rows).items()})
        assert_same(store.read(rows), values(spec, rows))
        pinned = {name: tensor.pin_memory() for name, tensor in values(spec, rows, seed=1).items()}
        store.write(rows, pinned)
        for tensor in pinned.values():
            tensor.zero_()
        assert_same(store.read(rows), values(spec, rows, seed=1))
