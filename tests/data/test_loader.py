# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch
from messages import mentions, missing

from hf_ssl import views
from hf_ssl.data import DataConfig, as_source, open_source, train_loader
from hf_ssl.data.batch import DeviceRows, ProcessShare
from hf_ssl.data.decode import decode
from hf_ssl.data.loader import RowBatchSampler
from hf_ssl.errors import UserError
from hf_ssl.random import image_seeds
from hf_ssl.views import Crops, ViewPreset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a small machine


def epochs(loader, count):
    return [batch for _ in range(count) for batch in loader]


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.sample_index, other.sample_index)
        assert torch.equal(one.parameters.table, other.parameters.table)
        for left, right in zip(pixels_of(one), pixels_of(other), strict=True):
            assert torch.equal(left, right)
        assert one.broken == other.broken
    return True


def pixels_of(batch):
    if isinstance(batch.images, Crops):
        return [crops for crops in (batch.images.global_crops, batch.images.local_crops) if crops is not None]
    return [batch.images]


def test_a_batch_contains_the_decoded_rows_and_their_augmentation_parameters(
    numbered, make_loader, encode, picture, preset
):
    loader = make_loader(numbered(40), seed=9)
    first, second = epochs(loader, 1)[1], epochs(loader, 1)[1]  # of the first and of the second epoch
    for epoch, batch in enumerate((first, second)):
        assert batch.images.shape == (8, 3, 12, 10) and batch.images.dtype == torch.uint8
        for row, pixels in zip(batch.sample_index.tolist(), batch.images, strict=True):
            assert torch.equal(pixels, decode(encode(picture(row)), 3))
        seeds = image_seeds(9, epoch, batch.sample_index.numpy().astype(np.uint64))
        drawn = views.sample_parameters(seeds, preset, np.tile([12, 10], (8, 1)))
        assert torch.equal(batch.parameters.table, drawn.table)
        assert batch.position is None and batch.broken == []
    shown = views.augment(first.images, first.parameters)
    assert shown.pixel_values.shape == (8, 2, 3, 8, 8)


def test_large_images_are_cropped_by_the_loader(numbered, make_loader, encode, picture):
    preset = ViewPreset(size=16, local=views.ViewOverrides(count=3, size=8))
    batch = epochs(make_loader(numbered(8, size=(100, 97)), preset=preset), 1)[0]
    images = [decode(encode(picture(row, (100, 97))), 3) for row in batch.sample_index.tolist()]
    expected = views.crop(images, batch.parameters)
    assert torch.equal(batch.images.global_crops, expected.global_crops)
    assert torch.equal(batch.images.local_crops, expected.local_crops)
    assert batch[2:5].images.local_crops.shape == (3, 3, 3, 8, 8)


def test_images_of_different_sizes_are_cropped_by_the_loader(image_folder, make_loader):
    batch = epochs(make_loader(DataConfig(path=str(image_folder))), 1)[0]
    assert isinstance(batch.images, Crops) and batch.images.global_crops.shape == (8, 2, 3, 8, 8)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_batches_do_not_depend_on_the_number_of_workers(cache, numbered, make_loader):
    config = numbered(40, broken=(3, 17, 25), cache=cache)
    alone = epochs(make_loader(config), 2)
    assert any(batch.broken for batch in alone)
    assert same(alone, epochs(make_loader(config, num_workers=2), 2))
    assert same(alone, epochs(make_loader(config, num_workers=3), 2))


def test_batches_of_large_images_do_not_depend_on_the_number_of_workers(numbered, make_loader):
    config = numbered(24, size=(100, 100))
    assert same(epochs(make_loader(config), 1), epochs(make_loader(config, num_workers=2), 1))


