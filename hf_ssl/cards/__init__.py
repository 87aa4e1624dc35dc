# SPDX-License-Identifier: Apache-2.0
"""Records of a run (layer 3): facts, the model card, and the results file of a recipe.

The names below are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.cards.card import write_card
    from hf_ssl.cards.facts import Facts
    from hf_ssl.cards.facts_files import append_result, read_facts, write_facts
    from hf_ssl.cards.privacy import last_part, remove_private
    from hf_ssl.cards.run_environment import environment

__getattr__, __dir__, __all__ = lazy_names(
    __name__, __file__, renamed={"public": "hf_ssl.cards.remove_private"}
)
