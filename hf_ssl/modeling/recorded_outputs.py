# SPDX-License-Identifier: Apache-2.0
"""Records hidden states and attention weights of an encoder while a method calls it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import layers

logger = logging.get_logger(__name__)  # of transformers, which can warn once

_TIMM_STATES = "forward_intermediates"
"""Method of the models of timm that returns hidden states. A few models lack it."""


class RecordedOutputs:
    """Records hidden states and attention weights inside a `with` block.

    The encoder's own forward pass returns them. If a method calls only the blocks of a vision transformer
    (MAE), hooks on the blocks record them. Only the first pass is recorded.

    Args:
        backbone: the encoder.
        hidden_states: whether hidden states are recorded, or the indices of those that are wanted.
        attentions: whether attention weights are recorded.

    Raises:
        UserError: `hidden_states` is neither a bool nor indices, or the encoder does not return the wanted
            outputs. The encoder's forward pass and both properties also raise this error.
    """

    def __init__(
        self, backbone: PreTrainedModel, hidden_states: bool | Sequence[int] | None, attentions: bool | None
    ) -> None:
        self._backbone, self._indices = backbone, _indices(hidden_states)
        self._wanted = {
            name: True
            for name, wanted in (
                ("output_hidden_states", hidden_states is True or self._indices is not None),
                ("output_attentions", attentions),
            )
            if wanted
        }
        self._own: Any = None
        self._states: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        if self._wanted:
            self._check_encoder()

    def __enter__(self) -> "RecordedOutputs":
        if self._wanted:
            self._hooks += [
                self._backbone.register_forward_pre_hook(self._request, with_kwargs=True),
                self._backbone.register_forward_hook(self._record_own),
            ]
            for number, layer in enumerate(layers(self._backbone)):
                self._hooks.append(layer.register_forward_hook(partial(self._record_state, number)))
                for module in layer.modules():
                    self._hooks.append(module.register_forward_hook(partial(self._record_weights, number)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def hidden_states(self) -> tuple[Tensor | None, ...] | None:
        """Return all hidden states, or those with the wanted indices and None for the others.

        None if hidden states are not recorded.
        """
        if "output_hidden_states" not in self._wanted:
            return None
        states = self._found("hidden_states", self._states)
        if self._indices is None:
            return states
        count = len(states)
        wrong = [index for index in self._indices if not -count <= index < count]
        if wrong:
            raise UserError(
                f"output_hidden_states: expected indices from {-count} to {count - 1} for "
                f"{type(self._backbone).__name__}, got {wrong[0]}"
            )
        chosen = {index % count for index in self._indices}
        return tuple(state if index in chosen else None for index, state in enumerate(states))

    @property
    def attentions(self) -> tuple[Tensor, ...] | None:
        """Return the attention weights of each layer. None if they are not recorded.

        The result is () if `attn_implementation` is not "eager".
        """
        return self._found("attentions", self._weights) if "output_attentions" in self._wanted else None

    def _found(self, name: str, of_layers: dict[int, Tensor]) -> tuple[Tensor, ...]:
        found = tuple(of_layers.values()) if self._own is None else tuple(self._own.get(name) or ())
        if not found and (name == "hidden_states" or self._computes_weights):
            raise UserError(
                f"output_{name}: expected an encoder that returns {name}, got "
                f"{type(self._backbone).__name__}; use false"
            )
        return found

    @property
    def _computes_weights(self) -> bool:
        return self._backbone.config._attn_implementation in ("eager", None)

    def _check_encoder(self) -> None:
        """Raise `UserError` for outputs that transformers omits or that end in its own error."""
        kind, attention = type(self._backbone).__name__, self._backbone.config._attn_implementation
        timm = self._backbone.config.model_type == "timm_wrapper"
        for name in self._wanted:
            if timm and (name == "output_attentions" or not hasattr(self._backbone.timm_model, _TIMM_STATES)):
                raise UserError(f"{name}: expected false for this encoder of timm, got true")
            if name == "output_attentions" and not self._computes_weights:  # no error, as in transformers
                logger.warning_once(
                    f'output_attentions: expected attn_implementation="eager", which computes the weights, '
                    f'got "{attention}" in {kind}; call model.set_attn_implementation("eager")'
                )

    def _request(self, backbone: nn.Module, inputs: Any, named: dict[str, Any]) -> Any:
        return (inputs, named | self._wanted) if self._own is None else (inputs, named)

    def _record_own(self, backbone: nn.Module, inputs: Any, output: Any) -> None:
        if self._own is None:
            self._own = output
            _ = self.hidden_states, self.attentions  # an error must not follow an update of the memory

    def _record_state(self, number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        if number == 0 and inputs:
            self._states.setdefault(0, inputs[0])
        self._states.setdefault(number + 1, output[0] if isinstance(output, tuple) else output)

    def _record_weights(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Tensor):
            self._weights.setdefault(number, output[1])


def _indices(wanted: object) -> list[int] | None:
    """Return the indices of wanted hidden states, or None for a bool or None."""
    if wanted is None or isinstance(wanted, bool):
        return None
    if isinstance(wanted, Sequence) and all(type(index) is int for index in wanted):
        return [int(index) for index in wanted]
    raise UserError(f"output_hidden_states: expected true, false or indices such as [0, -1], got {wanted!r}")