def test_two_processes_together_read_the_rows_of_one(numbered, make_loader):
    config = numbered(40, broken=(3, 17))
    alone = epochs(make_loader(config, batch_size=8), 2)
    pair = [epochs(make_loader(config, batch_size=4, rank=rank, world_size=2), 2) for rank in range(2)]
    for batch, left, right in zip(alone, *pair, strict=True):
        assert not set(left.sample_index.tolist()) & set(right.sample_index.tolist()) or batch.broken
        assert torch.equal(batch.sample_index, torch.cat([left.sample_index, right.sample_index]))
        assert torch.equal(batch.images, torch.cat([left.images, right.images]))
        assert torch.equal(batch.parameters.table, torch.cat([left.parameters.table, right.parameters.table]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_over_several_epochs(num_workers, numbered, make_loader):
    config = numbered(44)
    everything = epochs(make_loader(config), 4)
    for start in (0, 1, 5, 9, 14):
        resumed = make_loader(config, start_batch=start, num_workers=num_workers)
        assert same(
            everything[start:15],
            list(itertools.islice(itertools.chain(resumed, resumed, resumed, resumed), 15 - start)),
        )


def test_the_global_random_generators_do_not_change(numbered, make_loader):
    config = numbered(24)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    epochs(make_loader(config, num_workers=2), 1)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("cache", ["none", "memory", "memmap"])
def test_a_broken_image_is_replaced_and_reported(cache, numbered, make_loader, encode, picture):
    broken = (3, 17, 25)
    batches = epochs(make_loader(numbered(40, broken=broken, cache=cache)), 1)
    reported = [text for batch in batches for text in batch.broken]
    for row in broken:
        assert any(f"row {row} ({row}.png): not an image" in text for text in reported)
    shown = torch.cat([batch.sample_index for batch in batches]).tolist()
    assert len(shown) == 40 and not set(shown) & set(broken)
    for batch in batches:
        for row, pixels in zip(batch.sample_index.tolist(), batch.images, strict=True):
            assert torch.equal(pixels, decode(encode(picture(row)), 3))
    everything = torch.cat([batch.parameters.table for batch in batches])
    assert (
        len(torch.unique(everything, dim=0)) == 40
    )  # a replacement is not shown in the views of its original


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_of_broken_images_end_the_run_with_one_sentence(num_workers, numbered, make_loader, monkeypatch):
    # the inspection of the data would find the broken images earlier
    monkeypatch.setattr("hf_ssl.data.loader.common_size", lambda source, channels: (12, 10))
    loader = make_loader(numbered(16, broken=range(16), cache="none"), num_workers=num_workers)
    try:  # not pytest.raises: it keeps the frames alive, and torch's workers with them
        list(loader)
    except UserError as error:
        text = str(error)
    assert missing(text, 100, "numbered") == [] and "Traceback" not in text and "\n" not in text


def test_unreadable_data_and_too_few_images_are_an_error_at_once(numbered, make_loader):
    with pytest.raises(UserError, match=mentions("batch_size", 40, 48, "numbered")):
        make_loader(numbered(40), batch_size=24, world_size=2)
    with pytest.raises(UserError, match=mentions("numbered", "not an image")):
        make_loader(numbered(16, broken=range(16)))


def test_gray(numbered, make_loader):
    gray = ViewPreset(size=8, jitter=0, gray=0, saturation=0, hue=0, mean=[0.5], std=[0.25])
    batch = epochs(make_loader(numbered(8, channels=1), preset=gray), 1)[0]
    assert batch.images.shape == (8, 1, 12, 10)


def test_the_loader_has_the_length_and_data_set_that_transformers_reads(numbered, make_loader):
    loader = make_loader(numbered(44))
    assert len(loader) == 5 and len(loader.dataset) == 44


def test_a_second_loader_uses_the_decoded_images_of_the_first(numbered, preset, monkeypatch):
    config = numbered(20)
    source = open_source(config)
    first = train_loader(source, preset, config=config, seed=0, batch_size=4)
    monkeypatch.setattr("hf_ssl.data.images.decode", None)
    monkeypatch.setattr("hf_ssl.data.inspection.decode", None)
    second = train_loader(source, preset, config=config, seed=0, batch_size=4)
    assert same(list(first), list(second))


def test_a_loader_of_other_images_does_not_use_decoded_ones(preset, picture, monkeypatch):
    """Before, images in Python were found by the address of a data set that another one could have later."""
    monkeypatch.setattr("hf_ssl.data.decoded.id", lambda each: 1, raising=False)
    config = DataConfig(path="in Python", cache="memory")
    loaders = [
        train_loader(as_source([picture(number)] * 4, config), preset, config=config, seed=0, batch_size=4)
        for number in range(2)
    ]
    for number, loader in enumerate(loaders):
        expected = torch.from_numpy(np.array(picture(number))).permute(2, 0, 1)
        assert (next(iter(loader)).images == expected).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_stored_on_the_device_give_the_same_batches(workers):
    """The loader yields only row numbers; the device selects and crops the pixels."""
    config = {cache: DataConfig(path="digits", cache=cache) for cache in ("memory", "device")}
    preset = ViewPreset(size=8, blur=0.0)
    batches = {
        cache: list(
            train_loader(open_source(c), preset, config=c, seed=3, batch_size=50, num_workers=workers)
        )
        for cache, c in config.items()
    }
    assert len(batches["memory"]) == len(batches["device"]) > 2
    for copied, stored in zip(batches["memory"], batches["device"], strict=True):
        assert isinstance(stored.images, DeviceRows) and len(stored) == 50
        assert stored.images.pixels.data_ptr() == batches["device"][0].images.pixels.data_ptr()
        wanted, got = copied[10:30].inputs("cpu"), stored[10:30].inputs("cpu")
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert torch.equal(value, got[name]), name


def test_a_broken_image_on_the_device_is_replaced(tmp_path, write_parquet, encode, picture):
    images = [encode(picture(number)) for number in range(20)]
    images[7] = images[7][:20]
    write_parquet(tmp_path / "train.parquet", images)
    shown = {}
    for cache in ("memory", "device"):
        config = DataConfig(path=str(tmp_path), cache=cache)
        loader = train_loader(open_source(config), ViewPreset(size=8), config=config, seed=0, batch_size=20)
        (shown[cache],) = list(loader)
        assert len(shown[cache].broken) == 1 and 7 not in shown[cache].sample_index
    assert torch.equal(shown["memory"].sample_index, shown["device"].sample_index)
    assert torch.equal(*(batch.inputs("cpu")["pixel_values"] for batch in shown.values()))


def test_device_rows_without_pixels_raise_an_error():
    with pytest.raises(RuntimeError, match="images"):
        DeviceRows(torch.arange(3), (8, 8)).to("cpu")


def rows_of(batches):
    return [(batch.epoch, *batch.rows.tolist()) for batch in batches]


def test_each_iteration_is_one_epoch_of_different_rows():
    batches = RowBatchSampler(23, ProcessShare(seed=0, batch_size=5))
    assert len(batches) == 4
    first, second = rows_of(batches), rows_of(batches)
    assert [row[0] for row in first + second] == [0] * 4 + [1] * 4
    for rows in (first, second):
        seen = [number for row in rows for number in row[1:]]
        assert len(set(seen)) == 20 and set(seen) <= set(range(23))
    assert first != [(0, *row[1:]) for row in second]


def test_processes_share_the_batches_of_one_process():
    whole = rows_of(RowBatchSampler(50, ProcessShare(3, 12)))
    parts = [rows_of(RowBatchSampler(50, ProcessShare(3, 4, rank, 3))) for rank in range(3)]
    assert [
        (row[0], *(number for part in parts for number in part[step][1:])) for step, row in enumerate(whole)
    ] == whole


@pytest.mark.parametrize("rows", [20, 23, 39])
def test_an_epoch_can_have_all_rows(rows):
    """The batches of two processes still have one size, and no batch contains an image twice."""
    parts = [RowBatchSampler(rows, ProcessShare(3, 5, rank, 2), has_all_rows=True) for rank in range(2)]
    assert [len(part) for part in parts] == [math.ceil(rows / 10)] * 2
    for _ in range(2):
        steps = [first[1:] + second[1:] for first, second in zip(*map(rows_of, parts), strict=True)]
        assert all(len(set(step)) == len(step) == 10 for step in steps)
        assert {number for step in steps for number in step} == set(range(rows))


def test_resuming_yields_the_rest_of_the_epoch_and_then_the_next_epoch():
    share = ProcessShare(3, 4)
    uninterrupted = RowBatchSampler(22, share)
    everything = [row for _ in range(4) for row in rows_of(uninterrupted)]
    for start in range(0, 11):
        resumed = RowBatchSampler(22, share, start)
        rest = rows_of(resumed)
        assert len(rest) == 5 - start % 5
        assert rest + rows_of(resumed) == everything[start : start + len(rest) + 5]


def test_an_interrupted_iteration_is_not_continued():
    batches = RowBatchSampler(22, ProcessShare(3, 4))
    next(iter(batches))
    assert {row[0] for row in rows_of(batches)} == {1}
