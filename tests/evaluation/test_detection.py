# SPDX-License-Identifier: Apache-2.0
"""Object detection: the precision is that of pycocotools, the encoder's weights are used and stay frozen, a
training repeats and resumes exactly, and each mistake ends in one sentence."""

import copy
import io
import json
import os
import shutil
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from example_facts import new_facts
from messages import mentions
from pixel_encoder import Pixels
from torchvision.ops.poolers import LevelMapper
from transformers import BitImageProcessor, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_ssl.building import has_label_lists
from hf_ssl.cards.card import render_card
from hf_ssl.cards.facts import check_facts
from hf_ssl.data import DataConfig, LabeledImages, label_data
from hf_ssl.data.boxes import ImageObjects
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    EvaluationConfig,
    ProtocolResult,
    box_metrics,
    evaluate_encoder,
    evaluate_features,
)
from hf_ssl.evaluation.augmented import BatchRows
from hf_ssl.evaluation.box_metrics import Detections, average_precision_error, box_scores
from hf_ssl.evaluation.detector import Anchors, Architecture, NearestLevel, new_detector
from hf_ssl.evaluation.detector_training import BoxImages, DetectorTrainer, detect
from hf_ssl.evaluation.feature_maps import feature_maps
from hf_ssl.evaluation.plots import DETECTIONS, detections, write_plots
from hf_ssl.evaluation.protocols import detection
from hf_ssl.modeling.gather import joined_processes, process_rank
from hf_ssl.run import evaluate

SIDE = 32
NAMES = ["red", "blue"]
OBJECTS = {"bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=NAMES))}
SMALL = {
    "recipe": "small", "image_size": SIDE, "channels": 8, "head_size": 16, "proposals": 20,
    "sampled_regions": 16, "levels": 3, "epochs": 2, "batch_size": 4,
}  # fmt: skip
ARCHITECTURE = Architecture(SIDE, 4, 3, 4.0, 8, 16, 20, 16, False)


def pictures(count: int, seed: int = 0) -> Dataset:
    """Gray images with one or two colored rectangles."""
    random = np.random.default_rng(seed)
    images, objects = [], []
    for _ in range(count):
        image = random.integers(90, 130, (SIDE, SIDE, 3))
        boxes, classes = [], random.integers(0, 2, random.integers(1, 3)).tolist()
        for number in classes:
            x, y, w, h = *random.integers(0, SIDE - 16, 2), *random.integers(8, 16, 2)
            image[y : y + h, x : x + w] = (230, 20, 20) if number == 0 else (20, 20, 230)
            boxes.append([float(each) for each in (x, y, w, h)])
        images.append(PIL.Image.fromarray(image.astype(np.uint8)))
        objects.append({"bbox": boxes, "category": classes})
    columns = {"image": images, "objects": objects}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "objects": OBJECTS}))


@cache
def split(count: int, seed: int) -> LabeledImages:
    return label_data(pictures(count, seed), DataConfig(), "train")


def processor() -> BitImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return BitImageProcessor(size=size, do_center_crop=False, image_mean=[0.4] * 3, image_std=[0.2] * 3)


@cache
def resnet() -> ResNetModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return ResNetModel(config).eval()


def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=SIDE,
        patch_size=8,
    )  # fmt: skip
    return ViTModel(config).eval()


def measure(model: Any = None, train: Any = None, test: Any = None, **settings: Any) -> list[ProtocolResult]:
    config = {"protocols": ["detection"], "settings": {"detection": SMALL | settings}, "precision": "float32"}
    arguments = train or split(12, 0), test or split(6, 1), config, processor()
    return evaluate_encoder(resnet() if model is None else model, *arguments)["protocols"]


@cache
def measured() -> list[ProtocolResult]:
    return measure()


def random_detections(images: int, seed: int) -> tuple[list[Detections], list[ImageObjects]]:
    """Objects, and boxes near them with random scores."""
    random = np.random.default_rng(seed)
    found, truth = [], []
    for number in range(images):
        count = 0 if number == 1 else int(random.integers(1, 6))
        corners = random.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + random.uniform(4, 40, (count, 2))], axis=1).astype(
            np.float32
        )
        classes = random.integers(0, 3, count)
        truth.append(ImageObjects(boxes, classes, random.random(count) < 0.1))
        copies = random.integers(0, max(1, count), 8 if count else 0)
        near = boxes[copies] + random.normal(0, 2, (len(copies), 4)).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guessed = np.where(random.random(len(copies)) < 0.8, classes[copies], 0) if count else copies
        scores = random.random(len(copies)).astype(np.float32)
        found.append(Detections(*(torch.from_numpy(each) for each in (near, guessed, scores))))
    return found, truth


