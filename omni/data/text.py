"""Plain text files, cut into documents."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from omni.config import Frozen
from omni.data.digests import file_fingerprint
from omni.data.source import SOURCES, FiniteSource, require_file
from omni.document import Document, Role, Text
from omni.rng import Key


class TextFileOptions(Frozen):
    """path: of a UTF-8 text file.

    unit: what becomes one document: a "paragraph" (lines between blank ones), or a "line" that is not blank. Shorter
    ones than `min_words` are left out, such as headings.
    opening: the number of words that a user gives, after `request` and a blank line; the assistant writes the rest. 0:
    the assistant writes all of it.
    """

    path: Path
    unit: Literal["paragraph", "line"] = "paragraph"
    min_words: int = Field(default=1, ge=1)
    opening: int = Field(default=0, ge=0)
    request: str = ""

    @model_validator(mode="after")
    def _fit(self) -> TextFileOptions:
        if self.request and not self.opening:
            raise ValueError("request has no effect where opening is 0: leave it out, or give a number of words")
        if self.opening >= self.min_words > 1 or (self.opening and self.min_words == 1):
            raise ValueError(
                f"opening = {self.opening} words leave nothing of a document of min_words = {self.min_words}; "
                "give a larger min_words"
            )
        return self


@SOURCES.register("text")
class TextFile(FiniteSource):
    """Paragraphs or lines of one file, which is read whole. What the assistant writes is learnt."""

    Options = TextFileOptions

    def __init__(self, options: TextFileOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "text file")
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(self.path)!r} is not UTF-8 text: {error}; convert it") from None
        self.units = [unit for unit in units_of(text, options.unit) if len(unit.split()) >= options.min_words]
        self.num_records = len(self.units)
        if not self.num_records:
            raise ValueError(
                f"{str(self.path)!r} has no {options.unit} of at least {options.min_words} words; lower min_words"
            )

    def record(self, position: int) -> Document:
        o, unit = self.options, self.units[position]
        if not o.opening:
            return Document((Text(unit, Role.ASSISTANT, supervise=True),))
        given, rest = split_after(unit, o.opening)
        asked = f"{o.request}\n\n{given}" if o.request else given
        return Document((Text(asked, Role.USER), Text(rest, Role.ASSISTANT, supervise=True)))

    def record_name(self, position: int) -> str:
        return f"{self.path.name} {self.options.unit} {position + 1}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)


def units_of(text: str, unit: Literal["paragraph", "line"]) -> list[str]:
    """The paragraphs or lines of a text, without the space around them."""
    lines = [line.strip() for line in text.splitlines()]
    if unit == "line":
        return [line for line in lines if line]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line:
            paragraphs[-1].append(line)
        else:
            paragraphs.append([])
    return ["\n".join(part) for part in paragraphs if part]


def split_after(text: str, num_words: int) -> tuple[str, str]:
    """The first words of a text, and the rest from its next word on."""
    at = 0
    for _ in range(num_words):
        at += len(text[at:]) - len(text[at:].lstrip())
        word = text[at:].split(maxsplit=1)[0]
        at += len(word)
    return text[:at].strip(), text[at:].strip()
