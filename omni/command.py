"""What command lines share: a mistake of the user's is one line on the error stream, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

MISTAKE, DAMAGED = 2, 4


def is_mistake(error: Exception) -> bool:
    """ValueError is our way of saying what is wrong with an input; so is an ImportError that names an extra (it has no
    `name`), and what the system says of files. All else is a bug."""
    said = isinstance(error, ImportError) and error.name is None
    return bool(str(error)) and (said or isinstance(error, ValueError | OSError))


def one_line(error: Exception) -> str:
    """What the error says, without line breaks; of a file its name and the system's reason."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def fail(error: Exception, code: int = MISTAKE) -> int:
    """Says in one line what was wrong; returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object]) -> int:
    """Does the work: the int that it returns, else 0. After a mistake a line that says what was wrong, and 2, or 4
    where files are damaged or missing (checkpoint.DamagedError, by its name: to import it is to import torch)."""
    try:
        found = work()
    except Exception as error:
        if not is_mistake(error):
            raise
        damaged = any(base.__name__ == "DamagedError" for base in type(error).__mro__)
        return fail(error, DAMAGED if damaged else MISTAKE)
    return found if isinstance(found, int) else 0
