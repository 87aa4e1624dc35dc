# SPDX-License-Identifier: Apache-2.0
"""Trains a method (layer 4): arguments, trainer, monitor, optimizers, checkpoints."""
