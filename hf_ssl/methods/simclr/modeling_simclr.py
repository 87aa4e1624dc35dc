# SPDX-License-Identifier: Apache-2.0
"""SimCLR: a simple framework for contrastive learning of visual representations (arXiv:2002.05709)."""

from torch import Tensor
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import nt_xent
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.modeling.backbones import feature_size
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.outputs import SSLOutput


class SimCLRForPreTraining(SSLPreTrainedModel):
    """The loss is NT-Xent over all global and local views of the images of all processes.

    All views of one size are encoded together and share BatchNorm statistics. This is as in the authors'
    code, which concatenates the views. The loss is the mean over ordered positive pairs. The authors add the
    means of the two anchors, so their loss is twice as large. Under LARS, the same weight decay therefore has
    twice the weight here, relative to the gradient.
    """

    config_class = SimCLRConfig
    couples_samples = True
    takes_local_views = True

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config)
        # BatchNorm follows each layer, and the last one has no offset (google-research/simclr, tf2/model.py).
        sizes = projector_sizes(feature_size(self.backbone), config)
        self.projector = MLPHead(sizes, last_norm="batch_without_offset")
        self.post_init()

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the projections (B, V + L, D) of V global and L local views."""
        images = [inputs[name] for name in ("pixel_values", "local_pixel_values") if name in inputs]
        return {"projections": self.project_views(*images)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return NT-Xent of projections (B, V, D)."""
        projections = embeddings["projections"]
        loss = nt_xent(projections.transpose(0, 1), temperature=self.config.temperature)
        return SSLOutput(loss=loss, terms={"nt_xent": loss.detach()}, embeddings=projections)


AutoModelForPreTraining.register(SimCLRConfig, SimCLRForPreTraining)
