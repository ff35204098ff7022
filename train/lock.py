"""One run per output directory: a lock on out/.lock for as long as the process lives, and what a killed one left.

The lock is the kernel's (flock): it ends with its process, however that ends, and the file that stays behind locks
nothing. The file says who holds it. Loading processes are forks and let go of it, so that one that outlives a killed
run for a moment does not keep the directory.
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
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """The lock of `out`, which is made where it is missing, and removed again where nothing else came to be in it.
    Leftovers of saves that were killed are cleared first. ValueError naming the holder where another run has it."""
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
    """ValueError where a launcher started several processes, which would each train the whole."""
    count = os.environ.get("WORLD_SIZE", "1").strip()
    if count not in ("", "0", "1"):
        raise ValueError(
            f"WORLD_SIZE = {count}: training in several processes is not written yet, and each would train the same; "
            "start one with `python -m train`, without torchrun (workers = N loads in several)"
        )


def _lock(out: Path) -> int:
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
        os.close(descriptor)  # its holder has removed it meanwhile
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
