"""What command lines share: arguments, and a mistake of the user's as one line on the error stream and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

MISTAKE, DAMAGED = 2, 4
MAX_LINE = 1000
SPACE = 1 << 16  # bytes that must be free where something is to be written
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


def check_place(path: Path, name: str, is_folder: bool = True) -> None:
    """ValueError when the file or folder `path` (given as `name`) cannot be written. Tries it, and leaves nothing.

    Made for work that takes a while and writes at its end: call it before the work.
    """
    kind = "folder" if is_folder else "file"
    try:
        if path.exists() and path.is_dir() != is_folder:
            raise ValueError(f"{name} {str(path)!r} is a {'file' if is_folder else 'folder'}; name a {kind}")
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{name} {str(path)!r} is a link to nothing; name another {kind}")
        blocked = [str(parent) for parent in path.parents if parent.exists() and not parent.is_dir()]
        if blocked:
            raise ValueError(f"{name} {str(path)!r}: {blocked[0]!r} is a file; name another {kind}")
        there = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{path.name}.tmp-") as probe:
            (Path(probe) / "probe").write_bytes(bytes(SPACE))
            new = [part for part in path.relative_to(there).parts if part != ".."]
            (Path(probe) / max(new, key=lambda part: len(os.fsencode(part)))).mkdir()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{name} {str(path)!r:.300} cannot be written: {reason}; name another {kind}") from None


def is_mistake(error: BaseException) -> bool:
    """ValueError is our way of saying what is wrong with an input; so is an ImportError that names an extra (it has no
    `name`), and what the system says of files. Too deep a nesting and too large a request are inputs too. All else is
    a bug."""
    if isinstance(error, RecursionError) or is_out_of_memory(error):
        return True
    said = isinstance(error, ImportError) and error.name is None
    return bool(str(error)) and (said or isinstance(error, ValueError | OSError))


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python's memory, of torch's on the CPU, or of a device's; by name, for telling must not import torch."""
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def one_line(error: BaseException) -> str:
    """What the error says, without line breaks; of a file its name and the system's reason."""
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; make it flatter"
    if is_out_of_memory(error):
        return "out of memory: ask for less at once (text, pictures, their size), or take another device"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = " ".join(text.split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


def code_of(error: Exception) -> int:
    """The exit code after an error. checkpoint.DamagedError is known by its name: to import it is to import torch."""
    if any(base.__name__ == "DamagedError" for base in type(error).__mro__):
        return DAMAGED
    return MISTAKE if is_mistake(error) else 1


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
