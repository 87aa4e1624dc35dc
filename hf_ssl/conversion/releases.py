# SPDX-License-Identifier: Apache-2.0
"""The table of released checkpoints that `hf-ssl convert` reads. This module loads neither torch nor numpy.

To add a release, add one entry to `RELEASES`. `hf-ssl convert --help`, the messages, the cards and the table
in the documentation include it. A release with other names of weights also needs a table in
`hf_ssl.conversion.resnet` or `hf_ssl.conversion.vit`.

The facts come from the authors' repositories, which `page` names: the addresses, the names of the weights
(in the code that evaluates the checkpoint), the license, the normalization and the number of heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hf_ssl.errors import UserError, check_name
from hf_ssl.methods import METHODS
from hf_ssl.modeling.pooling import Pooling
from hf_ssl.views.preset import IMAGENET_MEAN, IMAGENET_STD

RESNET, VIT = "resnet", "vit"
FAMILIES = {RESNET: "ResNet", VIT: "vision transformer"}
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Width of a vision transformer -> its number of attention heads, in the code of most authors."""
_META = "https://dl.fbaipublicfiles.com"
_VISSL = f"{_META}/vissl/model_zoo"
_TRUNK = "classy_state_dict/base_model/model/trunk/_feature_blocks."


@dataclass(frozen=True)
class Release:
    """Checkpoints with the same layout and the same normalization.

    Attributes:
        title: name of the method or the library.
        page: address of the repository of the checkpoints.
        places: where the weights of the encoder are, the preferred place first. A place consists of the keys
            of nested dicts and a prefix of names: "state_dict/module.encoder_q.". The place "" is a file that
            contains only the encoder.
        families: architectures of the checkpoints.
        license: license of the repository, as the Hub names it; None: it depends on the checkpoint.
        method: key of `METHODS`; None: several methods, or training with labels.
        files: addresses of the checkpoints, or names of files without an address.
        mean, std: normalization of the images. None: it depends on the checkpoint. A `config.json` of timm
            beside the file contains it.
        interpolation: filter that resizes the images in the authors' evaluation.
        pooling: the feature that the authors evaluate, see `hf_ssl.modeling.pooling.pool`.
        heads: width of a vision transformer -> number of attention heads, which no file contains.
        resized: name of a file -> side in pixels before the crop of 224, in the authors' evaluation, if it
            is not 256.
        class_token: whether the vision transformers have a class token; None: some have.
        note: sentences about the weights, for documentation and cards.
        has_classifier: whether files without a prefix contain a classifier that others trained on the frozen
            encoder. In the files of other methods, a classifier shows a training with labels.
    """

    title: str
    page: str
    places: tuple[str, ...]
    families: tuple[str, ...] = (RESNET,)
    license: str | None = None
    method: str | None = None
    files: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD
    interpolation: str = "bilinear"
    pooling: Pooling = "auto"
    heads: Mapping[int, int] = field(default_factory=lambda: HEADS)
    resized: Mapping[str, float] = field(default_factory=dict)
    class_token: bool | None = None
    note: str = ""
    has_classifier: bool = False

    @property
    def paper(self) -> str | None:
        """Return the paper of the method."""
        return None if self.method is None else METHODS[self.method].paper

    def addresses(self, name: str) -> list[str]:
        """Return the addresses of the files with this name."""
        return [url for url in self.files if url.endswith(f"/{name}")]


def _swav_files(*names: str) -> tuple[str, ...]:
    return tuple(f"{_META}/deepcluster/{name}_pretrain.pth.tar" for name in names)


def _dino_files(*names: str) -> tuple[str, ...]:
    folders = [f"{_META}/dino/dino_{name}_pretrain/dino_{name}_pretrain" for name in names]
    return tuple(f"{folder}{end}.pth" for folder in folders for end in ("", "_full_checkpoint"))


