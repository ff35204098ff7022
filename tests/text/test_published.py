"""Published tokenizers and chat templates: ids equal those of transformers; no text forges a special token."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.experiments.imports.chat_families import CORPUS, FAMILIES, HAS_NO_SYSTEM, byte_level, plain, save, special
from eval.experiments.imports.chats import (
    CONVERSATIONS,
    Family,
    build_family,
    control_ids,
    document,
    no_media,
)
from omni.document import Document, Image, Role, Text
from omni.sequence.layout import LatentSpan, Span, TokenSpan, context_length
from omni.text.compose import compose, prompt_length
from omni.text.convert import convert_tokenizer
from omni.text.loading import load_tokenizer
from omni.text.published import PublishedTokenizer
from omni.text.template import ChatTemplate

transformers = pytest.importorskip("transformers")
S, U, A = Role.SYSTEM, Role.USER, Role.ASSISTANT
PIXELS = torch.zeros(16, 32, 3, dtype=torch.uint8)


@cache
def built(name: str, root: Path) -> Family:
    return build_family(name, root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, root: Path) -> Family:
    return built(request.param, root)


def ids_of(spans: list[Span]) -> list[int]:
    assert len(spans) == 1 and isinstance(spans[0], TokenSpan)
    return spans[0].ids


def shown(spans: list[Span], tokenizer: PublishedTokenizer) -> list[str]:
    """Text and names of ids, latent grids; neighbours with equal flags joined; supervised ones have a star."""
    out: list[tuple[str, bool]] = []
    for span in spans:
        if isinstance(span, LatentSpan):
            out.append((str(span.grid), span.supervise))
            continue
        for token, flag in zip(span.ids, span.supervise, strict=True):
            is_text = tokenizer.is_text(token) and token not in tokenizer.theirs.values()
            text = tokenizer.bytes_of(token).decode() if is_text else f"[{tokenizer.name(token)}]"
            if is_text and out and out[-1][1] == flag and not out[-1][0].startswith("["):
                out[-1] = (out[-1][0] + text, flag)
            else:
                out.append((text, flag))
    return [text + "*" * flag for text, flag in out]


# ---- text ----------------------------------------------------------------------------------------------------------

TEXTS = [text for turns in CONVERSATIONS for _, text in turns] + CORPUS[:5]


def test_text_has_the_ids_of_transformers(family: Family) -> None:
    spellings = [one for one in family.ours.theirs if one not in family.ours.settings.marks]
    for text in (*TEXTS, *(f"a {one} b{one}" for one in spellings)):
        expected = family.theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert family.ours.encode(text) == expected, text
        assert all(family.ours.is_text(token) for token in expected)
        assert family.ours.decode(expected) == family.theirs.decode(expected, clean_up_tokenization_spaces=False), text


def test_streams_equal_decode_of_transformers_for_any_order_of_ids(family: Family) -> None:
    whole = [t for t in family.ours.text_ids if family.ours.bytes_of(t)[:1] < b"\x80"]  # no parts of characters
    for start in range(0, 200, 7):
        ids = [whole[(start * k * 31) % len(whole)] for k in range(1, 6)]
        stream = family.ours.stream()
        streamed = "".join([stream.push(token) for token in ids]) + stream.flush()
        assert streamed == family.ours.decode(ids) == family.theirs.decode(ids, clean_up_tokenization_spaces=False)


def test_special_tokens_and_empty_rows_are_no_text(root: Path) -> None:
    gemma, qwen = built("gemma", root), built("qwen3", root).ours
    more = convert_tokenizer(root / "gemma", num_rows=gemma.ours.num_text + 5)
    assert more.num_text == gemma.ours.num_text + 5 and more.control.first == more.num_text
    assert more.vocab_size == more.num_text + 73 and more.text_ids == gemma.ours.text_ids
    assert not more.is_text(more.num_text - 1) and more.name(more.num_text - 1).startswith("row")
    with pytest.raises(ValueError, match="id 2 is '<bos>', not text"):
        more.decode([2])
    assert not any(more.is_text(token) for token in (0, 1, 2, 3, 5, 6, more.control.image, -1)) and more.is_text(7)
    assert more.encode("<table>") == [7] and len(more.encode("<bos>")) > 1
    with pytest.raises(ValueError, match="do not belong together"):
        convert_tokenizer(root / "gemma", num_rows=100)
    think = qwen.theirs["<think>"]  # a model may emit it, text never gives it
    assert qwen.is_text(think) and qwen.decode([think]) == "<think>" and think not in qwen.encode("<think>")
    assert qwen.settings.marks == ("<think>", "</think>") and len(qwen.encode("<x>")) == 1


def test_ends(root: Path) -> None:
    def names(family: str) -> list[str]:
        ours = built(family, root).ours
        assert ours.end == ours.ends[0]
        return [ours.name(token) for token in ours.ends]

    assert names("chatml") == ["<|im_end|>"] and names("qwen3") == ["<|im_end|>", "<|endoftext|>"]
    assert names("llama3") == ["<|eot_id|>", "<|end_of_text|>"] and names("olmo2") == ["<|endoftext|>"]
    assert names("gemma") == ["<end_of_turn>", "<eos>"] and names("mistral") == names("llama2") == ["</s>"]
    olmo = built("olmo2", root).ours  # a model may end with a token that is not special
    [end] = olmo.encode("!")
    ended = PublishedTokenizer(olmo._library_file, olmo.settings.model_copy(update={"ends": (end,)}), olmo.template)
    assert olmo.is_text(end) and not ended.is_text(end) and ended.ends == (olmo.end, end)
    assert names("phi3") == ["<|end|>", "<|endoftext|>"]


# ---- turns ---------------------------------------------------------------------------------------------------------


def test_conversations_have_the_ids_of_apply_chat_template(family: Family) -> None:
    num = 0
    for turns in CONVERSATIONS:
        messages = [{"role": str(role), "content": text} for role, text in turns]
        if family.name in HAS_NO_SYSTEM and turns[0][0] == S:
            with pytest.raises(ValueError, match="refuses the conversation: .*write that text into the first turn of"):
                compose(document(turns), family.ours, no_media)
            continue
        for prompt in (False, True):
            expected = family.theirs.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=prompt, return_dict=False
            )
            spans = compose(document(turns), family.ours, no_media, prompt)
            assert ids_of(spans) == expected, (turns, family.theirs.convert_ids_to_tokens(expected))
            if prompt:
                assert prompt_length(document(turns), family.ours, lambda _: 0, 5000) == len(expected)
            num += 1
    assert num >= 16


def test_a_turn_that_goes_on(family: Family) -> None:
    for turns in ([(U, "what?"), (A, "this is")], [(U, "a"), (A, "b"), (U, "c"), (A, "the  red \n")]):
        messages = [{"role": str(role), "content": text} for role, text in turns]
        expected = family.theirs.apply_chat_template(
            messages, tokenize=True, continue_final_message=True, return_dict=False
        )
        assert ids_of(compose(document(turns), family.ours, no_media, is_open=True)) == expected
        assert prompt_length(document(turns), family.ours, lambda _: 0, 5000, is_open=True) == len(expected)
    begun = compose(document([(U, "what?"), (A, "")]), family.ours, no_media, is_open=True)
    assert begun == compose(document([(U, "what?")]), family.ours, no_media, generation_prompt=True)


def test_what_follows_the_prompt_is_supervised(family: Family) -> None:
    """The ids after the generation prompt, up to the end of the turn, are supervised; no other is."""
    turns = [(U, "what is this?"), (A, "this is a cat. 猫")]
    [prompt] = compose(document(turns[:1]), family.ours, no_media, generation_prompt=True)
    [span] = compose(document(turns, supervise=True), family.ours, no_media)
    assert isinstance(prompt, TokenSpan) and isinstance(span, TokenSpan)
    assert span.ids == ids_of(compose(document(turns), family.ours, no_media))
    assert span.ids[: len(prompt.ids)] == prompt.ids
    last = span.ids.index(family.ours.end, len(prompt.ids))
    expected = [len(prompt.ids) <= n <= last for n in range(len(span.ids))]
    assert span.supervise == expected


def test_white_space_that_a_template_strips_is_not_supervised(root: Path) -> None:
    turns = [(U, "x"), (A, "\n\n a ")]
    llama, chatml = (built(name, root).ours for name in ("llama3", "chatml"))
    assert shown(compose(document(turns, True), llama, no_media), llama)[-4:] == ["[<|end_header_id|>]", "\n\n", "a*",
                                                                              "[<|eot_id|>]*"]  # fmt: skip
    assert shown(compose(document(turns, True), chatml, no_media), chatml)[-4:] == ["assistant\n", "\n\n a *",
                                                                                "[<|im_end|>]*", "\n"]  # fmt: skip


def encode_media(media: list[Any]) -> list[list[torch.Tensor]]:
    return [[torch.zeros(1, 2, 4, 3)] for _ in media]


def test_pictures_stand_in_the_contents(family: Family) -> None:
    parts = (Text("what"), Image(PIXELS), Text("is"), Text("so", A), Image(PIXELS, A, True), Text("yes", A, True))
    spans = compose(Document(parts), family.ours, encode_media)
    names = shown(spans, family.ours)
    header = ["[image]", "[size_2]", "[size_4]", "(1, 2, 4)", "[media_end]"]
    first, second = (n for n, name in enumerate(names) if name.startswith("[image]"))
    assert names[first : first + 5] == header and names[first - 1].endswith("what")
    assert names[second : second + 5] == [*(name + "*" for name in header[:4]), "[media_end]"]
    assert (
        names[second + 5].replace(" ", "") == "yes*" and names[second + 6] == f"[{family.ours.name(family.ours.end)}]*"
    )
    prompt = Document(parts[:3])
    num = context_length(compose(prompt, family.ours, encode_media, True))
    assert prompt_length(prompt, family.ours, lambda _: 8, 5000) == num


def test_thoughts_are_written_and_left_out_by_the_template(root: Path) -> None:
    qwen = built("qwen3", root)
    turns = [(U, "a"), (A, "<think>\nso so\n</think>\n\nred"), (U, "b"), (A, "<think>\nhm\n</think>\n\ncat")]
    for some in (turns[:2], turns[:3], turns):
        messages = [{"role": str(role), "content": text} for role, text in some]
        expected = qwen.theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids_of(compose(document(some), qwen.ours, no_media)) == expected
    names = shown(compose(document(turns, True), qwen.ours, no_media), qwen.ours)
    assert names[-7:] == ["assistant\n", "[<think>]*", "\nhm\n*", "[</think>]*", "\n\ncat*", "[<|im_end|>]*", "\n"]
    assert "red*" in names and not any("so so" in name for name in names)
    off = convert_tokenizer(root / "qwen3", variables={"enable_thinking": False})
    names = shown(compose(document(turns[:1]), off, no_media, True), off)
    assert names[-4:] == ["[<think>]", "\n\n", "[</think>]", "\n\n"]


# ---- safety --------------------------------------------------------------------------------------------------------


def fragments(family: Family) -> st.SearchStrategy[str]:
    spellings = [one for one in family.ours.theirs if "think" not in one]
    cut = st.sampled_from(spellings).flatmap(
        lambda one: st.tuples(st.integers(0, len(one)), st.integers(0, len(one))).map(lambda at: one[min(at) : max(at)])
    )
    return st.one_of(cut, st.sampled_from([*spellings, "x", " ", "\n", "<", "|", ">", "[image]", "\U000f0000"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_forges_a_special_token(name: str, root: Path) -> None:
    """Spellings whole, in fragments, across two parts, and across contents and template words."""
    family = built(name, root)
    contents = st.lists(st.lists(fragments(family), min_size=1, max_size=4), min_size=1, max_size=3)

    @settings(max_examples=15)  # the evaluation tries more
    @given(contents)
    def check(turns: list[list[str]]) -> None:
        harmless = [["x"] for _ in turns]
        assert control_ids(turns, family) == control_ids(harmless, family)

    check()


def test_many_spellings_take_time_in_proportion(root: Path) -> None:
    """A user's text of nothing but control spellings; quadratic work took half a minute."""
    tokenizer, num = built("chatml", root).ours, 16_000
    start = time.monotonic()
    ids = ids_of(compose(document([(Role.USER, "<|im_end|>" * num)]), tokenizer, no_media))
    assert time.monotonic() - start < 10
    assert ids.count(tokenizer.end) == 2  # of the template's own two turns
    assert tokenizer.decode([token for token in ids if tokenizer.is_text(token)]).count("<|im_end|>") == num


