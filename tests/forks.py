"""Programs in forked processes: signals and exit codes without the start of an interpreter (torch: 2 s)."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def forked(program: Callable[[], int], output: Path) -> Iterator[int]:
    """The process id of a fork that leads its own process group and ends with the exit code that `program` returns.

    Its standard output and errors go to the file `output`. What is still alive of the group is killed at the end.
    """
    child = os.fork()
    if not child:
        _run(program, output)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _run(program: Callable[[], int], output: Path) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        code = program()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def exit_code(child: int, seconds: float = 60) -> int:
    """The exit code of a fork that ends within `seconds`; minus the number of the signal that killed it."""
    found: list[int] = []

    def ended() -> bool:
        process, status = os.waitpid(child, os.WNOHANG)
        found.append(status)
        return process == child

    wait_until(ended, seconds)
    return os.waitstatus_to_exitcode(found[-1])