RELEASES = {
    "simclr": Release(
        "SimCLR",
        "https://github.com/tonylins/simclr-converter",
        ("state_dict/",),
        license="apache-2.0",
        method="simclr",
        files=("resnet50-1x.pth", "resnet50-2x.pth", "resnet50-4x.pth"),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        has_classifier=True,
        note="The authors' files (google-research/simclr) are checkpoints of TensorFlow. `convert.py` of "
        "this repository writes files of torch from them. The authors did not normalize the images.",
    ),
    "simclr_vissl": Release(
        "SimCLR (VISSL)",
        "https://github.com/facebookresearch/vissl/blob/main/MODEL_ZOO.md",
        (_TRUNK, "model_state_dict/_feature_blocks."),
        license="mit",
        method="simclr",
        files=tuple(
            f"{_VISSL}/simclr_{name}/model_final_checkpoint_phase{phase}.torch"
            for name, phase in (
                ("rn50_100ep_simclr_8node_resnet_16_07_20.8edb093e", 99),
                ("rn50_200ep_simclr_8node_resnet_16_07_20.a816c0ef", 199),
                ("rn50_400ep_simclr_8node_resnet_16_07_20.36b338ef", 399),
                ("rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1", 799),
                ("rn50_1000ep_simclr_8node_resnet_16_07_20.afe428c7", 999),
                ("rn50w2_100ep_simclr_8node_resnet_16_07_20.05b37ec3", 99),
                ("rn50w2_1000ep_simclr_8node_resnet_16_07_20.e1e3bbf0", 999),
                ("rn50w4_1000ep_bs32_16node_simclr_8node_resnet_28_07_20.9e20b0ae", 999),
                ("rn101_100ep_simclr_8node_resnet_16_07_20.1ff6cb4b", 99),
                ("rn101_1000ep_simclr_8node_resnet_16_07_20.35063cea", 999),
            )
        ),
        note="VISSL trained these encoders. They are not the weights of the paper.",
    ),
    "moco": Release(
        "MoCo",
        "https://github.com/facebookresearch/moco",
        ("state_dict/module.encoder_q.",),
        license="mit",
        method="moco",
        files=tuple(
            f"{_META}/moco/moco_checkpoints/{name}/{name}_pretrain.pth.tar"
            for name in ("moco_v1_200ep", "moco_v2_200ep", "moco_v2_800ep")
        ),
        note="The repository had the license CC BY-NC 4.0 until 2022.",
    ),
    "moco_v3": Release(
        "MoCo v3",
        "https://github.com/facebookresearch/moco-v3/blob/main/CONFIG.md",
        ("state_dict/module.base_encoder.",),
        (RESNET, VIT),
        license="cc-by-nc-4.0",
        method="moco_v3",
        files=tuple(
            f"{_META}/moco-v3/{name}/{name}.pth.tar"
            for name in ("r-50-100ep", "r-50-300ep", "r-50-1000ep", "vit-s-300ep", "vit-b-300ep")
        ),
        heads={**HEADS, 384: 12},  # vits.py: the authors' ViT-Small has 12 heads
        class_token=True,
    ),
    "byol": Release(
        "BYOL",
        "https://github.com/facebookresearch/vissl/blob/main/MODEL_ZOO.md",
        ("",),
        license="mit",
        method="byol",
        has_classifier=True,
        files=(f"{_VISSL}/baselines/converted_byol_pretrain_res200w2.torch",),
        note="The authors' files (google-deepmind) are pickles of JAX, which hf_ssl does not read. This file "
        "of VISSL contains the same weights. The authors' network pads images asymmetrically. This encoder, "
        "like that of VISSL, pads them symmetrically, so its features differ from those of the authors.",
    ),
    "simsiam": Release(
        "SimSiam",
        "https://github.com/facebookresearch/simsiam",
        ("state_dict/module.encoder.",),
        license="cc-by-nc-4.0",
        method="simsiam",
        files=(f"{_META}/simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar",),
    ),
    "barlow_twins": Release(
        "Barlow Twins",
        "https://github.com/facebookresearch/barlowtwins",
        ("model/module.backbone.", ""),
        license="mit",
        method="barlow_twins",
        files=tuple(
            f"{_META}/barlowtwins/epochs1000_bs2048_lr0.2_lambd0.0051_proj_8192_8192_8192_scale0.024/{name}.pth"
            for name in ("resnet50", "checkpoint")
        ),
    ),
    "vicreg": Release(
        "VICReg",
        "https://github.com/facebookresearch/vicreg",
        ("model/module.backbone.", ""),
        license="mit",
        method="vicreg",
        files=tuple(
            f"{_META}/vicreg/{name}{end}.pth"
            for name in ("resnet50", "resnet50x2", "resnet200x2")
            for end in ("", "_fullckpt")
        ),
    ),
    "swav": Release(
        "SwAV",
        "https://github.com/facebookresearch/swav",
        ("module.", "state_dict/module."),
        license="cc-by-nc-4.0",
        method="swav",
        files=_swav_files(
            "swav_800ep",
            "swav_400ep",
            "swav_200ep",
            "swav_100ep",
            "swav_200ep_bs256",
            "swav_400ep_bs256",
            "swav_400ep_2x224",
            "swav_RN50w2_400ep",
            "swav_RN50w4_400ep",
            "swav_RN50w5_400ep",
        ),
        std=(0.228, 0.224, 0.225),  # 0.228 in the authors' training and evaluation, not 0.229
    ),
    "dino": Release(
        "DINO",
        "https://github.com/facebookresearch/dino",
        ("teacher/backbone.", "teacher/module.backbone.", ""),
        (RESNET, VIT),
        license="apache-2.0",
        method="dino",
        files=_dino_files("deitsmall16", "deitsmall8", "vitbase16", "vitbase8", "resnet50"),
        interpolation="bicubic",
        class_token=True,
    ),
    "deepcluster_v2": Release(
        "DeepCluster v2",
        "https://github.com/facebookresearch/swav",
        ("module.", "state_dict/module."),
        license="cc-by-nc-4.0",
        method="deepcluster_v2",
        files=_swav_files("deepclusterv2_800ep", "deepclusterv2_400ep", "deepclusterv2_400ep_2x224"),
        std=(0.228, 0.224, 0.225),
    ),
    "mae": Release(
        "MAE",
        "https://github.com/facebookresearch/mae",
        ("model/",),
        (VIT,),
        license="cc-by-nc-4.0",
        method="mae",
        files=tuple(
            f"{_META}/mae/pretrain/mae_pretrain_vit_{name}.pth" for name in ("base", "large", "huge")
        ),
        interpolation="bicubic",
        pooling="mean",  # as the encoders that hf_ssl pretrains with MAE
        class_token=True,
    ),
    "ijepa": Release(
        "I-JEPA",
        "https://github.com/facebookresearch/ijepa",
        ("target_encoder/module.",),
        (VIT,),
        license="cc-by-nc-4.0",
        method="ijepa",
        files=tuple(
            f"{_META}/ijepa/{name}.pth.tar"
            for name in (
                "IN1K-vit.h.14-300e",
                "IN1K-vit.h.16-448px-300e",
                "IN22K-vit.h.14-900e",
                "IN22K-vit.g.16-600e",
            )
        ),
        pooling="mean",
        class_token=False,
    ),
    "pirl": Release(
        "PIRL",
        "https://github.com/facebookresearch/vissl/blob/main/projects/PIRL/README.md",
        (_TRUNK, "model_state_dict/_feature_blocks."),
        license="mit",
        method="pirl",
        files=tuple(
            f"{_VISSL}/{name}/model_final_checkpoint_phase{phase}.torch"
            for name, phase in (
                ("pirl/r50_200ep", 199),
                ("pirl/r50_200ep_mlp_gblur", 199),
                ("pirl_jigsaw_4node_pirl_jigsaw_4node_resnet_22_07_20.34377f59", 799),
                ("pirl/r50_800ep_mlphead_gblur", 799),
                ("pirl/w2_400ep", 399),
                ("pirl/r50w2_400ep_mlphead_gblur", 399),
            )
        ),
    ),
    "torchvision": Release(
        "torchvision",
        "https://github.com/pytorch/vision",
        ("", "model_ema/module.", "model/"),  # the files of references/classification have two dicts
        license="bsd-3-clause",
        files=tuple(
            f"https://download.pytorch.org/models/{name}.pth"
            for name in (
                "resnet18-f37072fd",
                "resnet34-b627a593",
                "resnet50-0676ba61",
                "resnet50-11ad3fa6",
                "resnet101-63fe2227",
                "resnet101-cd907fc2",
                "resnet152-394f9c45",
                "resnet152-f82ba261",
            )
        ),
        resized={
            # the weights IMAGENET1K_V2
            "resnet50-11ad3fa6.pth": 232,
            "resnet101-cd907fc2.pth": 232,
            "resnet152-f82ba261.pth": 232,
        },
        note="These encoders were trained with labels.",
    ),
    "timm": Release(
        "timm",
        "https://github.com/huggingface/pytorch-image-models",
        ("", "state_dict_ema/", "model_ema/", "state_dict/", "model/"),  # timm prefers the moving average
        (RESNET, VIT),
        files=("model.safetensors", "pytorch_model.bin"),
        mean=None,
        std=None,
        interpolation="bicubic",
        note="Weights do not show anti-aliasing, dilation and activation functions. The conversion assumes "
        "those of the original ResNet and ViT.",
    ),
    "lightly": Release(
        "lightly",
        "https://docs.lightly.ai/self-supervised-learning/getting_started/benchmarks.html",
        ("state_dict/backbone.vit.", "state_dict/backbone.", "backbone."),
        (RESNET, VIT),
        license="mit",
    ),
    "solo_learn": Release(
        "solo-learn",
        "https://github.com/vturrisi/solo-learn",
        ("state_dict/backbone.", "state_dict/encoder."),
        (RESNET, VIT),
        license="mit",
        # Its MoCo v3 and MAE have 12 heads for the widths 192 and 384, its other methods 3 and 6.
        heads={width: heads for width, heads in HEADS.items() if width >= 768},
    ),
}
"""Name for `--from` -> release."""


def find_checkpoint(file: str | Path, name: str) -> Path:
    """Return the path of a checkpoint.

    Raises:
        UserError: there is no such release or no such file.
    """
    check_name("--from", name, RELEASES, "a release")
    if str(file).startswith(("http:/", "https:/")):
        raise UserError(f"{file}: expected a file, got an address; download it first")
    path, release = Path(file).expanduser(), RELEASES[name]
    if not path.exists():
        address = f"download {release.files[0]}" if release.files else f"see {release.page}"
        raise UserError(f"{path}: expected a checkpoint of {release.title}, got no such file; {address}")
    return path
