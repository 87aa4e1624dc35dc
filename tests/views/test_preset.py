# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pytest
from messages import mentions
from omegaconf import OmegaConf

import hf_ssl.random
import hf_ssl.views
from hf_ssl.errors import UserError
from hf_ssl.views import ViewOverrides, ViewPreset

DINO = ViewPreset(
    size=224, scale=(0.4, 1.0), interpolation="bicubic", blur=1.0,
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
    second=ViewOverrides(blur=0.1, solarize=0.2),
    local=ViewOverrides(count=8, size=96, scale=(0.05, 0.4), blur=0.5),
)  # fmt: skip


@pytest.mark.parametrize(
    "preset", [ViewPreset(), DINO, ViewPreset(size=32, enlarge=128, mean=(0.5,), std=(1.0,))]
)
def test_plain_data(preset):
    values = preset.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert ViewPreset.from_dict(values) == preset
    structured = OmegaConf.merge(OmegaConf.structured(ViewPreset), OmegaConf.create(values))
    assert OmegaConf.to_object(structured) == preset


def test_omegaconf_reads_overrides_from_the_command_line():
    written = OmegaConf.from_dotlist(
        ["scale=[0.2,1]", "local.count=6", "local.scale=[0.05,0.14]", "blur=1e-1"]
    )
    preset = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ViewPreset), written))
    assert preset == ViewPreset(scale=(0.2, 1.0), blur=0.1, local=ViewOverrides(count=6, scale=(0.05, 0.14)))


def test_expand():
    views = DINO.expand()
    assert len(views) == 10 and DINO.count == 2 and DINO.local_count == 8
    assert [view.size for view in views] == [224] * 2 + [96] * 8
    assert [view.blur for view in views] == [1.0, 0.1] + [0.5] * 8
    assert [view.solarize for view in views] == [0.0, 0.2] + [0.0] * 8
    assert [view.blur_kernel for view in views] == [23] * 2 + [9] * 8
    assert all(view.interpolation == "bicubic" and view.hue == 0.1 for view in views)
    four = ViewPreset(count=4, second=ViewOverrides(gray=0.7)).expand()
    assert [view.gray for view in four] == [0.2, 0.7, 0.2, 0.7]
    assert ViewPreset(size=32).expand()[0].blur_kernel == 3
    assert ViewPreset(size=32, blur_kernel=7).expand()[0].blur_kernel == 7


