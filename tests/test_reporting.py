"""What a person reads: counts, bytes, the progress line, the table."""

from __future__ import annotations

import pytest

from cachefreeze.reporting import EpochReport, Report, caching_line, short_bytes, short_count, table_header, table_row


@pytest.mark.parametrize(
    ("count", "text"), [(7, "7"), (999, "999"), (12345, "12.3k"), (50000, "50k"), (1281167, "1.3M")]
)
def test_counts(count, text):
    assert short_count(count) == text


@pytest.mark.parametrize(("nbytes", "text"), [(5, "5 B"), (4096, "4.1 kB"), (7_400_000, "7.4 MB"), (8.4e9, "8.4 GB")])
def test_bytes(nbytes, text):
    assert short_bytes(int(nbytes)) == text


def test_the_progress_line():
    assert caching_line("layer4", 12300, 50000, 8_400_000_000) == "caching layer4: 12.3k/50k rows, 2.1/8.4 GB"


def epoch(**changes):
    values = {
        "epoch": 0, "source": "fill", "boundary": "fc", "seconds": 2.0, "val_seconds": None, "val_source": None,
        "train_loss": 1.0, "val_loss": None, "val_accuracy": None, "rows_cached": 0, "rows_computed": 9,
        "rows_repaired": 0, "lr": 0.1,
    }  # fmt: skip
    return EpochReport(**{**values, **changes})


def test_the_table_lines_up():
    full = epoch(val_loss=0.5, val_accuracy=0.875, val_seconds=1.0, val_source="cached")
    assert len(table_header()) == len(table_row(epoch())) == len(table_row(full))
    assert "87.5%" in table_row(full)


def test_fill_seconds_are_those_of_the_fill_epochs():
    report = Report(model="Net", epochs=[epoch(), epoch(source="cached"), epoch(seconds=0.5)])
    assert report.as_dict()["fill_seconds"] == 2.5
