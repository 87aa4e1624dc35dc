# SPDX-License-Identifier: Apache-2.0
"""What `hf-ssl space build` leaves: complete, replaceable, and silent about this machine."""

import io
import json
import re
import stat
import tomllib
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hub_server import HubServer
from huggingface_hub import HfApi, RepoCard
from messages import mentions
from PIL import Image
from transformers import BitImageProcessor, BlipConfig, BlipModel, TimmWrapperConfig, TimmWrapperModel
from transformers.utils import logging as transformers_logging

import hf_ssl
from hf_ssl.data import DataConfig, labeled_images
from hf_ssl.errors import UserError
from hf_ssl.evaluation import Gallery, load_encoder, read_photo
from hf_ssl.hub.publish import space_files
from hf_ssl.modeling.loading import loaded_commit
from hf_ssl.space import build, build_space

ROOT = Path(__file__).parents[2]


def facts(folder: Path) -> dict:
    return json.loads((folder / "space.json").read_text(encoding="utf-8"))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["vit", "resnet", "parts"])
def test_facts(spaces: dict[str, Path], kind: str) -> None:
    known = facts(spaces[kind])
    assert known["model"] == {
        "name": f"{kind}_encoder",
        "class": {"vit": "ViTModel", "resnet": "ResNetModel", "parts": "ParallelEncoders"}[kind],
        "folder": "encoder",
        "revision": None,
        "attention": kind == "vit",
    }
    assert known["gallery"]["images"] == 40 and known["gallery"]["labeled"]
    assert known["gallery"]["data"] == "digits (train)"
    assert [example["label"] for example in known["examples"]] == list("0123456789")
    assert known["versions"]["hf_ssl"] == hf_ssl.__version__
    assert set(known["versions"]) == {"hf_ssl", "torch", "transformers", "gradio", "faiss-cpu"}
    load_encoder(str(spaces[kind] / "encoder"))


def test_gallery_and_examples_are_of_the_data_and_apart(spaces: dict[str, Path]) -> None:
    folder = spaces["vit"]
    gallery = Gallery.load(folder)
    images = labeled_images(DataConfig(path="digits"), "train")
    known = {image.numpy().tobytes() for batch in images.iter_batches(64) for image in batch}
    assert len(gallery) == 40 and sorted(set(gallery.labels or [])) == list("0123456789")
    shown = [read_photo(thumbnail).numpy().tobytes() for thumbnail in gallery.thumbnails]
    examples = [
        read_photo(folder / example["file"]).numpy().tobytes() for example in facts(folder)["examples"]
    ]
    assert set(shown) | set(examples) <= known
    assert len(examples) == 10 and not set(shown) & set(examples)


def test_nothing_tells_where_it_was_made(spaces: dict[str, Path]) -> None:
    for folder in spaces.values():
        for path in folder.rglob("*"):
            assert not path.is_symlink()
            if path.is_file():
                content = path.read_bytes()
                for place in (str(folder.parent), str(Path.home()) + "/", str(ROOT)):
                    assert place.encode() not in content, (path, place)


