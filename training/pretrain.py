# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.11"
# ///
"""Runs `hf-ssl pretrain` as a script for launchers.

Examples are `torchrun --nproc_per_node 8 training/pretrain.py RECIPE section.key=value ...` and
`accelerate launch training/pretrain.py RECIPE ...`. The comment above is for `uv run` and `hf jobs uv run`.
It names no packages, because `--with hf_ssl` or `--with dist/hf_ssl-0.1.0-py3-none-any.whl` installs them.
"""

import sys

from hf_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
