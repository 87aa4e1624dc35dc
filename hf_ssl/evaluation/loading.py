# SPDX-License-Identifier: Apache-2.0
"""Opens an encoder as a stranger does: with the Auto classes, from a folder or the Hub."""

from typing import Any

from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from hf_ssl.errors import UserError


def load_encoder(model: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """An encoder in eval mode and its image processor.

    Args:
        model: a folder, or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    options = {} if revision is None else {"revision": revision}
    try:
        encoder = AutoModel.from_pretrained(model, **options)
        return encoder.eval(), AutoImageProcessor.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load an encoder and its image processor from {model}: {reason}") from error