def test_the_list_of_files_is_what_a_publication_takes(spaces: dict[str, Path]) -> None:
    folder = spaces["vit"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(space_files(folder)) == {name for name in there if "__pycache__" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ssl").rglob("*.py")}
    assert {name for name in there if name.startswith("hf_ssl/") and name.endswith(".py")} == sources


def test_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    lines = (ROOT / "spaces" / "retrieval" / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    assert set(required) <= declared and "hf_ssl" not in " ".join(required)
    names = {re.split(r"[<>=]", line)[0] for line in required}
    assert {"gradio", "faiss-cpu", "torch", "transformers", "pyarrow", "matplotlib"} <= names


def test_the_header_is_that_of_a_space(spaces: dict[str, Path]) -> None:
    header = RepoCard((spaces["vit"] / "README.md").read_text()).data.to_dict()
    assert header["title"] == "Digits by a vit"
    assert (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert re.fullmatch(r"6\.\d+\.\d+", header["sdk_version"]) and "models" not in header


def test_an_encoder_of_the_hub_stays_there(
    spaces: dict[str, Path], tmp_path: Path, online: HubServer
) -> None:
    """transformers 5.24 does not record the commit of an encoder."""
    api = HfApi()
    api.create_repo("someone/eyes")
    commits = [
        api.upload_folder(repo_id="someone/eyes", folder_path=spaces[name] / "encoder").oid
        for name in ("resnet", "vit")
    ]
    for revision, commit in (("main", commits[1]), (commits[0], commits[0])):
        encoder, _ = load_encoder("someone/eyes", revision)
        assert loaded_commit(encoder) == commit
        assert type(encoder).__name__ == ("ViTModel" if commit == commits[1] else "ResNetModel")
        encoder.save_pretrained(tmp_path / "again")
        assert commit not in (tmp_path / "again" / "config.json").read_text()
    folder = tmp_path / "space"
    build_space("someone/eyes", folder, DataConfig(path="digits"), images=5, examples=3)
    model = facts(folder)["model"]
    assert (model["name"], model["folder"], model["revision"]) == ("someone/eyes", None, commits[1])
    assert not (folder / "encoder").exists()
    assert RepoCard((folder / "README.md").read_text()).data["models"] == ["someone/eyes"]
    assert len(facts(folder)["examples"]) == 3


def test_data_without_labels(spaces: dict[str, Path], tmp_path: Path) -> None:
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    rows = {"image": [{"bytes": png(seed), "path": None} for seed in range(9)], "caption": ["a"] * 9}
    rows["image"][4] = {"bytes": b"broken", "path": None}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    data = DataConfig(path=str(tmp_path / "photos.parquet"), max_broken_fraction=0.5)
    transformers_logging.enable_progress_bar()
    known = build_space(str(spaces["vit"] / "encoder"), tmp_path / "space", data, examples=3)
    assert not transformers_logging.is_progress_bar_enabled()  # its bars are no whole lines of a log
    assert known["gallery"]["labeled"] is False and known["gallery"]["images"] == 5
    assert known["gallery"]["data"] == "photos.parquet (train)"
    assert [example["label"] for example in known["examples"]] == [None] * 3
    assert Gallery.load(tmp_path / "space").labels is None


def test_gray_images_without_labels_have_one_channel(tmp_path: Path) -> None:
    table = Dataset.from_dict(
        {"image": [{"bytes": png(seed), "path": None} for seed in range(4)]},
        Features({"image": ImageFeature()}),
    )
    (tmp_path / "gray").mkdir()
    table.to_parquet(tmp_path / "gray" / "train.parquet")
    images = build._images(DataConfig(path=str(tmp_path / "gray"), channels=1), "train", 3)
    (batch,) = images.iter_batches(8)
    assert [image.shape for image in batch] == [(1, 12, 12)] * 3
    colors = build._images(DataConfig(path=str(tmp_path / "gray")), "train", 3)
    assert images.fingerprint != colors.fingerprint, "stored features of gray and color images differ"


def test_examples_of_another_split(spaces: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "space"
    build_space(
        str(spaces["vit"] / "encoder"), folder, DataConfig(path="digits"), images=30, examples_split="test"
    )
    test = labeled_images(DataConfig(path="digits"), "test")
    known = {image.numpy().tobytes() for batch in test.iter_batches(64) for image in batch}
    assert len(Gallery.load(folder)) == 30
    for example in facts(folder)["examples"]:
        assert read_photo(folder / example["file"]).numpy().tobytes() in known


def test_examples_of_the_split_of_the_gallery_are_not_in_it(spaces: dict[str, Path], tmp_path: Path) -> None:
    """Otherwise the nearest neighbor of an example would be the example itself."""
    folder, data = tmp_path / "space", DataConfig(path="digits")
    build_space(
        str(spaces["vit"] / "encoder"), folder, data, images=10, examples=2, examples_split=data.split
    )
    gallery = [read_photo(thumbnail).numpy().tobytes() for thumbnail in Gallery.load(folder).thumbnails]
    examples = [
        read_photo(folder / example["file"]).numpy().tobytes() for example in facts(folder)["examples"]
    ]
    assert len(gallery) == 10 and len(examples) == 2 and not set(gallery) & set(examples)


def test_folders_of_somebody_else_are_refused_and_spaces_replaced(
    spaces: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "space"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    arguments = (str(spaces["vit"] / "encoder"), folder, DataConfig(path="digits"))
    with pytest.raises(UserError, match=mentions(folder)):
        build_space(*arguments, images=5)
    assert [path.name for path in tmp_path.rglob("*")] == ["space", "thesis.tex"]
    (folder / "thesis.tex").rename(folder / "space.json")
    build_space(*arguments, images=5, examples=2)
    assert facts(folder)["gallery"]["images"] == 5
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=mentions("images", 1, 0)):
        build_space(*arguments, images=0)
    with pytest.raises(UserError):
        build_space(str(spaces["vit"] / "encoder"), folder, DataConfig(path="digits"), examples_split="trian")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["space"]


def test_an_encoder_that_fails_is_reported_before_the_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of timm accepts one size of images."""
    pytest.importorskip("timm")
    settings = {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    arguments = {"img_size": 32, "depth": 1}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=arguments, pretrained_cfg=settings
    )
    TimmWrapperModel(config).save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr(build, "embed_gallery", None)
    with pytest.raises(UserError, match=mentions("TimmWrapperModel", 48, 32)):
        build_space(str(tmp_path / "encoder"), tmp_path / "space", DataConfig(path="digits"), images=5)
    assert not (tmp_path / "space").exists()


def test_a_copied_encoder_must_be_one_that_automodel_loads(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BlipConfig(vision_config=sizes | {"image_size": 16, "patch_size": 8}, text_config=sizes)
    BlipModel(config).save_pretrained(tmp_path / "encoder")
    BitImageProcessor(crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match=mentions("AutoModel", "BlipVisionModel")):
        build_space(str(tmp_path / "encoder"), tmp_path / "space", DataConfig(path="digits"), images=5)


def test_all_files_of_a_space_have_the_same_permissions(spaces: dict[str, Path]) -> None:
    """safetensors 0.8 creates files that only their owner can read."""
    files = [path for path in spaces["parts"].rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert len({stat.S_IMODE(path.stat().st_mode) for path in files}) == 1
