# SPDX-License-Identifier: Apache-2.0
"""The end of `hf-ssl demo`: the page in which digits find their own kind."""

from pathlib import Path

from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.space.serve import check_packages, run_space

FOLDER = "_space"  # a leading underscore keeps it out of what is published of the run


def serve_digits(output: Path, data: DataConfig, examples_split: str) -> None:
    """Build the Space of the demo's encoder in its output folder and serve it until Ctrl-C.

    Where the packages for it are missing a sentence says so, and that is all: the demo itself is complete.
    """
    try:
        check_packages()
    except UserError as error:
        print(f"to see it, {error}")
        return
    from hf_ssl.space.build import build_space  # loads faiss

    space = output / FOLDER
    build_space(str(output), space, data, examples_split=examples_split, title="Handwritten digits")
    run_space(space)
