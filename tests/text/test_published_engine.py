"""A model with a published tokenizer: replies, their ends, the next turn, edits; training documents that are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripted import enliven, follow

from eval.experiments.imports.chat_families import FAMILIES
from eval.experiments.imports.chats import no_media
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Image, Role, Text
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.transformer import TransformerConfig
from omni.pretrained import from_pretrained
from omni.rng import Key
from omni.sequence.layout import TokenSpan
from omni.text.compose import compose
from omni.text.convert import convert_tokenizer
from omni.text.published import PublishedTokenizer
from train.data.batch import BatchConfig, ShapeConfig
from train.data.loader import Loader

pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=["chatml", "llama3", "mistral", "llama2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Omni:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder / "published")
    tokenizer = convert_tokenizer(folder / "published", num_rows=700)
    transformer = TransformerConfig(width=32, depth=2, num_heads=2, num_kv_heads=2, head_dim=16)
    flow = FlowHeadConfig(channels=48, num_frequencies=4)
    made = Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=tokenizer.vocab_size))
    made.tokenizer, made.codec = tokenizer, PixelCodec(PixelConfig(patch=4))
    made.save_pretrained(folder / "model")
    return enliven(from_pretrained(folder / "model"))


def published(model: Omni) -> PublishedTokenizer:
    assert isinstance(model.tokenizer, PublishedTokenizer)
    return model.tokenizer


def words_of(model: Omni) -> list[int]:
    """The ids of the first words of a reply, as the template has them after the generation prompt."""
    asked = Text("draw a red apple")
    spans = [
        compose(Document((asked,)), published(model), no_media, generation_prompt=True),
        compose(Document((asked, Text("a red apple", Role.ASSISTANT))), published(model), no_media, is_open=True),
    ]
    prompt, begun = (span.ids for [span] in spans if isinstance(span, TokenSpan))
    assert begun[: len(prompt)] == prompt
    return begun[len(prompt) :]


def script_of(model: Omni, end: int) -> list[int]:
    """Text, a picture of 2 x 2 latents, text, and an end."""
    tokenizer = published(model)
    control = tokenizer.control
    words = words_of(model)
    last = tokenizer.encode_piece("cat.", is_first=False)[0]
    return [*words, control.image, control.size(2), control.size(2), *last, end]


def test_a_reply_ends_at_any_end_and_is_read_again_as_it_was(model: Omni) -> None:
    tokenizer = published(model)
    for end in tokenizer.ends:
        engine = Engine(model)
        script = script_of(model, end)
        follow(engine, lambda request, script=script: script)
        reply = engine.generate("draw a red apple", seed=0, steps=1, max_tokens=60)
        kinds = [type(part).__name__ for part in reply.parts]
        assert reply.stop_reason == "end" and kinds == ["TextPart", "ImagePart", "TextPart"]
        assert [text.strip() for text in reply.text.split("apple")] == ["a red", "cat."]
        [kept] = engine.prefixes._kept.values()
        again = engine._begun(
            Document((*reply.document.segments, Text("what is this?"))), GenerationOptions(seed=0), ()
        )
        engine._share(again)
        assert again.history.length >= kept.length - 1  # the end itself was not read
        again.release()


def test_only_text_ends_and_pictures_are_emitted(model: Omni) -> None:
    tokenizer = published(model)
    allowed = (Engine(model).grammar.allowed["text"] == 0).nonzero().flatten().tolist()
    control = tokenizer.control
    assert allowed == sorted([*tokenizer.text_ids, *tokenizer.ends, control.image, control.video])
    assert not any(token in allowed for token in range(len(tokenizer._spellings), 700))
    codec, model.codec = model.codec, None
    try:
        without = (Engine(model).grammar.allowed["text"] == 0).nonzero().flatten().tolist()
        assert without == sorted([*tokenizer.text_ids, *tokenizer.ends])
    finally:
        model.codec = codec


def test_an_edited_reply_goes_on(model: Omni) -> None:
    engine = Engine(model)
    script = script_of(model, published(model).end)
    follow(engine, lambda request: script)
    reply = engine.generate("draw a red apple", seed=0, steps=1, max_tokens=60)
    follow(engine, lambda request: [])
    for part in (0, 1, 2):
        edited = engine.edit(reply, part, max_tokens=20)
        assert edited.parts[:part] == reply.parts[:part] and len(edited.parts) >= part
    begun = engine._begun(Document(reply.document.segments[:1]), GenerationOptions(seed=0), reply.parts[:1])
    [span] = begun.pending
    assert isinstance(span, TokenSpan) and begun.length == len(span.ids)
    words = words_of(model)
    assert span.ids[-len(words) :] == words


def test_guided_pictures_have_histories_of_the_template(model: Omni) -> None:
    script = script_of(model, published(model).end)
    engine = Engine(model)
    follow(engine, lambda request: script)
    reply = engine.generate("draw a red apple", seed=0, steps=1, max_tokens=60, guidance=2.0, image_guidance=1.5)
    assert [type(part).__name__ for part in reply.parts] == ["TextPart", "ImagePart", "TextPart"]


def test_long_documents_are_split_by_the_size_of_their_rendering(model: Omni) -> None:
    story = [
        segment
        for number in range(8)
        for segment in (
            Image((Key(number).uniform((16, 16, 3)) * 255).byte(), Role.ASSISTANT, True),
            Text(f" the red apple and the cat {number}", Role.ASSISTANT, True),
        )
    ]
    document = Document((Text("draw a story"), *story))
    tokenizer = published(model)

    class Memo:
        def encode(self, segments: Any) -> list[list[torch.Tensor]]:
            return model.encode_media(list(segments))

    loader = Loader(
        lambda index: document, model.prepare, lambda one, encode: compose(one, tokenizer, encode), Memo(),
        BatchConfig(shapes=(ShapeConfig(rows=1, budget=200, refine_budget=200),)), channels=48,
        pad_id=tokenizer.control.pad, key=Key(0), end=1, ends=tokenizer.ends, is_additive=tokenizer.own_turns,
    )  # fmt: skip
    pieces = loader._read(0).pieces
    assert len(pieces) > 1
    for number, piece in enumerate(pieces):
        ids = [token for span in piece.spans if isinstance(span, TokenSpan) for token in span.ids]
        flags = [flag for span in piece.spans if isinstance(span, TokenSpan) for flag in span.supervise]
        last = len(ids) - 1 - ids[::-1].index(tokenizer.end)
        assert flags[last] == (number == len(pieces) - 1)
