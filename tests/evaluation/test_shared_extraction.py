# SPDX-License-Identifier: Apache-2.0
"""Two processes share the extraction of features, and get exactly the features and results of one process."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from hf_ssl.data import DataConfig, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_encoder, shared_extraction
from hf_ssl.evaluation.features import extract_poolings
from hf_ssl.evaluation.shared_extraction import extract_together
from hf_ssl.modeling.gather import join_rows, joined_processes

CPU = torch.device("cpu")
SETTINGS = {
    "few_label_knn": {"labels_per_class": [1], "draws": 2},
    "few_label_linear": {"fractions": [], "labels_per_class": [2], "draws": 2},
    "ridge": {},
}

TWO = """
import os, sys, torch
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/evaluation"]
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": sys.argv[4]}
from test_shared_extraction import measure_in_processes
torch.save(measure_in_processes(sys.argv[5]), sys.argv[2] + sys.argv[1])
"""


def labeled(seed: int = 0, rows: int = 40, broken: tuple[int, ...] = ()):
    pixels = np.random.default_rng(seed).integers(0, 255, (rows, 16, 16, 3), np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    images = [PIL.Image.fromarray(each) for each in pixels]
    table = {"image": images, "label": [row % 2 for row in range(rows)]}
    stored = Dataset.from_dict(table, features=features).cast_column("image", Image(decode=False))[:]
    for row in broken:
        stored["image"][row] = {"bytes": b"no image", "path": None}
    config = DataConfig(cache="none", max_broken_fraction=0.5)
    return label_data(Dataset.from_dict(stored, features=features), config, "train")


def new_encoder() -> ResNetModel:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**sizes)).eval()


PROCESSOR = BitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


class OnlyBatches:
    """Labeled images that are no `LabeledImages`."""

    def __init__(self, images) -> None:
        self.images, self.labels = list(images.iter_batches(1)), images.labels

    def __len__(self) -> int:
        return len(self.images)

    def iter_batches(self, batch_size: int):
        flat = [image for batch in self.images for image in batch]
        return (flat[start : start + batch_size] for start in range(0, len(flat), batch_size))


def features(images, batch_size: int = 8, seen: list[int] | None = None) -> torch.Tensor:
    def extract(batches):
        read = list(batches)
        if seen is not None:
            seen.append(sum(map(len, read)))
        options = {"poolings": ["pooler"], "device": CPU, "total": len(images)}
        return extract_poolings(new_encoder(), PROCESSOR, read, **options)

    return extract_together(extract, images, batch_size, ["pooler"], CPU)["pooler"]


def evaluation(cache: str) -> list:
    config = {
        "protocols": list(SETTINGS), "settings": SETTINGS, "precision": "float32", "batch_size": 8,
        "cache_dir": cache,
    }  # fmt: skip
    return evaluate_encoder(new_encoder(), labeled(), labeled(seed=1), config, PROCESSOR)["protocols"]


def measure_in_processes(cache: str) -> dict:
    rank = int(os.environ["RANK"])
    with joined_processes("cpu"):
        seen: list[int] = []
        broken = labeled(broken=(0, 33))
        found = {
            "all": features(labeled(), seen=seen),
            "only batches": features(OnlyBatches(labeled()), seen=seen),
            "one batch": features(labeled(), batch_size=64),  # the second process has no image
            "broken": features(broken),
            "labels": broken.labels,
            "rows": join_rows(torch.arange(3.0)[: 1 + rank], CPU),
        }
        try:  # only the second process has broken images
            features(labeled(broken=tuple(range(18, 40))))
        except UserError as error:
            found["error"] = str(error)
        return found | {"seen": seen, "protocols": evaluation(cache), "again": evaluation(cache)}


def test_two_processes_extract_what_one_extracts(forks, tmp_path: Path) -> None:
    port, file, cache = str(27700 + os.getpid() % 2000), str(tmp_path / "rank"), str(tmp_path / "cache")
    each = [[rank, file, str(Path(__file__).parent.parent), port, cache] for rank in "01"]
    for process in forks.together("hf_ssl", TWO, each):
        assert process.returncode == 0, process.stderr[-2000:]
    one = features(labeled())
    broken = labeled(broken=(0, 33))
    for rank in "01":
        two = torch.load(file + rank, weights_only=False)
        assert two["seen"] == [[24, 24], [16, 16]][int(rank)]  # 3 and 2 batches
        for name in ("all", "only batches"):
            assert torch.equal(two[name], one), name
        assert torch.equal(two["one batch"], features(labeled(), batch_size=64))
        torch.testing.assert_close(two["broken"], features(broken))
        assert torch.equal(two["labels"], broken.labels)
        assert two["rows"].tolist() == [0, 0, 1]
        assert "broken" in two["error"]
        assert two["protocols"] == evaluation(str(tmp_path / "other")) == two["again"]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_a_single_process_reads_all_batches() -> None:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch, joined_processes("cpu"):
        patch.delenv("WORLD_SIZE", raising=False)
        features(labeled(), seen=seen)
    assert seen == [40] and torch.equal(join_rows(torch.ones(2, 3), CPU), torch.ones(2, 3))


def test_no_image_on_any_process_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_extraction, "work_is_shared", lambda: True)
    images = OnlyBatches(labeled())
    images.images = []
    with pytest.raises(UserError, match="no image"):
        features(images)
