"""Terminal output: the choice of protocol, exact half blocks, and text without control characters."""

from __future__ import annotations

import base64
import io
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from omni.cli.terminal import Printer, detect, palette_index, picture
from omni.rng import Key
from omni.safe_text import safe_text


class Stream(io.StringIO):
    """A stream with a given `isatty` and encoding."""

    def __init__(self, tty: bool = True, encoding: str = "utf-8") -> None:
        super().__init__()
        self.tty, self._encoding = tty, encoding

    def isatty(self) -> bool:
        return self.tty

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolor"),
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "screen-256color", "TMUX": "/tmp/x", "KITTY_WINDOW_ID": "1"}, "256"),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, "none"),
        ({"TERM": "dumb"}, "none"),
    ],
)
def test_detect(environment: dict[str, str], protocol: str) -> None:
    assert detect(Stream(), environment) == protocol


def test_a_pipe_gets_no_pictures_unless_forced() -> None:
    assert detect(Stream(tty=False), {"TERM": "xterm-kitty", "KITTY_WINDOW_ID": "1"}) == "none"
    assert detect(Stream(tty=False), {"TERM": "xterm-kitty", "NO_COLOR": "1"}, force=True) == "truecolor"
    assert detect(Stream(encoding="ascii"), {"TERM": "xterm"}, force=True) == "none"


def parse_half_blocks(shown: str) -> np.ndarray:
    """The pixels (H, W, 3) of truecolor half blocks, parsed as by a terminal."""
    rows = []
    for line in shown.rstrip("\n").split("\n"):
        upper, lower, colours = [], [], None
        for token in re.findall(r"\x1b\[[0-9;]*m|\u2580", line):
            if token != "\u2580":
                numbers = [int(n) for n in token[2:-1].split(";")]
                colours = (numbers[2:5], numbers[7:10]) if len(numbers) == 10 else colours
                continue
            assert colours is not None
            upper.append(colours[0])
            lower.append(colours[1])
        rows += [upper, lower]
    return np.array(rows, dtype=np.uint8)


def test_half_blocks_show_every_pixel() -> None:
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    assert np.array_equal(parse_half_blocks(picture(pixels, "truecolor", columns=80)), pixels)


def test_half_blocks_shrink_to_the_terminal() -> None:
    pixels = np.full((64, 64, 3), 7, dtype=np.uint8)
    assert parse_half_blocks(picture(pixels, "truecolor", columns=16)).shape == (16, 16, 3)


@pytest.mark.parametrize("rgb", [(0, 0, 0), (255, 255, 255), (95, 135, 175), (128, 128, 128), (200, 10, 30)])
def test_palette_is_the_nearest(rgb: tuple[int, int, int]) -> None:
    levels = [0, 95, 135, 175, 215, 255]
    palette = {
        16 + 36 * r + 6 * g + b: (levels[r], levels[g], levels[b]) for r in range(6) for g in range(6) for b in range(6)
    }
    palette |= {232 + n: (8 + 10 * n,) * 3 for n in range(24)}

    def error(index: int) -> int:
        return sum((a - b) ** 2 for a, b in zip(palette[index], rgb, strict=True))

    assert error(palette_index(*rgb)) == min(map(error, palette))


def test_kitty_chunks_hold_the_png() -> None:
    pixels = (Key(0).uniform((64, 64, 3)).numpy() * 256).astype(np.uint8)  # noise, which PNG cannot shrink
    shown = picture(pixels, "kitty")
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", shown)
    assert len(commands) > 1 and all(len(data) <= 4096 for _, data in commands)
    assert [keys.endswith("m=1") for keys, _ in commands] == [True] * (len(commands) - 1) + [False]
    png = base64.b64decode("".join(data for _, data in commands))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)


def test_iterm2_holds_the_png() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:([^\x07]*)\x07\n", picture(pixels, "iterm2"))
    assert match and len(base64.b64decode(match[2])) == int(match[1])


@given(st.text(st.characters()))
def test_safe_text_removes_controls_and_keeps_the_rest(text: str) -> None:
    shown = safe_text(text)
    assert len(shown) == len(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    shown.encode("utf-8")
    assert all(a == b for a, b in zip(text, shown, strict=True) if b not in "\ufffd" and not 0x2400 <= ord(b) <= 0x2421)


def test_safe_text_keeps_emoji_sequences_and_shows_escapes() -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f"
    assert safe_text(family) == family
    assert safe_text("\x1b]0;title\x07\x1b[2J") == "\u241b]0;title\u2407\u241b[2J"


def test_printer_handles_a_narrow_encoding_and_breaks_lines_around_pictures() -> None:
    stream = Stream(encoding="ascii")
    Printer(stream, "none").text("caf\u00e9 \x1b[1m")
    assert stream.getvalue() == "caf? ?[1m"
    stream = Stream()
    printer = Printer(stream, "truecolor")
    printer.text("a cat:")
    printer.picture(np.zeros((2, 1, 3), dtype=np.uint8))
    printer.line("done")
    assert stream.getvalue() == "a cat:\n\x1b[38;2;0;0;0;48;2;0;0;0m\u2580\x1b[0m\ndone\n"
