# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - some libraries read the environment during their import
"""Page of a Space: it shows the nearest neighbors and the attention maps of an example or an uploaded photo.

This file contains only the presentation. `hf_ssl.evaluation` contains the computation. `hf-ssl space build`
copies this file into a folder with an encoder, a gallery and `space.json`; `python app.py` serves the folder.
The page embeds its pictures, so that no uploaded picture and no result stays on the disk.
"""

import atexit
import base64
import io
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
FACTS = json.loads((FOLDER / "space.json").read_text(encoding="utf-8"))
UPLOADS = Path(tempfile.mkdtemp(prefix="space-")).resolve()
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

# The libraries read these variables once, during their import.
os.environ["GRADIO_TEMP_DIR"] = str(UPLOADS)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# At its start, Gradio sends a request to its own server, which a proxy cannot reach.
NO_PROXY = {os.environ.get("no_proxy", ""), os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"}
os.environ["no_proxy"] = ",".join(sorted(NO_PROXY - {""}))
if FACTS["model"]["folder"]:
    os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
from gradio import route_utils
from PIL import Image
from torch import Tensor

from hf_ssl.data.formats import READABLE
from hf_ssl.data.photos import MAX_BYTES
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    Gallery,
    Neighbor,
    Retriever,
    attention_pictures,
    fade_outside,
    has_attention,
    load_encoder,
    read_photo,
    thumbnail,
    visible_part,
)
from hf_ssl.modeling.backbones import input_channels
from hf_ssl.modeling.parallel_encoders import ParallelEncoders

QUERY_SIDE = 560
SECONDS_TO_WAIT = 600  # an upload without a request stays so long, because requests wait for each other
LEAST_SHARE = 0.95  # of an edge; processors cut off single pixels because they round
NEIGHBORS = 12  # fills complete rows of 4 and of 3 images
# Some systems do not know that these files are images, and their dialogs would not offer them.
FILE_TYPES = ["image", *(ending for ending in (".heic", ".heif", ".avif") if ending in READABLE)]
STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")
NAMES = {
    "mean": "All heads",
    "rollout": "Through all layers",
    "mask": "60 % of the attention",
    "colors": "Alike parts, alike colors",
}


