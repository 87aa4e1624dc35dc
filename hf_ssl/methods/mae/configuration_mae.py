# SPDX-License-Identifier: Apache-2.0
"""Configuration of MAE."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_fields, strict, width_field


@strict
class MAEConfig(SSLConfig):
    """Masked autoencoder (He et al., arXiv:2111.06377).

    Attributes:
        mask_ratio: share of an image's patches that are masked (figure 5).
        norm_pix_loss: whether the targets are normalized within each patch to mean 0 and variance 1 (table
            1d). The released models use it (PRETRAIN.md of facebookresearch/mae).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads,
            decoder_intermediate_size: sizes of the decoder, which are the same for every encoder
            (models_mae.py). Its other settings (`layer_norm_eps`, activation, dropout) are those of the
            encoder, as in transformers' ViTMAE.
    """

    model_type = "ssl_mae"

    mask_ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048

    def validate_mask_ratio(self) -> None:
        """Raise `ValueError` unless the ratio is between 0 and 1, both excluded."""
        check_fields(("mask_ratio", self.mask_ratio, 0 < self.mask_ratio < 1, "a number between 0 and 1"))

    def validate_decoder(self) -> None:
        """Raise `ValueError` for a decoder with a wrong width (see `width_field`)."""
        size, heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        check_fields(width_field("decoder_hidden_size", size, "decoder_num_attention_heads", heads))


AutoConfig.register(MAEConfig.model_type, MAEConfig)
