"""What command lines share: arguments, and a mistake of the user's as one line on the error stream and an exit code."""

from __future__ import annotations

import argparse
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from omni.errors import MISTAKE, code_of, is_mistake, one_line

PATIENCE = 1.0  # seconds


@contextmanager
def announced(what: str, only_to_terminals: bool = False) -> Iterator[None]:
    """Prints a line with `what` on the error stream if loading it takes more than PATIENCE seconds."""
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


class Parser(argparse.ArgumentParser):
    """One-line errors with a way out, as ValueError; no guessed abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        command = self.prog.replace("__main__.py", "omni")
        raise ValueError(f"{message}; see `{command} --help`")

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # "-hello" is no -h with a value


def fail(error: Exception, code: int = MISTAKE) -> int:
    """Says in one line what was wrong; returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object]) -> int:
    """Does the work: the int that it returns, else 0. After a mistake a line that says what was wrong, and 2, or 4
    where files are damaged or missing."""
    try:
        found = work()
    except Exception as error:
        if not is_mistake(error):
            raise
        return fail(error, code_of(error))
    return found if isinstance(found, int) else 0


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Within, each warning of Omni's own is one line on the error stream; those of other libraries stay as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def in_a_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not category.__module__.startswith("omni."):
                return show(message, category, *where, **more)
            print(f"omni: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = in_a_line
        yield
