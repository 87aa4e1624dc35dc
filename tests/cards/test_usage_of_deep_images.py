# SPDX-License-Identifier: Apache-2.0
"""The code on a card converts images of more than 8 bits as the training did."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from image_files import png, pnm, tiff

from hf_ssl.cards import write_card
from hf_ssl.cards.facts import check_facts
from hf_ssl.cards.usage import usage
from hf_ssl.data.decode import decode

NUMBERS = np.rint(np.arange(30).reshape(5, 6) * (5000 / 29)).astype(np.uint16)
FILES = {
    "png": png(NUMBERS),
    "big-endian tiff": tiff(NUMBERS, order=">"),
    "int32 tiff": tiff(NUMBERS.astype(np.int32)),
    "float32 tiff": tiff(NUMBERS.astype(np.float32)),
    "pgm": pnm(NUMBERS, 65535),
    "8 bits": png((NUMBERS // 20).astype(np.uint8)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("values", [[0.0, 4095.0], [-0.5, 4000.25]])
def test_the_code_gives_the_pixels_of_the_training(
    name: str, values: list[float], facts: dict[str, Any]
) -> None:
    facts["data"] |= {"value_range": values, "found_values": [0.0, 5000.0]}
    code = usage(check_facts(facts))
    assert "to_8_bits(ImageOps" in code
    scope: dict[str, Any] = {"np": np, "Image": PIL.Image}
    exec(code[code.index("def to_8_bits") : code.index("encoder =")], scope)
    shown = scope["to_8_bits"](PIL.Image.open(io.BytesIO(FILES[name])))
    low, high = values
    assert np.array_equal(np.asarray(shown), decode(FILES[name], 1, (low, high))[0])


def test_the_card_states_the_values(facts: dict[str, Any], tmp_path: Path) -> None:
    facts["data"] |= {"value_range": [0.0, 4095.0], "found_values": [3.0, 4080.0]}
    write_card(tmp_path, facts)  # type: ignore[arg-type]
    text = (tmp_path / "README.md").read_text()
    assert "| values of the pixels | 0 became black, 4095 white; found 3 to 4080 in some images |" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None and "to_8_bits" in code[1]
    compile(code[1], "card", "exec")


def test_a_card_of_images_of_8_bits_has_no_conversion(facts: dict[str, Any]) -> None:
    assert "to_8_bits" not in usage(check_facts(facts))
