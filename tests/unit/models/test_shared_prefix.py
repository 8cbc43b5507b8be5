"""Rows that keep their common beginning once."""

from hypothesis import given
from hypothesis import strategies as st

from zerotune.models.shared_prefix import SharedRows


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=8))
def test_rows_that_begin_alike_are_kept_once_and_read_whole(rows):
    found = SharedRows()
    for row in rows:
        found.append(row)
    assert [list(row) for row in found] == rows and found.lengths.tolist() == list(map(len, rows))
    first, last = min(rows), max(rows)  # in lexical order these differ soonest
    common = next((place for place, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first))
    assert list(found.head) == first[:common]
    assert sum(map(len, found.tails)) == sum(map(len, rows)) - common * len(rows)
