"""Parts of the Tokenizer class, checked by hand on a library with one id for each byte."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from omni.document import Role
from omni.text.loading import load_tokenizer
from omni.text.tokenizer import CONTROL_NAMES, ControlTokens, Tokenizer, backends, decode_bytes

BYTES = [bytes([n]) for n in range(256)]


@backends.register("test_bytes")
class ByteTokenizer(Tokenizer):
    """256 ids, then " the" as an id of the library."""

    backend, file_name = "test_bytes", "bytes.txt"

    @classmethod
    def train(cls, texts: Iterable[str], num_text: int) -> Tokenizer:
        raise NotImplementedError

    def _split(self, text: str) -> list[int]:
        assert not self.verbatim_pattern.search(text)
        whole = text.encode()
        return [256 if part == b" the" else part[0] for part in _cut(whole)]

    def _model_bytes(self) -> bytes:
        return b"bytes"

    @classmethod
    def _from_model_bytes(cls, data: bytes, phrases: Sequence[str] = ()) -> ByteTokenizer:
        assert data == b"bytes"
        return cls([*BYTES, b" the"], phrases)


def _cut(whole: bytes) -> Iterable[bytes]:
    while whole:
        size = 4 if whole.startswith(b" the") else 1
        yield whole[:size]
        whole = whole[size:]


@pytest.fixture
def plain() -> ByteTokenizer:
    return ByteTokenizer([*BYTES, b" the"])


# ---- control ids ---------------------------------------------------------------------------------------------------


def test_control_names_in_the_order_of_their_ids() -> None:
    nine = ("pad", "begin", "system", "user", "assistant", "end", "image", "video", "media_end")
    assert CONTROL_NAMES[:9] == nine and CONTROL_NAMES[9] == "size_1" and CONTROL_NAMES[-1] == "size_64"
    control = ControlTokens(100)
    assert [getattr(control, name) for name in nine] == list(range(100, 109))
    assert len(control) == len(CONTROL_NAMES) == 73 and (control.size(1), control.size(64)) == (109, 172)
    assert [token in control for token in (99, 100, 172, 173, "pad", 100.0)] == [False, True, True, False, False, False]
    assert [control.size_of(token) for token in (108, 109, 172, 173)] == [None, 1, 64, None]
    assert [control.name(token) for token in (100, 108, 109, 172)] == ["pad", "media_end", "size_1", "size_64"]
    assert [control.role(role) for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT)] == [102, 103, 104]
    for token in (99, 173):
        with pytest.raises(ValueError, match=rf"^{token} is no control id \(100 to 172 are\)$"):
            control.name(token)
    for n in (0, 65, -3):
        with pytest.raises(ValueError, match=rf"side of {n} latents has no size token \(1 to 64\)"):
            control.size(n)


def test_control_ids_follow_the_text_ids(plain: ByteTokenizer) -> None:
    assert (plain.num_text, plain.control.first, plain.vocab_size) == (257, 257, 330)
    assert plain.encode("<|pad|>pad") == list(b"<|pad|>pad")
    with pytest.raises(ValueError, match=r"^id 257 is the control id 'pad', not text \(0 to 256\); decode text ids"):
        plain.decode([65, 257])
    for token in (-1, 330):
        with pytest.raises(ValueError, match=rf"^id {token} is out of range, not text \(0 to 256\)"):
            plain.bytes_of(token)
    assert plain.bytes_of(0) == b"\0" and plain.bytes_of(256) == b" the"


# ---- text ----------------------------------------------------------------------------------------------------------


def test_surrogates_are_encoded_byte_by_byte(plain: ByteTokenizer) -> None:
    """The library encodes all text between and around surrogates."""
    for surrogates in ("\ud800", "\udfff\ud800"):
        own = list(surrogates.encode("utf-8", "surrogatepass"))
        assert len(own) == 3 * len(surrogates)
        assert plain.encode(f"a the{surrogates} the{surrogates}") == [97, 256, *own, 256, *own]
        assert plain.decode(plain.encode(f"a{surrogates}b")) == f"a{surrogates}b"
    assert plain.encode("\ud7ff\ue000") == list("\ud7ff\ue000".encode())
    with pytest.raises(ValueError, match=r"only a str can be tokenized, got list \['a'\]"):
        plain.encode(["a"])  # type: ignore[arg-type]


def test_a_byte_has_its_first_single_byte_id(plain: ByteTokenizer) -> None:
    assert [plain.byte_id(n) for n in (0, 65, 255)] == [0, 65, 255]
    assert ByteTokenizer([*BYTES, b" the", b"A"]).byte_id(65) == 65
    with pytest.raises(ValueError, match="lacks ids for 2 of the 256 bytes, such as 0x07"):
        ByteTokenizer([b for b in BYTES if b not in (b"\x07", b"\xff")])


def test_a_library_that_changes_text_raises() -> None:
    class Strips(ByteTokenizer):
        def _split(self, text: str) -> list[int]:
            return super()._split(text.strip(" "))

    with pytest.raises(ValueError, match="bytes.txt changes text"):
        Strips(BYTES)


def test_a_phrase_has_one_id_after_the_librarys_ids(plain: ByteTokenizer) -> None:
    named = plain.with_phrases([" cat", "été", " cat food"])
    assert named.phrases == (" cat", "été", " cat food") and (named.num_text, named.control.first) == (260, 260)
    assert named.encode("the cat\ud800 cats") == [*b"the", 257, *b"\xed\xa0\x80", 257, *b"s"]
    assert named.encode("été cat foods") == [258, 259, *b"s"] and named.encode("category") == list(b"category")
    assert named.encode("a the cat food.") == [97, 256, 259, 46]
    assert named.decode([257, 258]) == " catété" and named.describe()["phrases"] == [" cat", "été", " cat food"]
    with pytest.raises(ValueError, match="has 3 phrases already"):
        named.with_phrases([" dog"])
    for phrases in (" cat", 3, [" a", " a"], [""], [3], ["a\ud800"]):
        with pytest.raises(ValueError, match="phrase"):
            plain.with_phrases(phrases)  # type: ignore[arg-type]
    assert plain.with_phrases([]).encode(" cat") == list(b" cat") and "phrases" not in plain.describe()


# ---- streams -------------------------------------------------------------------------------------------------------

# All proper prefixes of characters: one code point of every 64 has them all.
BEGINNINGS = {
    code[:n] for point in range(0, 0x110000, 64) for code in [chr(point).encode("utf-8", "surrogatepass")]
    for n in range(1, len(code))
}  # fmt: skip
EDGES = [edge + step for edge in (0x80, 0x90, 0xA0, 0xC0, 0xC2, 0xE0, 0xE1, 0xED, 0xEE, 0xF0, 0xF4, 0xF5) for step in
         (-1, 0)]  # fmt: skip


def test_a_stream_holds_back_only_unfinished_characters(plain: ByteTokenizer) -> None:
    """All strings of three bytes near the edges of UTF-8's table, compared with a table built from characters."""
    leads = [byte for byte in EDGES if byte > 0xC0]
    for data in itertools.product([0x41, *leads], EDGES, [0x7F, 0x80, 0xBF, 0xC2]):
        stream, written, whole = plain.stream(), "", bytes(data)
        for n, byte in enumerate(data, 1):
            written += stream.push(byte)
            so_far = whole[:n]
            held = max((size for size in (1, 2, 3) if size <= n and so_far[-size:] in BEGINNINGS), default=0)
            assert written == decode_bytes(so_far[: n - held]), (data, n)
        assert written + stream.flush() == decode_bytes(whole) and stream.flush() == ""


