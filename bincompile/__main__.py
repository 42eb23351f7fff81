"""`python -m bincompile` is the command `bincompile`."""

import sys

from bincompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
