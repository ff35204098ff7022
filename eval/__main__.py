"""python -m eval: see eval/suite.py."""

import sys

from eval.suite import main

if __name__ == "__main__":
    sys.exit(main())
