"""Byte-level BPE of the `tokenizers` library, with GPT-2's splitting: " apple" can be one token.

The library's model holds text tokens only: no special token, no added token, no normaliser, no post-processor.
Loading rejects a file that has any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Self

import tokenizers

from omni.config import parse_json, table_of
from omni.text.tokenizer import Tokenizer, backends


@backends.register("bpe")
class BPETokenizer(Tokenizer):
    """See Tokenizer. The model file, tokenizer.json, is the library's own format."""

    backend = "bpe"
    file_name = "tokenizer.json"

    def __init__(self, library: tokenizers.Tokenizer, phrases: Sequence[str] = ()) -> None:
        self._library = library
        to_byte = {char: byte for byte, char in enumerate(byte_characters())}
        tokens = sorted(library.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        if [token for _, token in tokens] != list(range(len(tokens))):
            raise ValueError("the vocabulary's ids are not 0, 1, 2, ...; train it again")
        try:
            id_bytes = [bytes([to_byte[char] for char in text]) for text, _ in tokens]
        except KeyError as error:
            raise ValueError(f"the vocabulary is not byte-level: it has the character {error}") from None
        super().__init__(id_bytes, phrases)

    @classmethod
    def train(cls, texts: Iterable[str], num_text: int) -> BPETokenizer:
        """Train on `texts` to exactly `num_text` ids (at least 256, the bytes). ValueError for a corpus too small."""
        if num_text < 256:
            raise ValueError(f"vocab_size {num_text} is below 256, one id for each byte; raise it")
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=num_text, min_frequency=2, show_progress=False, special_tokens=[], initial_alphabet=alphabet
        )
        library.train_from_iterator(texts, trainer)
        if library.get_vocab_size() != num_text:
            got = library.get_vocab_size()
            raise ValueError(f"the corpus yields {got} tokens, not vocab_size {num_text}; give more text or lower it")
        return cls(library)

    def _split(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids if text else []

    def _model_bytes(self) -> bytes:
        return self._library.to_str(pretty=False).encode("utf-8")

    @classmethod
    def _from_model_bytes(cls, data: bytes, phrases: Sequence[str] = ()) -> Self:
        """See Tokenizer. ValueError for parts that change text."""
        parts = table_of(parse_json(data, cls.file_name), cls.file_name)
        for part in ("added_tokens", "normalizer", "post_processor", "truncation", "padding"):
            if parts.get(part):
                raise ValueError(f"{cls.file_name} has {part!r}, so text could change or become a control token")
        try:
            library = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{cls.file_name} is no model of the tokenizers library: {error}") from None
        return cls(library, phrases)


@cache
def byte_characters() -> str:
    """GPT-2's printable characters for the 256 bytes, in byte order (openai/gpt-2, encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 256 + hidden.index(byte)) for byte in range(256))
