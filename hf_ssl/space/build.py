# SPDX-License-Identifier: Apache-2.0
"""Builds the folder of a Space.

The folder contains the encoder, the gallery, the examples, and the page with the files that it needs. It does
not depend on the machine that built it.
"""

import logging
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import RepoCard, SpaceCardData
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_ssl.auto  # noqa: F401  this import registers the methods with transformers
from hf_ssl import __version__
from hf_ssl.cards.privacy import encoder_name, remove_private
from hf_ssl.cards.result_files import with_trained_reading
from hf_ssl.data import DataConfig, LabeledImages, labeled_images, open_source
from hf_ssl.data.columns import find_optional_label_column
from hf_ssl.data.labeled_splits import unlabeled_images
from hf_ssl.data.subsets import balanced_rows
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    build_gallery,
    embed_gallery,
    fastest_device,
    has_attention,
    load_encoder,
    thumbnail,
)
from hf_ssl.evaluation.encoders import device_of, first_output
from hf_ssl.files import check_new_or_empty, local_folder, replaced_folder, write_json
from hf_ssl.hub.publish import SPACE_FACTS
from hf_ssl.modeling.loading import loaded_commit
from hf_ssl.modeling.pooling import Pooling
from hf_ssl.progress import progress
from hf_ssl.resources import MAX_IMAGES, resource
from hf_ssl.space.serve import check_packages

logger = logging.getLogger(__name__)

EXAMPLES = 10
ENCODER = "encoder"
_BATCH = 64
_EXAMPLE_SIDE = 640
_PAGE = ("app.py", "style.css", "requirements.txt")
_PACKAGES = ("torch", "transformers", "gradio", "faiss-cpu")


