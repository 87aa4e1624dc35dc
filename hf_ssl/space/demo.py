# SPDX-License-Identifier: Apache-2.0
"""The last step of `hf-ssl demo`: a page that shows the nearest neighbors of handwritten digits."""

from pathlib import Path

from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.space.serve import check_packages, run_space

FOLDER = "_space"  # publishing a run omits names with a leading underscore


def serve_digits(output: Path, data: DataConfig, examples_split: str) -> None:
    """Build the Space of the demo's encoder in its output folder and serve it until Ctrl-C.

    If packages for the Space are missing, the function only prints a message, because the training is
    complete.
    """
    try:
        check_packages()
    except UserError as error:
        print(f"the page is not shown: {error}")
        return
    from hf_ssl.space.build import build_space  # imported here because it loads faiss

    space = output / FOLDER
    build_space(str(output), space, data, examples_split=examples_split, title="Handwritten digits")
    run_space(space)
