"""Show text and pictures in a terminal: pixels where possible, else coloured half blocks; no pictures in a pipe.

Pictures are uint8 arrays (H, W, 3). Protocols: "kitty" (kitty, Ghostty), "iterm2" (iTerm2, WezTerm), "truecolor" and
"256" (a character cell shows two pixels, its upper half in the foreground colour), "none". This file uses no model and
no reply.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TextIO

import numpy as np
from PIL import Image as PillowImage

from omni.safe_text import safe_text

Protocol = Literal["kitty", "iterm2", "truecolor", "256", "none"]

_RESET = "\x1b[0m"
_KITTY_CHUNK = 4096  # bytes of base64 in one escape sequence, the protocol's limit
_CUBE = np.array([0, 95, 135, 175, 215, 255])  # the levels of the 6 x 6 x 6 colour cube, palette entries 16-231


def detect(stream: TextIO, environment: Mapping[str, str] | None = None, force: bool = False) -> Protocol:
    """The best protocol for `stream`, by the variables of the terminal in `environment` (default: os.environ).

    "none" if the stream is no terminal, TERM is "dumb" or NO_COLOR is set; `force` gives half blocks even then.
    Multiplexers (tmux, screen) drop graphics, so they get half blocks.
    """
    env = os.environ if environment is None else environment
    term, program = env.get("TERM", ""), env.get("TERM_PROGRAM", "")
    tty = stream.isatty()
    if not force and (not tty or term == "dumb" or env.get("NO_COLOR")):
        return "none"
    if tty and not env.get("TMUX") and not term.startswith(("screen", "tmux")):
        if env.get("KITTY_WINDOW_ID") or term == "xterm-kitty" or program.lower() == "ghostty" or "ghostty" in term:
            return "kitty"
        if program in ("iTerm.app", "WezTerm"):
            return "iterm2"
    if not _can_print(stream, "\u2580"):
        return "none"
    rich = (
        env.get("COLORTERM", "").lower() in ("truecolor", "24bit")
        or term.endswith("-direct")
        or bool(env.get("WT_SESSION"))
    )
    return "truecolor" if rich or not tty or "256color" not in term else "256"


def picture(pixels: Any, protocol: Protocol, columns: int | None = None) -> str:
    """The text that shows `pixels` (uint8 (H, W, 3), array or tensor) in a terminal at most `columns` cells wide.

    Ends with a newline, or is empty for "none". `columns` defaults to the terminal's width.
    """
    array = np.asarray(pixels, dtype=np.uint8)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture is (H, W, 3), got {array.shape}")
    columns = columns or shutil.get_terminal_size((80, 24)).columns
    if protocol == "none":
        return ""
    if protocol == "kitty":
        return _kitty(array, min(columns, 40))
    if protocol == "iterm2":
        return _iterm2(array, min(columns, 40))
    return _half_blocks(_fit(array, min(columns, 80)), protocol)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns: a header, a rule, the rows. Widths are in characters."""
    cells = [[safe_text(str(cell)).replace("\n", "\u240a") for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


class Printer:
    """Writes safe text and pictures to one stream, and records whether the cursor is at the start of a line."""

    def __init__(self, stream: TextIO | None = None, protocol: Protocol | None = None) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.protocol: Protocol = detect(self.stream) if protocol is None else protocol
        self._fresh = True

    def text(self, text: str) -> None:
        """Print untrusted text at once, with control characters made visible."""
        shown = safe_text(text)
        if shown:
            self._write(shown)
            self._fresh = shown.endswith("\n")

    def line(self, text: str = "") -> None:
        """Print `text` on a line of its own."""
        self.fresh_line()
        self.text(text + "\n")

    def fresh_line(self) -> None:
        """Start a new line unless at the start of one."""
        if not self._fresh:
            self._write("\n")
            self._fresh = True

    def picture(self, pixels: Any) -> None:
        """Show a picture (uint8 (H, W, 3)) below the text; nothing with the protocol "none"."""
        shown = picture(pixels, self.protocol)
        if shown:
            self.fresh_line()
            self._write(shown)

    def _write(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(text.encode(encoding, "replace").decode(encoding))
        self.stream.flush()


def _can_print(stream: TextIO, text: str) -> bool:
    """Whether the stream's encoding has these characters."""
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _fit(array: np.ndarray, columns: int) -> np.ndarray:
    """Shrink to at most `columns` pixels wide, keeping the aspect; never enlarge."""
    height, width = array.shape[:2]
    if width <= columns:
        return array
    size = (columns, max(1, round(height * columns / width)))
    return np.asarray(PillowImage.fromarray(array).resize(size, PillowImage.Resampling.BOX))


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _kitty(array: np.ndarray, columns: int) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: transmit and display PNG (f=100), quiet (q=2)."""
    data = base64.standard_b64encode(_png(array)).decode()
    chunks = [data[i : i + _KITTY_CHUNK] for i in range(0, len(data), _KITTY_CHUNK)]
    parts = []
    for index, chunk in enumerate(chunks):
        first = f"a=T,f=100,q=2,c={columns}," if index == 0 else ""
        parts.append(f"\x1b_G{first}m={int(index < len(chunks) - 1)};{chunk}\x1b\\")
    return "".join(parts) + "\n"


def _iterm2(array: np.ndarray, columns: int) -> str:
    """https://iterm2.com/documentation-images.html: an inline file, `columns` cells wide."""
    data = _png(array)
    encoded = base64.standard_b64encode(data).decode()
    return f"\x1b]1337;File=inline=1;size={len(data)};width={columns};preserveAspectRatio=1:{encoded}\x07\n"


def _half_blocks(array: np.ndarray, protocol: Protocol) -> str:
    """One character per two pixels: the upper in the foreground colour, the lower in the background colour."""
    if array.shape[0] % 2:
        array = np.concatenate([array, array[-1:]])
    rows = []
    for upper, lower in zip(array[0::2], array[1::2], strict=True):
        cells, last = [], None
        for above, below in zip(upper, lower, strict=True):
            colours = (_colour(above, protocol), _colour(below, protocol))
            if colours != last:
                cells.append(f"\x1b[38;{colours[0]};48;{colours[1]}m")
                last = colours
            cells.append("\u2580")
        rows.append("".join(cells) + _RESET)
    return "\n".join(rows) + "\n"


def _colour(rgb: np.ndarray, protocol: Protocol) -> str:
    """The parameters of an escape sequence for a colour."""
    if protocol == "truecolor":
        return f"2;{rgb[0]};{rgb[1]};{rgb[2]}"
    return f"5;{palette_index(int(rgb[0]), int(rgb[1]), int(rgb[2]))}"


def palette_index(red: int, green: int, blue: int) -> int:
    """The nearest of the 240 fixed colours of a 256-colour terminal: the colour cube, or the 24 greys."""
    rgb = np.array([red, green, blue])
    levels = np.abs(_CUBE[None, :] - rgb[:, None]).argmin(axis=1)
    cube_error = int(((_CUBE[levels] - rgb) ** 2).sum())
    grey = int(np.clip(round((float(rgb.mean()) - 8) / 10), 0, 23))
    if int(((8 + 10 * grey - rgb) ** 2).sum()) < cube_error:
        return 232 + grey
    return 16 + 36 * int(levels[0]) + 6 * int(levels[1]) + int(levels[2])
