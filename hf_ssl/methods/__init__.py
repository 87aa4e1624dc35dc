# SPDX-License-Identifier: Apache-2.0
"""The table of methods. It contains only strings, so importing this module loads no method."""

from importlib import import_module
from typing import Any, NamedTuple


class Method(NamedTuple):
    """One method.

    Attributes:
        title: name of the method in text, for example "MoCo v3".
        config: "module:class" of its configuration.
        model: "module:class" of its model.
        paper: "authors, year, arXiv:number".
        summary: one line about the method.
    """

    title: str
    config: str
    model: str
    paper: str
    summary: str

    def config_class(self) -> Any:
        """Return the class of its configuration. The first import registers it with transformers."""
        return _load(self.config)

    def model_class(self) -> Any:
        """Return the class of its model. The first import registers it with transformers."""
        return _load(self.model)


def _load(import_path: str) -> Any:
    module, _, name = import_path.partition(":")
    return getattr(import_module(module), name)


METHODS: dict[str, Method] = {
    "simclr": Method(
        title="SimCLR",
        config="hf_ssl.methods.simclr.configuration_simclr:SimCLRConfig",
        model="hf_ssl.methods.simclr.modeling_simclr:SimCLRForPreTraining",
        paper="Chen et al., 2020, arXiv:2002.05709",
        summary="Views of one image become similar, and views of other images become dissimilar.",
    ),
    "moco": Method(
        title="MoCo",
        config="hf_ssl.methods.moco.configuration_moco:MoCoConfig",
        model="hf_ssl.methods.moco.modeling_moco:MoCoForPreTraining",
        paper="He et al., 2019, arXiv:1911.05722; v2: Chen et al., 2020, arXiv:2003.04297",
        summary="The loss contrasts queries with keys of a momentum encoder; a queue stores the negatives.",
    ),
    "moco_v3": Method(
        title="MoCo v3",
        config="hf_ssl.methods.moco_v3.configuration_moco_v3:MoCoV3Config",
        model="hf_ssl.methods.moco_v3.modeling_moco_v3:MoCoV3ForPreTraining",
        paper="Chen et al., 2021, arXiv:2104.02057",
        summary="The loss contrasts queries with a momentum encoder's keys of the same batch.",
    ),
    "byol": Method(
        title="BYOL",
        config="hf_ssl.methods.byol.configuration_byol:BYOLConfig",
        model="hf_ssl.methods.byol.modeling_byol:BYOLForPreTraining",
        paper="Grill et al., 2020, arXiv:2006.07733",
        summary="A predictor predicts a momentum encoder's projection of the other view.",
    ),
    "simsiam": Method(
        title="SimSiam",
        config="hf_ssl.methods.simsiam.configuration_simsiam:SimSiamConfig",
        model="hf_ssl.methods.simsiam.modeling_simsiam:SimSiamForPreTraining",
        paper="Chen and He, 2020, arXiv:2011.10566",
        summary="A predictor predicts the other view's projection, which receives no gradient.",
    ),
    "directpred": Method(
        title="DirectPred",
        config="hf_ssl.methods.directpred.configuration_directpred:DirectPredConfig",
        model="hf_ssl.methods.directpred.modeling_directpred:DirectPredForPreTraining",
        paper="Tian et al., 2021, arXiv:2102.06810; Wang et al., 2021, arXiv:2110.04947",
        summary="BYOL's predictor is computed from a correlation matrix and receives no gradient.",
    ),
    "barlow_twins": Method(
        title="Barlow Twins",
        config="hf_ssl.methods.barlow_twins.configuration_barlow_twins:BarlowTwinsConfig",
        model="hf_ssl.methods.barlow_twins.modeling_barlow_twins:BarlowTwinsForPreTraining",
        paper="Zbontar et al., 2021, arXiv:2103.03230",
        summary="The correlation matrix between the embeddings of two views approaches the identity.",
    ),
    "vicreg": Method(
        title="VICReg",
        config="hf_ssl.methods.vicreg.configuration_vicreg:VICRegConfig",
        model="hf_ssl.methods.vicreg.modeling_vicreg:VICRegForPreTraining",
        paper="Bardes et al., 2021, arXiv:2105.04906",
        summary="Views become similar, each dimension keeps a minimum variance, covariances approach zero.",
    ),
    "swav": Method(
        title="SwAV",
        config="hf_ssl.methods.swav.configuration_swav:SwAVConfig",
        model="hf_ssl.methods.swav.modeling_swav:SwAVForPreTraining",
        paper="Caron et al., 2020, arXiv:2006.09882",
        summary="Each view predicts the prototype assignments of another view; multi-crop is supported.",
    ),
    "dino": Method(
        title="DINO",
        config="hf_ssl.methods.dino.configuration_dino:DINOConfig",
        model="hf_ssl.methods.dino.modeling_dino:DINOForPreTraining",
        paper="Caron et al., 2021, arXiv:2104.14294",
        summary="Each view predicts a momentum teacher's outputs for another view; multi-crop is supported.",
    ),
    "deepcluster_v2": Method(
        title="DeepCluster v2",
        config="hf_ssl.methods.deepcluster_v2.configuration_deepcluster_v2:DeepClusterV2Config",
        model="hf_ssl.methods.deepcluster_v2.modeling_deepcluster_v2:DeepClusterV2ForPreTraining",
        paper="Caron et al., 2020, arXiv:2006.09882, appendix",
        summary="Each view predicts the cluster of its image; k-means computes the clusters once per epoch.",
    ),
    "mae": Method(
        title="MAE",
        config="hf_ssl.methods.mae.configuration_mae:MAEConfig",
        model="hf_ssl.methods.mae.modeling_mae:MAEForPreTraining",
        paper="He et al., 2021, arXiv:2111.06377",
        summary="An encoder receives a quarter of the patches; a decoder predicts the pixels of the others.",
    ),
    "ijepa": Method(
        title="I-JEPA",
        config="hf_ssl.methods.ijepa.configuration_ijepa:IJEPAConfig",
        model="hf_ssl.methods.ijepa.modeling_ijepa:IJEPAForPreTraining",
        paper="Assran et al., 2023, arXiv:2301.08243",
        summary="A predictor predicts a teacher's features of hidden blocks from the visible patches.",
    ),
    "triplet": Method(
        title="Triplet",
        config="hf_ssl.methods.triplet.configuration_triplet:TripletConfig",
        model="hf_ssl.methods.triplet.modeling_triplet:TripletForPreTraining",
        paper="Schroff et al., 2015, arXiv:1503.03832",
        summary="Two views of an image become closer to each other than to another image, by a margin.",
    ),
}
