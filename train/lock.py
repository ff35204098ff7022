"""One run per output directory: a lock on out/.lock while the process lives. Removes leftovers of killed runs.

The lock is the kernel's (flock): it ends with its process, and the file that remains locks nothing. The file names
the holder. Data-loading workers are forks; they close the lock, so that a worker that outlives a killed run does not
hold the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from omni.checkpoint import remove_leftovers

LOCK = ".lock"
_held: set[int] = set()  # file descriptors of the locks of this process


def _close_in_fork() -> None:
    """Close the locks in a forked worker, so that it does not hold them."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_fork)


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Hold the lock of `out`. Creates the directory where it is missing and removes it again if it stays empty.
    Removes leftovers of killed saves first. ValueError naming the holder where another run has the lock."""
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(out)
    try:
        for folder in (out, out / "state"):
            remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if made and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
        _held.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def refuse_many_processes() -> None:
    """ValueError where a launcher started several processes: each would train the whole model."""
    count = os.environ.get("WORLD_SIZE", "1").strip()
    if count not in ("", "0", "1"):
        raise ValueError(
            f"WORLD_SIZE = {count}: training in several processes is not supported, and each would train the same; "
            "start one with `python -m train`, without torchrun (workers = N starts data-loading workers)"
        )


def _lock(out: Path) -> int:
    """The descriptor of the locked file. ValueError names the holder where it is locked."""
    path = out / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{str(out)!r} is in use by {holder}; wait for it or stop it, or choose another --out"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_file(path, descriptor):
            break
        os.close(descriptor)  # the holder removed the file meanwhile
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