def build_space(
    model: str,
    folder: Path,
    data: DataConfig,
    *,
    images: int = MAX_IMAGES,
    examples: int = EXAMPLES,
    examples_split: str | None = None,
    title: str | None = None,
    pooling: Pooling = "auto",
    revision: str | None = None,
    chosen_split: bool = True,
) -> dict[str, Any]:
    """Write a folder that `run_space` or the Hub can serve, and return the content of its `space.json`.

    The folder contains a copy of a local encoder. For an encoder on the Hub, it records the id and the
    commit. The folder appears only when it is complete.

    Args:
        model: the folder or the Hub id of an encoder with its image processor.
        folder: a new or empty folder, or an existing Space, which is replaced.
        data: data set of the gallery; its split is `data.split`. The page shows labels if the data have them.
        images: largest number of images in the gallery, with equal numbers per class where possible.
        examples: number of pictures that the page offers. They are not part of the gallery.
        examples_split: split for the examples; None: the split of the gallery.
        title: heading of the page.
        pooling: see `extract_features`.
        revision: branch, tag or commit of the model on the Hub.
        chosen_split: whether the user chose `data.split`. If not, most files of a folder must be in a split.

    Raises:
        UserError: the encoder or the data are invalid, a package is missing, or the folder has other files.
    """
    check_packages()
    if not (folder / SPACE_FACTS).is_file():
        check_new_or_empty(folder, "space", " or a Space")
    if images < 1 or examples < 0:
        raise UserError(f"space: expected images >= 1 and examples >= 0, got {images} and {examples}")
    transformers_logging.disable_progress_bar()
    with progress(f"loading {model}"):
        encoder, processor = load_encoder(model, revision)
    if local_folder(model) is not None and type(encoder.config) not in MODEL_MAPPING:
        raise UserError(
            f"model: expected an encoder that AutoModel loads, because a Space contains a copy, got "
            f"{type(encoder).__name__}; use another one, or its Hub id"
        )
    data = with_trained_reading(data, model)
    if examples_split == data.split:
        examples_split = None
    held_out = examples if examples_split is None else 0
    with progress(f"opening {data.path}"):
        if not chosen_split:
            count = open_source(replace(data, max_images=1), only_image=True).count
            if count is not None:
                count.require_most_files(data.split)
        shown = _images(data, data.split, images + held_out)
        data = replace(data, value_range=shown.value_range)  # that "auto" found
    first_output(encoder, processor, next(iter(shown.iter_batches(1))), device_of(encoder))
    torch.nn.Module.to(encoder, fastest_device())
    features, thumbnails = embed_gallery(
        encoder,
        processor,
        shown.iter_batches(_BATCH),
        pooling=pooling,
        total=len(shown),
        description="gallery",
    )
    labels = _labels(shown)
    kept = np.arange(len(thumbnails))
    pool, pool_labels, most = shown, labels, len(kept) // 2
    if examples_split is not None:
        pool = _images(data, examples_split, 20 * examples)
        pool_labels, most = _labels(pool), len(pool)
    classes = pool.labels.numpy()
    chosen = balanced_rows(classes, min(examples, most), 1)
    chosen = chosen[np.argsort(classes[chosen], kind="stable")]
    pictures = [(pool[number], None if pool_labels is None else pool_labels[number]) for number in chosen]
    if examples_split is None:
        kept = np.setdiff1d(kept, chosen)
    gallery = build_gallery(
        features[kept],
        [thumbnails[number] for number in kept],
        None if labels is None else [labels[number] for number in kept],
    )
    facts = _facts(model, encoder, shown, len(gallery), labels is not None, title, pooling)
    with replaced_folder(folder) as part:
        if facts["model"]["folder"]:
            encoder.save_pretrained(part / ENCODER)
            processor.save_pretrained(part / ENCODER)
        gallery.save(part)
        facts["examples"] = _write_examples(pictures, part)
        _write_page(part, facts)
        names = (path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        facts["files"] = sorted(names)  # publishing uploads these files
        write_json(part / SPACE_FACTS, facts)
    return facts


def _images(data: DataConfig, split: str, count: int) -> LabeledImages:
    """Return images of a split. If the data have no labels, all labels are 0 and there are no class names."""
    if data.streaming:
        raise UserError("data.streaming: expected false for a Space, got true; leave it out")
    source = open_source(replace(data, max_images=1), split, only_image=True)
    if find_optional_label_column(source.dataset.features, data.label_column, source.description) is not None:
        try:
            images = labeled_images(data, split, max_images=count, balanced=True)
            images.require_one_label("a Space")
            return images
        except UserError as error:
            if data.label_column is not None:
                raise
            logger.warning("the Space shows no labels: %s", error)
    return unlabeled_images(data, split, max_images=count)


def _labels(images: LabeledImages) -> list[str] | None:
    """Return the class name of each readable image, or None without class names.

    This decodes all images, unless they were read before.
    """
    if not images.class_names:
        return None
    return [images.class_names[label] for label in images.labels.tolist()]


def _facts(
    model: str,
    encoder: PreTrainedModel,
    images: LabeledImages,
    count: int,
    labeled: bool,
    title: str | None,
    pooling: Pooling,
) -> dict[str, Any]:
    local, name = local_folder(model) is not None, encoder_name(model)
    facts = {
        "title": title or f"Nearest neighbors by {name}",
        "model": {
            "name": name,
            "class": type(encoder).__name__,
            "folder": ENCODER if local else None,
            "revision": None if local else loaded_commit(encoder),
            "attention": has_attention(encoder),
        },
        "gallery": {
            "data": images.description,
            "revision": images.revision,
            "images": count,
            "labeled": labeled,
        },
        "pooling": pooling,
        "value_range": images.value_range,  # of uploaded pictures, too
        "versions": {"hf_ssl": __version__} | {package: version(package) for package in _PACKAGES},
    }
    return cast(dict[str, Any], remove_private(facts))


def _write_examples(pictures: list[tuple[Tensor, str | None]], folder: Path) -> list[dict[str, str | None]]:
    """Write each example (PNG if it is small, else JPEG) with a thumbnail, and return names and labels."""
    (folder / "examples").mkdir()
    written: list[dict[str, str | None]] = []
    for number, (image, label) in enumerate(pictures):
        names = {}
        for key, side in (("file", _EXAMPLE_SIDE), ("thumbnail", 128)):
            encoded = thumbnail(image, side)
            ending = "png" if encoded.startswith(b"\x89PNG") else "jpg"
            names[key] = f"examples/{number}_{key}.{ending}"
            (folder / names[key]).write_bytes(encoded)
        written.append({"label": label, **names})
    return written


def _write_page(folder: Path, facts: dict[str, Any]) -> None:
    """Write the page, the README with its header for the Hub, and the source files of hf_ssl.

    The source files are necessary because no package index has hf_ssl.
    """
    page = resource("spaces", "retrieval")
    for name in _PAGE:
        shutil.copyfile(page / name, folder / name)
    shutil.copyfile(resource("constraints.txt"), folder / "constraints.txt")
    card = RepoCard((page / "README.md").read_text(encoding="utf-8"))
    header = {**card.data.to_dict(), "title": facts["title"]}
    if facts["model"]["folder"] is None:
        header["models"] = [facts["model"]["name"]]
    card.data = SpaceCardData(**header)
    card.save(folder / "README.md")
    package = Path(__file__).parent.parent
    others = shutil.ignore_patterns("_data", "__pycache__", "py.typed")
    shutil.copytree(package, folder / "hf_ssl", ignore=others, copy_function=shutil.copyfile)
