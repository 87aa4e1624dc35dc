# SPDX-License-Identifier: Apache-2.0
"""The distributions of augmentation parameters equal those of torchvision's own samplers, on fixed seeds."""

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from messages import mentions
from scipy.stats import chi2_contingency, kstest
from torchvision import transforms

from hf_ssl.random import image_seeds
from hf_ssl.views import ViewOverrides, ViewPreset, ViewSettings, sample_parameters
from hf_ssl.views.operations import JITTER_ORDERS, OPERATIONS
from hf_ssl.views.parameters import COLUMNS

COUNT = 6000


def sampled(preset, height=50, width=60, count=COUNT):
    keys = np.arange(count, dtype=np.uint64)
    return sample_parameters(image_seeds(0, 0, keys), preset, np.tile([height, width], (count, 1)))


def assert_same_distribution(got, expected):
    assert kstest(np.asarray(got), np.asarray(expected)).pvalue > 1e-3


def assert_same_frequencies(got, expected):
    values = np.union1d(got, expected)
    table = np.array([[np.sum(sample == value) for value in values] for sample in (got, expected)])
    assert chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.2, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.05, 0.4), (0.5, 3.0)),
        (40, 100, (0.3, 1.0), (3 / 4, 4 / 3)),  # needs several tries, and sometimes more than ten
        (100, 30, (0.25, 1.0), (0.6, 4 / 3)),
    ],
)
def test_boxes(height, width, scale, ratio):
    preset = ViewPreset(count=1, scale=scale, ratio=ratio)
    got = sampled(preset, height, width).table[:, 0, :4].double().numpy()
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        crop = transforms.RandomResizedCrop
        expected = np.array(
            [crop.get_params(image, list(scale), list(ratio)) for _ in range(COUNT)], np.float64
        )
    top, left, box_height, box_width = got.T
    assert (got[:, :2] >= 0).all() and (got[:, 2:] >= 1).all() and (got == np.rint(got)).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    for column in range(4):
        assert_same_distribution(got[:, column], expected[:, column])
    assert_same_distribution(box_height * box_width, expected[:, 2] * expected[:, 3])
    assert_same_distribution(box_width / box_height, expected[:, 3] / expected[:, 2])
    assert_same_distribution(top / (height + 1 - box_height), expected[:, 0] / (height + 1 - expected[:, 2]))


def test_some_of_these_boxes_need_the_central_one():
    """The comparison above covers the central box only if this holds."""
    got = sampled(ViewPreset(count=1, scale=(0.3, 1.0)), 40, 100).table[:, 0, :4].numpy()
    central = (got == [0, 23, 40, 53]).all(axis=1)
    assert 0.02 < central.mean() < 0.5


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 50), (50, 1)])
def test_the_central_box_of_long_images(height, width):
    preset = ViewPreset(count=1, scale=(0.9, 1.0))
    image = torch.zeros(1, height, width)
    expected = transforms.RandomResizedCrop.get_params(image, list(preset.scale), list(preset.ratio))
    assert sampled(preset, height, width, 5).table[:, 0, :4].tolist() == [list(map(float, expected))] * 5


@pytest.mark.parametrize("strengths", [(0.8, 0.8, 0.8, 0.2), (0.4, 1.5, 0.2, 0.5)])
def test_jitter(strengths):
    names = ("brightness", "contrast", "saturation", "hue")
    parameters = sampled(ViewPreset(count=1, **dict(zip(names, strengths, strict=True))))
    jitter = transforms.ColorJitter(*strengths)
    ranges = [getattr(jitter, name) for name in names]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [transforms.ColorJitter.get_params(*ranges) for _ in range(COUNT)]
    for place, name in enumerate(names):
        assert_same_distribution(parameters.column(name)[:, 0], [row[1 + place] for row in expected])
    orders = JITTER_ORDERS[parameters.column("order")[:, 0].long().numpy()] @ [1000, 100, 10, 1]
    assert len(np.unique(orders)) == 24
    assert_same_frequencies(orders, np.array([row[0].tolist() for row in expected]) @ [1000, 100, 10, 1])


def test_sigma():
    sigma = sampled(ViewPreset(count=1, blur=0.5, blur_sigma=(0.1, 2.0))).column("sigma")[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(COUNT)]
    assert_same_distribution(sigma[sigma > 0], expected)


@pytest.mark.parametrize("largest", [10.0, 180.0])
def test_degrees(largest):
    preset = ViewPreset(count=1, rotation=0.6, rotation_degrees=largest)
    degrees = sampled(preset).column("degrees")[:, 0].double()
    assert degrees.min() == 0 and degrees.max() < 360
    degrees = degrees[degrees > 0]
    degrees[degrees > 180] -= 360
    assert degrees.abs().max() <= largest
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [transforms.RandomRotation.get_params([-largest, largest]) for _ in range(COUNT)]
    assert_same_distribution(degrees, expected)


