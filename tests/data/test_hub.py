# SPDX-License-Identifier: Apache-2.0
"""Data sets on the Hub: a separate process uses the real clients with the server of the test suite."""

import json

import pytest
from forks import Forks
from hub_server import HubServer
from messages import missing

SCRIPT = """
import json, sys
import datasets
datasets.disable_progress_bars()
from hf_ssl.data import DataConfig, labeled_images, open_source, train_loader
from hf_ssl.data.sources import label_column
from hf_ssl.errors import UserError
from hf_ssl.views import ViewPreset

def look(path, streaming, **options):
    config = DataConfig(path=path, streaming=streaming, **options)
    try:
        source = open_source(config)
    except UserError as error:
        return str(error)
    loader = train_loader(source, ViewPreset(size=8), config=config, seed=0, batch_size=10, num_workers=0)
    batches = [next(iter(loader)) for _ in range(2)]
    return [source.revision, source.num_rows, [text for batch in batches for text in batch.broken]]

found = {f"{name} {streaming}": look(f"someone/{name}", streaming)
         for name in ("parquet", "folder") for streaming in (False, True)}
found["unknown"] = look("someone/nothing", False)
found["revision"] = look("someone/parquet", False, revision="nowhere")
found["split"] = look("someone/parquet", False, split="validation")
config = DataConfig(path="someone/parquet", max_broken_fraction=0.1)
found["labels"] = labeled_images(config, "train").labels.tolist()

def classes(path, streaming):
    config = DataConfig(path=path, streaming=streaming)
    try:
        return label_column(open_source(config, labels=True), config)
    except UserError as error:
        return str(error)

for name in ("parquet", "other_names"):
    for streaming in (True, False):  # the stream first, so that nothing is in the cache
        found[f"classes of {name} {streaming}"] = classes(f"someone/{name}", streaming)
print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path, write_parquet, encode, picture):
    root = tmp_path / "hub"
    images = [b"no image" if number == 3 else encode(picture(number)) for number in range(40)]
    write_parquet(
        root / "someone/parquet/data/train-00000-of-00001.parquet",
        images,
        [number % 3 for number in range(40)],
    )
    for number in range(20):
        file = root / "someone/folder/train" / ("ant", "bee")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(picture(number)))
    for split, names in (("train", ("ant", "bee", "cat")), ("test", ("cat", "ant", "bee"))):
        file = root / f"someone/other_names/data/{split}-00000-of-00001.parquet"
        write_parquet(file, images[10:16], [0, 1, 2] * 2, names=names)
    with HubServer() as hub:
        for name in ("parquet", "folder", "other_names"):
            hub.store.add_repo("datasets", f"someone/{name}", root / "someone" / name)
        yield hub


def test_data_sets_on_the_hub(forks: Forks, hub, tmp_path):
    done = forks.run("torch", SCRIPT, env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    parquet, folder = (
        hub.store.repos["datasets", f"someone/{name}"].head.oid for name in ("parquet", "folder")
    )
    broken = "someone/parquet (train) row 3 (3.png): not an image that Pillow can read"
    assert found["parquet False"][:2] == [parquet, 40] and found["parquet False"][2][0].startswith(broken)
    assert found["parquet True"][0] == parquet
    assert found["folder False"] == found["folder True"] == [folder, 20, []]
    assert found["labels"] == [number % 3 for number in range(40) if number != 3]
    for streaming in (True, False):
        assert found[f"classes of parquet {streaming}"] == "label"
        message = found[f"classes of other_names {streaming}"]
        assert (
            missing(message, "data.path", "same classes", "ant", "cat", "train-00000-of-00001.parquet") == []
        )
    assert missing(found["unknown"], "someone/nothing") == [] and "\n" not in found["unknown"]
    assert missing(found["revision"], "someone/parquet", "nowhere") == []
    assert missing(found["split"], "someone/parquet", "validation", "train") == []
