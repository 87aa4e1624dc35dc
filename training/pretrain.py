# SPDX-License-Identifier: Apache-2.0
"""Runs `hf-ssl pretrain` as a script for launchers.

Examples are `torchrun --nproc_per_node 8 training/pretrain.py RECIPE section.key=value ...` and
`accelerate launch training/pretrain.py RECIPE ...`.
"""

import sys

from hf_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
