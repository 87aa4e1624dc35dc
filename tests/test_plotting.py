# SPDX-License-Identifier: Apache-2.0
"""`hf-ssl plot`: the pictures have the right content, and the command names those that it cannot draw."""

import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from messages import mentions, missing
from PIL import Image

from hf_ssl import plotting
from hf_ssl.cli import main
from hf_ssl.data import DataConfig, labeled_images
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder
from hf_ssl.evaluation.confusion import confusion_matrix, draw_confusion, most_confused
from hf_ssl.evaluation.maps import LEGEND_CLASSES, color_of, draw_maps, map_points, points_page, shape_of
from hf_ssl.evaluation.neighbor_sheet import RIGHT, WRONG, draw_neighbors, find_neighbors
from hf_ssl.plotting import KINDS, encoder_names, plot
from hf_ssl.trainer.logs import RunLog, loss_terms

DIGITS = DataConfig(path="digits")
SMALL = EvaluationConfig(
    max_train_images=100, max_test_images=60, settings={"linear": {"epochs": 2, "learning_rates": [0.1, 1.0]}}
)


@pytest.fixture(scope="module")
def drawn(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all pictures of a run, h beside z, without UMAP."""
    folder = tmp_path_factory.mktemp("plots")
    kinds = [kind for kind in KINDS if kind != "umap"]
    written = plot([str(finished_run)], DIGITS, SMALL, folder, kinds, "projector", most=40)
    assert sorted(written) == sorted(path.name for path in folder.iterdir())
    return folder


def page_data(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_every_picture_has_content(drawn: Path) -> None:
    pictures = sorted(path.name for path in drawn.glob("*.png"))
    assert pictures == [
        "confusion.png", "knn_curve.png", "loss_terms.png", "neighbors.png", "tsne_2d.png", "tsne_3d.png",
    ]  # fmt: skip
    for name in pictures:
        with Image.open(drawn / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(2**24)) > 50, name


def test_the_page_contains_everything_and_loads_nothing(drawn: Path) -> None:
    text = (drawn / "points.html").read_text(encoding="utf-8")
    HTMLParser().feed(text)
    assert not re.search(r"https?:|\b(src|href)=|url\(|@import|\bimport\b|fetch\(", text)
    assert "default-src 'none'" in text
    data = page_data(text)
    assert [each["name"] for each in data["encoders"]] == ["digits, h", "digits, z = g(h)"]
    for each in data["encoders"]:
        assert {name: np.array(points).shape for name, points in each["maps"].items()} == {
            "t-SNE, 2-D": (40, 2),
            "t-SNE, 3-D": (40, 3),
        }
        assert max(np.linalg.norm(points, axis=1).max() for points in each["maps"].values()) < 1.001
    assert data["classes"] == [str(digit) for digit in range(10)] and len(data["thumbnails"]) == 40
    counts = np.bincount(data["labels"])
    assert counts.min() >= 3  # balanced classes
    kind, content = data["thumbnails"][0].split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (8, 8)


def test_a_class_name_cannot_end_the_data_of_the_page() -> None:
    names = ["</script><img src=x>", "b"]
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 2
    maps = {"one": {"flat": np.array([[0.0, 0.0], [3.0, 4.0]])}}
    text = points_page(maps, images, np.array([0, 1]), names, "title")
    data = page_data(text)
    assert data["classes"] == names and "<img" not in text
    assert data["encoders"][0]["maps"]["flat"] == [[-0.6, -0.8], [0.6, 0.8]]


def test_the_page_holds_one_part_of_the_images_at_a_time(tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []

    def read(rows: np.ndarray) -> list[torch.Tensor]:
        seen.append(len(rows))
        return [torch.zeros(3, 8, 8, dtype=torch.uint8)] * len(rows)

    def page(maps: dict, images, *others) -> str:
        next(iter(images))
        assert seen == [150]
        return str(1 + len(list(images)))

    scene = SimpleNamespace(
        maps={("tsne", 2): {"a": np.zeros((300, 2))}}, rows=np.arange(300), features={"a": None},
        test=SimpleNamespace(read=read), labels=np.zeros(300, int), class_names=[], split="test",
    )  # fmt: skip
    monkeypatch.setattr(plotting, "points_page", page)
    plotting._draw_page(scene, tmp_path)
    assert (tmp_path / "points.html").read_text() == "300"


def test_maps_are_reproducible_and_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(60) % 3
    features = 10 * torch.eye(3, 8)[labels] + torch.randn(60, 8, generator=generator)
    points = map_points(features, "tsne", 2)
    assert np.array_equal(points, map_points(features, "tsne", 2)) and points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95
    assert map_points(features[:5], "tsne", 3).shape == (5, 3)  # the perplexity is lowered
    assert map_points(features[:, :2], "tsne", 3).shape == (60, 3)
    assert not map_points(torch.ones(6, 4), "tsne", 2).any()  # collapsed
    with pytest.raises(UserError, match=mentions("t-SNE", 5, 4)):
        map_points(features[:4], "tsne", 2)


def test_markers_differ_and_legends_are_short() -> None:
    assert len({(color_of(number), shape_of(number)) for number in range(40)}) == 40
    labels = np.arange(30)
    points = np.random.default_rng(0).normal(size=(30, 2))
    figure = draw_maps({"a": points, "b": points}, labels, [f"class {i}" for i in labels], "title")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == LEGEND_CLASSES and "30" in legend.get_title().get_text()
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    assert not draw_maps({"a": points}, np.zeros(30, dtype=int), [], "title").legends


def test_maps_of_projectors_are_below_those_of_their_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages of a training are one row of h and one row of z."""
    maps = {f"step {step}{end}": np.eye(2) for step in (1, 2, 3) for end in (", h", ", z = g(h)")}
    scene = SimpleNamespace(
        points=lambda method, size: maps, rows=[0, 1], labels=np.arange(2), class_names=[],
        about_maps=lambda method: "",
    )  # fmt: skip
    drawn: list[tuple] = []

    def draw(panels: dict, labels: np.ndarray, names: list, title: str, columns: int) -> Any:
        drawn.append((list(panels), columns))
        return draw_maps(panels, labels, names, title, columns)

    monkeypatch.setattr(plotting, "draw_maps", draw)
    plotting._draw_map("tsne", scene, tmp_path)
    order = [f"step {step}{end}" for end in (", h", ", z = g(h)") for step in (1, 2, 3)]
    assert drawn == [(order, 3)] * 2


def test_panels_of_maps_are_squares_with_one_scale() -> None:
    points = np.random.default_rng(0).normal(size=(60, 2)) * [5, 1]
    figure = draw_maps({"a": points, "b": points[:, ::-1]}, np.zeros(60, int), [], "title")
    figure.draw_without_rendering()
    for panel in figure.axes:
        sides = panel.get_window_extent()
        assert abs(sides.width - sides.height) < 1
        assert np.ptp(panel.get_xlim()) == pytest.approx(np.ptp(panel.get_ylim()))


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_the_title_of_a_map_does_not_touch_the_legend(panels: int) -> None:
    points = np.random.default_rng(0).normal(size=(60, 2)) * [2, 1]
    maps = {f"encoder {number}": points for number in range(panels)}
    names = [f"a class with a long name {number}" for number in range(20)]
    title = "t-SNE in 2-D of 2,000 images of split validation, perplexity 30, seed 0"
    figure = draw_maps(maps, np.arange(60) % 20, names, title)
    figure.draw_without_rendering()
    written, legend = (artist.get_window_extent() for artist in (figure.texts[0], figure.legends[0]))
    assert figure.texts[0].get_text().replace("\n", " ") == title
    assert not written.overlaps(legend) and written.x0 >= 0 and written.x1 <= figure.bbox.x1


def test_confusion_matrices_count_images() -> None:
    scores = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 2.0], [0.0, 3.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 2])
    counts = confusion_matrix(scores, labels, 3)
    assert counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 2, 0]]
    assert most_confused(counts) == [(2, 1, 2)]
    figure = draw_confusion({"a": {"k-NN": counts}, "b": {"k-NN": counts}}, ["x", "y", "z"], "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "2"]
    assert "50.0 %" in figure.axes[0].get_title()
    many = np.eye(60, dtype=int)
    many[7, 9] = 3
    figure = draw_confusion({"a": {"k-NN": many}}, [f"class {i}" for i in range(60)], "title")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["class 7 → class 9"]


def test_the_confusion_matrix_has_the_accuracy_of_the_evaluation(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(plotting, "draw_confusion", lambda *args: seen.append(args) or draw_confusion(*args))
    plot([str(finished_run)], DIGITS, SMALL, tmp_path, ["confusion"])
    splits = [
        labeled_images(DIGITS, split, max_images=most) for split, most in (("train", 100), ("test", 60))
    ]
    result = evaluate_encoder(str(finished_run), *splits, SMALL)
    expected = {each["key"]: each["value"] for each in result["protocols"]}
    ((matrices, _, _),) = seen
    counts = matrices[finished_run.name]
    found = {name: np.trace(matrix) / matrix.sum() for name, matrix in counts.items()}
    assert found == pytest.approx({"20-NN": expected["knn_20"], "linear probe": expected["linear_probe"]})


def test_neighbors_are_nearest_and_framed_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 4, generator=generator)
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(features).T
    expected = (cosines - 10 * torch.eye(30)).argsort(dim=1, descending=True)[[3, 8], :5]
    assert find_neighbors(features, features, [3, 8], is_bank=True).tolist() == expected.tolist()
    assert find_neighbors(features, features, [3, 8], is_bank=False)[:, 0].tolist() == [3, 8]
    images = labeled_images(DIGITS, "test", max_images=20)
    labels = images.labels
    other = int((labels != labels[0]).nonzero()[0])
    rows = {"one": np.array([[0, other]])}
    sheet = np.asarray(draw_neighbors(rows, images, [0], images, labeled=True)).reshape(-1, 3)
    counts = [
        int((sheet == [int(color[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=1).sum())
        for color in (RIGHT, WRONG)
    ]
    assert counts[0] == counts[1] > 1000
    plain = np.asarray(draw_neighbors(rows, images, [0], images, labeled=False)).reshape(-1, 3)
    assert (plain[:, 0] == plain[:, 2]).all()  # digits are gray, and there are no frames


def test_losses_of_a_method_share_panels() -> None:
    history = [{"step": step, "loss": 2.0 / step, "term_a": 1.0 / step} for step in (1, 2)]
    runs = {
        "one": RunLog("x", history),
        "two": RunLog("x", history[:1]),
        "three": RunLog("y", [{"step": 1, "loss": 5.0, "eval_knn": 0.5}]),
    }
    figure = loss_terms(runs)
    shown = {axes.get_title(): [line.get_label() for line in axes.get_lines()] for axes in figure.axes}
    assert shown == {
        "x: training loss": ["one", "two"],
        "x: term a": ["one", "two"],
        "y: training loss": ["three"],
        "": [],
    }
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [1.0, 0.5]
    with pytest.raises(UserError, match="curves"):
        loss_terms({"one": RunLog("x", [{"step": 1, "eval_knn": 0.5}])})


@pytest.mark.parametrize("classes", [0, 1])
@pytest.mark.slow
def test_images_without_classes_are_drawn(
    classes: int, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without labels there is one split. With one class, there are two, and k-NN has nothing to decide."""
    folders = [tmp_path / "photos" / split / "cat" for split in ("train", "test")] if classes else []
    for folder in folders or [tmp_path / "photos"]:
        folder.mkdir(parents=True)
        for number in range(8):
            pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    output = tmp_path / "plots"
    data = DataConfig(path=str(tmp_path / "photos"))
    written = plot([str(finished_run)], data, EvaluationConfig(), output)
    assert {"tsne_2d.png", "tsne_3d.png", "points.html", "neighbors.png", "loss_terms.png"} <= set(written)
    assert not {"confusion.png", "knn_curve.png"} & set(written)
    errors = capsys.readouterr().err
    assert "no classes" in errors and "confusion is not drawn" in errors
    data = page_data((output / "points.html").read_text(encoding="utf-8"))
    assert data["classes"] == [] and data["labels"] == [0] * 8


def test_a_wrong_name_of_the_labels_is_a_mistake(finished_run: Path, tmp_path: Path) -> None:
    """Otherwise, all pictures would show no classes."""
    data = replace(DIGITS, label_column="lable")
    with pytest.raises(UserError, match=mentions("label_column", "lable")):
        plot([str(finished_run)], data, SMALL, tmp_path, ["neighbors"])


def test_images_with_several_labels_have_no_frames(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = datasets.Features(
        {"image": datasets.Image(), "objects": datasets.List(datasets.ClassLabel(names=["cat", "dog"]))}
    )
    pixels = np.random.default_rng(0).integers(0, 255, (8, 12, 12), dtype=np.uint8)
    rows = {"image": list(map(Image.fromarray, pixels)), "objects": [[], [0], [1], [0, 1]] * 2}
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    data, output = DataConfig(path=str(tmp_path / "data")), tmp_path / "plots"
    written = plot([str(finished_run)], data, EvaluationConfig(), output, ["neighbors", "confusion"])
    assert written == ["neighbors.png"]
    assert "one class" in capsys.readouterr().err
    picture = np.asarray(Image.open(output / "neighbors.png").convert("RGB"))
    assert (picture[..., 0] == picture[..., 2]).all()  # gray images without blue and orange frames


def test_umap_is_optional(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    written = plot([str(finished_run)], DIGITS, SMALL, tmp_path, ["tsne", "umap"], most=20)
    assert written == ["tsne_2d.png", "tsne_3d.png"]
    assert "umap is not drawn" in capsys.readouterr().err
    with pytest.raises(UserError, match=mentions("umap-learn", "pip install")):
        plot([str(finished_run)], DIGITS, SMALL, tmp_path, ["umap"])


def test_umap_receives_unit_rows_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(neighbors: int, dimensions: int, **options: object) -> object:
        def fit_transform(rows: np.ndarray) -> np.ndarray:
            calls.append((neighbors, dimensions, options["random_state"], np.linalg.norm(rows, axis=1)))
            return rows[:, :dimensions].astype(np.float32)

        return SimpleNamespace(fit_transform=fit_transform)

    module = ModuleType("umap")
    module.UMAP = fake
    monkeypatch.setitem(sys.modules, "umap", module)
    points = map_points(torch.randn(9, 4), "umap", 3, seed=5)
    ((neighbors, dimensions, seed, norms),) = calls
    assert (neighbors, dimensions, seed) == (8, 3, 5) and norms == pytest.approx(np.ones(9))
    assert points.shape == (9, 3) and points.dtype == np.float64


@pytest.mark.slow
def test_umap_itself() -> None:
    pytest.importorskip("umap", reason="the package umap-learn is not installed")
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    points = map_points(features, "umap", 3)
    assert points.shape == (40, 3) and np.array_equal(points, map_points(features, "umap", 3))
    assert map_points(features[:6], "umap", 2).shape == (6, 2)


def test_mistakes_are_one_sentence(finished_run: Path, tmp_path: Path) -> None:
    encoder = str(finished_run)
    for arguments, parts in [
        ((["none"], ["tsne", "tnse"]), ["--kinds", "tnse", "tsne"]),
        (([encoder, encoder], ["tsne"]), [encoder, "twice"]),
        (([f"e{number}" for number in range(11)], ["tsne"]), [10, 11]),
        (([str(tmp_path)], ["curves"]), ["curves", "checkpoint"]),
        (([encoder], ["tsne"], "last"), ["--layer", "last"]),
        (([encoder], ["tsne"], "encoder", 1), ["--images", 1]),
        (([encoder], ["tsne"], "encoder", 4), ["t-SNE", 5, 4]),
    ]:
        models, kinds, *others = arguments
        with pytest.raises(UserError, match=mentions(*parts)):
            plot(models, DIGITS, SMALL, tmp_path / "out", kinds, *others)
    assert not (tmp_path / "out").exists()


def test_names_of_encoders_are_short_and_unique() -> None:
    assert encoder_names(["runs/a", "user/b", "c/"]) == ["a", "b", "c"]
    assert encoder_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]


def test_the_help_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plot", "--help"])
    assert missing(capsys.readouterr().out, *KINDS) == []


def test_the_command_separates_encoders_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(plotting, "plot", lambda *arguments: calls.append(arguments))
    command = ["plot", "a", "user/b", "data.path=digits", "--output", "out"]
    assert main(command) == 0
    options = ["--kinds", "tsne,page", "--layer", "projector", "--images", "50", "evaluation.seed=3"]
    assert main([*command, *options]) == 0
    default = (["a", "user/b"], DIGITS, EvaluationConfig(), Path("out"), list(KINDS), "encoder", 2000)
    changed = (EvaluationConfig(seed=3), Path("out"), ["tsne", "page"], "projector", 50)
    assert calls == [default, (["a", "user/b"], DIGITS, *changed)]
    assert main(["plot", "data.path=digits", "--output", "out"]) == 2
