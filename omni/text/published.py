"""The tokenizer of a published language model: its own ids and chat template, then the control tokens of this project.

    ids 0 .. num_theirs-1                theirs: text, special tokens, rows without a token (num_theirs is num_text)
    ids num_theirs ..                    CONTROL_NAMES

Text never gives a special id, nor that of a token that the chat template contains ("marks", such as <think>), even
where the library would match the spelling. A model may emit marks as text; special ids it may not, but for `ends`.
Other tokens that were added to the library, such as Gemma's runs of spaces, are ordinary text.

`encode` gives the ids of transformers for the same text. It may be lossy: a model may normalise text (NFC), write a
space in front, or lack ids for rare characters. So decode(encode(x)) == x is not checked here; `decode` joins bytes as
everywhere, and drops the one space in front that such a model adds. Bytes that are not UTF-8 decode to U+FFFD as in the
WHATWG standard; transformers may give another number of them.

A model without a chat template reads plain text: its begin token, if its tokenizer adds one, then the segments.
convert.py makes this of a published folder. The files load with the `tokenizers` library and jinja2 alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from pydantic import Field

from omni.config import Frozen
from omni.text.byte_decoder import ByteDecoder, state_of
from omni.text.template import ChatTemplate
from omni.text.tokenizer import Read, TextStream, Tokenizer, backends, prefix_tree_pattern, write_whole

TEMPLATE_FILE = "chat_template.jinja"


class PublishedSettings(Frozen):
    """What the library's file does not say. In tokenizer_config.json, under the key "published"."""

    num_theirs: int = Field(gt=0, le=1 << 24, description="rows of the model's embedding")
    bos: int | None = Field(default=None, description="the id that begins a text")
    adds_bos: bool = Field(default=False, description="whether plain text begins with it")
    ends: tuple[int, ...] = Field(default=(), description="ids that end a reply")
    end: int | None = Field(default=None, description="the id that ends an assistant's turn; None: the first of ends")
    marks: tuple[str, ...] = Field(
        default=(), description="tokens that the chat template contains and that are not special"
    )
    special: dict[str, str] = Field(default={}, description="special tokens by name, for the chat template")
    variables: dict[str, Any] = Field(default={}, description="further variables of the chat template")
    template: str | None = Field(default=None, description="blake2b of chat_template.jinja; None: no template")


