"""A reply: its parts in order, as a message, as files, as Markdown and HTML. How it arrives: events.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from omni import media
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.generation.events import Drafted, ImagePart, Part, StopReason, TextPart


def segments_of(parts: Sequence[Part]) -> tuple[Segment, ...]:
    """The parts as segments of the assistant, one for each."""
    found: list[Segment] = []
    for part in parts:
        if isinstance(part, TextPart):
            found.append(Text(part.text, Role.ASSISTANT))
        elif isinstance(part, ImagePart):
            found.append(Image(media.load_image(part.image), Role.ASSISTANT))
        else:
            found.append(Video(part.frames, part.fps, Role.ASSISTANT))
    return tuple(found)


# ---- the reply -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Reply:
    """An ordered reply. `document` is the prompt followed by the reply, ready for the next turn; `message` is the reply
    as a chat message. record: what made it, as JSON values (options with the seed, model, versions)."""

    parts: list[Part]
    document: Document
    stop_reason: StopReason
    drafts: tuple[Drafted, ...] = ()  # of each round of text in blocks
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of all parts. A space separates two texts that have a picture and no white space between them."""
        joined = ""
        for part in self.parts:
            if isinstance(part, TextPart):
                touching = joined and part.text and not joined[-1].isspace() and not part.text[0].isspace()
                joined += (" " if touching else "") + part.text
        return joined

    @property
    def evaluations(self) -> int:
        """Passes through the transformer spent on all its pictures and clips; see ImagePart."""
        return sum(p.evaluations for p in self.parts if not isinstance(p, TextPart))

    @property
    def images(self) -> list[PILImage.Image]:
        return [p.image for p in self.parts if isinstance(p, ImagePart)]

    @property
    def message(self) -> dict[str, Any]:
        """{"role": "assistant", "content": [...]}: append it to a list of messages for the next turn."""
        return {"role": "assistant", "content": [part.content() for part in self.parts]}

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write reply.md, reply.json and the pictures, as `omni generate --out` does; returns the folder.

        Raises ValueError when the folder cannot be made, or holds something (with `overwrite`: something other than a
        reply); OSError when writing fails. The folder appears whole or not at all.
        """
        from omni.generation.reply_files import check_folder, write_reply

        folder = Path(folder)
        check_folder(folder, overwrite, name="folder", way_out="pass overwrite=True")
        record = {"stop_reason": self.stop_reason, **self.record}
        return write_reply(folder, self.document, [p.made_by() for p in self.parts], record, replace=folder.exists())

    def to_markdown(self) -> str:
        """The reply as Markdown, with its pictures inside as data URLs. Its text is escaped: it shows, and does
        nothing."""
        from omni.generation.reply_files import markdown

        return markdown(segments_of(self.parts))

    def to_html(self) -> str:
        """The reply as one page of HTML, with its pictures inside. Its text is escaped; the page loads nothing."""
        from omni.generation.reply_files import html_page

        return html_page(segments_of(self.parts))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from omni.generation.reply_files import html_fragment

        return html_fragment(segments_of(self.parts))

    def __repr__(self) -> str:
        shown = [_short(part) for part in self.parts[:8]]
        shown += [f"{len(self.parts) - 8} more"] if len(self.parts) > 8 else []
        return f"Reply({', '.join(shown)}; stop_reason={self.stop_reason!r})"


def _short(part: Part) -> str:
    if isinstance(part, TextPart):
        return repr(part.text if len(part.text) <= 60 else part.text[:57] + "...")
    if isinstance(part, ImagePart):
        return f"<image {part.height}x{part.width}>"
    return f"<clip of {len(part.frames)} frames>"