def coco_stats(
    found: list[Detections], truth: list[ImageObjects], numbers: list[int] | None = None
) -> np.ndarray:
    """Return the numbers of pycocotools alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sized(box: Any) -> list[float]:
        x1, y1, x2, y2 = (np.float32(each) for each in box)
        return [float(each) for each in (x1, y1, x2 - x1, y2 - y1)]

    annotations = [
        {
            "image_id": k,
            "category_id": int(c),
            "bbox": sized(b),
            "area": sized(b)[2] * sized(b)[3],
            "iscrowd": int(i),
        }
        for k, each in enumerate(truth)
        for b, c, i in zip(*each[:2], each.crowd, strict=True)
    ]
    results = [
        {"image_id": k, "category_id": int(c), "bbox": sized(b), "score": float(s)}
        for k, each in enumerate(found)
        for b, c, s in zip(each.boxes.numpy(), each.classes, each.scores.numpy(), strict=True)
    ]
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": k} for k in range(len(truth))],
            "categories": [{"id": number} for number in range(3)],
            "annotations": [{"id": n, **each} for n, each in enumerate(annotations, 1)],
        }
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        if numbers is not None:
            evaluator.params.catIds = numbers
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


@pytest.mark.parametrize("seed", [0, 1])
def test_the_precisions_are_those_of_pycocotools_alone(seed: int) -> None:
    found, truth = random_detections(12, seed)
    scores, expected = box_scores(found, truth), coco_stats(found, truth)
    assert 0.05 < scores.ap < 0.9
    # torchmetrics rounds the numbers of pycocotools to float32.
    assert [scores.ap, scores.ap50, scores.ap75] == expected[:3].astype(np.float32).tolist()
    assert scores.classes == {
        number: float(coco_stats(found, truth, [number])[0].astype(np.float32)) for number in range(3)
    }


def test_perfect_and_missing_detections_have_the_precisions_1_and_0() -> None:
    _, truth = random_detections(6, 0)
    truth = [each._replace(crowd=np.zeros_like(each.crowd)) for each in truth]
    parts = [(torch.from_numpy(each.boxes), torch.from_numpy(each.classes)) for each in truth]
    perfect = [Detections(boxes, classes, torch.ones(len(boxes))) for boxes, classes in parts]
    assert box_scores(perfect, truth)[:3] == (1, 1, 1)
    assert average_precision_error(perfect, truth, 0) == pytest.approx(0, abs=1e-9)
    nothing = [Detections(boxes[:0], classes[:0], torch.ones(0)) for boxes, classes in parts]
    assert box_scores(nothing, truth)[:3] == (0, 0, 0)


def test_a_sample_of_the_bootstrap_is_the_precision_of_repeated_images() -> None:
    found, truth = random_detections(8, 2)
    generator = np.random.default_rng(5)
    drawn = [generator.integers(8, size=8) for _ in range(3)]
    values = [coco_stats([found[k] for k in rows], [truth[k] for k in rows])[0] for rows in drawn]
    assert average_precision_error(found, truth, 5, samples=3) == pytest.approx(
        np.std(values, ddof=1), rel=1e-6
    )


def test_a_result_is_complete() -> None:
    results = measured()
    assert json.loads(json.dumps(results)) == results
    assert [each["key"] for each in results] == ["detection_frozen", "detection_tuned"]
    assert len({each["id"] for each in results}) == 2
    for each in results:
        assert each.keys() == get_type_hints(ProtocolResult).keys()
        assert {"ap50", "ap75"} < each["metrics"].keys() <= {"ap50", "ap75", "ap_red", "ap_blue"}
        assert 0 <= each["value"] <= each["metrics"]["ap50"] <= 1 and each["standard_error"] >= 0
        assert each["selection"] == {} and each["selected_on"] is None
        assert "6 images of split test" in each["text"] and "C4" in each["text"]
        assert not each["text"].endswith(".") and "Standard error:" not in each["text"], "the card adds them"
        assert [example["row"] for example in each["details"]["examples"]] == list(range(6))
    facts = new_facts()
    facts["results"] = {"trained": facts["results"]["trained"] | {"protocols": results}}
    card = render_card(check_facts(facts), has_pretraining=False)
    for each in results:
        assert f"{100 * each['value']:.1f} %" in card and each["text"] in card and each["column"] in card


def test_a_training_learns_and_depends_on_the_seed() -> None:
    """More steps on more images find rectangles. The encoder and the random state do not change."""
    before = {key: value.clone() for key, value in resnet().state_dict().items()}
    state = torch.get_rng_state()
    options = {"modes": ["tuned"], "epochs": 6, "batch_size": 8, "learning_rate": 0.005, "seeds": 2}
    (learned,) = measure(train=split(32, 2), **options)
    assert learned["metrics"]["ap50"] > 0.25
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in resnet().state_dict().items())
    values = [each["ap"] for each in learned["details"]["seeds"].values()]
    assert learned["value"] == np.mean(values) and values[0] != values[1]
    assert learned["standard_error"] == pytest.approx(np.std(values, ddof=1) / 2**0.5)


@pytest.mark.slow
def test_a_vision_transformer_is_trained_with_its_own_recipe() -> None:
    (result,) = measure(vit(), modes=["tuned"], epochs=1, recipe=None)
    assert "ViTDet" in result["text"] and result["details"]["settings"]["optimizer"] == "adamw"


@pytest.mark.parametrize("frozen", [True, False])
def test_the_body_uses_the_weights_of_the_encoder_and_frozen_ones_do_not_change(frozen: bool) -> None:
    """One step of training changes all weights of a tuned encoder, and none of a frozen one."""
    model = resnet()
    detector = new_detector(feature_maps(model, 4), processor(), 2, ARCHITECTURE, frozen=frozen).train()
    body, pixels = detector.backbone, torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        assert all(torch.equal(*pair) for pair in zip(body.maps(pixels), states[1:], strict=True))
    before = copy.deepcopy(body.maps.state_dict())
    batch = BoxImages(split(12, 0), split(12, 0).objects.images, 0.5, 0).__getitems__(
        BatchRows(np.arange(4), 0, 0, 4)
    )
    losses = detector([image / 255 for image in batch.images], batch.targets)
    sum(losses.values()).backward()
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
    same = {key: torch.equal(before[key], value) for key, value in body.maps.state_dict().items()}
    statistics = [key for key in same if "running" in key or "num_batches" in key]
    assert all(same[key] for key in statistics) and statistics
    assert {same[key] for key in same.keys() - set(statistics)} == {frozen}
    assert all(parameter.grad is not None for parameter in detector.parameters() if parameter.requires_grad)


def test_batch_statistics_are_an_option_of_a_tuned_encoder() -> None:
    for frozen, expected in ((False, True), (True, False)):
        settings = Architecture(SIDE, 4, 3, 4.0, 8, 16, 20, 16, True)
        body = (
            new_detector(feature_maps(resnet(), 4), processor(), 2, settings, frozen=frozen).train().backbone
        )
        assert body.maps.encoder.embedder.embedder.normalization.training == expected


def test_a_processor_with_other_values_of_pixels_is_an_error() -> None:
    other = BitImageProcessor(do_rescale=False)
    with pytest.raises(UserError, match=mentions("processor", "BitImageProcessor")):
        new_detector(feature_maps(resnet(), 4), other, 2, ARCHITECTURE, frozen=True)


def test_the_detector_normalizes_as_the_image_processor() -> None:
    detector = new_detector(feature_maps(resnet(), 4), processor(), 2, ARCHITECTURE, frozen=True)
    image = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8)
    expected = processor()([image], return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    (found,) = detector.transform([image / 255])[0].tensors
    assert torch.allclose(found, expected[0], atol=1e-6)


def test_anchors_have_the_strides_of_the_pyramid() -> None:
    """Those of whole strides are torchvision's. Patches of 14 pixels have levels of 3.5 and 7 pixels."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    maps = [torch.zeros(1, 8, 8, 8), torch.zeros(1, 8, 4, 4)]
    images = ImageList(torch.zeros(1, 3, 32, 32), [(32, 32)])
    (expected,) = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)(images, maps)
    (found,) = Anchors([4.0, 8.0], 4.0)(images, maps)
    assert torch.equal(found, expected)
    (found,) = Anchors([3.5, 7.0], 4.0)(images, maps)
    centers = (found[:192, :2] + found[:192, 2:]) / 2
    assert centers.max().item() == 7 * 3.5


