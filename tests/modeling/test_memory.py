# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn

from hf_ssl.modeling.memory import HostNumber, Queue


def test_a_number_and_its_buffer_agree_until_something_else_writes_the_buffer():
    module = nn.Module()
    number = HostNumber(module, "temperature", 0.1)
    number.write(0.3)
    assert number.value == 0.3  # the exact number, not the one rounded to float32
    assert module.temperature.item() == pytest.approx(0.3) and list(module.state_dict()) == ["temperature"]
    module.load_state_dict({"temperature": torch.tensor(0.5)})
    assert number.value == 0.3
    number.invalidate()
    assert number.value == 0.5
    copied = copy.deepcopy({"module": module, "number": number})
    copied["number"].write(0.25)
    assert copied["module"].temperature.item() == 0.25 and module.temperature.item() == 0.5


def rows(start, count):
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, 3)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [3, 3, 3], [5, 1, 4], [7], [3, 12, 2]])
def test_a_queue_keeps_the_last_rows_in_the_place_of_the_oldest(sizes):
    """Against a list in which one row after the other is written."""
    queue, slow, total = Queue(5, 3), None, 0
    slow = queue.rows.clone()
    for size in sizes:
        given = rows(total, size)
        queue.enqueue(given)
        for row in given:
            slow[total % 5] = row
            total += 1
        assert torch.equal(queue.rows, slow)
        assert queue.total == int(queue.count) == total
        assert queue.is_full == (total >= 5) and queue.latest == size


def test_before_that_it_holds_unit_vectors_that_differ():
    queue = Queue(50, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(50))
    assert queue.rows.std() > 0.2 and not queue.is_full


def test_a_loaded_queue_goes_on_where_the_saved_one_was():
    saved, loaded = Queue(4, 3), Queue(4, 3)
    saved.enqueue(rows(0, 3))
    assert loaded.total == 0  # has been read before loading
    loaded.load_state_dict(saved.state_dict())
    for queue in (saved, loaded):
        queue.enqueue(rows(10, 2))
    assert torch.equal(saved.rows, loaded.rows) and loaded.total == 5
