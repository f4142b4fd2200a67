"""Content gets out of a padded batch and back into another one, whatever the side and wherever the dimensions are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cachefreeze.padding import content, ladder, pad, unpad

lengths_of_a_batch = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@given(lengths_of_a_batch, st.integers(0, 3), st.integers(0, 3), st.booleans(), st.permutations([0, 1, 2]))
def test_rows_are_the_content_and_padding_becomes_zeros(lengths, extra, more, left, order):
    """Of batches padded by any amount, on either side, with the batch and the length anywhere among the dimensions."""
    own = torch.tensor(lengths)
    batch_dim, dim = order[0], order[1]
    rest = [torch.randn(n, 2) + 10 for n in lengths]

    def padded(size, value):
        made = torch.full((len(lengths), size, 2), value)
        for i, row in enumerate(rest):
            start = size - len(row) if left else 0
            made[i, start : start + len(row)] = row
        return made.movedim((0, 1), (batch_dim, dim))

    size = max(lengths) + extra
    rows = unpad(padded(size, -1.0), (batch_dim, dim), own, left=left)
    assert rows.shape == (len(lengths), max(lengths), 2)
    for i, row in enumerate(rest):
        assert torch.equal(rows[i, : len(row)], row)
        assert not rows[i, len(row) :].any()
    other = max(lengths) + more
    back = pad(rows, (batch_dim, dim), own, other, left=left)
    assert torch.equal(back, padded(other, 0.0))
    assert back.is_contiguous()
    real = content(own, other, left=left)
    assert real.sum(dim=1).tolist() == lengths


def test_rows_that_are_wider_than_their_content_are_cut():
    """What a store or a fill hands over is as wide as the batch that it comes from, not as the one that it goes to."""
    rows = torch.ones(2, 5, 1)
    rows[:, 2:] = 7
    own = torch.tensor([2, 1])
    for left, expected in ((False, [[1, 1, 0], [1, 0, 0]]), (True, [[0, 1, 1], [0, 0, 1]])):
        assert pad(rows, (0, 1), own, 3, left=left)[..., 0].tolist() == expected


def test_three_samples_to_verify_with():
    sizes = torch.tensor([[8, 4], [16, 8], [8, 8], [16, 4], [8, 4]])
    lengths = torch.tensor([[7, 4], [12, 8], [8, 7], [9, 3], [3, 2]])
    assert ladder(sizes, lengths) == (4, 0, 1)
    assert ladder(sizes[:, :1], lengths[:, :1]) == (4, 2, 1)
    assert ladder(torch.full((3, 1), 8), lengths[:3, :1]) is None, "one padded size tells nothing"
