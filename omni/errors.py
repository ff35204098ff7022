"""Errors: the types that programs distinguish, the definition of a user's mistake, and one-line messages.

A mistake is a ValueError whose message names the value and the way out. This file does not import torch.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MISTAKE, DAMAGED = 2, 4  # exit codes
MAX_LINE = 1000
PROBE_BYTES = 1 << 16  # that must be free before a write


class DamagedError(ValueError):
    """A published directory is incomplete or differs from its manifest."""


class NotFiniteError(ValueError):
    """A computed value is NaN, infinite or far out of range. The message names the value and its place."""


class RetiredKeyWarning(UserWarning):
    """A key of a configuration that earlier versions had: it has another name now, or no effect."""


class EntryPointWarning(UserWarning):
    """An entry point of an installed package has no effect."""


def is_mistake(error: BaseException) -> bool:
    """Whether the user can fix the cause. True for a ValueError, an ImportError that names an extra (its `name` is
    None), an OSError, too deep nesting and too large a request. All else is a bug."""
    if isinstance(error, RecursionError) or is_out_of_memory(error):
        return True
    names_an_extra = isinstance(error, ImportError) and error.name is None
    return bool(str(error)) and (names_an_extra or isinstance(error, ValueError | OSError))


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python, of torch on the CPU, or of a device; by class name, so that torch is not imported."""
    names = {base.__name__ for base in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def one_line(error: BaseException) -> str:
    """The error's message without line breaks; for a file its name and the system's reason."""
    if isinstance(error, RecursionError):
        return "the input is nested too deeply; make it flatter"
    if is_out_of_memory(error):
        return "out of memory: use less at once (text, pictures, their size), or another device"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    line = " ".join(text.split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..."


def exit_code_of(error: Exception) -> int:
    """The exit code after an error."""
    if isinstance(error, DamagedError):
        return DAMAGED
    return MISTAKE if is_mistake(error) else 1


def check_place(path: Path, name: str, is_folder: bool = True) -> None:
    """ValueError if the file or folder `path` (given as `name`) cannot be written. Writes a probe and removes it.

    Call it before long work that writes at its end.
    """
    kind = "folder" if is_folder else "file"
    try:
        if path.exists() and path.is_dir() != is_folder:
            raise ValueError(f"{name} {str(path)!r} is a {'file' if is_folder else 'folder'}; name a {kind}")
        if path.is_symlink() and not path.exists():
            raise ValueError(f"{name} {str(path)!r} is a broken link; name another {kind}")
        blocked = [str(parent) for parent in path.parents if parent.exists() and not parent.is_dir()]
        if blocked:
            raise ValueError(f"{name} {str(path)!r}: {blocked[0]!r} is a file; name another {kind}")
        there = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
        with tempfile.TemporaryDirectory(dir=there, prefix=f".{path.name}.tmp-") as probe:
            (Path(probe) / "probe").write_bytes(bytes(PROBE_BYTES))
            new = [part for part in path.relative_to(there).parts if part != ".."]
            (Path(probe) / max(new, key=lambda part: len(os.fsencode(part)))).mkdir()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{name} {str(path)!r:.300} cannot be written: {reason}; name another {kind}") from None


# ---- values that must be finite -------------------------------------------------------------------------------------


def in_range(values: Tensor, limit: float = sys.float_info.max) -> bool:
    """Whether every value is finite and at most `limit` in size. One reduction; True for no values at all."""
    if values.numel() == 0:
        return True
    low, high = values.aminmax()  # either is NaN where any value is
    return -limit <= low.item() and high.item() <= limit


def require_finite(values: Tensor, what: str, way_out: str, limit: float = sys.float_info.max) -> None:
    """NotFiniteError that names `what` (a plural) and the worst value, unless `in_range`."""
    if in_range(values, limit):
        return
    low, high = (extreme.item() for extreme in values.aminmax())
    worst = low if math.isnan(low) or -low > high else high
    found = f"reach {worst:g}, beyond {limit:g}" if math.isfinite(worst) else f"are not finite ({worst})"
    raise NotFiniteError(f"{what} {found}; {way_out}")
