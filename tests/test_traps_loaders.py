"""Every trap of data trains exactly as without a cache, or is refused with the reason."""

from __future__ import annotations

import pytest

from cachefreeze.errors import CacheFreezeError
from cachefreeze.testing import traps_datasets, traps_samplers
from cachefreeze.testing.exact import assert_equal
from cachefreeze.testing.loader_table import LoaderTrap, train

TRAPS = {**traps_datasets.TRAPS, **traps_samplers.TRAPS}
REFUSED = {**traps_datasets.REFUSED, **traps_samplers.REFUSED}


@pytest.mark.parametrize("name", TRAPS)
def test_it_trains_as_without_a_cache(name):
    """Batches, outputs, final weights and random draws over three epochs, bit for bit."""
    expected, got = train(TRAPS[name], "off"), train(TRAPS[name], "host")
    assert expected.pop("sources") == ["frozen"] * 3
    assert got.pop("sources")[0] == "fill"
    assert len(expected["steps"]) == len(got["steps"]) > 0
    assert_equal("training", expected, got)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name):
    with pytest.raises(CacheFreezeError, match=REFUSED[name].message):
        train(REFUSED[name], "host")


def test_every_row_is_read_from_the_store_in_the_end():
    """The harness trains on rows: by the third epoch nothing is computed."""
    trap: LoaderTrap = TRAPS["tensors"]
    assert train(trap, "host")["sources"] == ["fill", "cached", "cached"]


def test_the_harness_sees_other_data():
    """Two loaders of other samples in one structure are told apart."""
    expected, got = train(TRAPS["numpy_samples"], "off"), train(TRAPS["byte_images"], "host")
    expected.pop("sources"), got.pop("sources")
    with pytest.raises(AssertionError, match=r"training: \["):
        assert_equal("training", expected, got)
