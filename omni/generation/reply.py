"""A reply: its parts in order, as a message, as files, as Markdown and HTML. events.py has the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from omni import media
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.generation.events import Drafted, ImagePart, Part, StopReason, TextPart, VideoPart


def segments_of(parts: Sequence[Part]) -> tuple[Segment, ...]:
    """One assistant segment for each part."""
    found: list[Segment] = []
    for part in parts:
        if isinstance(part, TextPart):
            found.append(Text(part.text, Role.ASSISTANT))
        elif isinstance(part, ImagePart):
            found.append(Image(media.load_image(part.image), Role.ASSISTANT))
        else:
            found.append(Video(part.frames, part.fps, Role.ASSISTANT))
    return tuple(found)


def part_of(value: Any, before: Sequence[Part]) -> Part:
    """A given part, after others: text, or a picture in any form that omni.media.load_image takes."""
    if isinstance(value, TextPart | ImagePart | VideoPart):
        return value
    if isinstance(value, str):
        return TextPart(value)
    pixels = media.load_image(value)
    picture, index = PILImage.fromarray(pixels.numpy(), "RGB"), sum(not isinstance(part, TextPart) for part in before)
    return ImagePart(picture, picture.height, picture.width, 0, 0, index)


# ---- the reply -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Reply:
    """An ordered reply. document: the prompt and the reply, ready for the next turn. message: the reply as a chat
    message. record: options with the seed, model and versions, as JSON values."""

    parts: list[Part]
    document: Document
    stop_reason: StopReason
    drafts: tuple[Drafted, ...] = ()  # one for each round of speculative decoding
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of all parts. A space separates two texts without white space between them."""
        joined = ""
        for part in self.parts:
            if isinstance(part, TextPart):
                touching = joined and part.text and not joined[-1].isspace() and not part.text[0].isspace()
                joined += (" " if touching else "") + part.text
        return joined

    @property
    def evaluations(self) -> int:
        """Function evaluations of all pictures and clips; see ImagePart."""
        return sum(p.evaluations for p in self.parts if not isinstance(p, TextPart))

    @property
    def images(self) -> list[PILImage.Image]:
        return [p.image for p in self.parts if isinstance(p, ImagePart)]

    @property
    def message(self) -> dict[str, Any]:
        """{"role": "assistant", "content": [...]}: append it to a list of messages for the next turn."""
        return {"role": "assistant", "content": [part.content() for part in self.parts]}

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write reply.md, reply.json and the pictures, like `omni generate --out`; returns the folder.

        Raises ValueError when the folder cannot be made or is not empty (with `overwrite`: holds anything other than a
        reply); OSError when writing fails. The folder appears whole or not at all.
        """
        from omni.generation.reply_files import check_folder, write_reply

        folder = Path(folder)
        check_folder(folder, overwrite, name="folder", way_out="pass overwrite=True")
        record = {"stop_reason": self.stop_reason, **self.record}
        return write_reply(folder, self.document, [p.made_by() for p in self.parts], record, replace=folder.exists())

    def to_markdown(self) -> str:
        """The reply as Markdown, with its pictures as data URLs. Its text is escaped: Markdown shows it as it is."""
        from omni.generation.reply_files import markdown

        return markdown(segments_of(self.parts))

    def to_html(self) -> str:
        """The reply as one HTML page, with its pictures as data URLs. Its text is escaped; the page loads nothing."""
        from omni.generation.reply_files import html_page

        return html_page(segments_of(self.parts))

    def _repr_html_(self) -> str:
        """The representation in a notebook."""
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
