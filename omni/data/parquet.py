"""Captioned pictures in a parquet file: generate from the caption, describe, or both. Needs omni[data]."""

from __future__ import annotations

from typing import Literal

from omni.data.digests import bytes_digest, file_fingerprint
from omni.data.files import FileOptions
from omni.data.source import SOURCES, FiniteSource, require_file
from omni.document import Document, Image, Role, Text
from omni.media import load_image
from omni.rng import Key


class CaptionOptions(FileOptions):
    """image, caption: names of columns. task: generate the picture, describe it, or either by a keyed choice."""

    image: str = "image"
    caption: str = "caption"
    task: Literal["draw", "describe", "both"] = "both"


@SOURCES.register("image_caption")
class CaptionedPictures(FiniteSource):
    """A parquet file with a picture column (bytes, or {"bytes": ...}) and a caption column. Needs omni[data]."""

    Options = CaptionOptions

    def __init__(self, options: CaptionOptions, key: Key) -> None:
        super().__init__(options, key)
        self.path = require_file(options.path, "data file")
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise ValueError("the source image_caption needs pyarrow: pip install 'omni-flow[data]'") from None
        try:
            self.table = parquet.read_table(self.path, columns=[options.image, options.caption], memory_map=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{str(self.path)!r} is not a parquet file with these columns: {error}") from None
        self.num_records = self.table.num_rows
        if not self.num_records:
            raise ValueError(f"{str(self.path)!r} has no rows")

    def record(self, position: int) -> Document:
        options = self.options
        data = self.table[options.image][position].as_py()
        caption = self.table[options.caption][position].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if not isinstance(data, bytes) or not isinstance(caption, str):
            raise ValueError(f"{options.image} must be bytes and {options.caption} text")
        pixels = load_image(data)
        draws = self.key.fold("task", position).python().random() < 0.5
        if options.task == "draw" or (options.task == "both" and draws):
            return Document((Text(caption, Role.USER), Image(pixels, Role.ASSISTANT, supervise=True)))
        return Document((Image(pixels, Role.USER), Text(caption, Role.ASSISTANT, supervise=True)))

    def record_identity(self, position: int) -> str:
        options = self.options
        data, caption = (self.table[name][position].as_py() for name in (options.image, options.caption))
        data = data["bytes"] if isinstance(data, dict) else data
        return bytes_digest(bytes(data or b"") + b"\0" + str(caption).encode())

    def record_name(self, position: int) -> str:
        return f"{self.path.name} row {position + 1}"

    def fingerprint(self) -> str:
        return file_fingerprint(self.path)
