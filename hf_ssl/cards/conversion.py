# SPDX-License-Identifier: Apache-2.0
"""Facts and card of an encoder that `hf-ssl convert` made from a checkpoint of other code."""

from pathlib import Path
from typing import Any, TypedDict, cast

from hf_ssl.cards.card import CARD, encoder_metadata, render
from hf_ssl.cards.facts import Facts
from hf_ssl.cards.privacy import remove_private
from hf_ssl.cards.usage import usage
from hf_ssl.files import write_json, write_text

FILE = "conversion.json"


class SourceFacts(TypedDict):
    """The converted file."""

    file: str  # its name
    bytes: int
    sha256: str
    urls: list[str]  # the known addresses of files with this name
    place: str  # keys of nested dicts and the prefix of the names: "state_dict/module.encoder_q."


class EncoderFacts(TypedDict):
    """The encoder; the names are those of `hf_ssl.cards.facts.BackboneFacts`."""

    architecture: str  # "ResNet-50"
    class_name: str  # "ResNetModel"
    parameters: int
    feature_size: int
    image_size: int  # side in pixels of the images from the processor
    channels: int
    pooling: str  # "pooler", "cls" or "mean"
    parts: None


class ConversionFacts(TypedDict):
    """All facts of a conversion."""

    hf_ssl_version: str
    date: str
    name: str  # last part of the output folder
    release: str  # key of `RELEASES`
    title: str  # "MoCo"
    paper: str | None
    page: str  # address of the repository of the checkpoints
    license: str | None  # of this repository, as the Hub names it
    source: SourceFacts
    backbone: EncoderFacts
    processor: dict[str, Any]  # the normalization and the sizes in pixels
    not_converted: dict[str, int]  # place in the file -> number of tensors
    notes: list[str]  # sentences for the limitations


def write_conversion(directory: Path, facts: ConversionFacts) -> None:
    """Write `conversion.json` and the card to the folder of a converted encoder.

    Raises:
        UserError: a file cannot be written.
    """
    facts = remove_private(facts)
    write_json(directory / FILE, facts)
    write_text(directory / CARD, conversion_card(facts))


def conversion_card(facts: ConversionFacts) -> str:
    """Return the text of README.md; the layout is in `model_cards/converted.md`."""
    metadata = encoder_metadata(facts["release"], ["converted"], license=facts["license"])
    code = usage(cast(Facts, facts), "EXIF rotation")
    return render("converted.md", metadata=metadata.to_yaml(), usage=code, facts=facts)