def test_joints_of_template_and_contents_forge_nothing(root: Path) -> None:
    """A template that writes fragments of a special token around contents."""
    folder = root / "joints"
    text = "{% for m in messages %}<|im_{{ m['content'] }}|>{{ m['content'] }}start|>{% endfor %}<|im_end|>"
    save(folder, byte_level(special("<|im_start|>", "<|im_end|>")), text, eos_token="<|im_end|>")
    family = Family("joints", convert_tokenizer(folder), None)
    for content in ("start|> x", "x <|im_", "start", "<|im_", "end", "|>", " start\n", "x|>"):
        assert control_ids([[content]], family) == control_ids([["x"]], family), content
    assert len(control_ids([["x"]], family)) == 1


def test_a_unigram_library_gives_no_special_id(root: Path) -> None:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{n:02X}>", -9.0) for n in range(256))]
    pieces += [(char, -5.0) for char in "▁<>s/ab"]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, byte_fallback=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    library.decoder = tokenizers.decoders.Sequence(steps)
    library.add_special_tokens(special("<unk>", "<s>", "</s>"))
    save(root / "unigram", library, None, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    ours = convert_tokenizer(root / "unigram")
    assert ours.decode(ours.encode("a<s>b</s>é")) == "a<s>b</s>é" and len(ours.encode("<s>")) == 3


# ---- without a template; files; errors -----------------------------------------------------------------------------


def test_a_base_model_reads_plain_text(root: Path) -> None:
    library = byte_level(special("<s>", "</s>"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    save(root / "base", library, None, bos_token="<s>", eos_token="</s>")
    ours = convert_tokenizer(root / "base")
    theirs = transformers.AutoTokenizer.from_pretrained(root / "base")
    parts = (Text("the red"), Text(" apple </s>", U, True))
    span = compose(Document(parts), ours, no_media, True)[0]
    assert isinstance(span, TokenSpan)
    assert span.ids == theirs("the red apple </s>", split_special_tokens=True)["input_ids"]
    names = shown(compose(Document((*parts, Image(PIXELS))), ours, encode_media), ours)
    assert names[:4] == ["[<s>]", "the red", " apple </s>*", "[image]"] and names[-1] == "[</s>]*"


def test_a_sentencepiece_model_file(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=340,
        byte_fallback=True, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    ours = convert_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the red apple", " été\n<s> 猫"):
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids)


def test_damaged_files_raise(root: Path, tmp_path: Path) -> None:
    built("chatml", root).ours.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ValueError, match=r"chat_template.jinja is damaged: its digest"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat_template.jinja is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        convert_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot read the tokenizer in"):
        (tmp_path / "empty").mkdir()
        convert_tokenizer(tmp_path / "empty")


def test_a_template_that_leaves_out_a_turn_raises(root: Path) -> None:
    ours = built("chatml", root).ours
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content[:3] }}{% endif %}{% endfor %}"
    few = PublishedTokenizer(ours._library_file, ours.settings, ChatTemplate(users))
    with pytest.raises(ValueError, match="leaves out the system turn"):
        compose(document([(S, "be brief"), (U, "hi")]), few, no_media)
    with pytest.raises(ValueError, match="writes 0 of 1 pictures"):
        compose(Document((Text("see this"), Image(PIXELS))), few, encode_media)
    with pytest.raises(ValueError, match="leaves out the last turn"):
        compose(document([(U, "hi"), (A, "yes")]), few, no_media, is_open=True)
    with pytest.raises(ValueError, match="supervised text cannot be found"):
        compose(Document((Text("see this", U, True),)), few, no_media)


def test_unsupported_decoders_are_named(root: Path) -> None:
    library = byte_level(plain("<x>"))
    library.decoder = tokenizers.decoders.WordPiece()
    save(root / "wordpiece", library, None)
    with pytest.raises(ValueError, match=r"decoder has the step .*WordPiece.* not supported"):
        convert_tokenizer(root / "wordpiece")


@pytest.mark.slow
def test_the_real_tokenizer_of_smollm2() -> None:
    from eval.tasks.pretrained.smollm2 import real_gguf

    try:
        file = real_gguf()
    except ValueError as error:
        pytest.skip(str(error))
    ours = convert_tokenizer(file)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    assert ours.template is not None and ours.template.source == theirs.chat_template
    real = Family("smollm2", ours, theirs)
    test_text_has_the_ids_of_transformers(real)
    test_conversations_have_the_ids_of_apply_chat_template(real)
    test_a_turn_that_goes_on(real)
    test_what_follows_the_prompt_is_supervised(real)
