# SPDX-License-Identifier: Apache-2.0
"""MoCo v1 and v2."""