@backends.register("published")
class PublishedTokenizer(Tokenizer):
    """See Tokenizer and the head of this file. The model file, tokenizer.json, is the library's own format.

    `theirs`: the id of each spelling of a special token or mark. `template`: the chat template, or None.
    """

    backend = "published"
    file_name = "tokenizer.json"
    own_turns = False

    def __init__(
        self, library: tokenizers.Tokenizer, settings: PublishedSettings, template: ChatTemplate | None = None
    ) -> None:
        self._library_file, self.settings, self.template = library, settings, template
        added = library.get_added_tokens_decoder()
        named = {*settings.marks, *settings.special.values()}
        self.added = {one.content: one for one in added.values() if one.special or one.content in named}
        self.theirs = {one.content: token for token, one in added.items() if one.content in self.added}
        num = settings.num_theirs
        marks = set(settings.marks)
        silent = {token for spelling, token in self.theirs.items() if spelling not in marks}
        vocabulary = {token: text for text, token in library.get_vocab().items()}
        if lost := [token for token in vocabulary if token >= num and token not in silent]:
            raise ValueError(
                f"the model has {num} embedding rows, and its tokenizer the text id {min(lost)}; "
                "the files of model and tokenizer do not belong together"
            )
        self._spellings = {token: text for token, text in vocabulary.items() if token < num}
        self._is_text = bytearray(token in self._spellings and token not in silent for token in range(num))
        self._decoder = ByteDecoder(library.decoder)
        self._first = _literal_library(library, set(self.theirs))
        later = state_of(library.pre_tokenizer).replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        self._later = self._first
        if later != state_of(library.pre_tokenizer):
            self._later = _literal_library(library, set(self.theirs), later)
        super().__init__([self._decoder.bytes_of(self._spellings.get(token, "")) for token in range(num)])
        self.longest_id = max((len(self._id_bytes[token]) for token in self.text_ids), default=1)
        self._set_ends()

    def _set_ends(self) -> None:
        """`end` and `ends` of the settings. ValueError for ids that are no special token of the model."""
        ends = self.settings.ends
        if wrong := [token for token in ends if not 0 <= token < self.num_text]:
            raise ValueError(f"a reply cannot end with id {wrong[0]}: the model has the ids 0 to {self.num_text - 1}")
        self.end = self.settings.end if self.settings.end is not None else ends[0] if ends else self.control.end
        self.ends = tuple(dict.fromkeys((self.end, *ends)))
        for token in self.ends:
            if token < self.num_text:
                self._is_text[token] = False

    # ---- text ------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: those of transformers, without special tokens; [] for "". ValueError if it is not a str."""
        return self.encode_piece(text)[0]

    def encode_piece(self, text: str, is_first: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a piece of text, and the characters (start, stop) of each. is_first: whether nothing is before it;
        some models write a space in front there. Ids of `theirs` are not among them."""
        if not isinstance(text, str):
            raise ValueError(f"only a str can be tokenized, got {type(text).__name__} {text!r:.80}")
        ids: list[int] = []
        where: list[tuple[int, int]] = []
        start = 0
        for match in (*self.verbatim_pattern.finditer(text), None):
            stop = len(text) if match is None else match.start()
            for token, span in self._library_ids(text[start:stop], is_first and not start):
                ids.append(token)
                where.append((start + span[0], start + span[1]))
            if match is not None:
                for at in range(match.start(), match.end()):
                    own = self._ids_of_bytes(text[at].encode("utf-8", "surrogatepass"))
                    ids += own
                    where += [(at, at + 1)] * len(own)
                start = match.end()
        return ids, where

    def _library_ids(self, text: str, is_first: bool) -> Iterable[tuple[int, tuple[int, int]]]:
        """Ids and their characters (start, stop) of text without surrogates."""
        if not text:
            return
        encoded = (self._first if is_first else self._later).encode(text, add_special_tokens=False)
        for token, span in zip(encoded.ids, encoded.offsets, strict=True):
            if token in self._theirs_by_id:  # a unigram model has its special tokens among its pieces
                for part in self._parts_of(self._theirs_by_id[token]):
                    yield part, span
            else:
                yield token, span

    def _parts_of(self, spelling: str) -> list[int]:
        """Text ids of a spelling of `theirs`: the longest pieces first, then bytes."""
        ids: list[int] = []
        while spelling:
            sizes = range(len(spelling), 0, -1)
            size = next((n for n in sizes if self._pieces.get(spelling[:n]) is not None), 0)
            ids += [self._pieces[spelling[:size]]] if size else self._ids_of_bytes(spelling[0].encode())
            spelling = spelling[size or 1 :]
        return ids

    def _ids_of_bytes(self, data: bytes) -> list[int]:
        return [self._byte_ids[byte] for byte in data if self._byte_ids[byte] >= 0]

    def _split(self, text: str) -> list[int]:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of text ids, as transformers decodes them; ValueError for any other id."""
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.flush()

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one text id; ValueError for any other id."""
        if 0 <= token < self.num_text and not self._is_text[token]:
            raise ValueError(f"id {token} is {self.name(token)!r}, not text; decode text ids only")
        return super().bytes_of(token)

    def is_text(self, token: int) -> bool:
        return 0 <= token < self.num_text and bool(self._is_text[token])

    @property
    def text_ids(self) -> Sequence[int]:
        return [token for token, flag in enumerate(self._is_text) if flag]

    def name(self, token: int) -> str:
        """Spelling of a special token, "row N without a token", or the name of a control id of this project."""
        if 0 <= token < self.num_text:
            return self._theirs_by_id.get(token) or self._spellings.get(token) or f"row {token} without a token"
        return super().name(token)

    def stream(self) -> TextStream:
        return _PublishedStream(self, self._decoder)

    @cached_property
    def _theirs_by_id(self) -> dict[int, str]:
        return {token: spelling for spelling, token in self.theirs.items()}

    @cached_property
    def _pieces(self) -> dict[str, int]:
        """Text ids by their text."""
        found: dict[str, int] = {}
        for token in self._spellings:
            if token not in self._theirs_by_id and self._is_text[token]:
                found.setdefault(self._id_bytes[token].decode("utf-8", "replace"), token)
        return found

    def byte_id(self, byte: int) -> int:
        """The id of one single byte. ValueError where the vocabulary has none."""
        if self._byte_ids[byte] < 0:
            raise ValueError(f"this model's vocabulary has no id for the byte {byte:#04x}")
        return self._byte_ids[byte]

    def _check_round_trip(self) -> None:
        """Nothing is checked: a published model may change text."""

    def _find_byte_ids(self) -> tuple[int, ...]:
        """The first text id of each single byte, -1 for none: some published vocabularies lack rare bytes."""
        first: dict[bytes, int] = {}
        for token, value in enumerate(self._id_bytes):
            if len(value) == 1 and self._is_text[token]:
                first.setdefault(value, token)
        return tuple(first.get(bytes([byte]), -1) for byte in range(256))

    # ---- turns -----------------------------------------------------------------------------------------------------

    @cached_property
    def spelled(self) -> re.Pattern[str]:
        """Matches the longest spelling of `theirs`. One character alone is no such spelling."""
        return re.compile(prefix_tree_pattern([one for one in self.theirs if len(one) > 1]) or r"(?!)")

    def spelled_in(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of every token of `theirs` in a text of the chat template, as the library finds
        them; with the white space that the token takes up. ValueError for one without a row in the model."""
        before = 0
        for found in self.spelled.finditer(text):
            start, stop = found.span()
            one, token = self.added[found.group()], self.theirs[found.group()]
            if one.single_word and (text[start - 1 : start].isalnum() or text[stop : stop + 1].isalnum()):
                continue
            if one.lstrip:
                start = max(before, len(text[:start].rstrip()))
            if one.rstrip:
                stop = len(text) - len(text[stop:].lstrip())
            if token >= self.num_text:
                raise ValueError(f"the chat template writes {found.group()!r}, for which the model has no row")
            yield start, stop, token
            before = stop

    def may_begin_spelling(self, text: str) -> bool:
        """Whether text that follows could complete a spelling of `theirs` that this text begins."""
        begins, _, longest = self._edges
        sizes = range(1, min(longest, len(text)) + 1)
        return self._may_be_inside(text) or any(text[-size:] in begins for size in sizes)

    def may_end_spelling(self, text: str) -> bool:
        """Whether this text could complete a spelling of `theirs` that text before it begins."""
        _, ends, longest = self._edges
        sizes = range(1, min(longest, len(text)) + 1)
        return self._may_be_inside(text) or any(text[:size] in ends for size in sizes)

    def _may_be_inside(self, text: str) -> bool:
        return 0 < len(text) < self._edges[2] and text in self._insides

    @cached_property
    def _edges(self) -> tuple[set[str], set[str], int]:
        """Proper beginnings and endings of all spellings of `theirs`, and the length of the longest of them."""
        begins = {one[:size] for one in self.theirs for size in range(1, len(one))}
        ends = {one[size:] for one in self.theirs for size in range(1, len(one))}
        return begins, ends, max(map(len, self.theirs), default=1)

    @cached_property
    def _insides(self) -> str:
        """The insides of all spellings of `theirs`, NUL between two."""
        return "\0".join(one[1:-1] for one in self.theirs)

    # ---- files -----------------------------------------------------------------------------------------------------

    @classmethod
    def train(cls, texts: Iterable[str], num_text: int) -> Tokenizer:
        raise ValueError("a published tokenizer is not trained here; take the backend 'bpe' or 'sentencepiece'")

    def with_phrases(self, phrases: Sequence[str]) -> Self:
        raise ValueError("a published tokenizer takes no phrases: its model has no ids for them")

    def _model_bytes(self) -> bytes:
        return self._library_file.to_str(pretty=False).encode("utf-8")

    @classmethod
    def _from_model_bytes(cls, data: bytes, phrases: Sequence[str] = ()) -> Self:
        raise ValueError("a published tokenizer needs its tokenizer_config.json; load the folder")

    def save(self, directory: str | Path) -> None:
        """Write chat_template.jinja, if there is one, then as every tokenizer."""
        if self.template is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            write_whole(Path(directory) / TEMPLATE_FILE, self.template.source.encode("utf-8"))
        super().save(directory)

    def describe(self) -> dict[str, Any]:
        template = None if self.template is None else _digest(self.template.source.encode("utf-8"))
        settings = self.settings.model_copy(update={"template": template})
        return {**super().describe(), "published": settings.model_dump(mode="json")}

    @classmethod
    def _from_saved(cls, data: bytes, config: Mapping[str, Any], read: Read) -> Self:
        settings = PublishedSettings.model_validate(config.get("published", {}))
        source = None if settings.template is None else read(TEMPLATE_FILE)
        if source is not None and _digest(source) != settings.template:
            raise ValueError(f"{TEMPLATE_FILE} is damaged: its digest is not the one in tokenizer_config.json")
        try:
            library = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{cls.file_name} is no model of the tokenizers library: {error}") from None
        template = None
        if source is not None:
            template = ChatTemplate(source.decode("utf-8"), settings.special, settings.variables)
        return cls(library, settings, template)


class _PublishedStream(TextStream):
    """Drops what the model's decoder drops at the start of a text."""

    def __init__(self, tokenizer: PublishedTokenizer, decoder: ByteDecoder) -> None:
        super().__init__(tokenizer)
        self._decoder, self._is_start = decoder, True

    def _bytes_of(self, token: int) -> bytes:
        data = super()._bytes_of(token)
        if self._is_start and data:
            self._is_start, data = False, self._decoder.at_start(data)
        return data


def _literal_library(
    library: tokenizers.Tokenizer, theirs: set[str], pre_tokenizer: str | None = None
) -> tokenizers.Tokenizer:
    """A library with the same model (shared, not copied) that matches no token of `theirs` in text. Ids are kept, as
    all added tokens are added in order. ValueError where they would not be."""
    literal = tokenizers.Tokenizer(library.model)
    if library.normalizer is not None:
        literal.normalizer = library.normalizer
    if library.pre_tokenizer is not None:
        literal.pre_tokenizer = library.pre_tokenizer
    if pre_tokenizer is not None:
        changed = tokenizers.pre_tokenizers.Sequence([])
        changed.__setstate__(pre_tokenizer.encode())  # type: ignore[attr-defined]
        literal.pre_tokenizer = changed
    added = library.get_added_tokens_decoder()
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    for token in sorted(added):
        one = added[token]
        options = {name: getattr(one, name) for name in flags}
        is_theirs = one.content in theirs
        again = tokenizers.AddedToken(one.content, special=is_theirs, **options)
        (literal.add_special_tokens if is_theirs else literal.add_tokens)([again])
        if literal.token_to_id(one.content) != token:
            raise ValueError(f"the added token {one.content!r} has the id {token}, which the library does not give it")
    literal.encode_special_tokens = True
    return literal


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