def test_the_pyramid_of_a_vision_transformer_has_a_quarter_half_one_and_two_patches() -> None:
    maps = feature_maps(vit(), 1)
    settings = Architecture(SIDE, 1, 5, 4.0, 8, 16, 20, 16, False)
    body = new_detector(maps, processor(), 2, settings, frozen=True).backbone
    assert body.strides == [2, 4, 8, 16, 32] and body.own_levels == 4
    shapes = [tuple(each.shape[-2:]) for each in body(torch.zeros(1, 3, 32, 64)).values()]
    assert shapes == [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]


def test_a_flip_moves_the_boxes_with_the_pixels() -> None:
    images = split(12, 0)
    (kept,), (flipped,) = (
        BoxImages(images, images.objects.images, flip, 0)
        .__getitems__(BatchRows(np.array([3]), 0, 0, 1))
        .images
        for flip in (0.0, 1.0)
    )
    assert torch.equal(kept.flip(-1), flipped)
    batch = BoxImages(images, images.objects.images, 1.0, 0).__getitems__(BatchRows(np.array([3]), 0, 0, 1))
    x1, y1, x2, y2 = batch.targets[0]["boxes"][-1].int().tolist()
    red, _, blue = flipped[:, y1:y2, x1:x2].float().mean(dim=(1, 2))
    assert (red > blue) == (batch.targets[0]["labels"][-1] == 1) and abs(red - blue) > 150, "drawn last"


