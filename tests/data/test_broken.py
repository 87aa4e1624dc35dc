# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch
from messages import mentions, missing

from hf_ssl.data import BrokenCounter, LoadedBatch
from hf_ssl.data.batch import Failure
from hf_ssl.errors import UserError
from hf_ssl.views import ViewParameters


def batch(images, *broken):
    return LoadedBatch(
        torch.zeros(images, 3, 4, 4),
        ViewParameters(None, torch.zeros(images, 2, 14)),
        np.zeros(images, np.uint64),
        broken=list(broken),
    )


def test_each_is_logged_once_and_all_are_counted(caplog):
    counter = BrokenCounter(0.5)
    counter.add(batch(8, "row 3: truncated"))
    counter.add(batch(8, "row 3: truncated", "row 9: zero bytes"))
    first, second = (record.getMessage() for record in caplog.records)
    assert missing(first, "row 3: truncated") == missing(second, "row 9: zero bytes") == []
    assert counter.state_dict() == {"read": 19, "broken": 3}


def test_too_many_end_the_run_but_not_before_enough_were_read():
    counter = BrokenCounter(0.02)
    counter.add(batch(1, *(["row 1: bad"] * 3)))  # 3 of 4
    counter.add(batch(95))
    with pytest.raises(UserError, match=mentions(4, 100, "data.max_broken_fraction=0.02", "row 7: worse")):
        counter.add(batch(0, "row 7: worse"))


def test_a_small_data_set_is_judged_after_a_pass():
    counter = BrokenCounter(0.02, images_per_pass=10)
    with pytest.raises(UserError, match=mentions(3, 10)):
        counter.add(batch(7, *["row 1: bad"] * 3))


def test_as_many_as_allowed_are_allowed():
    counter = BrokenCounter(0.05)
    counter.add(batch(95, *[f"row {row}: bad" for row in range(5)]))
    with pytest.raises(UserError):
        BrokenCounter(0.0).add(batch(100, "row 1: bad"))


def test_counts_survive_a_restart():
    counter = BrokenCounter(0.05)
    counter.add(batch(95, *[f"row {row}: bad" for row in range(5)]))
    resumed = BrokenCounter(0.05)
    resumed.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    with pytest.raises(UserError, match=mentions(6, 101)):
        resumed.add(batch(0, "row 99: bad"))


def test_a_failure_is_raised():
    with pytest.raises(UserError, match=r"^nothing left$"):
        BrokenCounter(0.05).add(Failure("nothing left"))
