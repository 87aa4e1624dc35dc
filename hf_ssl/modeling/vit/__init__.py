# SPDX-License-Identifier: Apache-2.0
"""Parts for methods on vision transformers: encoding some patches, fixed positions, stochastic depth."""
