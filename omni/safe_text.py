"""Text that is safe to print, from any source."""

from __future__ import annotations

import unicodedata


def safe_text(text: str) -> str:
    """`text` with every control character made visible: printing it cannot move, colour or retitle anything.

    C0 controls (except newline and tab) and DEL become their Unicode pictures (ESC is shown as U+241B); C1 controls,
    line separators, lone surrogates and bidirectional overrides become U+FFFD. Works character by character: a sequence
    split in two pieces is as safe as a whole one.
    """
    return "".join(map(_safe_character, text))


def _safe_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    override = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return "\ufffd" if override or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") else character
