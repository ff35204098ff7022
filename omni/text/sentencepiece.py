"""SentencePiece with the Tokenizer interface: identity normalisation, byte fallback, no dummy prefix, no user-defined
symbols.

The library writes a space as U+2581, so it confuses the two, and it stops at NUL. These characters are encoded as the
ids of their UTF-8 bytes (byte fallback) and decode exactly. Text is decoded from the bytes of each piece, not by the
library's decoder.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import sentencepiece

from omni.text.tokenizer import Tokenizer, backends

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6  # SentencePiece.Type in sentencepiece_model.proto


@backends.register("sentencepiece")
class SentencePieceTokenizer(Tokenizer):
    """See Tokenizer. The model file, tokenizer.model, is the library's own format."""

    backend = "sentencepiece"
    file_name = "tokenizer.model"
    verbatim_pattern = re.compile("[\x00\u2581\ud800-\udfff]+")

    def __init__(self, model: bytes, phrases: Sequence[str] = ()) -> None:
        self._model = model
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{self.file_name} is no SentencePiece model: {error}") from None
        super().__init__([self._piece_bytes(token, kind) for token, kind in enumerate(_piece_kinds(model))], phrases)

    def _piece_bytes(self, token: int, kind: int) -> bytes:
        """The bytes that a piece stands for. ValueError for a control or user-defined symbol."""
        piece = self._library.id_to_piece(token)
        if kind == _BYTE:
            return bytes([int(piece[3:5], 16)])
        if kind == _UNKNOWN:
            return "\ufffd".encode()
        if kind != _NORMAL:
            raise ValueError(f"piece {piece!r} of {self.file_name} is a control or user-defined symbol; train without")
        return piece.replace("\u2581", " ").encode("utf-8")

    @classmethod
    def train(cls, texts: Iterable[str], num_text: int) -> SentencePieceTokenizer:
        """Train a unigram model on `texts` to exactly `num_text` ids (at least 300: 256 bytes, <unk>, characters)."""
        if num_text < 300:
            raise ValueError(f"vocab_size {num_text} is below 300 (256 bytes, <unk>, some characters); raise it")
        lines = list(_lines(texts))  # before training: an error of the corpus keeps its type
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="unigram",
                vocab_size=num_text,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                byte_fallback=True,
                character_coverage=0.9995,
                max_sentence_length=1 << 20,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"vocab_size {num_text} does not fit the corpus: {reason}") from None
        return cls(model.getvalue())

    def _split(self, text: str) -> list[int]:
        return self._library.encode(text, out_type=int) if text else []

    def _model_bytes(self) -> bytes:
        return self._model

    @classmethod
    def _from_model_bytes(cls, data: bytes, phrases: Sequence[str] = ()) -> Self:
        return cls(data, phrases)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of training text; the trainer skips lines with its reserved characters, so text is also split there."""
    for text in texts:
        for line in re.split("[\n\r\x00\u2581\u2585\ud800-\udfff]+", text):
            if line:
                yield line


def _piece_kinds(model: bytes) -> list[int]:
    """Type of every piece, read from the model's protobuf: field 1 is a piece, whose field 3 is its type."""
    kinds: list[int] = []
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            kinds.append(next((v for n, v in _fields(value) if n == 3 and isinstance(v, int)), _NORMAL))
    return kinds


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of one protobuf message; fixed-width numbers are their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"the model file is damaged: protobuf wire type {wire}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, offset after it) of a protobuf varint at offset `at`."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("the model file is damaged: it ends inside a number, or one is too long")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
