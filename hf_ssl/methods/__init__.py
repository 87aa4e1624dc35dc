# SPDX-License-Identifier: Apache-2.0
"""The table of methods, the one place where a method is announced. Strings only: reading it loads nothing."""

from typing import NamedTuple


class Method(NamedTuple):
    """One method.

    Attributes:
        title: the name that people write.
        config: "module:class" of its configuration.
        model: "module:class" of its model.
        paper: "authors, year, arXiv:number".
        summary: what it does, in one line.
    """

    title: str
    config: str
    model: str
    paper: str
    summary: str


METHODS: dict[str, Method] = {
    "simclr": Method(
        title="SimCLR",
        config="hf_ssl.methods.simclr.configuration_simclr:SimCLRConfig",
        model="hf_ssl.methods.simclr.modeling_simclr:SimCLRForPreTraining",
        paper="Chen et al., 2020, arXiv:2002.05709",
        summary="Views of one image attract each other, views of all other images in the batch repel.",
    ),
}
