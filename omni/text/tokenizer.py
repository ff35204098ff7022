"""Tokenizer: text to ids and back, exactly; control tokens exist only as ids above the text ids.

    ids 0 .. num_text-1                      text: returned by `encode`, accepted by `decode`
    ids num_text .. num_text+len(control)-1  control: roles, media blocks and their size header

The library has no control tokens, so no text can produce one. Every text id has a fixed string of bytes; decoding joins
the bytes. Text is UTF-8; a lone surrogate, which UTF-8 forbids, is its own three bytes (Python's "surrogatepass"):
decode(encode(x)) == x for every Python str. Bytes that are not text (a model may emit any) decode to U+FFFD.

Phrases (" hot beverage") are text ids after the library's ids. Each name of a corpus can have one id and thus its own
embedding. SuperBPE (arXiv 2503.13423) finds such ids by frequency.

A published model's tokenizer (published.py) may change text, has special tokens below num_text, which are no text
(`is_text`), and a chat template for turns.

bpe.py and sentencepiece.py split and merge text; compose.py lays out turns.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from omni.config import parse_json
from omni.document import Role
from omni.registry import Registry

MAX_SIZE = 64  # one control id each: never change it
CONTROL_NAMES: tuple[str, ...] = (
    *("pad", "begin", "system", "user", "assistant", "end", "image", "video", "media_end"),
    *(f"size_{n}" for n in range(1, MAX_SIZE + 1)),
)
CONFIG_FILE = "tokenizer_config.json"
MAX_BYTES = 256 << 20  # of a file
Read = Callable[[str], bytes]
# Encoded and decoded at start: text that a lossy tokenizer changes.
_PROBE = " two  spaces\n\ttab \u2581 <unk></s><s><0x0A>\x00\u2028\ud800 \ufb01 \u212b e\u0301 "

backends: Registry[type[Tokenizer]] = Registry("tokenizer backend", "omni.text", entry_points="omni.tokenizers")


class ControlTokens:
    """Ids of the control tokens: `first` + index in CONTROL_NAMES (tokenizers_cfg/control_tokens.toml has the table).

    Attributes pad, begin, system, user, assistant, end, image, video, media_end are ids.
    Checkpoints hold these ids: never reorder; change the toml with it.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.pad, self.begin, self.system, self.user, self.assistant, self.end = range(first, first + 6)
        self.image, self.video, self.media_end = range(first + 6, first + 9)
        self._before_sizes = first + 8  # size_n is _before_sizes + n

    def __len__(self) -> int:
        return len(CONTROL_NAMES)

    def __contains__(self, token: object) -> bool:
        return isinstance(token, int) and self.first <= token < self.first + len(self)

    def size(self, n: int) -> int:
        """Id of the size token for n latents (or chunks, or frames a second), 1 <= n <= MAX_SIZE; ValueError beyond."""
        if not 1 <= n <= MAX_SIZE:
            raise ValueError(f"a media side of {n} latents has no size token (1 to {MAX_SIZE}); resize or split it")
        return self._before_sizes + n

    def size_of(self, token: int) -> int | None:
        """n when `token` is a size token, else None."""
        n = token - self._before_sizes
        return n if 1 <= n <= MAX_SIZE else None

    def role(self, role: Role) -> int:
        """Id that opens a turn of this role."""
        return {Role.SYSTEM: self.system, Role.USER: self.user, Role.ASSISTANT: self.assistant}[role]

    def name(self, token: int) -> str:
        """Name of a control id, such as "image" or "size_4"; ValueError for any other id."""
        if token not in self:
            raise ValueError(f"{token} is no control id ({self.first} to {self.first + len(self) - 1} are)")
        return CONTROL_NAMES[token - self.first]