def test_a_training_resumes_from_its_checkpoint(tmp_path) -> None:
    whole = measured()[0]
    options = {"modes": ["frozen"], "folder": str(tmp_path)}
    assert measure(**options)[0] == whole, "checkpoints do not change a training"
    (folder,) = filter(Path.is_dir, tmp_path.iterdir())
    first, last = sorted(folder.glob("checkpoint-*"), key=lambda each: int(each.name.split("-")[1]))
    times = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    shutil.rmtree(last)
    assert measure(**options)[0] == whole
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == times and last.exists()


def test_the_folder_of_a_training_depends_on_all_that_changes_it(tmp_path, monkeypatch) -> None:
    """Pixels with the same boxes, the normalization and the precision are other trainings."""
    found: list[Any] = []
    monkeypatch.setattr(detection, "train_detector", lambda *args, folder, **options: found.append(folder))
    monkeypatch.setattr(detection, "detect", lambda *args: random_detections(2, 0)[0])
    other = processor()
    other.image_mean = [0.3] * 3
    dark = pictures(2).map(lambda item: {"image": item["image"].point(lambda value: value // 2)})
    for data, process, precision in (
        (pictures(2), processor(), "float32"),
        (pictures(2), processor(), "float32"),
        (dark, processor(), "float32"),
        (pictures(2), other, "float32"),
        (pictures(2), processor(), "bfloat16"),
    ):
        settings = SMALL | {"modes": ["frozen"], "folder": str(tmp_path)}
        config = {"protocols": ["detection"], "settings": {"detection": settings}, "precision": precision}
        evaluate_encoder(resnet(), data, pictures(2, 1), config | {"cache": False}, process)
    assert found[0] == found[1] and len(set(found)) == 4


def test_each_process_measures_the_precision_of_all_detections(monkeypatch) -> None:
    """torchmetrics would add the detections of other processes, which have the same images."""
    import torchmetrics.metric

    monkeypatch.setattr(torchmetrics.metric, "jit_distributed_available", lambda: True)
    found, truth = random_detections(4, 0)
    assert box_scores(found, truth).ap == pytest.approx(coco_stats(found, truth)[0], rel=1e-6)


TWO = """
import os, sys, torch
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/evaluation"]
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": sys.argv[3]}
from test_detection import measure_in_two_processes
torch.save(measure_in_two_processes(), sys.argv[4] + sys.argv[1])
"""


def measure_in_two_processes() -> dict[str, Any]:
    """Return the detections of shared batches, and the error after a loss that diverges on one process."""
    with joined_processes("cpu"):
        found: dict[str, Any] = {"detections": untrained_detections(), "error": ""}
        loss = torch.tensor(float("inf") if process_rank() else 1.0)
        trainer: Any = SimpleNamespace(
            args=SimpleNamespace(device=torch.device("cpu")), where="section", learning_rate=0.5
        )
        batch = BoxImages(split(12, 0), split(12, 0).objects.images, 0.0, 0).__getitems__(
            BatchRows(np.arange(2), 0, 0, 4)
        )
        try:
            DetectorTrainer.compute_loss(trainer, lambda images, targets: {"loss": loss}, batch)
        except UserError as error:
            found["error"] = str(error)
        return found


def untrained_detections() -> list[torch.Tensor]:
    maps = feature_maps(resnet(), 4)
    torch.manual_seed(0)
    detector = new_detector(maps, processor(), 2, ARCHITECTURE, frozen=True)
    found = detect(detector, split(6, 1), 2, torch.device("cpu"), lambda count: None)
    return [torch.cat([each.boxes, each.classes[:, None], each.scores[:, None]], 1) for each in found]


@pytest.mark.slow
def test_two_processes_share_the_test_images_and_raise_the_same_error(forks, tmp_path) -> None:
    port, file = str(25700 + os.getpid() % 2000), str(tmp_path / "rank")
    each = [[rank, str(Path(__file__).parent.parent), port, file] for rank in "01"]
    for process in forks.together("hf_ssl", TWO, each):
        assert process.returncode == 0, process.stderr[-2000:]
    one = untrained_detections()
    assert sum(map(len, one)) > 6
    for rank in "01":
        two = torch.load(file + rank, weights_only=False)
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(two["detections"], one, strict=True))
        assert "section.learning_rate" in two["error"]


def test_the_picture_shows_test_images(tmp_path) -> None:
    result: Any = {"protocols": measured(), "images": {"test": 6}}
    assert write_plots(tmp_path, {"encoder": result}, {}, split(6, 1)) == [DETECTIONS]
    width, height = PIL.Image.open(tmp_path / DETECTIONS).size
    assert width > 2 * height > 300
    assert write_plots(tmp_path, {"encoder": result}, {}) == [] and not list(tmp_path.iterdir())
    for each in result["protocols"]:
        for example in each["details"]["examples"]:
            example["boxes"] = []
    (legend,) = detections({"encoder": result}, split(6, 1)).legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["objects (dashed, white)", "no detection with a score of 0.5"]


def test_the_command_also_measures_random_weights(tmp_path, capsys, monkeypatch) -> None:
    """The encoder with random weights has the same columns, and other features."""
    monkeypatch.setattr(detection, "train_detector", lambda *args, **options: None)
    torch.manual_seed(1)
    ResNetModel(resnet().config).save_pretrained(tmp_path / "encoder")
    processor().save_pretrained(tmp_path / "encoder")
    (tmp_path / "data").mkdir()
    for name, images in (("train", pictures(8)), ("test", pictures(6, 1))):
        images.to_parquet(tmp_path / "data" / f"{name}.parquet")
    settings = {"detection": SMALL | {"modes": ["frozen"], "epochs": 1}}
    evaluation = EvaluationConfig(protocols=["detection"], settings=settings, cache=False)
    results = evaluate(
        str(tmp_path / "encoder"), DataConfig(path=str(tmp_path / "data")), evaluation, tmp_path / "results"
    )
    assert list(results) == ["encoder", "untrained"]
    (one,), (other,) = (each["protocols"] for each in results.values())
    assert one["id"] == other["id"] and one["key"] == other["key"] == "detection_frozen"
    assert results["encoder"]["statistics"] != results["untrained"]["statistics"]
    assert sorted(each.name for each in (tmp_path / "results").iterdir()) == [DETECTIONS, "results.json"]
    assert "the same network without training" in capsys.readouterr().out


def test_a_column_of_boxes_is_found_before_a_training(tmp_path) -> None:
    """Otherwise, the training ends without an evaluation, because k-NN needs one class for each image."""
    for name, images in (("train", pictures(8)), ("test", pictures(6, 1))):
        images.to_parquet(tmp_path / f"{name}.parquet")
    assert has_label_lists(DataConfig(path=str(tmp_path)), EvaluationConfig())


def empty(count: int) -> LabeledImages:
    rows = [{"bbox": [], "category": []}] * count
    dataset = pictures(count).remove_columns("objects").add_column("objects", rows, feature=OBJECTS)
    return label_data(dataset, DataConfig(), "test")


def test_mistakes_end_in_one_sentence_before_the_training(monkeypatch) -> None:
    monkeypatch.setattr(detection, "train_detector", None)  # nothing is trained
    with pytest.raises(UserError, match=mentions("detection", "boxes", "test", 4)):
        measure(test=empty(4))
    with pytest.raises(UserError, match=mentions("detection", "spatial map", "Pixels")):
        evaluate_encoder(
            Pixels(), split(12, 0), split(6, 1), {"protocols": ["detection"]},
            BitImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False, image_mean=[0.5] * 3),
        )  # fmt: skip
    one = pictures(12).remove_columns("objects").add_column("label", [0, 1] * 6)
    with pytest.raises(
        UserError, match=mentions("evaluation.protocols", "knn", "detection", "data.label_column")
    ):
        evaluate_encoder(resnet(), one, one, {"protocols": ["detection"]}, processor())
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "detection", "knn", "boxes")):
        evaluate_encoder(resnet(), split(12, 0), split(6, 1), {"protocols": ["knn"]}, processor())
    features = torch.randn(8, 4), torch.zeros(8, 2).long().numpy()
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "multi_label")):
        evaluate_features({"protocols": ["detection"]}, *features, *features)

    def missing() -> None:
        raise UserError("detection: expected the packages")

    monkeypatch.setattr(detection, "require_packages", missing)
    monkeypatch.setattr(LabeledImages, "iter_batches", None)  # no image is read
    with pytest.raises(UserError, match="expected the packages"):
        measure()


