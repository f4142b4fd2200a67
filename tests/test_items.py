"""A dataset's item goes through bytes and comes back as it was, types included; what cannot is refused by name."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachefreeze.errors import FieldError
from cachefreeze.fingerprint import digest
from cachefreeze.items import ItemCodec

Pair = namedtuple("Pair", ["text", "label"])


class Encoding(UserDict):
    """As tokenizers return: a mapping that is no dict."""


ITEMS = {
    "tensors": (torch.arange(6).view(2, 3), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 4)),
    "lists": {"input_ids": [3, 1, 4], "mask": [True, False], "scores": [0.1, -0.0, 1e300], "label": 2},
    "texts": ("a sentence with \0 and \ud800 and ž", ["some", "words"], [["nested"], [1, None]], None, True),
    "arrays": [np.arange(4, dtype=np.int16)[::2], np.float32(0.1), np.bool_(True), np.zeros((2, 0))],
    "text": "alone",
    "empty lists": {"ids": [], "label": 0},
    "named": Pair("x", 1),
    "ordered": OrderedDict(b=1, a=torch.ones(1)),
    "encoding": Encoding(input_ids=[1, 2], attention_mask=[1, 1]),
    "numbers": {"big": 2**70, "nan": [float("inf")], "negative": -3},
}


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict | UserDict):
        assert list(a) == list(b)
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.generic | np.ndarray):
        assert a.dtype == b.dtype
    return digest(a) == digest(b)


@pytest.mark.parametrize("name", ITEMS)
def test_items_come_back_as_they_were(name):
    item = ITEMS[name]
    codec = ItemCodec(item)
    for after in (b"", bytes(15)):  # a store pads with zero bytes
        assert same(codec.decode(codec.encode(item) + after), item)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.lists(st.tuples(plain, st.lists(plain), st.binary(max_size=9)), min_size=1, max_size=3))
def test_any_plain_item_comes_back(rows):
    for value, many, data in rows:
        item = {"value": value, "many": many, "array": np.frombuffer(data, np.uint8)}
        codec = ItemCodec(item)
        assert same(codec.decode(codec.encode(item) + bytes(7)), item)


def test_arrays_that_come_back_are_writable_and_their_own():
    codec = ItemCodec((torch.zeros(2), np.zeros(2)))
    data = codec.encode((torch.ones(2), np.ones(2)))
    for _ in range(2):
        tensor, array = codec.decode(data)
        tensor += 1
        array += 1
        assert tensor.tolist() == array.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": object()}, r"\['image'\].*object"),
        ((torch.ones(1), {1, 2}), r"\[1\].*set"),
        ({"when": np.array(["2020"], "datetime64[Y]")}, "ndarray"),
        ([torch.ones(1), 1j], "complex"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(item, words):
    with pytest.raises(FieldError, match=words):
        ItemCodec(item)


@pytest.mark.parametrize(
    "other",
    [{"ids": [1]}, {"ids": [1], "label": 1.5j}, {"ids": torch.ones(1), "label": 1}, {"ids": [object()], "label": 1}],
)
def test_items_of_another_structure_are_refused(other):
    codec = ItemCodec({"ids": [1, 2], "label": 1})
    with pytest.raises(FieldError, match="differ in structure"):
        codec.encode(other)
