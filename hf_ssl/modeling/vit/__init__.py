# SPDX-License-Identifier: Apache-2.0
"""Parts for methods on vision transformers: patches and their positions, a predictor, stochastic depth."""
