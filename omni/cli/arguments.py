"""Shared parts of command lines: the parser, and user errors as one line on the error stream and an exit code."""

from __future__ import annotations

import argparse
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from omni.errors import MISTAKE, exit_code_of, is_mistake, one_line

ANNOUNCE_AFTER_SECONDS = 1.0  # before `announced` prints


@contextmanager
def announced(what: str, only_to_terminals: bool = False) -> Iterator[None]:
    """Print a line with `what` on the error stream if the body takes more than PATIENCE seconds."""
    if only_to_terminals and not sys.stderr.isatty():
        yield
        return
    start = "\r\x1b[K" if sys.stderr.isatty() else ""  # overwrites a progress line
    timer = threading.Timer(
        ANNOUNCE_AFTER_SECONDS, lambda: print(f"{start}loading {what} ...", file=sys.stderr, flush=True)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Parser(argparse.ArgumentParser):
    """Raises ValueError with one line and a way out; accepts no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        command = self.prog.replace("__main__.py", "omni")
        raise ValueError(f"{message}; see `{command} --help`")

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # "-hello" is not -h with a value


def fail(error: Exception, code: int = MISTAKE) -> int:
    """Print the error in one line; returns the exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code


def exit_code(work: Callable[[], object]) -> int:
    """Run `work`; returns its int, else 0. A user error is printed in one line and gives 2, or 4 for damaged or missing
    files."""
    try:
        found = work()
    except Exception as error:
        if not is_mistake(error):
            raise
        return fail(error, exit_code_of(error))
    return found if isinstance(found, int) else 0


@contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Within, each warning of Omni is one line on the error stream; warnings of other libraries do not change."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def in_a_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not category.__module__.startswith("omni."):
                return show(message, category, *where, **more)
            print(f"omni: warning: {' '.join(str(message).split())}", file=sys.stderr)

        warnings.showwarning = in_a_line
        yield