class Tokenizer(ABC):
    """Text to ids below `num_text` and back. A subclass splits text, and passes the bytes of each id to `__init__`.

    `own_turns`: whether turns are written with the control tokens of this project, else as the published model does.
    `ends`: the ids that end a reply; `end`: the one of an assistant's turn.

    `verbatim_pattern`: characters that are encoded as the ids of their bytes, without the library. `phrases`: texts
    with one id each, in the order of their ids, the last text ids (see `with_phrases`).
    """

    backend: ClassVar[str]
    file_name: ClassVar[str]
    own_turns: ClassVar[bool] = True
    verbatim_pattern: ClassVar[re.Pattern[str]] = re.compile("[\ud800-\udfff]+")

    def __init__(self, id_bytes: Sequence[bytes], phrases: Sequence[str] = ()) -> None:
        self.phrases = _checked_phrases(phrases, self.verbatim_pattern)
        self._phrase_ids = {phrase: len(id_bytes) + number for number, phrase in enumerate(self.phrases)}
        self._phrase_pattern = _longest_phrase_pattern(self.phrases)
        self._id_bytes = (*id_bytes, *(phrase.encode("utf-8") for phrase in self.phrases))
        self.num_text = len(self._id_bytes)
        self.longest_id = max(map(len, self._id_bytes))  # in bytes; n characters have at least n / longest_id ids
        self.control = ControlTokens(self.num_text)
        self.end = self.control.end
        self.ends: tuple[int, ...] = (self.end,)
        self._byte_ids = self._find_byte_ids()
        self._check_round_trip()

    def _check_round_trip(self) -> None:
        """ValueError for a library that changes text."""
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(
                f"{self.file_name} changes text (it normalises it, strips spaces or adds one in front);"
                " train a tokenizer with `python -m train.tools.tokenizer`"
            )

    @property
    def vocab_size(self) -> int:
        """The number of text ids and control ids."""
        return self.num_text + len(self.control)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, every one below num_text; [] for "". ValueError if it is not a str."""
        if not isinstance(text, str):
            raise ValueError(f"only a str can be tokenized, got {type(text).__name__} {text!r:.80}")
        ids: list[int] = []
        start = 0
        for match in self.verbatim_pattern.finditer(text):
            ids += self._split_phrases(text[start : match.start()])
            ids += [self._byte_ids[byte] for byte in match.group().encode("utf-8", "surrogatepass")]
            start = match.end()
        return ids + self._split_phrases(text[start:])

    def _split_phrases(self, text: str) -> list[int]:
        """Ids of text without verbatim characters: one for each phrase, and the library's for what is between."""
        if self._phrase_pattern is None:
            return self._split(text)
        ids: list[int] = []
        start = 0
        for match in self._phrase_pattern.finditer(text):
            ids += [*self._split(text[start : match.start()]), self._phrase_ids[match.group()]]
            start = match.end()
        return ids + self._split(text[start:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of text ids; ValueError for a control id or one out of range. decode(encode(x)) == x."""
        return decode_bytes(b"".join([self.bytes_of(token) for token in ids]))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one text id; ValueError for any other id."""
        if not 0 <= token < self.num_text:
            what = f"the control id {self.control.name(token)!r}" if token in self.control else "out of range"
            raise ValueError(f"id {token} is {what}, not text (0 to {self.num_text - 1}); decode text ids only")
        return self._id_bytes[token]

    def is_text(self, token: int) -> bool:
        """Whether a model may emit an id as text, and `decode` accepts it. `text_ids`: all of these, in order."""
        return 0 <= token < self.num_text

    @property
    def text_ids(self) -> Sequence[int]:
        return range(self.num_text)

    def name(self, token: int) -> str:
        """Name of an id that is not text, for reports; ValueError for a text id or one out of range."""
        return self.control.name(token)

    def byte_id(self, byte: int) -> int:
        """The id of one single byte."""
        return self._byte_ids[byte]

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time."""
        return TextStream(self)

    @classmethod
    @abstractmethod
    def train(cls, texts: Iterable[str], num_text: int) -> Tokenizer:
        """A tokenizer of exactly `num_text` text ids, trained on `texts`. ValueError if the corpus is too small."""

    def with_phrases(self, phrases: Sequence[str]) -> Self:
        """The same tokenizer with one id for each of `phrases`; the other text ids stay. It must have none yet.

        A phrase counts where a word ends after it, a plural "s" aside, and, unless it starts with a space, where no
        word and no space is before it; of several that fit, the longest does. Raises ValueError for an empty phrase,
        one given twice, or one with characters that the library never sees.
        """
        if self.phrases:
            raise ValueError(f"this tokenizer has {len(self.phrases)} phrases already; give them all at once")
        return self._from_model_bytes(self._model_bytes(), phrases)

    @abstractmethod
    def _split(self, text: str) -> list[int]:
        """Ids of text without verbatim characters; [] for ""."""

    @abstractmethod
    def _model_bytes(self) -> bytes:
        """The library's model file."""

    @classmethod
    @abstractmethod
    def _from_model_bytes(cls, data: bytes, phrases: Sequence[str] = ()) -> Self:
        """Inverse of _model_bytes; ValueError for a model that could match control spellings in text."""

    def save(self, directory: str | Path) -> None:
        """Write the library's model file, then tokenizer_config.json with its digest; each file appears whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        model = self._model_bytes()
        write_whole(directory / self.file_name, model)
        write_whole(directory / CONFIG_FILE, (json.dumps(self.describe(), indent=2) + "\n").encode())

    def describe(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: backend, sizes, control names, digest of the model file."""
        return {
            "backend": self.backend,
            "file": self.file_name,
            "blake2b": hashlib.blake2b(self._model_bytes(), digest_size=16).hexdigest(),
            "num_text": self.num_text,
            "vocab_size": self.vocab_size,
            "control": list(CONTROL_NAMES),
        } | ({"phrases": list(self.phrases)} if self.phrases else {})

    @classmethod
    def load(cls, directory: str | Path, read: Read | None = None) -> Self:
        """Load a saved tokenizer. ValueError for missing, damaged or incompatible files. `read` returns the bytes of a
        file of the directory by name; None reads the disk."""
        directory, read = Path(directory), read or from_disk(Path(directory))
        config = read_config(directory, read)
        if config["backend"] != cls.backend:
            raise ValueError(f"{str(directory)!r} holds a {config['backend']!r} tokenizer; use load_tokenizer")
        path, data = directory / cls.file_name, read(cls.file_name)
        if hashlib.blake2b(data, digest_size=16).hexdigest() != config["blake2b"]:
            raise ValueError(f"{str(path)!r} is damaged: its digest is not the one in {CONFIG_FILE}; restore the file")
        tokenizer = cls._from_saved(data, config, read)
        if config["control"] != list(CONTROL_NAMES) or config["num_text"] != tokenizer.num_text:
            raise ValueError(f"{str(directory)!r} has another table of control tokens or text ids; train it again")
        return tokenizer

    @classmethod
    def _from_saved(cls, data: bytes, config: Mapping[str, Any], read: Read) -> Self:
        """The tokenizer of a saved model file, whose digest is right, and the content of tokenizer_config.json."""
        return cls._from_model_bytes(data, config.get("phrases", ()))

    def _find_byte_ids(self) -> tuple[int, ...]:
        """The first id of each single byte. ValueError if a byte has none."""
        first: dict[bytes, int] = {}
        for token, value in enumerate(self._id_bytes):
            if len(value) == 1:
                first.setdefault(value, token)
        missing = [byte for byte in range(256) if bytes([byte]) not in first]
        if missing:
            raise ValueError(f"the vocabulary lacks ids for {len(missing)} of the 256 bytes, such as {missing[0]:#04x}")
        return tuple(first[bytes([byte])] for byte in range(256))


def _checked_phrases(phrases: object, verbatim: re.Pattern[str]) -> tuple[str, ...]:
    """The phrases. ValueError for one that is empty, given twice, or no plain text."""
    if not isinstance(phrases, Sequence) or isinstance(phrases, str):
        raise ValueError(f"phrases must be a list of texts, got {phrases!r:.80}")
    seen: set[object] = set()
    for phrase in phrases:
        if not isinstance(phrase, str) or not phrase or verbatim.search(phrase) or phrase in seen:
            raise ValueError(f"{phrase!r} cannot be a phrase: it is empty, given twice, or no plain text")
        seen.add(phrase)
    return tuple(phrases)


def _longest_phrase_pattern(phrases: Sequence[str]) -> re.Pattern[str] | None:
    """Matches the longest phrase that fits. It ends where a word does, a plural s aside; it begins with its space, or
    where neither a space nor a word is before it. None without phrases."""
    if not phrases:
        return None
    inside, alone = ([p for p in phrases if p[0].isspace() == spaced] for spaced in (True, False))
    try:
        trees = ([prefix_tree_pattern(inside)] if inside else []) + (
            [rf"(?<![\w\s]){prefix_tree_pattern(alone)}"] if alone else []
        )
        either = "|".join(trees)
        return re.compile(rf"(?:{either})(?=s?(?![^\W_]))")
    except RecursionError:
        raise ValueError("these phrases are beginnings of one another too many times over; give fewer") from None


def prefix_tree_pattern(words: Sequence[str]) -> str:
    """A pattern of any of the words, the longest first, as a tree of letters: thousands of words side by side would
    each be tried at every place of a text."""
    by_letter: dict[str, list[str]] = {}
    for word in filter(None, words):
        by_letter.setdefault(word[0], []).append(word)
    parts = []
    for some in by_letter.values():
        common = os.path.commonprefix(some)
        parts.append(re.escape(common) + prefix_tree_pattern([word[len(common) :] for word in some]))
    if not parts:
        return ""
    branches = "|".join(parts)
    return f"(?:{branches})?" if "" in words else f"(?:{branches})" if len(parts) > 1 else branches


class TextStream:
    """Decodes ids one by one; holds back the bytes of an unfinished character.

    The joined strings of every `push` and of `flush` equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unfinished_bytes = b""

    def push(self, token: int) -> str:
        """The text that this id completes; "" while a character is unfinished."""
        data = self._unfinished_bytes + self._bytes_of(token)
        cut = len(data) - _unfinished(data)
        self._unfinished_bytes = data[cut:]
        return decode_bytes(data[:cut])

    def _bytes_of(self, token: int) -> bytes:
        return self._tokenizer.bytes_of(token)

    def flush(self) -> str:
        """The held-back bytes as text; an unfinished character gives U+FFFD."""
        data, self._unfinished_bytes = self._unfinished_bytes, b""
        return decode_bytes(data)


def decode_bytes(data: bytes) -> str:
    """UTF-8 to str. Three-byte surrogates give surrogates, other invalid bytes U+FFFD as in the WHATWG standard."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    parts: list[str] = []
    start = 0
    for match in _SURROGATE.finditer(data):
        parts.append(data[start : match.start()].decode("utf-8", "replace"))
        parts.append(match.group().decode("utf-8", "surrogatepass"))
        start = match.end()
    parts.append(data[start:].decode("utf-8", "replace"))
    return "".join(parts)


_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_UNFINISHED_CHARACTER = re.compile(  # a valid start of a character, cut off by the end of the data
    rb"([\xc2-\xf4]|\xe0[\xa0-\xbf]|[\xe1-\xef][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]?|[\xf1-\xf3][\x80-\xbf]{1,2}|\xf4[\x80-\x8f][\x80-\xbf]?)\Z"
)


def _unfinished(data: bytes) -> int:
    """The number of bytes at the end that may still become a character."""
    tail = data[-3:]
    match = _UNFINISHED_CHARACTER.search(tail)
    return len(tail) - match.start() if match else 0


def write_whole(path: Path, data: bytes) -> None:
    """Write under another name, then rename: `path` is never half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def from_disk(directory: Path) -> Read:
    """A function that returns the bytes of a file of `directory` by its name. ValueError where it cannot."""

    def read(name: str) -> bytes:
        try:
            with (directory / name).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except FileNotFoundError:
            raise ValueError(f"{str(directory)!r} holds no tokenizer ({name} is missing); train one") from None
        except OSError as error:
            raise ValueError(f"cannot read {str(directory / name)!r}: {error.strerror}") from None
        if len(data) > MAX_BYTES:
            raise ValueError(f"{str(directory / name)!r} has more than {MAX_BYTES:,} bytes; no tokenizer is so large")
        return data

    return read


def read_config(directory: Path, read: Read) -> dict[str, Any]:
    """The content of tokenizer_config.json. ValueError where keys are missing."""
    source = str(directory / CONFIG_FILE)
    config = parse_json(read(CONFIG_FILE), source)
    wanted = {"backend", "blake2b", "num_text", "control"}
    if not isinstance(config, dict) or not wanted <= config.keys():
        raise ValueError(f"{source!r} describes no Omni tokenizer: it needs the keys {', '.join(sorted(wanted))}")
    return config
