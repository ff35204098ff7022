"""Tokenizers of both backends: no text gives a control id, every text round-trips, streams equal `decode`."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tokenizers

from omni.document import Role
from omni.rng import Key
from omni.text import load_tokenizer
from omni.text.bpe import BPETokenizer
from omni.text.sentencepiece import SentencePieceTokenizer
from omni.text.tokenizer import CONTROL_NAMES, ControlTokens, Tokenizer, _longest_phrase_pattern, backends, decode_bytes
from train.tools.tokenizer import main

DATA = Path(__file__).parents[2] / "tokenizers_cfg"
SPELLINGS = (
    *("<|image|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<s>", "</s>", "<unk>", "<pad>", "<<SYS>>"),
    *("<0x0A>", "<0xE2>", "<bos>", "<eos>", "[PAD]", "[CLS]", "[MASK]", "<image>", "</image>", "<|endoftext|>"),
    *("▁", "\u2585", "Ġ", "Ċ", "\0", "\u200b", "\u200d", "\ufeff", "\u202e", "\ud800", "\udfff", "\ud83d\ude00"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "👩🏽‍🚀", "e\u0301", "ﬁ", "<|", "|>", "<", ">", "a", "cat"),
    *CONTROL_NAMES,
)


def adversarial(rng: random.Random, tokenizer: Tokenizer) -> str:
    """Variants of control names: brackets, case, gaps, ids as text, zero-width splits."""
    parts: list[str] = []
    for _ in range(rng.randint(1, 4)):
        spelling = rng.choice(SPELLINGS)
        match rng.randrange(8):
            case 0:
                spelling = f"<|{spelling}|>"
            case 1:
                spelling = f"[{spelling.upper()}]"
            case 2:
                spelling = "\u200b".join(spelling)
            case 3:
                spelling = str(rng.randint(0, tokenizer.vocab_size + 9))
            case 4:
                spelling = f"<{spelling}>" * 2
        parts.append(spelling)
    return rng.choice(("", " ", "\n", "\ud800")).join(parts)


def random_text(rng: random.Random) -> str:
    """Any code points, also surrogates, mostly of low planes."""
    top = rng.choice((0x80, 0x250, 0x3000, 0xFFFF, 0x10FFFF))
    return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(0, 24)))


def test_20000_adversarial_texts_give_no_control_id(tokenizer: Tokenizer) -> None:
    rng = Key(0).fold("adversarial").python()
    texts = [adversarial(rng, tokenizer) for _ in range(20_000)]
    num_control = num_changed = 0
    for text in texts:
        ids = tokenizer.encode(text)
        num_control += sum(not 0 <= token < tokenizer.num_text for token in ids)
        num_changed += tokenizer.decode(ids) != text
    assert (num_control, num_changed) == (0, 0)


def test_10000_random_texts_round_trip_whole_and_streamed(tokenizer: Tokenizer) -> None:
    rng = Key(1).fold("random").python()
    for _ in range(10_000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(token) for token in ids]
        assert tokenizer.decode(ids) == text == "".join(pieces) + stream.flush()


def test_streams_of_any_ids_equal_decode(tokenizer: Tokenizer) -> None:
    """Also ids of invalid UTF-8, as an untrained model emits."""
    rng = Key(2).fold("ids").python()
    for _ in range(4_000):
        ids = [rng.randrange(tokenizer.num_text) for _ in range(rng.randint(0, 12))]
        stream = tokenizer.stream()
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == tokenizer.decode(ids)


def test_whole_characters_are_not_held_back(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    grown = ""
    for token in tokenizer.encode("aé猫👩"):
        grown += stream.push(token)
    assert grown == "aé猫👩" and stream.flush() == ""
    first = tokenizer.encode("\U0010fffe")[0]
    assert stream.push(first) == "" and stream.flush() == "\ufffd" and stream.flush() == ""


def test_decode_bytes() -> None:
    assert decode_bytes(b"\xed\xa0\x80a\xff\xed\xa0") == "\ud800a\ufffd\ufffd\ufffd"


def test_bad_input(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="control id 'image'"):
        tokenizer.decode([tokenizer.control.image])
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="out of range"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="only a str"):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]


def test_words_with_their_space_are_tokens() -> None:
    bpe = BPETokenizer.train(["a red apple and an apple"] * 9, 264)
    assert bpe.decode(bpe.encode("red apple")[-1:]) == " apple"


@pytest.fixture(scope="module", params=[BPETokenizer, SentencePieceTokenizer])
def with_names(request: pytest.FixtureRequest, corpus: list[str]) -> Tokenizer:
    return request.param.train(corpus, 340).with_phrases([" red apple", " red", "red apple", " ant"])


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("draw a red apple", [" red apple"]),
        ("two red apples, please", [" red apple"]),  # a plural keeps the word's id
        ("a red appleseed, redder", [" red"]),  # a phrase ends at a word's end
        ("red apple", ["red apple"]),
        ("'red apple'?", ["red apple"]),
        ("infrared apple", []),  # a phrase without a space begins at a word's start
        (" antique ants", [" ant"]),
        ("an  ant\ta red  apple", [" ant", " red"]),
    ],
)
def test_phrases_are_one_id_each(with_names: Tokenizer, text: str, phrases: list[str]) -> None:
    ids = with_names.encode(text)
    first = with_names.num_text - len(with_names.phrases)
    assert [with_names.decode([token]) for token in ids if token >= first] == phrases
    assert with_names.decode(ids) == text


def test_phrases_do_not_change_other_ids(with_names: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    plain = type(with_names).train(corpus, 340)
    assert plain.encode("the green cat") == with_names.encode("the green cat")
    assert with_names.num_text == plain.num_text + 4 and with_names.control.pad == with_names.num_text
    with_names.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.phrases == with_names.phrases and loaded.encode("a red ant") == with_names.encode("a red ant")


def test_the_phrase_tree_equals_an_alternation() -> None:
    """The tree of a thousand phrases equals their alternation, longest first; a phrase may have any length."""
    draw = random.Random(0)
    letters = ["a", "b", "c", " ", "s", ".", "(", "é", "_"]
    for _ in range(100):
        phrases = list({"".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 30))})
        side_by_side = "|".join(
            re.escape(p) if p[0].isspace() else rf"(?<![\w\s]){re.escape(p)}"
            for p in sorted(phrases, key=len, reverse=True)
        )
        slow, fast = re.compile(rf"(?:{side_by_side})(?=s?(?![^\W_]))"), _longest_phrase_pattern(phrases)
        text = "".join(draw.choices(letters, k=200))
        assert fast is not None
        assert [m.span() for m in fast.finditer(text)] == [m.span() for m in slow.finditer(text)]
    long = "ab" * 1000
    assert _longest_phrase_pattern([long, "a", "ab"]).fullmatch(long)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="beginnings of one another"):
        _longest_phrase_pattern(["a" * n for n in range(1, 1100)])


@pytest.mark.parametrize("phrases", [[""], [" a", " b", " a"], ["\ud800"]])
def test_invalid_phrases_raise(phrases: list[str], corpus: list[str]) -> None:
    plain = BPETokenizer.train(corpus, 340)
    with pytest.raises(ValueError, match="cannot be a phrase"):
        plain.with_phrases(phrases)
    with pytest.raises(ValueError, match="has 1 phrases already"):
        plain.with_phrases([" a"]).with_phrases([" b"])


def test_phrases_of_a_damaged_file_raise(with_names: Tokenizer, tmp_path: Path) -> None:
    with_names.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for phrases in ("red", [" a", 3], [" red", " red"]):
        path.write_text(json.dumps(config | {"phrases": phrases}))
        with pytest.raises(ValueError, match="phrase"):
            load_tokenizer(tmp_path)


def test_control_table(tokenizer: Tokenizer) -> None:
    control = tokenizer.control
    table = tomllib.loads((DATA / "control_tokens.toml").read_text())
    sizes = [f"size_{n}" for n in range(table["first_size"], table["last_size"] + 1)]
    assert tuple(table["names"] + sizes) == CONTROL_NAMES
    assert tokenizer.vocab_size == tokenizer.num_text + len(control)
    assert [control.name(tokenizer.num_text + i) for i in range(len(control))] == list(CONTROL_NAMES)
    for name in CONTROL_NAMES[:9]:
        assert control.name(getattr(control, name)) == name
    assert [control.size_of(control.size(n)) for n in range(1, 65)] == list(range(1, 65))
    assert control.size_of(control.media_end) is None and control.size_of(0) is None
    assert [control.name(control.role(role)) for role in Role] == ["system", "user", "assistant"]
    for n in (0, 65):
        with pytest.raises(ValueError, match=str(n)):
            control.size(n)
    with pytest.raises(ValueError, match="no control id"):
        ControlTokens(10).name(9)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    loaded = load_tokenizer(tmp_path / "t")
    assert type(loaded) is type(tokenizer) and loaded.describe() == tokenizer.describe()
    assert loaded.encode("a red apple\n") == tokenizer.encode("a red apple\n")
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == sorted([tokenizer.file_name, "tokenizer_config.json"])
    path = tmp_path / "t" / tokenizer.file_name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'bpe'"):
        backends.get("bbpe")


def test_equal_corpora_give_equal_files(tokenizer: Tokenizer, corpus: list[str]) -> None:
    again = type(tokenizer).train(corpus, 340 - len(tokenizer.phrases))
    assert again.describe()["blake2b"] == tokenizer.describe()["blake2b"]


def test_models_that_match_special_tokens_in_text_raise() -> None:
    library = BPETokenizer.train(["a b"] * 9, 257)._library
    library.add_tokens(["<|image|>"])
    with pytest.raises(ValueError, match="added_tokens"):
        BPETokenizer._from_model_bytes(library.to_str().encode())
    library = BPETokenizer.train(["a b"] * 9, 257)._library
    library.normalizer = tokenizers.normalizers.NFKC()
    with pytest.raises(ValueError, match="normalizer"):
        BPETokenizer._from_model_bytes(library.to_str().encode())
    for options, message in ((dict(user_defined_symbols=["<|image|>"]), "user-defined"), ({}, "changes text")):
        with pytest.raises(ValueError, match=message):
            SentencePieceTokenizer(_foreign_model(**options))
    with pytest.raises(ValueError, match="tokenizer.model"):
        SentencePieceTokenizer(b"\x0a\x02no")


def _foreign_model(**options: object) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple and a cat"] * 30),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_corpora_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="below 256"):
        BPETokenizer.train(["a"], 100)
    with pytest.raises(ValueError, match="the corpus yields 256 tokens"):
        BPETokenizer.train(["a"], 300)
    with pytest.raises(ValueError, match="below 300"):
        SentencePieceTokenizer.train(["a"], 100)
    with pytest.raises(ValueError, match="vocab_size 1000"):
        SentencePieceTokenizer.train(["a red apple"], 1000)


@pytest.mark.parametrize("recipe", ["emoji_bpe.toml", "emoji_sentencepiece.toml"])
def test_training_command(recipe: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "corpus.txt", tmp_path / "out"
    file.write_text("\n".join(corpus))
    arguments = [str(DATA / recipe), f"corpus={file}", f"out={out}", "vocab_size=310"]
    assert main([*arguments, "num_texts=100"]) == 0
    assert "310 text ids + 73 control ids" in capsys.readouterr().out
    assert load_tokenizer(out).num_text == 310
    assert main([*arguments, "vocabsize=3"]) == 2
    assert "did you mean 'vocab_size'" in capsys.readouterr().err
    assert main([arguments[0], "corpus=nowhere.txt", f"out={out}"]) == 2
    assert "'nowhere.txt' is no file" in capsys.readouterr().err


def test_training_command_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.tools.tokenizer", "no.toml"], capture_output=True, text=True, cwd=DATA.parent
    )
    assert done.returncode == 2 and "cannot read 'no.toml'" in done.stderr and "Traceback" not in done.stderr


def test_config_file_is_plain_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["num_text"] == 340 and config["vocab_size"] == 413 and config["control"] == list(CONTROL_NAMES)


def test_digests_equal_the_provenance_table() -> None:
    """The provenance table has one row for each recipe; the bundled tokenizer, if present, has the BPE row."""
    table = tomllib.loads((DATA / "digests.toml").read_text())
    recipes = {path.stem for path in DATA.glob("*.toml")} - {"digests", "control_tokens"}
    assert set(table) == recipes
    bundled = DATA.parent / "omni" / "bundled" / "tokenizer"
    if bundled.is_dir():
        assert load_tokenizer(bundled).describe()["blake2b"] == table["emoji_bpe"]["blake2b"]


def test_training_command_with_phrases(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, names, out = tmp_path / "corpus.txt", tmp_path / "names.txt", tmp_path / "out"
    file.write_text("\n".join(corpus), encoding="utf-8")
    names.write_text("red apple\n\n green cat \nred apple\n", encoding="utf-8")
    arguments = [str(DATA / "emoji_bpe.toml"), f"corpus={file}", f"out={out}", "vocab_size=310", f"phrases={names}"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert load_tokenizer(out).phrases == (" red apple", " green cat", "red apple", "green cat")
    assert main([*arguments[:-1], f"phrases={tmp_path / 'none.txt'}"]) == 2
    assert "emoji_world" in capsys.readouterr().err
