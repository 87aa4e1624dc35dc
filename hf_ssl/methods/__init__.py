# SPDX-License-Identifier: Apache-2.0
"""The table of methods. It contains only strings, so importing this module loads no method."""

from pkgutil import resolve_name
from typing import Any, NamedTuple


class Method(NamedTuple):
    """One method.

    Attributes:
        title: name of the method in text, for example "MoCo v3".
        classes: its package and the prefix of its two classes, for example "moco_v3.MoCoV3".
        paper: "authors, year, arXiv:number".
        summary: one line about the method.
        captions: the caption of each picture that its model returns (`SSLPreTrainedModel.pictures`).
    """

    title: str
    classes: str
    paper: str
    summary: str
    captions: dict[str, str] = {}  # noqa: RUF012  no code changes the default

    @property
    def config(self) -> str:
        """ "module:class" of its configuration."""
        package, prefix = self.classes.split(".")
        return f"hf_ssl.methods.{package}.configuration_{package}:{prefix}Config"

    @property
    def model(self) -> str:
        """ "module:class" of its model."""
        package, prefix = self.classes.split(".")
        return f"hf_ssl.methods.{package}.modeling_{package}:{prefix}ForPreTraining"

    def config_class(self) -> Any:
        """Return the class of its configuration. The first import registers it with transformers."""
        return resolve_name(self.config)

    def model_class(self) -> Any:
        """Return the class of its model. The first import registers it with transformers."""
        return resolve_name(self.model)


METHODS: dict[str, Method] = {
    "simclr": Method(
        title="SimCLR",
        classes="simclr.SimCLR",
        paper="Chen et al., 2020, arXiv:2002.05709",
        summary="Views of one image become similar, and views of other images become dissimilar.",
    ),
    "moco": Method(
        title="MoCo",
        classes="moco.MoCo",
        paper="He et al., 2019, arXiv:1911.05722; v2: Chen et al., 2020, arXiv:2003.04297",
        summary="The loss contrasts queries with keys of a momentum encoder; a queue stores the negatives.",
    ),
    "moco_v3": Method(
        title="MoCo v3",
        classes="moco_v3.MoCoV3",
        paper="Chen et al., 2021, arXiv:2104.02057",
        summary="The loss contrasts queries with a momentum encoder's keys of the same batch.",
    ),
    "byol": Method(
        title="BYOL",
        classes="byol.BYOL",
        paper="Grill et al., 2020, arXiv:2006.07733",
        summary="A predictor predicts a momentum encoder's projection of the other view.",
    ),
    "simsiam": Method(
        title="SimSiam",
        classes="simsiam.SimSiam",
        paper="Chen and He, 2020, arXiv:2011.10566",
        summary="A predictor predicts the other view's projection, which receives no gradient.",
    ),
    "directpred": Method(
        title="DirectPred",
        classes="directpred.DirectPred",
        paper="Tian et al., 2021, arXiv:2102.06810; Wang et al., 2021, arXiv:2110.04947",
        summary="BYOL's predictor is computed from a correlation matrix and receives no gradient.",
    ),
    "barlow_twins": Method(
        title="Barlow Twins",
        classes="barlow_twins.BarlowTwins",
        paper="Zbontar et al., 2021, arXiv:2103.03230",
        summary="The correlation matrix between the embeddings of two views approaches the identity.",
    ),
    "vicreg": Method(
        title="VICReg",
        classes="vicreg.VICReg",
        paper="Bardes et al., 2021, arXiv:2105.04906",
        summary="Views become similar, each dimension keeps a minimum variance, and covariances approach 0.",
    ),
    "swav": Method(
        title="SwAV",
        classes="swav.SwAV",
        paper="Caron et al., 2020, arXiv:2006.09882",
        summary="Each view predicts the prototype assignments of another view; multi-crop is supported.",
    ),
    "dino": Method(
        title="DINO",
        classes="dino.DINO",
        paper="Caron et al., 2021, arXiv:2104.14294",
        summary="Each view predicts a momentum teacher's outputs for another view; multi-crop is supported.",
    ),
    "deepcluster_v2": Method(
        title="DeepCluster v2",
        classes="deepcluster_v2.DeepClusterV2",
        paper="Caron et al., 2020, arXiv:2006.09882, appendix",
        summary="Each view predicts the cluster of its image; k-means computes the clusters once per epoch.",
    ),
    "mae": Method(
        title="MAE",
        classes="mae.MAE",
        paper="He et al., 2021, arXiv:2111.06377",
        summary="An encoder receives a quarter of the patches; a decoder predicts the pixels of the others.",
        captions={
            "reconstructions": "Images, the visible patches, and the reconstruction of the other patches. "
            "If the decoder predicts normalized pixels, each patch has the mean and the contrast of the "
            "original patch."
        },
    ),
    "ijepa": Method(
        title="I-JEPA",
        classes="ijepa.IJEPA",
        paper="Assran et al., 2023, arXiv:2301.08243",
        summary="A predictor predicts a teacher's features of hidden blocks from the visible patches.",
    ),
    "cpc": Method(
        title="CPC",
        classes="cpc.CPC",
        paper="van den Oord et al., 2018, arXiv:1807.03748; v2: Henaff et al., 2019, arXiv:1905.09272",
        summary="Contexts predict the encodings of the patches below them; other patches are the negatives.",
    ),
    "cmc": Method(
        title="CMC",
        classes="cmc.CMC",
        paper="Tian et al., 2019, arXiv:1906.05849",
        summary="The luminance view and the color view of an image become similar. Each view has its own "
        "encoder.",
    ),
    "triplet": Method(
        title="Triplet",
        classes="triplet.Triplet",
        paper="Schroff et al., 2015, arXiv:1503.03832",
        summary="Two views of an image become closer to each other than to another image, by a margin.",
    ),
    "pirl": Method(
        title="PIRL",
        classes="pirl.PIRL",
        paper="Misra and van der Maaten, 2019, arXiv:1912.01991",
        summary="An image and its jigsaw of nine patches become similar. The negatives are embeddings of "
        "other images in a memory bank.",
    ),
}
