"""What command lines share: a mistake of the user's is one line on the error stream, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

MISTAKE = 2


def fail(error: Exception, code: int = MISTAKE) -> int:
    """Says in one line what was wrong; returns the exit code."""
    said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    print(f"error: {' '.join(said.split())}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object]) -> int:
    """Does the work: the int that it returns, else 0; or, after a line that says what was wrong with the input, 2.

    An ImportError with a `name` is a bug and goes on; those that tell of a missing extra have none.
    """
    try:
        found = work()
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, ImportError) and error.name is not None:
            raise
        return fail(error)
    return found if isinstance(found, int) else 0
