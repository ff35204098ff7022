"""What the small commands of this package share: a mistake of the user's is one line, and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


def exit_code(work: Callable[[], object]) -> int:
    """Does the work: 0; or, after a line that says what was wrong with the input, 2."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
