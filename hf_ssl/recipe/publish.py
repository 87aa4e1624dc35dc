# SPDX-License-Identifier: Apache-2.0
"""The section `publish` of a recipe."""

from dataclasses import dataclass, field


@dataclass
class PublishConfig:
    """The section `publish` of a recipe.

    `training.push_to_hub=true` publishes during and after training. `hf-ssl publish` publishes a finished
    run.

    Attributes:
        repo_id: "user/name" on the Hub. `training.hub_model_id` has the same meaning.
        private: whether a new repository is private. `training.hub_private_repo` has the same meaning.
        license: license of the weights, with its name on the Hub ("apache-2.0"). The publisher must check
            that the license of the data allows it.
        title: title of the card. None composes it from method, backbone and data.
        tags: further tags of the card.
    """

    repo_id: str | None = None
    private: bool = False
    license: str | None = None
    title: str | None = None
    tags: list[str] = field(default_factory=list)