class OwnFolder(route_utils.GradioUploadFile):
    """An upload that gets a folder of its own.

    Gradio (6.29 to 6.31) writes an upload to a folder that has the hash of the content as its name. Equal
    uploads of two people are then one file, and the first answer would delete it before the second request
    has read it. Random bytes in the hash give each upload its own folder.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sha.update(secrets.token_bytes(16))


route_utils.GradioUploadFile = OwnFolder  # type: ignore[misc]


def open_retriever() -> Retriever:
    """Return the encoder and the gallery of this Space."""
    model = FACTS["model"]
    name = str(FOLDER / model["folder"]) if model["folder"] else model["name"]
    encoder, processor = load_encoder(name, model["revision"])
    return Retriever(encoder, processor, Gallery.load(FOLDER), FACTS["pooling"])


def answer(retriever: Retriever, data: bytes | Path, caption: str) -> str:
    """Return the HTML of the results for one picture, or a message if the picture cannot be read."""
    try:
        channels = input_channels(retriever.model.config)
        photo = read_photo(data, channels=channels, value_range=FACTS.get("value_range"))
        found = retriever.neighbors(photo, NEIGHBORS)
        shown = query(retriever, photo, caption) + neighbors(retriever.gallery, found)
        return f'<div class="answer">{shown}{attention(retriever, photo)}</div>'
    except UserError as error:
        return sentence(str(error))
    except Exception:
        logging.exception("the page could not process a picture")
        return sentence("Something went wrong with this picture. Please try another one.")


def uploaded(retriever: Retriever, file: dict[str, Any] | None) -> str:
    """Return the answer to an uploaded file. The function deletes the file before it returns.

    The request contains the path, and Gradio (6.31) also accepts the folder of all uploads as path. Only a
    file in the folder of one upload is read, and only this folder is deleted.
    """
    path = None if file is None else Path(file["path"]).resolve()
    if path is None or path.parent.parent != UPLOADS or not path.is_file():
        return sentence("No file arrived. Please try again.")
    try:
        return answer(retriever, path, "Your picture")
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def query(retriever: Retriever, photo: Tensor, caption: str) -> str:
    """Return the picture. The parts that the image processor cuts off are gray."""
    encoded, text = thumbnail(photo, QUERY_SIDE), escape(caption)
    channels, height, width = photo.shape
    part = visible_part(retriever.processor, height, width, channels)
    if min(part[2] - part[0], part[3] - part[1]) < LEAST_SHARE:
        encoded = jpeg(fade_outside(Image.open(io.BytesIO(encoded)), part))
        text += '<small class="quiet">The encoder does not see the gray parts.</small>'
    shown = figure(encoded, text, f"The chosen picture: {caption}")
    return f'<section class="query" aria-label="The picture">{shown}</section>'


def neighbors(gallery: Gallery, found: list[Neighbor]) -> str:
    items = []
    for rank, (number, similarity, label) in enumerate(found, start=1):
        value = f"{similarity:.2f}"
        caption = value if label is None else f"{escape(label)} · {value}"
        alt = f"Neighbor {rank}, similarity {value}" + ("" if label is None else f", {label}")
        items.append(f"<li>{figure(gallery.thumbnails[number], caption, alt)}</li>")
    grid = f'<ol class="grid">{"".join(items)}</ol>'
    return f'<section class="neighbors"><h2>Most alike in the gallery</h2>{grid}</section>'


def attention(retriever: Retriever, photo: Tensor) -> str:
    """Return the attention maps of the last layer, or a message if the encoder has no attention maps."""
    title = "<h2>Where the encoder looks</h2>"
    if not has_attention(retriever.model):
        kind = escape(FACTS["model"]["class"].removesuffix("Model"))
        reason = f"This encoder is a {kind}, which has no attention."
        if isinstance(retriever.model, ParallelEncoders):
            reason = "This encoder consists of one narrow encoder for each color view."
        return (
            f'<section class="attention">{title}<p class="quiet">{reason} A single encoder of the ViT family '
            "shows here which parts of the picture it looks at.</p></section>"
        )
    pictures = attention_pictures(retriever.model, retriever.processor, photo)
    pictures.pop("image")
    summary, heads = [], []
    for name, picture in pictures.items():
        caption = NAMES.get(name, name.capitalize())
        shown = f"<li>{figure(jpeg(picture), escape(caption), f'Attention on the picture: {caption}')}</li>"
        (summary if name in NAMES else heads).append(shown)
    return (
        f'<section class="attention">{title}<ul class="grid wide">{"".join(summary)}</ul>'
        f'<h3>Each head of the last layer</h3><ul class="grid">{"".join(heads)}</ul></section>'
    )


def figure(encoded: bytes, caption: str, alt: str) -> str:
    """Return the HTML of an embedded picture. The caption is HTML."""
    return (
        f'<figure><img src="{data_uri(encoded)}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def data_uri(encoded: bytes) -> str:
    kind = "png" if encoded.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def sentence(text: str) -> str:
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def introduction() -> str:
    model, gallery = FACTS["model"], FACTS["gallery"]
    return (
        f'<header class="introduction"><h1>{escape(FACTS["title"])}</h1><p>Choose a picture, or upload one: '
        f"below is what the encoder <b>{escape(model['name'])}</b> finds most alike among "
        f"{gallery['images']:,} images.</p></header>"
    )


def closing() -> str:
    gallery = FACTS["gallery"]
    words = "label and similarity" if gallery["labeled"] else "similarity"
    return (
        f'<footer class="closing">Below each image: {words} (cosine; 1 is the same). Gallery: '
        f"{gallery['images']:,} images of {escape(gallery['data'])}. An uploaded picture is deleted as soon "
        "as it has been read.</footer>"
    )


def example_style() -> str:
    """Return the CSS that shows the picture of each example on its button."""
    rules = []
    for number, example in enumerate(FACTS["examples"]):
        picture = data_uri((FOLDER / example["thumbnail"]).read_bytes())
        rules.append(f'#example-{number}::before {{ background-image: url("{picture}"); }}')
    return "\n".join(rules)


def page(retriever: Retriever) -> gr.Blocks:
    """Return the page with the results of the first example.

    The first example also runs the encoder once, so that later requests are fast.
    """
    examples = [
        (FOLDER / example["file"], example["label"] or f"{number}")
        for number, example in enumerate(FACTS["examples"], start=1)
    ]
    labeled = FACTS["gallery"]["labeled"]
    captions = [f"Example: {label}" if labeled else f"Example {label}" for _, label in examples]
    first = answer(retriever, examples[0][0], captions[0]) if examples else ""
    one_at_a_time: dict[str, Any] = {
        "concurrency_id": "encoder",
        "concurrency_limit": 1,
        "api_visibility": "private",
        "show_progress": "minimal",
    }
    # Gradio deletes uploads without a request.
    with gr.Blocks(title=FACTS["title"], delete_cache=(60, SECONDS_TO_WAIT)) as blocks:
        gr.HTML(introduction())
        with gr.Row(elem_id="choices"):
            upload = gr.UploadButton(
                "Upload a photo", file_types=FILE_TYPES, variant="primary", elem_id="upload"
            )
            buttons = [
                gr.Button(label, elem_id=f"example-{number}", elem_classes="example")
                for number, (_, label) in enumerate(examples)
            ]
        shown = gr.HTML(first, elem_id="answer")
        gr.HTML(closing())
        upload.upload(partial(uploaded, retriever), upload, shown, preprocess=False, **one_at_a_time)
        for button, (path, _), caption in zip(buttons, examples, captions, strict=True):
            button.click(partial(answer, retriever, path, caption), None, shown, **one_at_a_time)
    return blocks


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # runs the functions of atexit
    blocks = page(open_retriever())
    _, address, _ = blocks.launch(
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        # Gradio (6.29 to 6.31) ends the server if its own first request takes more than 3 seconds.
        _frontend=False,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        theme=gr.themes.Base(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["monospace"],
        ),
        css=f"{STYLE}\n{example_style()}",
    )
    print(f"the Space is at {address}", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    main()
