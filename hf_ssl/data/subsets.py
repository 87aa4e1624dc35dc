# SPDX-License-Identifier: Apache-2.0
"""Random choices of labeled images that depend only on the labels and a key, so they are equal everywhere."""

import numpy as np

from hf_ssl.random import permutation, random_rows


def balanced_rows(labels: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Return `count` row numbers of the labels (N,) in ascending order, at random with balanced classes.

    The first image of each class is chosen before the second image of any class, and so on. The choice
    depends only on the labels, the count and the key, so all encoders use the same images.
    """
    shuffled = permutation(len(labels), *key)
    order = np.lexsort((labels[shuffled], rank_in_class(labels[shuffled])))
    return np.sort(shuffled[order[:count]])


def proportional_rows(labels: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Return `count` row numbers in ascending order, at random with the class shares of all images.

    The number of images of a class differs from its exact share by less than one, up to ties.

    Args:
        labels: (N,) class numbers from 0. For labels (N, K), the classes have no influence.
        count: number of rows.
        key: key of the choice.
    """
    if labels.ndim == 2:
        return random_rows(len(labels), count, *key)
    shuffled = permutation(len(labels), *key)
    own = labels[shuffled]
    # Image number i of the n images of a class is chosen if at least the share (i + 1/2) / n is chosen.
    shares = (rank_in_class(own) + 0.5) / np.bincount(own)[own]
    return np.sort(shuffled[np.argsort(shares, kind="stable")[:count]])


def divided_rows(
    labels: np.ndarray, groups: np.ndarray, fraction: float, *key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of a training part and of a test part, each in ascending order.

    Both parts have the class shares of all images. Rows of one group are in the same part.

    Args:
        labels: see `proportional_rows`.
        groups: (N,) numbers of groups, such as images with the same content.
        fraction: share of the groups in the test part.
        key: key of the random division.
    """
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    in_test = np.zeros(len(first), bool)
    in_test[proportional_rows(labels[first], round(fraction * len(first)), *key)] = True
    return np.flatnonzero(~in_test[group_of_row]), np.flatnonzero(in_test[group_of_row])


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """Return for each image how many earlier images have the same class, (N,) int64."""
    by_class = np.argsort(labels, kind="stable")
    sorted_labels = labels[by_class]
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return ranks
