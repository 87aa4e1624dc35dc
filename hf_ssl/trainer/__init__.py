# SPDX-License-Identifier: Apache-2.0
"""Training (layer 4): arguments, the Trainer, its monitor, optimisers."""
