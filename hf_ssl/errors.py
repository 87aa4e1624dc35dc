# SPDX-License-Identifier: Apache-2.0
"""The exception for mistakes of the user (layer 0)."""


class UserError(ValueError):
    """A mistake in a command, a recipe or a data set.

    The message has the form `section.key: expected X, got Y; do Z`. The command line prints it and exits with
    status 2. A script can catch it as a `ValueError`.
    """
