# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from hf_ssl.data.subsets import divided_rows, proportional_rows


@pytest.mark.parametrize("count", [1, 7, 40, 89, 90])
def test_each_class_has_its_share(count: int) -> None:
    labels = np.repeat([0, 1, 2, 3], [60, 20, 9, 1])[np.random.default_rng(0).permutation(90)]
    rows = proportional_rows(labels, count, 5)
    assert len(set(rows.tolist())) == count and rows.tolist() == sorted(rows.tolist())
    assert rows.tolist() == proportional_rows(labels, count, 5).tolist()
    exact = np.bincount(labels) * count / 90
    assert np.abs(np.bincount(labels[rows], minlength=4) - exact).max() < 1
    if count < 90:
        assert rows.tolist() != proportional_rows(labels, count, 6).tolist()


def test_images_of_many_classes_have_different_classes() -> None:
    labels = np.repeat(np.arange(50), 4)
    assert np.bincount(labels[proportional_rows(labels, 50)]).tolist() == [1] * 50


def test_the_parts_of_a_division_are_complete_and_keep_the_groups_together() -> None:
    labels = np.repeat([0, 1, 2], [40, 20, 20])
    groups = np.arange(80)
    groups[[3, 50, 70]] = 3
    train, test = divided_rows(labels, groups, 0.25, 0)
    assert sorted([*train, *test]) == [*range(80)]
    assert set(groups[train]).isdisjoint(groups[test])
    assert np.abs(np.bincount(labels[test]) - [10, 5, 5]).max() <= 2 and len(test) in (19, 20, 21, 22)
    assert [rows.tolist() for rows in divided_rows(labels, groups, 0.25, 0)] == [
        train.tolist(),
        test.tolist(),
    ]


def test_a_class_with_one_image_stays_in_the_training_part() -> None:
    train, test = divided_rows(np.array([0] * 10 + [1]), np.arange(11), 0.3)
    assert 10 in train and len(test) == 3


def test_images_with_several_labels_are_divided_too() -> None:
    train, test = divided_rows(np.ones((10, 3), np.int64), np.arange(10), 0.2)
    assert (len(train), len(test)) == (8, 2)
