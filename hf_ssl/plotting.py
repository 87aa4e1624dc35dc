# SPDX-License-Identifier: Apache-2.0
"""Draws the features of one or more encoders on the same images: `hf-ssl plot` (layer 5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_ssl.cards.privacy import encoder_name, last_part
from hf_ssl.data import DataConfig, LabeledImages
from hf_ssl.data.subsets import balanced_rows
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation import EvaluationConfig, evaluate_features, fastest_device, load_encoder
from hf_ssl.evaluation.config import main_knn
from hf_ssl.evaluation.confusion import confusion_matrix, draw_confusion
from hf_ssl.evaluation.feature_cache import published_features
from hf_ssl.evaluation.knn import vote
from hf_ssl.evaluation.maps import (
    COLUMNS,
    TITLES,
    check_umap,
    draw_maps,
    map_points,
    perplexity,
    points_page,
)
from hf_ssl.evaluation.neighbor_sheet import QUERIES, draw_neighbors, find_neighbors
from hf_ssl.evaluation.plots import K_CURVE, k_curve
from hf_ssl.evaluation.protocols.linear import predict_scores
from hf_ssl.files import replaced_file, write_text
from hf_ssl.plotted_images import images_of_encoders
from hf_ssl.progress import notice, progress
from hf_ssl.projector import LAYERS, load_projected_encoder, projector_settings
from hf_ssl.resources import MAP_IMAGES
from hf_ssl.trainer.logs import loss_terms, read_log

KINDS = {
    "tsne": "t-SNE in 2-D and 3-D",
    "umap": "UMAP in 2-D and 3-D, which needs the package umap-learn",
    "page": "one HTML page with these maps and small images",
    "confusion": "confusion matrices of k-NN and of the linear probe",
    "neighbors": "test images with their nearest training images",
    "k_curve": "accuracy of k-NN for each k",
    "curves": "curves of the loss and its terms, from the logs of runs",
}
"""Name in `--kinds` -> description of the picture."""
PAGE, CONFUSION, SHEET, TERMS = "points.html", "confusion.png", "neighbors.png", "loss_terms.png"
MOST_ENCODERS = 10  # colors of curves
_LETTERS = {"encoder": "", "projector": ", z = g(h)"}


class Features(NamedTuple):
    """Features (N, D) of both splits; `train` is None for images without labels."""

    train: Tensor | None
    test: Tensor


@dataclass
class Scene:
    """The images, features and settings that all pictures share.

    Attributes:
        test, train: the images; `train` is None for images without labels.
        labels: (N,) class numbers of the test images.
        class_names: names of the classes; an empty list for images without labels.
        features: {name of the encoder: features}.
        evaluation: settings of the classifiers.
        split: name of the split of the test images.
        most: largest number of images in a map.
        maps: {(method, dimensions): {name of the encoder: points}}. Each map is computed once.
    """

    test: LabeledImages
    train: LabeledImages | None
    labels: np.ndarray
    class_names: list[str]
    features: dict[str, Features]
    evaluation: EvaluationConfig
    split: str
    most: int
    maps: dict[tuple[str, int], dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def rows(self) -> np.ndarray:
        """Return the row numbers of the test images in maps, with balanced classes."""
        seed = self.evaluation.seed
        return balanced_rows(self.labels, min(self.most, len(self.labels)), seed)

    def points(self, method: str, dimensions: int) -> dict[str, np.ndarray]:
        """Return {name of the encoder: points (n, dimensions) of the rows in `rows`}."""
        key = method, dimensions
        if key not in self.maps:
            rows, found = self.rows, {}
            for name, features in self.features.items():
                with progress(f"{TITLES[method]} in {dimensions}-D, {name}"):
                    chosen = features.test[rows]
                    found[name] = map_points(chosen, method, dimensions, self.evaluation.seed)
            self.maps[key] = found
        return self.maps[key]

    def about_maps(self, method: str) -> str:
        """Return the end of the title of maps: images, split and settings."""
        count = len(self.rows)
        setting = f", perplexity {perplexity(count):.3g}" if method == "tsne" else ""
        return f"{count:,} images of split {self.split}{setting}, seed {self.evaluation.seed}"

    def splits(self) -> dict[str, tuple[Tensor, Any, Tensor, Any]]:
        """Return {name of the encoder: (train features, train labels, test features, test labels)}.

        Raises:
            UserError: the images have no labels.
        """
        if self.train is None or not self.class_names:
            raise UserError(
                "expected one class for each image, in two splits, got images without classes; use "
                "data.label_column=NAME"
            )
        labels = self.train.labels, self.test.labels
        return {
            name: (found.train, labels[0], found.test, labels[1])
            for name, found in self.features.items()
            if found.train is not None
        }


def plot(
    models: Sequence[str],
    data: DataConfig,
    evaluation: EvaluationConfig,
    output: Path,
    kinds: Sequence[str] = tuple(KINDS),
    layer: str = "encoder",
    most: int = MAP_IMAGES,
) -> list[str]:
    """Draw pictures of one or more encoders, and return the names of the files.

    If a picture is not possible, the function prints the reason and draws the others. It shares the stored
    features with `hf-ssl evaluate`.

    Args:
        models: folders or Hub ids of encoders.
        data: the images, unless `evaluation.path` is set.
        evaluation: settings of features and classifiers. There is a confusion matrix for each of the
            protocols knn and linear that `evaluation.protocols` contains.
        output: folder of the pictures, which is created. Pictures of the same names are replaced.
        kinds: names of `KINDS`.
        layer: "projector" also draws the projector's output z = g(h), beside the features h of each encoder.
        most: largest number of images in a map.

    Raises:
        UserError: an argument is invalid, or no picture is possible.
    """
    transformers_logging.disable_progress_bar()
    for kind in kinds:
        check_name("--kinds", kind, KINDS, "known kinds of pictures")
    check_name("--layer", layer, LAYERS, "encoder or projector")
    names = encoder_names(models)
    most_models = MOST_ENCODERS // (1 + (layer == "projector"))
    if len(models) > most_models:
        raise UserError(
            f"plot: expected at most {most_models} encoders with --layer {layer}, got {len(models)}; "
            "draw fewer"
        )
    written: list[str] = []
    reasons: list[str] = []
    scene = None
    if set(kinds) - {"curves"}:
        scene = open_scene(dict(zip(names, models, strict=True)), data, evaluation, layer, most)
    for kind in KINDS:
        if kind not in kinds:
            continue
        try:
            if kind == "curves":
                written += [_draw_curves(dict(zip(names, models, strict=True)), output)]
            elif scene is not None:
                written += _DRAWN[kind](scene, output)
        except UserError as error:
            reasons.append(f"{kind} is not drawn: {error}")
            notice(reasons[-1])
    if not written:
        raise UserError("; ".join(reasons)[:600])
    print(f"{', '.join(written)} in {output}")
    return written


def encoder_names(models: Sequence[str]) -> list[str]:
    """Return short names of encoders: the last part of a folder or Hub id, or all of it if names repeat.

    Raises:
        UserError: an encoder is given twice.
    """
    twice = [model for number, model in enumerate(models) if model in models[:number]]
    if twice:
        raise UserError(f"plot: expected different encoders, got {twice[0]} twice; give it once")
    short = [last_part(encoder_name(model)) for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def open_scene(
    models: Mapping[str, str], data: DataConfig, evaluation: EvaluationConfig, layer: str, most: int
) -> Scene:
    """Return the images and the features of all encoders.

    Raises:
        UserError: an encoder or the images cannot be loaded, or a run has no projector.
    """
    if most < 2:
        raise UserError(f"--images: expected at least 2, got {most}; use --images {MAP_IMAGES}")
    images = images_of_encoders(models, data, evaluation)
    train, test, split = next(iter(images.values()))
    device = fastest_device()
    features: dict[str, Features] = {}
    for name, model in models.items():
        with progress(f"loading {model}"):
            encoder, processor = load_encoder(model)
        found: dict[str, tuple[EvaluationConfig, Any]] = {"encoder": (evaluation, encoder)}
        if layer == "projector":
            found["projector"] = projector_settings(evaluation), load_projected_encoder(model)
        for key, (settings, network) in found.items():
            title = f"{name}{_LETTERS[key]}" if key == "projector" or layer == "encoder" else f"{name}, h"
            network.to(device)
            rows = published_features(settings, network, processor, images[name].splits, device, title)
            features[title] = Features(rows.get("train"), rows["test"])
    several = test.has_several_labels
    labels = np.zeros(len(test), dtype=np.int64) if several else test.labels.numpy()
    class_names = [] if several else test.class_names
    return Scene(test, train, labels, class_names, features, evaluation, split, most)


def _save(figure: Any, path: Path) -> str:
    with replaced_file(path) as staging:
        figure.savefig(staging, format="png")
    return path.name


def _draw_map(method: str, scene: Scene, output: Path) -> list[str]:
    if method == "umap":
        check_umap()  # before the first map is computed
    written = []
    for dimensions in (2, 3):
        maps = scene.points(method, dimensions)
        title = f"{TITLES[method]} in {dimensions}-D of {scene.about_maps(method)}"
        # h of all encoders above z of all encoders
        of_projectors = [name for name in maps if name.endswith(_LETTERS["projector"])]
        panels = {name: maps[name] for name in sorted(maps, key=of_projectors.__contains__)}
        columns = min(len(of_projectors), COLUMNS) if len(of_projectors) > 1 else COLUMNS
        labels = scene.labels[scene.rows]
        figure = draw_maps(panels, labels, scene.class_names, title, columns)
        written.append(_save(figure, output / f"{method}_{dimensions}d.png"))
    return written


def _draw_page(scene: Scene, output: Path) -> list[str]:
    if not scene.maps:  # only the page was requested
        for dimensions in (2, 3):
            scene.points("tsne", dimensions)
    rows = scene.rows
    maps = {
        name: {f"{TITLES[method]}, {size}-D": found[name] for (method, size), found in scene.maps.items()}
        for name in scene.features
    }
    # Only one part of the images is in memory. The page holds their thumbnails.
    images = (image for part in np.array_split(rows, -(-len(rows) // 256)) for image in scene.test.read(part))
    title = f"Features of {len(rows):,} images of split {scene.split}"
    text = points_page(maps, images, scene.labels[rows], scene.class_names, title)
    write_text(output / PAGE, text)
    return [PAGE]


def _draw_confusion(scene: Scene, output: Path) -> list[str]:
    evaluation, device = scene.evaluation, fastest_device()
    matrices: dict[str, dict[str, np.ndarray]] = {}
    for name, split in scene.splits().items():
        scores: dict[str, Tensor] = {}
        if "knn" in evaluation.protocols:
            k, temperature = setting = main_knn(evaluation.of_protocol("knn"), len(split[0]))
            votes = vote(*split, neighbors=[k], temperatures=[temperature], keep=[setting], device=device)
            scores[f"{k}-NN"] = votes.scores[setting]
        if "linear" in evaluation.protocols:
            with progress(f"linear probe, {name}"):
                settings = evaluation.of_protocol("linear")
                scores["linear probe"] = predict_scores(*split, settings, evaluation.seed, device)
        classes = len(scene.class_names)
        matrices[name] = {
            key: confusion_matrix(found, scene.test.labels, max(classes, found.shape[1]))
            for key, found in scores.items()
        }
    if not any(matrices.values()):
        raise UserError(
            f"evaluation.protocols: expected knn or linear, got {', '.join(evaluation.protocols)}; use "
            "evaluation.protocols=[knn,linear]"
        )
    count = f"{len(scene.test):,} images of split {scene.split}"
    title = f"{count} by class (row) and predicted class (column)"
    return [_save(draw_confusion(matrices, scene.class_names, title), output / CONFUSION)]


def _draw_neighbors(scene: Scene, output: Path) -> list[str]:
    test, train = scene.test, scene.train
    bank = test if train is None else train
    queries = balanced_rows(scene.labels, min(QUERIES, len(test)), scene.evaluation.seed)
    found = {
        name: find_neighbors(
            features.test if features.train is None else features.train,
            features.test,
            queries.tolist(),
            is_bank=train is None,
        )
        for name, features in scene.features.items()
    }
    sheet = draw_neighbors(found, test, queries.tolist(), bank, labeled=bool(scene.class_names))
    with replaced_file(output / SHEET) as staging:
        sheet.save(staging, "PNG")
    return [SHEET]


def _draw_k_curve(scene: Scene, output: Path) -> list[str]:
    settings = {"settings": {"knn": scene.evaluation.settings.get("knn", {})}, "seed": scene.evaluation.seed}
    results = {
        name: evaluate_features({"protocols": ["knn"], **settings}, *split, description=name)
        for name, split in scene.splits().items()
    }
    figure = k_curve(results)
    if figure is None:
        raise UserError(
            "evaluation.settings.knn.neighbors: expected several values of k, got fewer than 2; use [1,5,20]"
        )
    return [_save(figure, output / K_CURVE)]


_DRAWN: dict[str, Callable[[Scene, Path], list[str]]] = {
    "tsne": partial(_draw_map, "tsne"),
    "umap": partial(_draw_map, "umap"),
    "page": _draw_page,
    "confusion": _draw_confusion,
    "neighbors": _draw_neighbors,
    "k_curve": _draw_k_curve,
}


def _draw_curves(models: Mapping[str, str], output: Path) -> str:
    logs, errors = {}, []
    for name, model in models.items():
        try:
            logs[name] = read_log(Path(model).expanduser())
        except UserError as error:
            errors.append(error)
    if not logs:
        raise errors[0]
    for reason in errors:
        notice(str(reason))
    return _save(loss_terms(logs), output / TERMS)
