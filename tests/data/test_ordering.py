# SPDX-License-Identifier: Apache-2.0
from hf_ssl.data.ordering import RowBatches, Share


def rows_of(batches):
    return [(batch.pass_number, *batch.rows.tolist()) for batch in batches]


def test_each_iteration_is_one_pass_of_different_rows():
    batches = RowBatches(23, Share(seed=0, batch_size=5))
    assert len(batches) == 4
    first, second = rows_of(batches), rows_of(batches)
    assert [row[0] for row in first + second] == [0] * 4 + [1] * 4
    for rows in (first, second):
        seen = [number for row in rows for number in row[1:]]
        assert len(set(seen)) == 20 and set(seen) <= set(range(23))
    assert first != [(0, *row[1:]) for row in second]


def test_processes_share_the_batches_of_one():
    whole = rows_of(RowBatches(50, Share(3, 12)))
    parts = [rows_of(RowBatches(50, Share(3, 4, rank, 3))) for rank in range(3)]
    assert [
        (row[0], *(number for part in parts for number in part[step][1:])) for step, row in enumerate(whole)
    ] == whole


def test_resuming_yields_the_rest_of_the_pass_and_then_the_next():
    share = Share(3, 4)
    uninterrupted = RowBatches(22, share)
    everything = [row for _ in range(4) for row in rows_of(uninterrupted)]
    for start in range(0, 11):
        resumed = RowBatches(22, share, start)
        rest = rows_of(resumed)
        assert len(rest) == 5 - start % 5
        assert rest + rows_of(resumed) == everything[start : start + len(rest) + 5]


def test_set_epoch_goes_to_a_pass_but_not_back_to_its_start():
    share = Share(3, 4)
    batches = RowBatches(22, share, start=7)
    batches.set_epoch(1)
    assert len(rows_of(batches)) == 3
    batches.set_epoch(4)
    assert rows_of(batches) == rows_of(RowBatches(22, share, start=20))


def test_an_iteration_that_was_broken_off_is_not_continued():
    batches = RowBatches(22, Share(3, 4))
    next(iter(batches))
    assert {row[0] for row in rows_of(batches)} == {1}
