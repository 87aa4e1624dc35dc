# SPDX-License-Identifier: Apache-2.0
"""The parts of methods (layer 1): base class, backbones, heads, memory banks, EMA updates, gathering."""
