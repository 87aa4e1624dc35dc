# SPDX-License-Identifier: Apache-2.0
"""The code on the card, which computes the features of a photo without hf_ssl."""

from typing import Any

from hf_ssl.cards.facts import Facts
from hf_ssl.cards.text import literal, plain

FEATURES = {
    "pooler": "outputs.pooler_output.flatten(1)",
    "cls": "outputs.last_hidden_state[:, 0]",
    # The mean of tokens (B, T, D), or of the positions of a feature map (B, D, H, W).
    "mean": "outputs.last_hidden_state.mean(dim=1 if outputs.last_hidden_state.ndim == 3 else (2, 3))",
}
_TIMM_AXES = '(1, 2) if getattr(encoder.timm_model, "output_fmt", "") == "NHWC" else (2, 3)'
# The constants are those of `hf_ssl.views.color_spaces`. A test compares the features.
_LAB = '''def to_lab(rgb):
    """Return L, a and b (B, 3, H, W) of colors in [0, 1], as skimage.color.rgb2lab does."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = torch.tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("dc,bchw->bdhw", to_xyz / white[:, None], linear)
    x, y, z = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)'''
_LINEAR = '''def to_{name}(rgb):
    """Return the channels {channels} (B, 3, H, W) of colors in [0, 1]."""
    matrix = torch.tensor({matrix})
    offset = torch.tensor({offset})
    return torch.einsum("dc,bchw->bdhw", matrix, rgb) + offset[:, None, None]'''


# The image processor would clip such images at 255. Pillow 12 also resizes big-endian ones to noise.
_TO_8_BITS = '''def to_8_bits(image):
    """Return a gray image of 16 or 32 bits as in training: {0} is black and {1} is white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64).clip({0}, {1})
    return Image.fromarray(np.rint((values - {0}) * 255 / ({1} - {0})).astype(np.uint8))'''


def usage(facts: Facts, opening: str = "EXIF rotation, as in training") -> str:
    """Return Python code that computes the features of a photo without hf_ssl.

    Args:
        facts: the facts of the encoder; only `name`, `backbone` and, if there is one, `data` are read.
        opening: comment about how the code opens the photo.
    """
    backbone = facts["backbone"]
    opened = 'ImageOps.exif_transpose(Image.open("photo.jpg"))'
    values = facts["data"].get("value_range") if "data" in facts else None
    if values is not None:
        opened = f"to_8_bits({opened})"
    if backbone["channels"] == 1:
        opened += '.convert("L")'
    size, feature = backbone["feature_size"], FEATURES[backbone["pooling"]]
    if backbone["class_name"] == "TimmWrapperModel":
        feature = feature.replace("(2, 3)", _TIMM_AXES)
    lines = [
        "import torch",
        "from PIL import Image, ImageOps",
        "from transformers import AutoImageProcessor, AutoModel",
        "",
        f"repo = {literal(facts['name'])}  # id on the Hub, or a folder with these files",
        "processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=False)",
    ]
    if values is not None:
        lines[:1] = ["import numpy as np", "import torch"]
        lines += ["", "", *_TO_8_BITS.format(*map(plain, values)).split("\n"), "", ""]
    if backbone["parts"] is None:
        lines += [
            "encoder = AutoModel.from_pretrained(repo, trust_remote_code=False).eval()"
            f"  # {backbone['class_name']}",
            f"image = {opened}  # {opening}",
            "with torch.inference_mode():",
            '    outputs = encoder(**processor(image, return_tensors="pt"))',
            f"features = {feature}  # (1, {size})",
        ]
    else:
        lines += _of_parts(backbone["parts"], backbone["class_name"], opened)
        lines.append(f"features = torch.cat([{feature} for outputs in parts], dim=1)  # (1, {size})")
    return "\n".join(lines)


def _of_parts(described: dict[str, Any], class_name: str, opened: str) -> list[str]:
    """Return the lines that load encoders in subfolders and compute their outputs.

    Args:
        described: the content of `encoders.json`.
        class_name: class of each encoder.
        opened: the expression that opens an image.
    """
    space, encoders = described["color_space"], described["encoders"]
    channels = [name for each in encoders for name in each["channels"]]
    folders = ", ".join(literal(each["subfolder"]) for each in encoders)
    sizes = [len(each["channels"]) for each in encoders]

    def column(key: str) -> list[Any]:
        return [value for each in encoders for value in each[key]]

    convert = _LAB
    if space != "lab":
        convert = _LINEAR.format(
            name=space, channels=", ".join(channels), matrix=column("matrix"), offset=column("offset")
        )
    return [
        f"folders = [{folders}]",
        "encoders = [",
        "    AutoModel.from_pretrained(repo, subfolder=name, trust_remote_code=False).eval()"
        f"  # {class_name}",
        "    for name in folders",
        "]",
        "",
        "",
        *convert.split("\n"),
        "",
        "",
        f"image = {opened}  # EXIF rotation, as in training",
        'rgb = processor(image, return_tensors="pt", do_normalize=False)["pixel_values"]  # in [0, 1]',
        f"mean = torch.tensor({column('mean')})  # of {', '.join(channels)}",
        f"std = torch.tensor({column('std')})",
        f"views = ((to_{space}(rgb) - mean[:, None, None]) / std[:, None, None]).split({sizes}, dim=1)",
        "with torch.inference_mode():",
        "    parts = [encoder(view) for encoder, view in zip(encoders, views)]",
    ]
