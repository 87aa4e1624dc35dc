# SPDX-License-Identifier: Apache-2.0
import io
import json
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, concatenate_datasets, interleave_datasets
from datasets.distributed import split_dataset_by_node
from messages import mentions, missing

from hf_ssl.data import DataConfig, as_source, open_source, train_loader
from hf_ssl.data.decode import decode
from hf_ssl.data.stream import ReaderPosition, StreamReader, StreamShards
from hf_ssl.data.stream_loader import _start_position
from hf_ssl.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def rows_by_epoch(reader, epochs):
    """Return [(shard, number), ...] of each epoch, in the order of the reader."""
    found = [[] for _ in range(epochs)]
    while True:
        window = reader.next_window()
        assert len({row.epoch for row in window}) == 1
        if window[0].epoch == epochs:
            return found
        found[window[0].epoch] += [(row.shard, row.number) for row in window]


def sharded(config, open_shards=4):
    return StreamShards(open_source(config), open_shards)


@pytest.mark.parametrize("readers", [1, 2, 3, 6, 8, 11])
def test_readers_share_each_epoch_without_overlap_and_without_loss(readers, numbered):
    shards = sharded(numbered(100, files=2, row_group=10, streaming=True))
    everything = [(shard, number) for shard in range(10) for number in range(10)]
    assert shards.count == 10
    parts = [
        rows_by_epoch(StreamReader(shards, 3, number, readers, window=16, min_rows=1), 3)
        for number in range(readers)
    ]
    for epoch in range(3):
        assert sorted(row for part in parts for row in part[epoch]) == everything
    orders = [[row for part in parts for row in part[epoch]] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_each_epoch_begins_with_other_shards(numbered):
    shards = sharded(numbered(100, files=2, row_group=10, streaming=True), open_shards=2)
    first = [
        rows_by_epoch(StreamReader(shards, 3, 0, 1, window=16, min_rows=1), 4)[epoch][:16]
        for epoch in range(4)
    ]
    assert len({frozenset(shard for shard, _ in window) for window in first}) == 4


def test_fewer_shards_are_open_if_the_first_is_large(numbered, monkeypatch):
    config = numbered(100, files=2, row_group=10, streaming=True)
    assert sharded(config, open_shards=8).open_shards == 8
    monkeypatch.setattr("hf_ssl.data.stream._OPEN_BYTES", 1)
    assert sharded(config, open_shards=8).open_shards == 2


@pytest.mark.parametrize("readers", [1, 3, 4])
def test_a_reader_resumes_from_every_position(readers, numbered):
    shards = sharded(numbered(100, files=2, row_group=25, streaming=True))
    reader = StreamReader(shards, 3, readers - 1, readers, window=9, min_rows=1)
    windows = []
    for _ in range(30):
        window = reader.next_window()
        windows.append((json.dumps(reader.window_start.state_dict()), [row[:3] for row in window]))
    assert windows[-1][1][0][0] > 1  # several epochs
    for start in range(0, 28):
        position = ReaderPosition.from_state_dict(json.loads(windows[start][0]))
        resumed = StreamReader(shards, 3, readers - 1, readers, 9, 1, position)
        for _, expected in windows[start : start + 3]:
            assert [row[:3] for row in resumed.next_window()] == expected


@pytest.fixture
def numbers(encode, picture):
    """Return a function that finds the numbers of the images of `numbered` in a batch."""
    known = {}

    def find(batch, count=200):
        if not known:
            for number in range(count):
                known[decode(encode(picture(number)), 3).numpy().tobytes()] = number
        return [known[image.contiguous().numpy().tobytes()] for image in batch.images]

    return find


def take(loader, count):
    batches = []
    while True:
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                return batches


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.parameters.table, other.parameters.table)
        assert one.broken == other.broken
        assert one.position == other.position
    return True


def test_each_epoch_contains_each_image_once_in_other_views(numbered, make_loader, numbers):
    for num_workers in (0, 2):
        loader = make_loader(
            numbered(48, files=2, row_group=12, streaming=True), batch_size=4, num_workers=num_workers
        )
        assert len(loader) == 12
        epochs = [list(loader), list(loader)]
        seen = [[number for batch in batches for number in numbers(batch)] for batches in epochs]
        assert sorted(seen[0]) == sorted(seen[1]) == list(range(48)) and seen[0] != seen[1]
        drawn = [batch.parameters.table for batches in epochs for batch in batches]
        assert len(torch.unique(torch.cat(drawn), dim=0)) == 96


