# SPDX-License-Identifier: Apache-2.0
"""Recipes (layer 5): a YAML file and overrides become checked, typed sections, or one sentence about what is
wrong."""

from hf_ssl.recipe.recipe import PublishConfig, Recipe, load_recipe, read_sections

__all__ = ["PublishConfig", "Recipe", "load_recipe", "read_sections"]
