"""What command lines share: a mistake of the user's is one line on the error stream, and an exit code."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MISTAKE = 2
PATIENCE = 1.0  # seconds


@contextmanager
def announced(what: str, only_to_terminals: bool = False) -> Iterator[None]:
    """A line on the error stream says what is being loaded, if that takes more than PATIENCE seconds."""
    if only_to_terminals and not sys.stderr.isatty():
        yield
        return
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # where a progress line stands
    timer = threading.Timer(PATIENCE, lambda: print(f"{start}loading {what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    """Does the work: the int that it returns, else 0; after a mistake a line that says what was wrong, and 2."""
    try:
        found = work()
    except Exception as error:
        if not is_mistake(error):
            raise
        return fail(error)
    return found if isinstance(found, int) else 0