def test_a_stream_emits_a_character_at_its_last_byte(plain: ByteTokenizer) -> None:
    for character in ("é", "猫", "👩", "\U0010ffff", "\ud800", "\udfff", "\ud7ff"):
        code = character.encode("utf-8", "surrogatepass")
        stream = plain.stream()
        assert [stream.push(byte) for byte in code] == [""] * (len(code) - 1) + [character]


def test_invalid_bytes_decode_to_replacement_characters() -> None:
    assert decode_bytes(b"abc\xff") == "abc\ufffd" and decode_bytes(b"") == ""
    assert decode_bytes(b"\xffa\xed\xa0\x80b\xed\xbf\xbfc\xe9") == "\ufffda\ud800b\udfffc\ufffd"


# ---- files ---------------------------------------------------------------------------------------------------------


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "tokenizer_config.json").read_text())


def test_saved_files_by_name_and_key(plain: ByteTokenizer, tmp_path: Path) -> None:
    named = plain.with_phrases([" cat"])
    named.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["bytes.txt", "tokenizer_config.json"]
    assert config_of(tmp_path / "a" / "b") == {
        "backend": "test_bytes", "file": "bytes.txt", "blake2b": hashlib.blake2b(b"bytes", digest_size=16).hexdigest(),
        "num_text": 258, "vocab_size": 331, "control": list(CONTROL_NAMES), "phrases": [" cat"],
    }  # fmt: skip
    named.save(tmp_path / "a" / "b")  # overwrites
    loaded = load_tokenizer(str(tmp_path / "a" / "b"))
    assert isinstance(loaded, ByteTokenizer) and loaded.describe() == named.describe()
    plain.save(tmp_path / "plain")
    assert ByteTokenizer.load(tmp_path / "plain").phrases == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "bpe"}, "holds a 'bpe' tokenizer; use load_tokenizer"),
        ({"blake2b": "00"}, "is damaged: its digest is not the one in tokenizer_config.json"),
        ({"num_text": 256}, "has another table of control tokens or text ids"),
        ({"control": list(CONTROL_NAMES[:-1])}, "has another table of control tokens or text ids"),
        ({"backend": None}, "it needs the keys backend, blake2b, control, num_text"),
        ({"blake2b": None}, "it needs the keys backend, blake2b, control, num_text"),
        ({"control": None}, "it needs the keys backend, blake2b, control, num_text"),
        ({"num_text": None}, "it needs the keys backend, blake2b, control, num_text"),
        ([], "describes no Omni tokenizer"),
        ("{", "is not valid JSON"),
    ],
)
def test_incompatible_files_raise(plain: ByteTokenizer, tmp_path: Path, change: Any, message: str) -> None:
    plain.save(tmp_path)
    if isinstance(change, dict):
        change = {name: value for name, value in (config_of(tmp_path) | change).items() if value is not None}
    text = change if isinstance(change, str) else json.dumps(change)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ByteTokenizer.load(tmp_path)


def test_missing_files_are_named(plain: ByteTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer \(tokenizer_config.json is missing\)"):
        ByteTokenizer.load(tmp_path)
    plain.save(tmp_path)
    (tmp_path / "bytes.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer \(bytes.txt is missing\); train one"):
        ByteTokenizer.load(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    plain: ByteTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.save(tmp_path)
    before = config_of(tmp_path)

    def full(self: Path, data: bytes) -> int:
        self.open("wb").write(data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        plain.with_phrases([" cat"]).save(tmp_path)
    assert config_of(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.txt", "tokenizer_config.json"]


def test_the_abstract_methods_of_a_backend() -> None:
    assert Tokenizer.__abstractmethods__ == {"train", "_split", "_model_bytes", "_from_model_bytes"}
