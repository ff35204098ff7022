"""`python -m omni ...` is the `omni` command."""

import sys

from omni.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
