# SPDX-License-Identifier: Apache-2.0
"""Tests in separate processes: the command publishes, a user loads, training streams and pushes."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from forks import Forks
from hub_server import HubServer
from messages import missing
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from hf_ssl.data.digits import digits

REPO = "someone/digits"

# This program loads the same repository first without hf_ssl, then with it.
WITHOUT_HF_SSL = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ssl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import json, re
import torch
from PIL import Image
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModel

repo, folder = sys.argv[1:]
wrong = ("missing_keys", "unexpected_keys")
processor = AutoImageProcessor.from_pretrained(repo)
encoder, report = AutoModel.from_pretrained(repo, output_loading_info=True)
weights = {name: value.clone() for name, value in encoder.state_dict().items()}
pixel_values = processor(Image.open(f"{folder}/photo.jpg"), return_tensors="pt")["pixel_values"]
with torch.inference_mode():
    features = encoder.double()(pixel_values.double()).pooler_output
torch.save({"features": features, "weights": weights, "pixels": pixel_values}, f"{folder}/without_hf_ssl.pt")
code = re.search(r"```python\\n(.*?)```", open(hf_hub_download(repo, "README.md")).read(), re.S)[1]
scope = {}
exec(code.replace('"photo.jpg"', repr(f"{folder}/photo.jpg")), scope)
found = {
    "class": type(encoder).__module__, "keys": [len(report[key]) for key in wrong],
    "card": (scope["features"] - features.flatten(1)).abs().max().item() / features.abs().max().item(),
    "without hf_ssl": "hf_ssl" not in sys.modules,
}
sys.meta_path.pop(0)
import hf_ssl.auto
from transformers import AutoModelForPreTraining
method, report = AutoModelForPreTraining.from_pretrained(
    repo, subfolder="pretraining", output_loading_info=True
)
torch.save(method.state_dict(), f"{folder}/method.pt")
found |= {"method": type(method).__name__, "method keys": [len(report[key]) for key in wrong]}
print(json.dumps(found))
"""

# `python -m hf_ssl` in a process that has already imported the libraries.
COMMAND = "import runpy; runpy.run_module('hf_ssl', run_name='__main__', alter_sys=True)"