def test_processes_read_different_images(numbered, make_loader, numbers):
    config = numbered(48, files=2, row_group=12, streaming=True)
    seen = [
        {
            number
            for batch in make_loader(config, batch_size=4, rank=rank, world_size=2)
            for number in numbers(batch)
        }
        for rank in range(2)
    ]
    assert len(seen[0]) == len(seen[1]) == 24 and not seen[0] & seen[1]


def test_the_views_of_an_image_depend_only_on_its_row_and_the_epoch(numbered, make_loader, numbers):
    tables = []
    for options in ({"num_workers": 0, "batch_size": 8}, {"num_workers": 2, "batch_size": 4}):
        loader = make_loader(numbered(48, files=2, row_group=12, streaming=True), **options)
        drawn = {}
        for batch in loader:
            drawn.update(zip(numbers(batch), batch.parameters.table, strict=True))
        tables.append(drawn)
    assert all(torch.equal(tables[0][number], tables[1][number]) for number in range(48))


@pytest.mark.parametrize(
    ("num_workers", "world_size", "row_group"), [(0, 1, 11), (2, 1, 11), (2, 2, 11), (3, 1, 44), (0, 2, 44)]
)
def test_resume_is_exact_over_several_epochs(num_workers, world_size, row_group, numbered, make_loader):
    config = numbered(
        88, files=2, row_group=row_group, broken=(5, 40, 41), streaming=True, shuffle_window=13, open_shards=3
    )
    options = {"batch_size": 4, "rank": world_size - 1, "world_size": world_size, "num_workers": num_workers}
    everything = take(make_loader(config, **options), 66 // world_size)
    assert max(place["pass_number"] for place in everything[-1].position["readers"].values()) >= 2
    assert any(batch.broken for batch in everything)
    for start in (1, 2, 6, 7, 21, 22, 25) if num_workers == 0 else (1, 7, 22):
        position = json.loads(json.dumps(everything[start - 1].position))
        resumed = take(make_loader(config, position=position, **options), 8)
        assert same(everything[start : start + 8], resumed)


def test_a_loader_continues_where_its_last_iteration_stopped(tars, make_loader):
    config = DataConfig(path=str(tars), streaming=True)
    everything = take(make_loader(config, num_workers=2), 12)
    loader = make_loader(config, num_workers=2)
    assert same(everything, take(loader, 3) + take(loader, 2) + take(loader, 7))


def test_a_position_is_small(numbered, make_loader):
    config = numbered(100, row_group=5, streaming=True)
    batch = take(make_loader(config, batch_size=4, num_workers=2), 5)[-1]
    assert len(json.dumps(batch.position)) < 1000


def test_with_other_workers_a_stream_resumes_close_to_its_position_with_a_warning(
    numbered, make_loader, numbers, caplog
):
    config = numbered(96, files=2, row_group=4, streaming=True, shuffle_window=8, open_shards=2)
    first = take(make_loader(config, batch_size=4, num_workers=2), 14)
    assert caplog.text == ""
    resumed = make_loader(config, batch_size=4, num_workers=3, position=first[-1].position)
    rest = take(resumed, 9)
    assert "workers 2 -> 3" in caplog.text
    assert rest[-1].position["batches"] == 23
    seen = {number for batch in first + rest for number in numbers(batch)}
    assert len(seen) > 66  # of 96; a start from the beginning would give 56
    assert all(place["pass_number"] == 0 for place in rest[0].position["readers"].values())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_resumes_with_other_readers_from_every_position(processes, numbered, preset):
    """Before, a reader that started near the end of an epoch had less than a batch, which ended the run."""
    config = numbered(48, files=2, row_group=4, streaming=True, shuffle_window=8, open_shards=2)
    make = partial(train_loader, open_source(config), preset, config=config, seed=5)
    others = {"world_size": 3 - processes, "batch_size": 12 * processes // 2}
    for batch in take(make(world_size=processes, batch_size=12 // processes), 5):
        resumed = take(make(position=batch.position, **others), 3)
        assert all(len(each) == others["batch_size"] for each in resumed)
        # The remaining part of an epoch can be less than a batch. This is no error after a further resume.
        assert len(take(make(position=resumed[0].position, **others), 2)) == 2


def test_an_epoch_of_a_resumed_stream_ends_after_the_batches_that_the_trainer_counts(
    numbered, make_loader, caplog
):
    """After 3 of 10 steps of 8 images, a run continues with two batches of 4 images in each step."""
    config = numbered(80, streaming=True)
    position = take(make_loader(config), 3)[-1].position
    assert len(list(make_loader(config, position=position, start_batch=3))) == 7
    assert caplog.text == ""
    loader = make_loader(config, batch_size=4, position=position, start_batch=6)
    assert [len(list(loader)), len(list(loader))] == [14, 20]
    assert missing(caplog.text, "3 -> 6") == []


def test_without_a_position_a_stream_warns_that_it_starts_again(numbered, make_loader, caplog):
    loader = make_loader(numbered(40, streaming=True), start_batch=3)
    assert missing(caplog.text, 3) == []
    assert len(list(loader)) == 2


def test_equal_images_have_different_views(write_parquet, tmp_path, encode, picture, make_loader):
    write_parquet(tmp_path / "equal" / "train.parquet", [encode(picture(0))] * 24, row_group=6)
    loader = make_loader(DataConfig(path=str(tmp_path / "equal"), streaming=True))
    tables = torch.cat([batch.parameters.table for batch in loader])
    assert len(tables) == len(torch.unique(tables, dim=0)) == 24


def test_the_images_of_a_stream_without_end_have_new_views_each_time(preset, encode, picture):
    images = [{"image": {"bytes": encode(picture(number)), "path": None}} for number in range(4)]
    stream = IterableDataset.from_generator(lambda: iter(images), Features({"image": Image()})).repeat(None)
    config = DataConfig(streaming=True, shuffle_window=8)
    source = as_source(stream, config)
    batches = take(train_loader(source, preset, config=config, seed=0, batch_size=4), 6)
    tables = torch.cat([batch.parameters.table for batch in batches])
    assert len(torch.unique(tables, dim=0)) == 24


def solid(label, shade):
    return PIL.Image.fromarray(np.full((4, 4), 20 * label + shade % 20, np.uint8))


def mean_entropy(loader, batches):
    """Return the mean entropy (nats) of the classes in a batch. The pixels encode the class."""
    entropies = []
    for batch in take(loader, batches):
        counts = np.array(list(Counter((batch.images[:, 0, 0, 0] // 20).tolist()).values()))
        share = counts / counts.sum()
        entropies.append(-(share * np.log(share)).sum())
    return np.mean(entropies)


@pytest.mark.parametrize(("files", "row_group"), [(1, 100), (10, 200), (4, 50), (1, 2000)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_sorted_by_class_are_shuffled(
    files, row_group, num_workers, tmp_path, write_parquet, encode, make_loader
):
    labels = np.repeat(np.arange(10), 200)
    images = [encode(solid(label, number)) for number, label in enumerate(labels)]
    names = [str(label) for label in range(10)]
    for file, rows in enumerate(np.array_split(np.arange(2000), files)):
        write_parquet(
            tmp_path / "sorted" / f"train-{file}.parquet",
            [images[row] for row in rows], labels[rows], row_group=row_group, names=names,
        )  # fmt: skip
    config = DataConfig(path=str(tmp_path / "sorted"), streaming=True, shuffle_window=500)
    ideal = mean_entropy(make_loader(DataConfig(path=config.path), batch_size=64), 24)
    assert ideal > 2.2
    assert mean_entropy(make_loader(config, batch_size=64, num_workers=num_workers), 24) > 0.95 * ideal


def test_a_folder_of_images_is_shuffled_and_divided(image_folder, make_loader):
    config = DataConfig(path=str(image_folder), streaming=True)
    shards = sharded(config)
    parts = [rows_by_epoch(StreamReader(shards, 0, number, 4, 8, 1), 1)[0] for number in range(4)]
    assert Counter(len(part) for part in parts) == {15: 4}
    assert len({row for part in parts for row in part}) == 60
    classes = [row.image.path.split("/")[-2] for row in StreamReader(shards, 0, 0, 4, 15, 1).next_window()]
    assert len(set(classes)) == 3
    loader = make_loader(config, num_workers=2)
    assert len(loader) == 7 and len(list(loader)) == 7


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 6), (1, 6), (2, 6), (4, 3)])
def test_an_epoch_of_few_tars_contains_each_image_once(num_workers, batch_size, tars, make_loader):
    """3 tars for 2 workers: before, one worker repeated the images of its tar, and 15 % were missing."""
    loader = make_loader(
        DataConfig(path=str(tars), streaming=True), batch_size=batch_size, num_workers=num_workers
    )
    for _ in range(2):
        images = [image.numpy().tobytes() for batch in loader for image in batch.images]
        assert len(images) == len({*images}) == 36


@pytest.mark.parametrize(
    ("shards", "readers", "groups"),
    [(4, 2, 2), (4, 3, 1), (10, 4, 2), (7, 2, 1), (8, 2, 2), (9, 2, 2), (100, 64, 16), (1, 8, 1)],
)
def test_groups_of_readers_have_almost_equally_many_shards(shards, readers, groups, numbered):
    found = sharded(numbered(4, streaming=True), open_shards=1)
    found.count, found.sizes = shards, [7] * shards
    assert found.groups(readers) == groups
    order = list(reversed(range(shards)))
    assert found.divide(order, groups) == [order[group::groups] for group in range(groups)]


@pytest.mark.parametrize(
    ("sizes", "readers", "groups"),
    [
        ([200, 10], 2, 1),
        ([10] * 7 + [1], 2, 1),
        ([10] * 7 + [8], 2, 2),
        ([30, 10, 10, 10], 2, 2),  # the large one alone
        ([1000 // rank for rank in range(1, 201)], 8, 4),
    ],
)
def test_groups_of_readers_have_almost_equally_many_rows(sizes, readers, groups, numbered):
    found = sharded(numbered(4, streaming=True), open_shards=1)
    found.count, found.sizes = len(sizes), sizes
    assert found.groups(readers) == groups
    for epoch in range(3):
        parts = found.divide(np.random.default_rng(epoch).permutation(len(sizes)).tolist(), groups)
        assert sorted(shard for part in parts for shard in part) == list(range(len(sizes)))
        rows = [sum(sizes[shard] for shard in part) for part in parts]
        assert max(rows) <= 1.13 * np.mean(rows)


@pytest.mark.parametrize("num_images", [None, 24])
def test_an_epoch_of_unequal_tars_contains_each_image_once(num_images, tmp_path, encode, picture):
    """Before, the reader of the small tar repeated it, and images of the large one were missing."""
    for shard, count in enumerate((20, 4)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(count):
                content = encode(picture(number))
                info = tarfile.TarInfo(f"{number}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    shards = sharded(DataConfig(path=str(tmp_path), streaming=True, num_images=num_images))
    parts = [rows_by_epoch(StreamReader(shards, 0, reader, 2, 8, 1), 1)[0] for reader in range(2)]
    assert [len(part) for part in parts] == [12, 12] and len({row for part in parts for row in part}) == 24


def test_tars_are_read_as_streams(tars, make_loader, encode, picture):
    config = DataConfig(path=str(tars), streaming=True)
    source = open_source(config)
    assert source.num_rows == 36 and source.image_column == "png" and not source.whole_shards
    loader = make_loader(config, batch_size=12)
    assert len(loader) == 3
    known = {
        decode(encode(picture(100 * shard + number)), 3).numpy().tobytes()
        for shard in range(3)
        for number in range(12)
    }
    seen = [image.contiguous().numpy().tobytes() for batch in take(loader, 3) for image in batch.images]
    assert set(seen) == known and len(seen) == 36


def test_digits_are_a_stream_too(make_loader):
    loader = make_loader(DataConfig(path="digits", streaming=True), batch_size=64)
    assert len(loader) == 20 and next(iter(loader)).images.shape == (64, 3, 8, 8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_skipped_and_reported(num_workers, numbered, make_loader, numbers):
    config = numbered(48, files=2, row_group=12, broken=(5, 30), streaming=True)
    batches = take(make_loader(config, batch_size=4, num_workers=num_workers), 11)
    assert all(len(batch) == 4 for batch in batches)
    reported = {text for batch in batches for text in batch.broken}
    assert len(reported) == 2
    assert any("shard 0 row 5 (5.png): not an image" in text for text in reported)
    assert any("shard 2 row 6 (6.png): not an image" in text for text in reported)
    shown = {number for batch in batches for number in numbers(batch)}
    assert not shown & {5, 30}


def test_the_first_images_may_be_in_a_later_shard(preset):
    def rows(counts):
        for count in counts:
            yield from [{"image": {"bytes": b"no image", "path": None}}] * count

    features = Features({"image": Image()})
    table = IterableDataset.from_generator(rows, features, gen_kwargs={"counts": [0, 4]})
    source = as_source(table, DataConfig(streaming=True))
    with pytest.raises(UserError, match="shard 1 row 0"):
        train_loader(source, preset, config=DataConfig(streaming=True), seed=0, batch_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_with_less_than_a_batch_ends_the_run_with_one_sentence(num_workers, numbered, make_loader):
    loader = make_loader(
        numbered(30, files=2, streaming=True), batch_size=16, num_workers=num_workers, rank=0
    )
    loader.dataset.share = loader.dataset.share._replace(
        batch_size=31
    )  # as if the number of rows were not known
    try:
        next(iter(loader))
    except UserError as error:
        text = str(error)
    assert missing(text, 31) == [] and "Traceback" not in text


def numbered_stream(*sizes):
    """Return a stream of shards of these sizes, whose encoded images are the bytes of their numbers."""

    def rows(shards):
        for shard in shards:
            for number in shard:
                yield {"image": {"bytes": number.to_bytes(8), "path": None}}

    starts = np.cumsum([0, *sizes]).tolist()
    shards = [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    features = Features({"image": Image(decode=False)})
    return IterableDataset.from_generator(rows, features, gen_kwargs={"shards": shards})


def numbers_in(stream):
    """Return the numbers of all images that hf_ssl reads from a stream in an epoch."""
    shards = StreamShards(as_source(stream, DataConfig(streaming=True)), 4)
    parts = [rows_by_epoch(StreamReader(shards, 0, reader, 3, 8, 1), 1)[0] for reader in range(3)]
    images = [
        [image for block in shards.blocks(shard) for image in block.images] for shard in range(shards.count)
    ]
    return sorted(int.from_bytes(images[shard][number].read()) for part in parts for shard, number in part)


COUNTING = {
    "take": (lambda stream: stream.take(30), range(30)),
    "skip": (lambda stream: stream.skip(30), range(30, 60)),
    "skip, then map": (lambda stream: stream.skip(30).filter(lambda row: True), range(30, 60)),
    "indices": (
        lambda stream: stream.filter(lambda row, index: index % 3 > 0, with_indices=True),
        [number for number in range(60) if number % 3],
    ),
    "interleaved": (
        lambda stream: interleave_datasets([stream, stream.skip(45)]),
        [*range(15), *range(45, 60)],
    ),
    "concatenated": (
        lambda stream: concatenate_datasets([stream.take(20), stream.skip(40)]),
        [*range(20), *range(40, 60)],
    ),
}


@pytest.mark.parametrize("name", COUNTING)
def test_a_stream_has_the_rows_that_its_steps_choose(name, caplog):
    """`datasets` (5.2) applies these steps to each shard: `skip` then yields rows that are left out."""
    change, expected = COUNTING[name]
    stream = change(numbered_stream(25, 25, 5, 5))
    assert numbers_in(stream) == list(expected)
    assert missing(caplog.text, stream.num_shards) == []
    by_shard = [
        row["image"]["bytes"]
        for shard in range(stream.num_shards)
        for row in stream.shard(stream.num_shards, shard)
    ]
    assert sorted(map(int.from_bytes, by_shard)) != list(expected), "`datasets` divides such streams now"


def test_other_streams_are_divided_into_their_shards(caplog):
    stream = numbered_stream(25, 5).filter(lambda row: True).shuffle(seed=0, buffer_size=8)
    assert numbers_in(stream) == list(range(30)) and caplog.text == ""
    assert StreamShards(as_source(stream, DataConfig(streaming=True)), 4).count == 2


def test_a_stream_that_the_user_divided_among_processes_is_an_error(preset):
    """Each process would divide its part again, so that two processes would read half of the images."""
    config = DataConfig(streaming=True)
    part = as_source(split_dataset_by_node(numbered_stream(8, 8), 0, 2), config)
    with pytest.raises(UserError, match=mentions("train_dataset", "split_dataset_by_node")):
        train_loader(part, preset, config=config, seed=0, batch_size=2, world_size=2)


def test_data_of_broken_images_end_the_run_with_one_sentence(numbered, make_loader, monkeypatch):
    monkeypatch.setattr("hf_ssl.data.stream_loader._MAX_BROKEN", 10)
    loader = make_loader(numbered(64, files=2, broken=range(1, 64), streaming=True), batch_size=4)
    with pytest.raises(UserError, match=r"\b(11|21)\b.*png"):
        next(iter(loader))


def test_other_data_give_a_warning(numbered, make_loader, caplog):
    position = take(make_loader(numbered(60, streaming=True)), 3)[-1].position
    take(make_loader(numbered(60, size=(12, 11), streaming=True), position=position), 3)
    assert "revision" in caplog.text


def test_a_damaged_file_is_named(numbered, make_loader, tmp_path):
    config = numbered(40, files=2, streaming=True, open_shards=1)
    loader = make_loader(config)
    file = tmp_path / "numbered" / "train-00001.parquet"
    data = bytearray(file.read_bytes())
    data[4 : len(data) // 2] = bytes(len(data) // 2 - 4)
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"shard \d.*numbered"):
        take(loader, 5)


def test_large_images_are_cropped_by_the_workers(numbered, make_loader):
    config = numbered(16, size=(100, 100), streaming=True)
    batch = next(iter(make_loader(config)))
    assert batch.images.global_crops.shape == (8, 2, 3, 8, 8)


def test_the_global_random_generators_do_not_change(numbered, make_loader):
    config = numbered(40, streaming=True)
    before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()
    take(make_loader(config, num_workers=2), 6)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_the_keys_of_a_position_are_those_of_earlier_checkpoints(numbered, make_loader):
    position = take(make_loader(numbered(40, streaming=True)), 1)[-1].position
    assert position.keys() == {"batches", "layout", "readers"}
    assert position["layout"].keys() == {
        "revision", "seed", "rank", "world_size", "workers", "shards", "groups", "window", "open_shards",
    }  # fmt: skip
    (reader,) = position["readers"].values()
    assert reader.keys() == {"pass_number", "window", "rows", "next_shard", "open", "used"}
    assert ReaderPosition.from_state_dict(reader).state_dict() == reader
    assert ReaderPosition.from_state_dict({}) == ReaderPosition()


def test_the_order_of_a_stream_never_changes(numbered):
    # a run must resume exactly with another version of hf_ssl or numpy
    shards = sharded(numbered(100, files=2, row_group=10, streaming=True))
    state = {"pass_number": 1, "window": 2, "rows": 32, "next_shard": 5, "open": [[2, 6], [9, 3]], "used": 4}
    reader = StreamReader(shards, 3, 1, 2, 16, 1, ReaderPosition.from_state_dict(state))
    assert [reader.next_row()[:3] for _ in range(8)] == [
        (1, 9, 9), (1, 9, 1), (1, 9, 6), (1, 9, 4), (1, 9, 8), (1, 2, 4), (1, 9, 3), (2, 4, 9),
    ]  # fmt: skip


def test_an_approximate_position_counts_half_of_each_open_shard():
    layout = {"revision": "revision", "seed": 1, "workers": 2, "shards": 10, "groups": 1}
    state = {"pass_number": 2, "window": 1, "rows": 8, "next_shard": 6, "open": [[0, 1], [3, 1]], "used": 0}
    readers = {"0": state, "1": {**state, "pass_number": 3}}
    position = {"batches": 7, "layout": layout, "readers": readers}
    start = _start_position(position, layout | {"workers": 1}, 7, 16)
    assert start == {"batches": 7, "readers": {"0": ReaderPosition(2, rows=16, next_shard=5).state_dict()}}


def test_the_images_of_local_tars_are_counted(tmp_path, encode, picture):
    image = encode(picture(0))
    members = ("a.png", "a.cls", "folder/a.png", "folder/a.cls", "b.png", ".hidden.png", "no_ending", "b.cls")
    for number, names in enumerate((members, members[:2])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(image)
                tar.addfile(info, io.BytesIO(image if name.endswith("png") else b"1".ljust(len(image))))
            folder = tarfile.TarInfo("c.png")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    config = DataConfig(path=str(tmp_path), streaming=True)
    source = open_source(config)
    assert source.num_rows == len(list(source.dataset)) == 4
    config.num_images = 3  # is not compared with the tars, because nobody counts them
    assert open_source(config).num_rows == 3
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    config.num_images = None
    assert open_source(config).num_rows is None


def test_the_images_of_arrow_files_are_counted(tmp_path, picture):
    table = Dataset.from_dict({"image": [picture(row) for row in range(5)]}, features=Features(image=Image()))
    table.save_to_disk(tmp_path, num_shards=2)
    source = open_source(DataConfig(path=str(tmp_path / "*.arrow"), streaming=True))
    assert source.num_rows == len(list(source.dataset)) == 5


def test_a_given_number_of_images_must_be_the_counted_one(numbered):
    with pytest.raises(UserError, match=mentions("data.num_images", 60, 50)):
        open_source(numbered(60, streaming=True, num_images=50))
    assert open_source(numbered(60, streaming=True, num_images=60)).num_rows == 60
    stream = IterableDataset.from_generator(lambda: iter([]), features=Features(image=Image()))
    assert as_source(stream, DataConfig(path="none", num_images=7)).num_rows == 7
