"""native_step.cpp as a library: compiled by the machine's C++ compiler at first use, and kept for later processes.

Compiling takes two or three seconds. The library is kept in `$XDG_CACHE_HOME/omni` (`~/.cache/omni`), under the digest
of the source, the flags, and all that the compiler predefines: its version and the features of this processor. A kept
file is loaded only if its folder and it belong to this user, nobody else may write them, and its bytes have the digest
in its name. Where it cannot be kept, each process compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("native_step.cpp")
THREADS = Path(__file__).with_name("native_threads.h")  # included by it
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-pthread")
STEPS = ("float32_float32", "bfloat16_float32", "bfloat16_bfloat16")  # dtype of the weights, of the cache
OTHERS_WRITE = 0o022
_log = logging.getLogger("omni")


class LowRank(ctypes.Structure):
    """Of native_step.cpp."""

    _fields_ = (("down", ctypes.c_void_p), ("up", ctypes.c_void_p), ("rank", ctypes.c_int64))


class Pass(ctypes.Structure):
    """Of native_step.cpp."""

    _fields_ = (
        ("h", ctypes.c_void_p), ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p), ("num_positions", ctypes.c_int64), ("first", ctypes.c_void_p),
        ("at", ctypes.c_void_p), ("num_tokens", ctypes.c_int64), ("adapters", ctypes.c_void_p),
        ("groups", ctypes.c_void_p), ("num_groups", ctypes.c_int64), ("threads", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )  # fmt: skip


@cache
def load_library() -> ctypes.CDLL:
    """The library, kept or compiled; once per process. ValueError without a compiler, or where it fails."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ValueError(
            f"compile=True needs a C++ compiler ({', '.join(COMPILERS)}); install one or leave compile out"
        )
    folder = _private_folder()
    library = None if folder is None else _load_kept(compiler, folder)
    if library is None:
        with tempfile.TemporaryDirectory() as temporary:
            target = Path(temporary) / "native_step.so"
            _compile(compiler, target)
            library = ctypes.CDLL(str(target))
    pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name in STEPS:
        step = getattr(library, f"step_{name}")
        step.argtypes, step.restype = [pointer] * 4, None
    for name in ("float32", "bfloat16"):
        read = getattr(library, f"read_{name}")
        read.argtypes, read.restype = [*[pointer] * 3, count, count, count, threads], None
    return library


def _compile(compiler: str, target: Path) -> None:
    """Write the library. ValueError with the compiler's last line where it fails."""
    done = _run([compiler, *FLAGS, "-o", str(target), str(SOURCE)])
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
        raise ValueError(f"{compiler} could not compile {SOURCE.name}: {last}; leave compile out")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)


# ---- kept libraries --------------------------------------------------------------------------------------------------


def _load_kept(compiler: str, folder: Path) -> ctypes.CDLL | None:
    """The library of the folder; compiled into it where it is missing or damaged. None where the folder is full or the
    compiler does not describe itself."""
    predefined = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    if predefined.returncode:
        return None
    key = _digest(b"".join([SOURCE.read_bytes(), THREADS.read_bytes(), repr(FLAGS).encode(), predefined.stdout]))
    for path in folder.glob(f"native_step-{key}-*.so"):
        if _is_private(path) and path.stem.endswith(_digest(path.read_bytes())):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "native_step.so"
            _compile(compiler, made)
            target = folder / f"native_step-{key}-{_digest(made.read_bytes())}.so"
            made.chmod(0o700)
            os.replace(made, target)
    except OSError as error:
        _log.info("compiled step: the library is not kept, each process compiles it: %s", error)
        return None
    return ctypes.CDLL(str(target))


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def _private_folder() -> Path | None:
    """The folder of kept libraries, made where it is missing. None where it cannot be made, or others may write it."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "omni"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a file in its place, no rights, no home
        return None
    return folder if _is_private(folder) else None


def _is_private(path: Path) -> bool:
    """Whether it belongs to this user and nobody else may write it. False where the system has no users."""
    if not hasattr(os, "getuid"):
        return False
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & OTHERS_WRITE
