# SPDX-License-Identifier: Apache-2.0
"""`hf-ssl pretrain` as a script, for launchers: torchrun --nproc_per_node 8 training/pretrain.py RECIPE
section.key=value ...

`accelerate launch training/pretrain.py RECIPE ...` works alike.
"""

import sys

from hf_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
