# SPDX-License-Identifier: Apache-2.0
"""Finds the encoder of a release in a checkpoint, and names the option for a checkpoint that does not fit.

A place is text: the keys of nested dicts and a prefix of names, as in "state_dict/module.encoder_q.".
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hf_ssl.conversion import resnet, vit
from hf_ssl.conversion.architecture import TIMM_ADVICE
from hf_ssl.conversion.checkpoint import StateDict
from hf_ssl.conversion.releases import FAMILIES, RELEASES, RESNET, VIT, Release
from hf_ssl.errors import UserError

_PREFIXES = {RESNET: resnet.prefixes, VIT: vit.prefixes}
_NATIVE = ("embedder.embedder.convolution.weight", "embeddings.patch_embeddings.projection.weight")
_LONGEST = 60


class Selection(NamedTuple):
    """The encoder of a release in a checkpoint.

    Attributes:
        place: where its weights are.
        family: RESNET or VIT.
        weights: its weights, without the prefix of their names.
    """

    place: str
    family: str
    weights: StateDict


def select(dicts: Mapping[str, StateDict], file: Path, name: str, place: str | None) -> Selection:
    """Return the encoder of a release in a checkpoint.

    A file that contains only one of the nested dicts also fits.

    Args:
        dicts: the result of `state_dicts`.
        file: the checkpoint, for messages.
        name: key of `RELEASES`.
        place: place that replaces those of the release, or None.

    Raises:
        UserError: there is no such encoder. The message names the option to use.
    """
    release, families = RELEASES[name], _families(dicts)
    if not families:
        raise _no_encoder(dicts, file, release)
    alone = [path.rpartition("/")[2] for path in release.places]
    # "state_dict/module.encoder_q" lacks the last dot, and "state_dict" the last slash.
    wanted = [place, f"{place}.", f"{place}/"] if place is not None else [*release.places, *alone]
    found = next((path for path in wanted if path in families), None)
    if found is None:
        raise _other_place(families, file, name, wanted if place is None else [place])
    family = families[found]
    if place is None and family not in release.families:
        fitting = _fitting(name, {found: family})
        advice = f"use --from {_either(fitting)}" if fitting else f'add --prefix "{found}"'
        expected = _either([FAMILIES[each] for each in release.families])
        raise UserError(
            f"{file}: expected a {expected} of {release.title}, got a {FAMILIES[family]}; {advice}"
        )
    entry, _, prefix = found.rpartition("/")
    weights = {
        key.removeprefix(prefix): value for key, value in dicts[entry].items() if key.startswith(prefix)
    }
    return Selection(found, family, weights)


def _families(dicts: Mapping[str, StateDict]) -> dict[str, str]:
    """Return {place: family} of all encoders in a checkpoint."""
    return {
        f"{entry}/{prefix}" if entry else prefix: family
        for entry, tensors in dicts.items()
        for family, prefixes in _PREFIXES.items()
        for prefix in prefixes(tensors)
    }


def _no_encoder(dicts: Mapping[str, StateDict], file: Path, release: Release) -> UserError:
    names = [name for tensors in dicts.values() for name in tensors]
    if any(name.endswith(_NATIVE) for name in names):
        return UserError(
            f"{file}: expected a checkpoint of {release.title}, got weights of transformers, which need no "
            f"conversion; run hf-ssl evaluate {shlex.quote(str(file.parent))}"
        )
    if not names:
        return UserError(
            f"{file}: expected a dict of tensors, got none; save the state dict of the model with torch.save"
        )
    shown = ", ".join(_short(name) for name in dict.fromkeys((names[0], names[-1])))
    return UserError(
        f"{file}: expected a ResNet with the names of torchvision or a vision transformer with those of "
        f"timm, got {shown}. {TIMM_ADVICE}"
    )


def _other_place(families: Mapping[str, str], file: Path, name: str, wanted: list[str]) -> UserError:
    fitting = _fitting(name, families)
    places = RELEASES[fitting[0]].places if fitting else ()
    got = next((place for place in places if place in families), next(iter(families)))
    expected = " or ".join(dict.fromkeys(map(_shown, wanted[:2])))
    advice = f'add --prefix "{got}"'
    if fitting:
        advice = f"use --from {_either(fitting)}, or {advice}"
    return UserError(
        f"{file}: expected the encoder of {RELEASES[name].title} in {expected}, got one in {_shown(got)}; "
        f"{advice}"
    )


def _fitting(name: str, families: Mapping[str, str]) -> list[str]:
    """Return the names of the other releases with the places and the families of encoders in a checkpoint."""
    return [
        other
        for other, release in RELEASES.items()
        if other != name and any(families.get(place) in release.families for place in release.places)
    ]


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else names[0]


def _shown(place: str) -> str:
    return _short(place) if place else "the whole file"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"...{text[-_LONGEST:]}"


def left_out(
    content: Mapping[Any, Any], dicts: Mapping[str, StateDict], chosen: Selection, heads: Iterable[str]
) -> dict[str, int]:
    """Return {place: number of tensors} of the parts of a checkpoint outside of the encoder.

    Args:
        content: the checkpoint.
        dicts: the result of `state_dicts`.
        chosen: the encoder.
        heads: names of the weights in `chosen` that do not belong to the encoder.
    """
    own, _, prefix = chosen.place.rpartition("/")
    found: dict[str, int] = {}
    for entry, tensors in dicts.items():
        if entry == own:
            inner = {key: key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
            unused = [key for key in tensors if key not in inner or inner[key] in heads]
            starts = [
                prefix + inner[key].partition(".")[0] if key in inner else _first(key) for key in unused
            ]
            places = [f"{own}/{start}" if own else start for start in starts]
        else:
            places = [entry] * len(tensors)
        for place in places:
            found[place] = found.get(place, 0) + 1
    tensors_of = {place.partition("/")[0] for place in (*found, *dicts)}
    plain = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    return found | {key: 0 for key in plain if key not in tensors_of}


def _first(name: str) -> str:
    """Return the first part of a name, or two parts if the first one is the "module" of a parallel model."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "module" else 1])
