# SPDX-License-Identifier: Apache-2.0
"""Loads recipes (layer 5): converts a YAML file and overrides to checked, typed sections."""

from hf_ssl.recipe.recipe import PublishConfig, Recipe, load_recipe, read_sections

__all__ = ["PublishConfig", "Recipe", "load_recipe", "read_sections"]
