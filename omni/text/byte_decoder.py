"""The decoder of a published tokenizer as bytes of each id, so that text can be streamed.

The `tokenizers` library describes a decoder as steps. Those of decoder language models are known here: bytes as GPT-2's
printable characters (ByteLevel), or "▁" for a space and <0xXX> for a byte (SentencePiece), where a space in front of
the whole text is dropped. Any other step is refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

from omni.text.bpe import byte_characters

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteDecoder:
    """`bytes_of` a token's spelling, and `at_start` of a text. ValueError for a decoder that is not known."""

    def __init__(self, decoder: Any) -> None:
        self._to_byte: dict[str, int] | None = None
        self._replacements: list[tuple[str, str]] = []
        self._has_bytes = self._is_fused = False
        self._num_dropped = 0  # spaces in front of a text
        self._drops_first = False  # all spaces of the first token
        described = json.loads(state_of(decoder) or "{}")
        for step in described["decoders"] if described.get("type") == "Sequence" else [described]:
            self._take(step)
        if self._to_byte is None and not self._has_bytes:
            raise ValueError(
                "the tokenizer has no ids for bytes, so it cannot write all text; only byte-level tokenizers and those "
                "of SentencePiece with byte fallback are supported"
            )

    def _take(self, step: dict[str, Any]) -> None:
        """Read one step."""
        match step:
            case {"type": "ByteLevel"}:
                self._to_byte = {char: byte for byte, char in enumerate(byte_characters())}
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "ByteFallback"}:
                self._has_bytes = True
            case {"type": "Fuse"}:
                self._is_fused = True
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if self._is_fused:
                self._num_dropped = start
            case {"type": "Metaspace", "replacement": str(mark), "prepend_scheme": str(scheme)}:
                self._replacements.append((mark, " "))
                self._drops_first = scheme != "never"
            case _:
                raise ValueError(
                    f"the tokenizer's decoder has the step {json.dumps(step)[:120]}, which is not supported: only "
                    "byte-level tokenizers and those of SentencePiece are"
                )

    def bytes_of(self, spelling: str) -> bytes:
        """The bytes of a token that is spelled so in the vocabulary."""
        if self._to_byte is not None:
            try:
                return bytes([self._to_byte[char] for char in spelling])
            except KeyError:
                return spelling.encode()
        if self._has_bytes and (match := _BYTE.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            spelling = spelling.replace(old, new)
        return spelling.encode()

    def at_start(self, data: bytes) -> bytes:
        """The bytes of the first token of a text, without the space that the model adds there."""
        if self._drops_first:
            return data.replace(b" ", b"")
        num = len(data) - len(data.lstrip(b" "))
        return data[min(num, self._num_dropped) :]


def state_of(part: tokenizers.decoders.Decoder | tokenizers.pre_tokenizers.PreTokenizer | None) -> str:
    """The description of a part of the library, as JSON; "" for none."""
    return "" if part is None else part.__getstate__().decode("utf-8")  # type: ignore[attr-defined]
