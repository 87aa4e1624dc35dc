# SPDX-License-Identifier: Apache-2.0
"""How deep in an encoder a parameter lies."""

import re
from collections.abc import Iterable

# The number of a block, or of a stage and a block in it, in the names of transformers and timm: "layers.3.",
# "encoder.layer.3.", "encoder.stages.1.layers.0.", "encoder.layers.1.blocks.0.", "timm_model.layer1.0.".
_BLOCK = re.compile(r"(?:^|\.)(?:stages|layers|layer|blocks)\.?(\d+)\.(?:(?:(?:layers|blocks)\.)?(\d+)\.)?")
_FIRST = re.compile(r"(^|\.)(embed\w*|patch_embed\w*|cls_token|pos_embed|reg_token|stem\w*|conv1|bn1)(\.|$)")


def depths(names: Iterable[str]) -> dict[str, int]:
    """The depth of each parameter of an encoder: 0 for embeddings and stem, 1 for the first block, and one
    more than the last block's for what follows it.

    Args:
        names: of all of the encoder's parameters.
    """
    blocks = {name: _block(name) for name in names}
    found = sorted({block for block in blocks.values() if block is not None})
    order = {block: number for number, block in enumerate(found, start=1)}
    last = len(order) + 1
    return {
        name: order[block] if block is not None else (0 if _FIRST.search(name) else last)
        for name, block in blocks.items()
    }


def _block(name: str) -> tuple[int, int] | None:
    found = _BLOCK.search(name)
    return None if found is None else (int(found[1]), int(found[2] or 0))
