"""Find a colour emoji font on Linux, macOS or Windows, or check the given one.

`atlas.py` renders. This file downloads nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

FONT_FILES = ("NotoColorEmoji*.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
WAY_OUT = (
    "install one (`apt install fonts-noto-color-emoji`) or name a font file (a suite: font=FILE; a recipe: "
    "data.0.options.font=FILE)"
)


def font_folders() -> tuple[Path, ...]:
    """The folders to search: first the user's, then the system's."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    return (
        data / "fonts",
        home / ".fonts",
        Path("/usr/local/share/fonts"),
        Path("/usr/share/fonts"),
        home / "Library/Fonts",
        Path("/Library/Fonts"),
        Path("/System/Library/Fonts"),
        Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",
    )


def _candidates(folders: tuple[Path, ...]) -> Iterator[Path]:
    """Installed font files, the best pattern first."""
    for pattern in FONT_FILES:
        for folder in folders:
            if folder.is_dir():
                yield from sorted(folder.rglob(pattern))


def find_font(path: str | os.PathLike[str] | None = None, folders: tuple[Path, ...] | None = None) -> Path:
    """The colour emoji font file: `path` if given, else the first installed one.

    Raises ValueError if there is none; its one line names the searched files and the way out.
    """
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"no emoji font at {str(path)!r}; {WAY_OUT}")
        return Path(path)
    folders = font_folders() if folders is None else folders
    for candidate in _candidates(folders):
        return candidate
    where = ", ".join(str(f) for f in folders if f.is_dir()) or "no font folder exists"
    raise ValueError(f"no colour emoji font ({', '.join(FONT_FILES)}) found in {where}; {WAY_OUT}")
