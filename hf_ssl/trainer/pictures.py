# SPDX-License-Identifier: Apache-2.0
"""Pictures that a method makes of some images while it trains."""

from pathlib import Path

from hf_ssl.data import LoadedBatch
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.trainer.callbacks import Drawing
from hf_ssl.trainer.monitor import undisturbed
from hf_ssl.views import ViewPreset, Views, montage


class MethodPictures(Drawing):
    """Draws `SSLPreTrainedModel.pictures` as `NAME.png` in the output folder.

    Args:
        model: the method; most make none.
        images: what it is shown: the same each time, with the same draws.
        preset: of the views, to turn pixels back into colours.
    """

    def __init__(self, model: SSLPreTrainedModel, images: LoadedBatch, preset: ViewPreset) -> None:
        super().__init__()
        self.model, self.images, self.preset = model, images, preset

    def draw(self, args, state) -> None:
        inputs = self.images.inputs(self.model.device, self.model.draw)
        with undisturbed(self.model):
            pictures = self.model.pictures(inputs)
        for name, tiles in pictures.items():
            beside = Path(args.output_dir) / f".{name}.png"
            montage(Views(tiles), self.preset, beside)
            beside.replace(beside.with_name(f"{name}.png"))
