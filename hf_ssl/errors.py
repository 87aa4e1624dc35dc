# SPDX-License-Identifier: Apache-2.0
"""The one exception that a person may cause: layer 0."""


class UserError(ValueError):
    """A mistake in a command, a recipe or a data set, told in one sentence: what was expected, what came,
    and where.

    The command line prints the sentence and exits with status 2; a script sees an ordinary `ValueError`.
    """
