# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from messages import mentions, missing

from hf_ssl.data import BrokenCounter, LoadedBatch
from hf_ssl.data.batch import WorkerFailure
from hf_ssl.errors import UserError
from hf_ssl.views import ViewParameters


def batch(images, *broken):
    return LoadedBatch(
        torch.zeros(images, 3, 4, 4),
        ViewParameters(None, torch.zeros(images, 2, 14)),
        np.zeros(images, np.uint64),
        broken=list(broken),
    )


def test_each_broken_image_is_logged_once_and_counted(caplog):
    counter = BrokenCounter(0.5)
    counter.add(batch(8, "row 3: truncated"))
    counter.add(batch(8, "row 3: truncated", "row 9: zero bytes"))
    first, second = (record.getMessage() for record in caplog.records)
    assert missing(first, "row 3: truncated") == missing(second, "row 9: zero bytes") == []
    assert (counter.read, counter.broken) == (19, 2)


def rows(*numbers):
    return [f"row {number}: bad" for number in numbers]


def test_too_many_broken_images_of_data_of_known_size_are_an_error():
    counter = BrokenCounter(0.02, num_images=1000)
    counter.add(batch(1, *rows(*range(20))))  # 20 of the first 21, but 2 % of all images
    for _ in range(20):  # epochs
        counter.add(batch(980, *rows(*range(20))))
    suggested = "data.max_broken_fraction=0.04"
    with pytest.raises(UserError, match=mentions(21, 1000, 0.02, "row 70: worse", suggested)):
        counter.add(batch(0, "row 70: worse"))


def test_fewer_than_16_broken_images_are_allowed_unless_the_share_is_zero():
    counter = BrokenCounter(0.0001, num_images=400)
    counter.add(batch(7, *rows(*range(15))))
    with pytest.raises(UserError, match=mentions(16, 400, "data.max_broken_fraction=0.04")):
        counter.add(batch(7, *rows(15)))


def test_at_most_half_of_the_images_may_be_broken():
    counter = BrokenCounter(0.02, num_images=10)
    counter.add(batch(2, *rows(1, 2, 3, 4, 5)))
    with pytest.raises(UserError, match=mentions(6, 10, "data.max_broken_fraction=0.6")):
        counter.add(batch(2, *rows(6)))
    with pytest.raises(UserError, match=mentions(1, 10)):
        BrokenCounter(0.0, num_images=10).add(batch(7, *rows(1)))


def test_the_share_in_a_stream_refers_to_the_images_read_with_a_tolerance():
    counter = BrokenCounter(0.04)
    counter.add(batch(1, *rows(*range(34))))  # 34 of 35; 35 images are too few to decide
    counter.read += 365  # 34 of 400: 16 are expected, 12 are three standard deviations
    with pytest.raises(UserError, match=mentions(35, 401, "data.max_broken_fraction=")):
        counter.add(batch(0, *rows(99)))


def test_few_broken_images_do_not_stop_a_stream():
    counter = BrokenCounter(0.01)
    counter.add(batch(385, *rows(*range(15))))
    with pytest.raises(UserError, match=mentions(16, 401)):
        counter.add(batch(0, *rows(99)))
    with pytest.raises(UserError):
        BrokenCounter(0.0).add(batch(100, *rows(1)))


def test_counts_are_saved_and_restored():
    counter = BrokenCounter(0.05, num_images=400)
    counter.add(batch(95, *rows(*range(20))))
    resumed = BrokenCounter(0.05, num_images=400)
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    resumed.add(batch(95, *rows(*range(20))))
    assert (resumed.read, resumed.broken) == (230, 20)
    with pytest.raises(UserError, match=mentions(21, 400)):
        resumed.add(batch(0, *rows(99)))


def test_counts_of_an_older_version_can_be_loaded():
    counter = BrokenCounter(0.05, num_images=100)
    counter.load_state_dict({"read": 300, "broken": 4})
    assert (counter.read, counter.broken) == (300, 0)


def test_the_failure_of_a_worker_is_raised():
    with pytest.raises(UserError, match=r"^nothing left$"):
        BrokenCounter(0.05).add(WorkerFailure("nothing left"))