def test_sizes():
    assert (DINO.final_size, DINO.final_local_size) == (224, 96)
    enlarged = ViewPreset(size=32, enlarge=128, local=ViewOverrides(count=2, size=16))
    assert (enlarged.final_size, enlarged.local_size, enlarged.final_local_size) == (128, 16, 64)
    assert ViewPreset().local_count == 0


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"sise": 3}, ["views.sise", "size"]),
        ({"local": {"cout": 3}}, ["views.local.cout", "count"]),
        ({"second": {"enlarge": 3}}, ["views.second.enlarge"]),
        ({"xyzzy": 3}, ["views.xyzzy", "size", "count"]),
        ({"second": 5}, ["views.second", 5]),
    ],
)
def test_unknown_keys_raise_an_error(values, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        ViewPreset.from_dict(values)


@pytest.mark.parametrize("channels", [3])
@pytest.mark.parametrize(
    "preset", [ViewPreset(), DINO, ViewPreset(size=32, enlarge=128), ViewPreset(count=1)]
)
def test_good_presets_pass(preset, channels):
    preset.check(channels)


GRAY = {"mean": (0.5,), "std": (0.25,)}
FIVE = {"mean": (0.5,) * 5, "std": (0.25,) * 5}


def test_presets_for_images_without_color():
    ViewPreset(saturation=0, hue=0, gray=0, solarize=0.2, **GRAY).check(1)
    ViewPreset(jitter=0, gray=0, **GRAY).check(1)
    ViewPreset(jitter=0, gray=0, solarize=0.2, **FIVE).check(5)
    ViewPreset(brightness=0, contrast=0, saturation=0, hue=0, gray=0, **FIVE).check(5)


@pytest.mark.parametrize(
    ("values", "channels", "parts"),
    [
        (GRAY, 1, ["views.saturation", 0, 1, 0.8]),
        (GRAY | {"saturation": 0.0}, 1, ["views.hue", 0]),
        (GRAY | {"saturation": 0.0, "hue": 0.0}, 1, ["views.gray", 0]),
        (
            GRAY | {"saturation": 0.0, "hue": 0.0, "gray": 0.0, "second": ViewOverrides(hue=0.1)},
            1,
            ["views.second.hue", 0.1],
        ),
        (FIVE, 5, ["views.jitter", 0, 5, 0.8]),
        (FIVE | {"jitter": 0.0}, 5, ["views.gray", 0]),
        (
            FIVE | {"jitter": 0.0, "gray": 0.0, "local": ViewOverrides(count=1, jitter=0.5)},
            5,
            ["views.local.jitter", 0.5],
        ),
        ({}, 0, ["channels", 0]),
        ({}, 4, ["views.jitter"]),
        ({"count": 0}, 3, ["views.count", 1, 0]),
        ({"size": 0}, 3, ["views.size"]),
        ({"size": 224.5}, 3, ["views.size"]),
        ({"flip": 1.5}, 3, ["views.flip", 0, 1, 1.5]),
        ({"jitter": -0.1}, 3, ["views.jitter"]),
        ({"gray": float("nan")}, 3, ["views.gray"]),
        ({"blur": 2}, 3, ["views.blur"]),
        ({"solarize": "often"}, 3, ["views.solarize"]),
        ({"brightness": -1}, 3, ["views.brightness"]),
        ({"contrast": float("inf")}, 3, ["views.contrast"]),
        ({"hue": 0.6}, 3, ["views.hue", 0, 0.5, 0.6]),
        ({"scale": (0.5, 0.2)}, 3, ["views.scale", "[0.5, 0.2]"]),
        ({"scale": (0.0, 1.0)}, 3, ["views.scale"]),
        ({"scale": (0.5, 1.5)}, 3, ["views.scale"]),
        ({"scale": (0.5,)}, 3, ["views.scale"]),
        ({"ratio": (-1.0, 1.0)}, 3, ["views.ratio"]),
        ({"ratio": (1.0, float("inf"))}, 3, ["views.ratio"]),
        ({"blur_sigma": (0.0, 1.0)}, 3, ["views.blur_sigma"]),
        ({"blur_kernel": 4}, 3, ["views.blur_kernel", 4]),
        ({"blur_kernel": -3}, 3, ["views.blur_kernel"]),
        ({"size": 4, "blur_kernel": 9}, 3, ["views.blur_kernel", 8, 9]),
        ({"interpolation": "nearest"}, 3, ["views.interpolation", "bilinear", "bicubic", "nearest"]),
        ({"solarize_threshold": 128}, 3, ["views.solarize_threshold"]),
        ({"rotation": 1.5}, 3, ["views.rotation", 0, 1, 1.5]),
        ({"rotation": True}, 3, ["views.rotation"]),
        ({"quarter_turns": 2}, 3, ["views.quarter_turns", 0, 1, 2.0]),
        ({"rotation_degrees": 181.0}, 3, ["views.rotation_degrees", 0, 180, 181.0]),
        ({"rotation_degrees": -5.0}, 3, ["views.rotation_degrees", -5.0]),
        ({"rotation_degrees": (0.0, 30.0)}, 3, ["views.rotation_degrees"]),
        ({"second": ViewOverrides(rotation_degrees=200.0)}, 3, ["views.second.rotation_degrees", 200.0]),
        ({"mean": (0.5,)}, 3, ["views.mean", 3]),
        ({"std": (0.5, 0.5)}, 3, ["views.std"]),
        ({"std": 0.5}, 3, ["views.std"]),
        ({"std": (0.5, 0.0, 0.5)}, 3, ["views.std", 0]),
        ({"mean": (0.5, float("nan"), 0.5)}, 3, ["views.mean"]),
        ({"enlarge": 100}, 3, ["views.enlarge", "views.size", 224, 100]),
        ({"size": 32, "enlarge": 48, "local": ViewOverrides(count=1, size=17)}, 3, ["views.enlarge"]),
        ({"second": ViewOverrides(count=1)}, 3, ["views.second.count"]),
        ({"second": ViewOverrides(size=96)}, 3, ["views.second.size"]),
        ({"count": 1, "second": ViewOverrides(blur=0.1)}, 3, ["views.count", 2, 1]),
        ({"second": ViewOverrides(blur=7.0)}, 3, ["views.second.blur"]),
        ({"local": ViewOverrides(size=96)}, 3, ["views.local.count"]),
        ({"local": ViewOverrides(count=2, size=-1)}, 3, ["views.local.size"]),
        ({"local": ViewOverrides(count=2, scale=(0.4, 0.1))}, 3, ["views.local.scale"]),
    ],
)
def test_bad_presets_raise_an_error_in_one_sentence(values, channels, parts):
    with pytest.raises(UserError, match=mentions(*parts)) as error:
        ViewPreset(**values).check(channels)
    text = str(error.value)
    assert "\n" not in text and len(text) < 200


def test_a_preset_is_read_without_torch():
    code = (
        "import sys; from hf_ssl.views import ViewPreset; ViewPreset().check(3);"
        "print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_found():
    for name in hf_ssl.views.__all__:
        assert getattr(getattr(hf_ssl.views, name), "__name__", name) == name  # constants have no name
    with pytest.raises(AttributeError, match="nothing"):
        hf_ssl.views.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("old", "home", "new"),
    [
        ("FOR_METHODS", hf_ssl.random, "FIRST_METHOD_NUMBER"),
        ("apply", hf_ssl.views, "augment"),
        ("draw", hf_ssl.views, "sample_parameters"),
        ("seeds", hf_ssl.random, "image_seeds"),
        ("uniforms", hf_ssl.random, "uniforms"),
    ],
)
def test_deprecated_names_warn_and_name_the_new_one(old, home, new):
    with pytest.warns(DeprecationWarning, match=mentions(f"hf_ssl.views.{old}", f"{home.__name__}.{new}")):
        assert getattr(hf_ssl.views, old) is getattr(home, new)
