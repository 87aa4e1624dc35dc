# SPDX-License-Identifier: Apache-2.0
"""Tables in folders: each row has its own image and class, and each image occurs once."""

from pathlib import Path

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk
from messages import mentions

from hf_ssl.data import DataConfig, labeled_images, open_source
from hf_ssl.errors import UserError

COLORS = {"cat": 50, "dog": 200}


def photo(path: Path, value: int) -> None:
    """Write an image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), (value, 0, 0)).save(path)


def colors_of_classes(path: object, split: str = "train", **options: object) -> list[tuple[str, int]]:
    """Return the class and the color of each image."""
    images = labeled_images(DataConfig(path=str(path), cache="none", **options), split)
    pixels = (images[row][0, 0, 0].item() for row in range(len(images)))
    return [(images.class_names[label], value) for label, value in zip(images.labels, pixels, strict=True)]


@pytest.mark.parametrize("streaming", [False, True])
def test_equal_relative_names_in_tables_of_several_folders_are_an_error(tmp_path: Path, streaming) -> None:
    """Before, the rows of all tables showed the images of the first folder."""
    for name, value in COLORS.items():
        photo(tmp_path / name / "0.png", value)
        table = tmp_path / name / "list.parquet"
        Dataset.from_dict({"image": ["0.png"], "label": [name]}).to_parquet(table)
        assert colors_of_classes(table, image_column="image") == [(name, value)]
    config = DataConfig(path=f"{tmp_path}/*/list.parquet", image_column="image")
    with pytest.raises(UserError, match=mentions("data.path", "0.png", "dog", "absolute")):
        open_source(config, streaming=streaming)


def test_a_later_row_of_a_table_in_another_folder_is_an_error(tmp_path: Path) -> None:
    for name, files in {"cat": ["0", "1"], "dog": ["1", "2"]}.items():
        for file in files:
            photo(tmp_path / name / f"{file}.png", COLORS[name])
        rows = "".join(f"{file}.png,{name}\n" for file in files)
        (tmp_path / name / "list.csv").write_text(f"image,label\n{rows}")
    with pytest.raises(UserError, match=mentions("data.path", "1.png")):
        open_source(DataConfig(path=f"{tmp_path}/*/list.csv", image_column="image"))


def test_absolute_names_in_tables_of_several_folders(tmp_path: Path) -> None:
    for name, value in COLORS.items():
        photo(tmp_path / name / "0.png", value)
        (tmp_path / name / "list.csv").write_text(f"image,label\n{tmp_path / name / '0.png'},{name}\n")
    found = colors_of_classes(f"{tmp_path}/*/list.csv", image_column="image")
    assert found == list(COLORS.items())


@pytest.mark.parametrize("pattern", ["", "/*.arrow"])
@pytest.mark.parametrize("change", ["map", "filter", "shuffle"])
def test_caches_of_datasets_in_a_stored_data_set_are_not_read(
    change: str, pattern: str, tmp_path: Path
) -> None:
    """Before, the data contained each image twice after `map`. After `shuffle`, the folder was an error."""
    for name, value in COLORS.items():
        photo(tmp_path / "files" / f"{name}.png", value)
    features = Features(image=Image(), label=ClassLabel(names=list(COLORS)))
    files = [str(tmp_path / "files" / f"{name}.png") for name in COLORS]
    data = Dataset.from_dict({"image": files * 4, "label": [0, 1] * 4}, features=features)
    data.save_to_disk(tmp_path / "stored")
    stored = load_from_disk(tmp_path / "stored")
    changes = {
        "map": lambda: stored.map(lambda row: {"label": 1 - row["label"]}),
        "filter": lambda: stored.filter(lambda label: label == 0, input_columns="label"),
        "shuffle": lambda: stored.shuffle(seed=1),
    }
    changes[change]()
    assert list((tmp_path / "stored").glob("cache-*.arrow"))
    for streaming in (False, True):
        config = DataConfig(path=f"{tmp_path}/stored{pattern}", streaming=streaming)
        assert open_source(config).num_rows == 8
    assert colors_of_classes(f"{tmp_path}/stored{pattern}") == list(COLORS.items()) * 4
    if change == "map":
        assert open_source(DataConfig(path=f"{tmp_path}/stored/cache-*.arrow")).num_rows == 8  # as requested