def test_missing_packages_end_in_one_sentence(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.cocoeval", None)
    with pytest.raises(UserError, match=mentions("torchmetrics", "pycocotools", ".[detection]")):
        box_metrics.require_packages()


def test_a_training_that_diverges_ends_in_one_sentence() -> None:
    # The message contains the setting. The rate of a step is lower, because the schedule changes it.
    where = mentions("evaluation.settings.detection.learning_rate", 900000, "converges")
    with pytest.raises(UserError, match=where):
        measure(modes=["tuned"], optimizer="sgd", learning_rate=9e5)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"recipe": "coco"}, ["recipe", "fpn", "vitdet", "small"]),
        ({"modes": []}, ["modes", "frozen", "tuned"]),
        ({"modes": ["frozen", "frozen"]}, ["modes"]),
        ({"modes": ["half"]}, ["modes", "half"]),
        ({"seeds": 0}, ["seeds", 1]),
        ({"flip": 2.0}, ["flip"]),
        ({"levels": 9}, ["levels", 8]),
        ({"optimizer": "lamb"}, ["optimizer", "adamw"]),
        ({"learning_rate": 0.0}, ["learning_rate"]),
    ],
)
def test_settings_are_checked(settings, parts) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        measure(**settings)


def test_settings_that_are_null_follow_the_encoder() -> None:
    """The learning rate is proportional to the number of images in a batch."""
    config = detection.Config(batch_size=8)
    architecture, optimization, _ = config.resolved(False, 1000)
    assert (architecture.image_size, optimization.optimizer, optimization.learning_rate) == (800, "sgd", 0.01)
    architecture, optimization, _ = config.resolved(True, 4)
    assert (architecture.image_size, optimization.optimizer, optimization.batch_size) == (1024, "adamw", 4)
    assert optimization.learning_rate == pytest.approx(1e-4 * 4 / 64)


def test_each_region_has_a_level_that_exists() -> None:
    sides = torch.tensor([4.0, 60.0, 111.0, 113.0, 223.0, 225.0, 449.0, 2000.0])
    boxes = [torch.stack([0 * sides, 0 * sides, sides, sides], dim=1)]
    usual = NearestLevel([4, 8, 16, 32], 224, 4)(boxes)
    assert usual.tolist() == LevelMapper(2, 5)(boxes).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert NearestLevel([4, 16, 32], 224, 4)(boxes).tolist() == [0, 0, 0, 0, 0, 1, 2, 2]
    assert LevelMapper(2, 5)(boxes).max() == 3, "torchvision would give a fourth level"


def test_another_optimizer_needs_a_learning_rate() -> None:
    config = detection.Config(optimizer="adamw")
    assert config.resolved(True, 1000)[1].optimizer == "adamw"  # also in the recipe of a ViT
    with pytest.raises(UserError, match=mentions("detection.learning_rate", "adamw", "fpn", "sgd", "1e-4")):
        config.resolved(False, 1000)
    config = detection.Config(optimizer="adamw", learning_rate=2e-4)
    assert config.resolved(False, 1000)[1].learning_rate == 2e-4
