"""`python -m triward` is the command `triward`."""

from __future__ import annotations

import sys

from triward.cli import main

if __name__ == "__main__":
    sys.exit(main())
