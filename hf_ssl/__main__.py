# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_ssl` is the command `hf-ssl`."""

import sys

from hf_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main())