def process(hub: HubServer, home: Path, *command: str, token: str | None = None, **changed: str):
    return subprocess.run(
        [sys.executable, *command],
        env=hub.environment(home, token) | changed,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_a_published_encoder_is_loaded_without_hf_ssl(
    forks: Forks, hub: HubServer, finished_run: Path, tmp_path: Path
) -> None:
    command = ("-m", "hf_ssl", "publish", str(finished_run), REPO)
    done = process(hub, tmp_path, *command, token=hub.write_token)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{hub.endpoint}/{REPO}"

    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.jpg")
    done = forks.run("torch", WITHOUT_HF_SSL, REPO, str(tmp_path), env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers.") and found["without hf_ssl"]
    # The card's code computes in float32, the others in float64. The tolerance covers rounding in sums of
    # some hundred numbers.
    assert found["card"] <= 100 * torch.finfo(torch.float32).eps
    assert (found["keys"], found["method keys"], found["method"]) == ([0, 0], [0, 0], "SimCLRForPreTraining")

    encoder, processor = (
        AutoModel.from_pretrained(finished_run),
        AutoImageProcessor.from_pretrained(finished_run),
    )
    pixel_values = processor(Image.open(tmp_path / "photo.jpg"), return_tensors="pt")["pixel_values"]
    loaded = torch.load(tmp_path / "without_hf_ssl.pt")
    torch.testing.assert_close(loaded["pixels"], pixel_values, rtol=0, atol=1e-6)
    assert all(torch.equal(value, loaded["weights"][name]) for name, value in encoder.state_dict().items())
    with torch.inference_mode():
        features = encoder.double()(loaded["pixels"].double()).pooler_output
    torch.testing.assert_close(loaded["features"], features, rtol=0, atol=1e-13 * float(features.abs().max()))


def test_the_command_with_a_hub_without_xet(hub: HubServer, finished_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    command = ("-m", "hf_ssl", "publish", str(finished_run), REPO)
    done = process(hub, tmp_path, *command, token=hub.write_token, HF_HUB_DISABLE_XET="0")
    assert done.returncode == 2
    assert missing(done.stderr.splitlines()[-1], "hf-ssl:", "HF_HUB_DISABLE_XET=1") == []
    assert [commit.summary for commit in hub.store.model(REPO).commits] == ["initial commit"]
    assert hub.count("xet-write-token") == 1, "a permanent error is not retried"


def test_publishing_loads_no_torch(finished_run: Path) -> None:
    code = (
        "import sys\n"
        "from hf_ssl.cli import main\n"
        f"assert main(['publish', {str(finished_run)!r}, 'a/b', '--dry-run']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("role", [None, "read"])
def test_a_missing_and_a_read_only_token(
    hub: HubServer, finished_run: Path, tmp_path: Path, role: str | None
) -> None:
    command = ("-m", "hf_ssl", "publish", str(finished_run), REPO)
    done = process(hub, tmp_path, *command, token=None if role is None else hub.read_token)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    parts = ["token", "hf auth login"] if role is None else ["token", "someone", "read", REPO]
    assert missing(sentence, "hf-ssl:", *parts) == []
    assert hub.store.repos == {}


OPEN = """
import json
from hf_ssl.data import DataConfig, open_source
source = open_source(DataConfig(path="someone/shards"))
stream = open_source(DataConfig(path="someone/shards", num_images=8), streaming=True)
images = [[row[each.image_column]["bytes"].hex() for row in each.dataset] for each in (source, stream)]
print(json.dumps([source.image_column, source.revision, *images]))
"""


@pytest.mark.slow
def test_tars_on_the_hub_can_have_images_with_different_endings(hub: HubServer, tmp_path: Path) -> None:
    """`datasets` finds the columns in the first five images. The others would have no image."""
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.png", "6.jpeg", "7.png"]
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "train-0.tar", "w") as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            tar.addfile(entry, io.BytesIO(bytes([number, 0])))
    repo = hub.store.add_repo("datasets", "someone/shards", tmp_path / "data")
    done = process(hub, tmp_path, "-c", OPEN)
    assert done.returncode == 0, done.stderr[-3000:]
    column, revision, *images = json.loads(done.stdout.splitlines()[-1])
    assert column == "jpg" and images == [[f"{number:02x}00" for number in range(8)]] * 2
    assert revision == repo.commits[-1].oid


def test_pretraining_streams_from_the_hub_and_pushes(forks: Forks, hub: HubServer, tmp_path: Path) -> None:
    """The first push fails, training continues, and the later pushes succeed."""
    data = tmp_path / "data" / "train-00000-of-00001.parquet"
    data.parent.mkdir()
    digits()["train"].select(range(600)).to_parquet(data)
    hub.store.add_repo("datasets", "someone/images", data.parent, private=True)
    hub.fail("POST .*/commit/", status=400)
    output = tmp_path / "runs" / "streamed"
    done = forks.run(
        "torch", COMMAND, "pretrain", "smoke/simclr", "data.path=someone/images",
        "data.streaming=true", f"training.output_dir={output}", "training.monitor_steps=0",
        "training.push_to_hub=true", "training.hub_strategy=every_save", "training.hub_always_push=true",
        f"training.hub_token={hub.write_token}", "publish.repo_id=streamed", "publish.private=true",
        env=hub.environment(tmp_path / "home", hub.write_token),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "someone/streamed" in done.stderr and hub.count(r"GET /datasets/someone/images/resolve") >= 1
    repo = hub.store.model("someone/streamed")
    assert repo.private
    assert [commit.summary for commit in repo.commits] == [
        "initial commit", "Training in progress, step 8", "End of training",
    ]  # fmt: skip
    during, after = repo.commits[1].files, repo.head.files
    assert json.loads(during["config.json"].data)["architectures"] == ["ResNetModel"]
    assert json.loads(during["pretraining/config.json"].data)["model_type"] == "ssl_simclr"
    assert b"step 8 of 8" in during["README.md"].data and "facts.json" not in during
    assert not [name for name in (*during, *after) if "checkpoint" in name or name.endswith((".pt", ".pth"))]
    assert after["model.safetensors"].data == (output / "model.safetensors").read_bytes()
    facts = json.loads(after["facts.json"].data)
    assert (facts["repo_id"], facts["data"]["hub_id"]) == ("someone/streamed", "someone/images")
    assert re.search(r'repo = "someone/streamed"', after["README.md"].data.decode())
    assert [name for name in os.listdir(output) if name.startswith("_writing")] == []
    assert hub.write_token not in (output / "_run.json").read_text()
    received = hub.received()
    assert [
        text for text in (hub.write_token, str(tmp_path), str(Path.cwd())) if text.encode() in received
    ] == []
