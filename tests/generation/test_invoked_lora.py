"""A LoRA that replies invoke: where it is active, what it leaves to the text weights; a replay gives its ids."""

from __future__ import annotations

import pytest
import torch
from scripted import enliven, follow

from eval.experiments.imports.chat_families import FAMILIES
from eval.experiments.imports.chats import no_media
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Image, Role, Text
from omni.generation.contract import verify
from omni.generation.engine import Engine
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.lora import LoraSpec
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.sequence.layout import IGNORE, LatentSpan, Shape, TokenSpan, pack
from omni.text.compose import compose, prompt_length
from omni.text.convert import convert_tokenizer

pytest.importorskip("transformers")
LORA = LoraSpec(name="pictures", rank=3, alpha=6.0, invoked=True)
PICTURE = torch.arange(8 * 8 * 3).reshape(8, 8, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Omni:
    folder = tmp_path_factory.mktemp("chatml")
    FAMILIES["chatml"](folder)
    tokenizer = convert_tokenizer(folder, num_rows=700)
    transformer = TransformerConfig(
        width=32, depth=2, num_heads=2, num_kv_heads=2, head_dim=16, latent_weights="refine", loras=(LORA,)
    )
    flow = FlowHeadConfig(channels=48, num_frequencies=4)
    made = Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=tokenizer.vocab_size)).eval()
    made.tokenizer, made.codec = tokenizer, PixelCodec(PixelConfig(patch=4))
    made.defaults = {"lora": "pictures"}
    with torch.no_grad():
        for name, parameter in made.transformer.loras.named_parameters():
            parameter.copy_(Key(5).fold(name).normal(tuple(parameter.shape)) * 0.3)
    return enliven(made).double()


def spans_of(model: Omni, document: Document, **how: bool) -> list:
    assert model.tokenizer is not None
    return compose(document, model.tokenizer, model.encode_media, invokes=True, **how)


def test_where_it_is_active(model: Omni) -> None:
    """Pictures, and the assistant's turns with media or supervised segments, from the invocation to the end id."""
    tokenizer, picture = model.tokenizer, Image(PICTURE, Role.ASSISTANT, supervise=True)
    assert tokenizer is not None
    document = Document(
        (Text("a red"), Text("cat", Role.ASSISTANT), Text("apple"), picture, Text("so", Role.ASSISTANT, supervise=True),
         Text("and"), Text("", Role.ASSISTANT, supervise=True), Image(PICTURE), Text("dog"))
    )  # fmt: skip
    spans = spans_of(model, document)
    ids = []
    for span in spans:
        ids += [(token, span.adapted) for token in span.ids] if isinstance(span, TokenSpan) else [(-1, True)]
    invocations = [n for n, (token, _) in enumerate(ids) if token == tokenizer.control.assistant]
    assert len(invocations) == 2 and all(ids[n][1] for n in invocations)
    first, second = invocations
    ends = [n for n, (token, _) in enumerate(ids) if token in tokenizer.ends]
    assert ids[second + 1][0] in tokenizer.ends and ids[second + 1][1], "an empty reply ends at once"
    end = next(n for n in ends if n > first)
    active = {n for n, (token, flag) in enumerate(ids) if flag or token == -1}
    given = next(n for n in range(second + 2, len(ids)) if ids[n][0] == tokenizer.control.image)
    assert active == {*range(first, end + 1), second, second + 1, *range(given, given + 5)}
    [batch], _ = pack([spans], [Shape(1, 400, 64)], channels=48, pad_id=0, fixed_shape=False)
    assert batch.adapted is not None
    flat = [flag for s in spans for flag in ([s.adapted] * len(s.ids) if isinstance(s, TokenSpan) else [True] * 4)]
    assert batch.adapted[0].tolist() == flat
    supervised = [token for token in batch.target[0].tolist() if token != IGNORE]
    assert supervised[0] == tokenizer.control.image and supervised[-1] in tokenizer.ends
    length = prompt_length(document, tokenizer, lambda one: 4, 1000, invokes=True)
    assert length == len(flat) + len(compose(Document((Text("x"),)), tokenizer, no_media, True)[0].ids) - len(
        compose(Document((Text("x"),)), tokenizer, no_media)[0].ids
    )


def test_a_reply_that_ends_at_once_is_that_of_the_text_weights(model: Omni) -> None:
    assert model.tokenizer is not None
    end, options = model.tokenizer.ends[0], {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    own = Engine(model).generate("a red apple", lora="none", **options)
    engine = Engine(model)
    choices = []

    def script(request):  # noqa: ANN001, ANN202
        choices.append(request.num_tokens)
        return [end] if len(choices) == 2 else []  # the second choice is that of the invocation

    follow(engine, script)
    reply = engine.generate("a red apple", **options)
    assert reply.text == own.text and reply.stop_reason == own.stop_reason and own.text
    assert not any(kept.lora is None for kept in engine.prefixes._kept.values())


def test_a_replay_gives_the_ids_and_the_picture_is_the_same(model: Omni) -> None:
    """Greedy ids of an adapted reply with a picture are the best ids of one packed pass over the whole document."""
    assert model.tokenizer is not None
    control, engine = model.tokenizer.control, Engine(model)
    script = [control.image, control.size(2), control.size(2)]
    follow(engine, lambda request: script)
    reply = engine.generate("a red apple", steps=2, seed=0, max_tokens=16, max_images=1)
    kinds = [type(part).__name__ for part in reply.parts]
    assert kinds[:2] == ["ImagePart", "TextPart"], kinds
    [history] = engine.prefixes._kept.values()
    start, first = history.marks.index(control.assistant), next(n for n, m in enumerate(history.marks) if m < 0)
    [picture] = [s for s in reply.document.segments if isinstance(s, Image)]
    [latents] = engine.latents.encode([picture], model.encode_media)[0]
    before, header, behind = (history.marks[a:b] for a, b in ((0, start), (start, first), (first + 4, None)))
    spans = [TokenSpan(ids, [True] * len(ids), adapted) for ids, adapted in ((before, False), (header, True))]
    spans += [LatentSpan(latents.flatten(0, 2), (1, 2, 2)), TokenSpan(behind, [True] * len(behind), True)]
    [batch], _ = pack([spans], [Shape(1, 400, 0)], channels=48, pad_id=0, fixed_shape=False)
    model.transformer.active_lora = "pictures"
    with torch.no_grad():
        hidden, _ = model.context(batch)
    model.transformer.active_lora = None
    best = (model.token.read(hidden[0]) + engine.grammar.allowed["text"]).argmax(-1)
    assert len(behind) > 4 and best[first + 4 : -1].tolist() == behind[1:]
    edited = Engine(model).edit(reply, 1, steps=2)
    assert [type(part).__name__ for part in edited.parts][:1] == ["ImagePart"]


def test_forced_pictures_and_no_pictures(model: Omni) -> None:
    engine = Engine(model)
    reply = engine.generate("a cat", force_image=True, image_size=(8, 8), steps=1, max_tokens=6, seed=0)
    assert type(reply.parts[0]).__name__ == "ImagePart"
    off = Engine(model).generate("a cat", lora="none", max_images=0, max_tokens=6, seed=0)
    asked = Engine(model)
    assert asked.generate("a cat", max_images=0, max_tokens=6, seed=0).text == off.text


def test_the_contract_holds(model: Omni) -> None:
    checks = verify(model)
    for check in checks:
        assert check.holds, check
    assert any("LoRA pictures" in check.name for check in checks)
