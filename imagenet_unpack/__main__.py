"""`python -m imagenet_unpack`."""

from __future__ import annotations

import sys

from imagenet_unpack.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
