# SPDX-License-Identifier: Apache-2.0
"""What every method is made of (layer 1): base config, model and output, backbones, heads, gathering."""