def test_quarter_turns_of_all_four_orientations_are_equally_likely():
    turns = sampled(ViewPreset(count=1, quarter_turns=0.75)).column("quarter_turns")[:, 0].numpy()
    assert_same_frequencies(turns, np.repeat(np.arange(4), COUNT // 4))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.8, 1.0])
def test_probabilities(probability):
    names = ("flip", "jitter", "gray", "blur", "solarize", "quarter_turns", "rotation")
    parameters = sampled(ViewPreset(**dict.fromkeys(names, probability)), count=20000)
    for name in ("flip", "jitter", "gray", "sigma", "solarize", "quarter_turns", "degrees"):
        share = (parameters.column(name) > 0).double().mean(0)
        assert (
            (share - probability).abs() <= 4.5 * (probability * (1 - probability) / 20000) ** 0.5
        ).all(), name


def test_parameters_are_uncorrelated():
    """This holds for two parameters of a view, two views of an image, two images, and two epochs."""
    probabilities = [item.name for item in fields(ViewSettings) if "probability" in item.metadata["expected"]]
    assert "solarize" in probabilities
    local = ViewOverrides(count=2, size=16)
    preset = ViewPreset(size=32, local=local, **dict.fromkeys(probabilities, 0.5))
    keys, sizes = np.arange(20000, dtype=np.uint64), np.full((20000, 2), 1000)
    seeds = [image_seeds(0, epoch, keys) for epoch in (0, 1)]
    epochs = [sample_parameters(of_epoch, preset, sizes).table.flatten(1) for of_epoch in seeds]
    table = torch.cat([*epochs, epochs[0].roll(1, 0)], dim=1).numpy()
    columns = table.shape[1]
    correlation = np.corrcoef(table.T) - np.eye(columns)
    for view in range(columns // len(COLUMNS)):  # the four columns of a box are correlated
        box = slice(view * len(COLUMNS), view * len(COLUMNS) + 4)
        correlation[box, box] = 0
    assert np.isfinite(correlation).all()
    assert np.abs(correlation).max() < 5 / 20000**0.5


def test_each_view_has_its_own_settings():
    preset = ViewPreset(
        count=3,
        second=ViewOverrides(blur=0.0, solarize=1.0, hue=0.0, scale=(0.9, 1.0)),
        local=ViewOverrides(count=2, size=96, scale=(0.05, 0.1), flip=1.0),
    )
    parameters = sampled(preset, 400, 400, 500)
    area = (parameters.column("height") * parameters.column("width") / 400**2).numpy()
    assert area[:, [1]].min() > 0.85 and area[:, 3:].max() < 0.11 and area[:, [0, 2]].min() < 0.2
    assert (parameters.column("solarize") == torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])).all()
    assert ((parameters.column("sigma") > 0).any(0) == torch.tensor([True, False, True, True, True])).all()
    assert ((parameters.column("hue") != 0).any(0) == torch.tensor([True, False, True, True, True])).all()
    assert (parameters.column("flip")[:, 3:] == 1).all()
    assert not torch.equal(parameters.table[:, 3], parameters.table[:, 4])


def test_parameters_depend_only_on_seed_and_size():
    preset = ViewPreset(size=32, local=ViewOverrides(count=2, size=16))
    keys, sizes = np.arange(50, dtype=np.uint64), np.stack([np.arange(50) + 10, 90 - np.arange(50)], axis=1)
    whole = sample_parameters(image_seeds(1, 2, keys), preset, sizes)
    some = [40, 3, 17]
    part = sample_parameters(image_seeds(1, 2, keys[some]), preset, sizes[some])
    assert torch.equal(part.table, whole.table[some])
    assert torch.equal(whole[some].table, whole.table[some])
    assert torch.equal(whole[torch.tensor(some)].table, whole[[40, 3, 17]].table)
    assert torch.equal(whole[10:20].table, whole.table[10:20])
    assert not torch.equal(sample_parameters(image_seeds(1, 3, keys), preset, sizes).table, whole.table)


def test_parameters_never_change():
    """A change would alter the views of every run that resumes or is repeated."""
    parameters = sampled(ViewPreset(size=32, solarize=0.5, quarter_turns=1.0, rotation=1.0), 300, 400, 2)
    expected = {
        "top": 98, "left": 71, "height": 182, "width": 218, "flip": 1, "jitter": 1, "order": 21,
        "brightness": 1.45913, "contrast": 0.85432, "saturation": 0.688, "hue": -0.02322,
        "gray": 0, "sigma": 0, "solarize": 1, "quarter_turns": 1, "degrees": 13.66252,
    }  # fmt: skip
    got = {name: parameters.column(name)[1, 1].item() for name in expected}
    assert got == pytest.approx(expected, abs=1e-5)


def test_parameters_can_be_pickled_and_stay_on_the_host():
    parameters = sampled(ViewPreset(size=32), count=64)
    copy = pickle.loads(pickle.dumps(parameters))
    assert copy.preset == parameters.preset and torch.equal(copy.table, parameters.table)
    assert len(parameters) == 64 and parameters.table.dtype == torch.float32
    assert parameters.to("meta").table.device.type == "cpu"
    assert len(pickle.dumps(parameters)) < 64 * 2 * len(COLUMNS) * 4 + 4096


def test_wrong_arguments_raise_an_error():
    with pytest.raises(ValueError, match=mentions("(3, 2)", "(2, 2)")):
        sample_parameters(np.zeros(3, np.uint64), ViewPreset(), np.ones((2, 2)))
    with pytest.raises(ValueError, match=mentions("1 x 1")):
        sample_parameters(np.zeros(1, np.uint64), ViewPreset(), np.array([[0, 5]]))
    with pytest.raises(TypeError, match=mentions("slice", 1)):
        sampled(ViewPreset(), count=3)[1]


def test_each_operation_has_its_own_random_numbers():
    """Two operations with the same number would be correlated; numbers of other views begin at 64."""
    used = [number for operation in OPERATIONS for number in operation.numbers]
    assert len(set(used)) == len(used) and min(used) >= 7 and max(used) < 64 - 22
    assert len({operation.parameter for operation in OPERATIONS}) == len(OPERATIONS)
