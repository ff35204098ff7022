"""Features of pictures in a model: what the context holds, who sees it, and the three computations that must agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import torch
from histories import histories_of
from layouts import CHANNELS, VOCABULARY
from scripted import enliven, follow
from torch import Tensor

from omni.codecs import PixelCodec, PixelConfig
from omni.document import Document, Image, Role, Text
from omni.encoders import Encoder, EncoderBlockConfig, EncoderSpec
from omni.generation import contract
from omni.generation.context import append_of, run_context
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.heads import FlowHeadConfig
from omni.heads.joint import JointConfig
from omni.losses import sampled_past
from omni.media.preparation import EncoderSizes
from omni.model import Omni, OmniConfig
from omni.nn.cache import History
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.sequence.features import FeatureSpan
from omni.sequence.layout import IGNORE, LatentSpan, Shape, Span, TokenSpan, pack
from omni.sequence.mask import dense
from omni.text.bpe import BPETokenizer
from omni.text.compose import compose

Pictures = Literal["features", "both"]
WIDTH = 6


class Means(Encoder):
    """Means of quarters of 8 x 8 pixels: an encoder without a network. Counts its pictures."""

    spec = EncoderSpec(name="means", width=WIDTH, patch=8, sizes=EncoderSizes(multiple=8))

    def __init__(self) -> None:
        self.num_pictures = 0

    def _encode(self, pixels: Tensor) -> Tensor:
        self.num_pictures += len(pixels)
        parts = pixels.float().unflatten(2, (-1, 8)).unflatten(1, (-1, 8))
        return torch.cat([parts.mean((2, 4)), parts[:, :, :4].mean((2, 4))], -1) / 128 - 1

    def config(self) -> dict[str, Any]:
        return {"kind": "means"}

    def weights(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def restored(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Self:
        return cls()


def picture(seed: int = 0, height: int = 16, width: int = 24) -> Tensor:
    return (Key(seed).fold("picture").uniform((height, width, 3)) * 255).byte()


def config(pictures: Pictures | None, channels: int, vocab_size: int, **more: Any) -> OmniConfig:
    encoder = None if pictures is None else EncoderBlockConfig(width=WIDTH, pictures=pictures, table=8)
    sizes = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **more.pop("transformer", {})}
    flow = FlowHeadConfig(channels=channels, num_frequencies=4)
    return OmniConfig(transformer=TransformerConfig(**sizes), flow=flow, vocab_size=vocab_size, encoder=encoder, **more)


def whole_model(pictures: Pictures | None, **more: Any) -> Omni:
    """With byte tokenizer, exact pixel codec and encoder; float64."""
    tokenizer = BPETokenizer.train([], 256)
    model = Omni(config(pictures, 48, tokenizer.vocab_size, **more), Key(0))
    model.tokenizer, model.codec = tokenizer, PixelCodec(PixelConfig(patch=4))
    model.encoder = None if pictures is None else Means()
    return enliven(model).double().eval()


def training_memory(model: Omni, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """Hidden states (T, W), and keys of all layers (L, G, T, D), of the training forward of one document."""
    [batch], _ = pack([spans], [Shape(1, 1024, 1024)], channels=48, pad_id=0, fixed_shape=False)
    with torch.no_grad():
        hidden, memory = model.context(batch)
    return hidden[0], torch.stack([keys[0] for keys in memory.keys])


def cached_keys(engine: Engine, history: Any) -> Tensor:
    return engine.pool.k[:, :, history.start : history.start + history.length]


# ---- the three computations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_the_contract_holds(pictures: Pictures) -> None:
    """Cached = uncached = training forward, with separate latents' weights and a joint-token head."""
    given = config(
        pictures, CHANNELS, VOCABULARY + 9, transformer={"latent_weights": "separate"}, joint=JointConfig(length=3)
    )
    with torch.inference_mode():
        found = list(contract._differences(enliven(Omni(given, Key(0))).double().eval(), Key(0)))
    assert len(found) == 9 and all(absolute <= contract.EXACT for _, absolute, _ in found), found


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_a_prompt_is_read_as_in_training(pictures: Pictures) -> None:
    """The engine's keys of a prompt with two pictures, read in parts, are those of the training forward."""
    model = whole_model(pictures)
    given = (Text("see", Role.USER), Image(picture(1), Role.USER), Text("or", Role.USER), Image(picture(2), Role.USER))
    prompt, engine = Document(given), Engine(model, budget=8)
    engine.generate(prompt, GenerationOptions(max_tokens=1, max_images=0, temperature=0.0))
    [history] = engine.prefixes._kept.values()
    spans = model.spans(prompt, generation_prompt=True)
    kinds = [type(span) for span in spans]
    assert kinds.count(FeatureSpan) == 2 and kinds.count(LatentSpan) == (2 if pictures == "both" else 0)
    _, keys = training_memory(model, spans)
    num = min(history.length, keys.shape[2])
    assert num >= keys.shape[2] - 1
    torch.testing.assert_close(cached_keys(engine, history)[:, :, :num], keys[:, :, :num], atol=1e-10, rtol=0)


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_a_drawn_picture_enters_the_context_with_its_features(pictures: Pictures) -> None:
    """The history after a reply with a picture, and that of a guidance branch, equal the training forward."""
    model = whole_model(pictures)
    c = model.tokenizer.control
    engine = Engine(model)
    script = [65, c.image, c.size(2), c.size(4), 66, c.image, c.size(2), c.size(2), 67, c.end]
    follow(engine, lambda request: script)
    options = GenerationOptions(max_images=2, steps=2, guidance=2.0, max_tokens=40, seed=1)
    requests: list[Any] = []
    finish = engine._finish
    engine._finish = lambda request, failed: (requests.append((request, failed)), None)[1]  # type: ignore[method-assign]
    reply = engine.generate(Document((Text("go", Role.USER), Image(picture(3), Role.USER))), options)
    [(request, failed)] = requests
    assert len(reply.images) == 2 and not failed and request.num_tokens == len(script)
    spans = compose(Document(tuple(request.segments)), model.tokenizer, request.encoded)
    features = [span for span in spans if isinstance(span, FeatureSpan)]
    assert [span.grid for span in features] == [(1, 2, 3), (1, 1, 2), (1, 1, 1)]
    assert torch.equal(features[1].features, model.encoder.encode(reply.document.segments[-4].pixels[None])[0, 0])
    _, keys = training_memory(model, spans)
    num = request.history.length
    assert num >= keys.shape[2] - 2 and request.length == keys.shape[2]
    torch.testing.assert_close(cached_keys(engine, request.history), keys[:, :, :num], atol=1e-10, rtol=0)
    branch = request.branches["text"]  # before the last picture: without texts, with the first two pictures
    assert sum(mark < 0 for mark in branch.marks) == (6 + 2 if pictures == "features" else 24 + 6 + 8 + 2)
    finish(request, failed)


def test_a_history_read_in_parts_is_that_of_one_pass() -> None:
    """Parts cut no block of features; a part keeps the features of its positions."""
    model, spans = whole_model("both"), document("both")
    [whole] = histories_of(model, [spans])
    history = History(model.transformer.new_pool())
    rest, stops = append_of(history, spans, 0), []
    with torch.no_grad():
        while len(rest):
            stop = rest.legal_stop(3)
            stops.append(stop)
            run_context(model, [rest.part(0, stop)])
            rest = rest.part(stop, len(rest)) if stop < len(rest) else rest.part(0, 0)
    assert stops == [2, 6, 3, 1]  # ids; latents; features and an id; an id
    one, other = (h.pool.k[:, :, h.start : h.start + h.length] for h in (whole, history))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert not append_of(history, spans[2:3], 0).is_text and append_of(history, spans[:1], 0).is_text


def test_the_room_of_a_picture_counts_its_features() -> None:
    model = whole_model("both", max_context=64)
    c = model.tokenizer.control
    given = Document((Image(picture(1), Role.USER),))  # 3 + 24 latents + 6 features + 1
    assert model.num_positions((16, 24, 3)) == 30 and model.num_positions((2, 16, 24, 3)) == 48
    engine = Engine(model)
    follow(engine, lambda request: [c.image, c.size(4), c.size(3)])
    # begin, user, 34, end, assistant = 38; a header of 3; 12 latents and 4 features: 57 of 64
    ok = engine.generate(given, steps=1, max_tokens=4)
    assert len(ok.images) == 1 and len(ok.document.segments) >= 2
    follow(engine := Engine(model), lambda request: [c.image, c.size(4), c.size(5)])
    full = engine.generate(given, steps=1, max_tokens=4)  # 20 latents and 6 features end beyond 64
    assert not full.images and full.stop_reason == "length"
    with pytest.raises(ValueError, match="longest context"):
        engine.generate(Document((Image(picture(1, 24, 32), Role.USER), Text("a" * 8, Role.USER))))


def test_a_kept_prompt_with_features_is_found_again() -> None:
    model = whole_model("features")
    engine = Engine(model)
    options = GenerationOptions(max_tokens=3, max_images=0, temperature=0.0)
    prompt = Document((Image(picture(1), Role.USER), Text("what is it", Role.USER)))
    first, cost = engine.generate(prompt, options), engine.steps.computed
    again, repeated = engine.generate(prompt, options), engine.steps.computed - cost
    assert first.text == again.text and repeated < cost / 2
    assert model.encoder.num_pictures == 1  # the engine keeps features, too
    other = Document((Image(picture(2), Role.USER), Text("what is it", Role.USER)))
    engine.generate(other, options)
    assert engine.steps.computed - cost - repeated > repeated and model.encoder.num_pictures == 2


# ---- who sees what -------------------------------------------------------------------------------------------------


def document(pictures: Pictures, shift: float = 0.0, of_latents: float = 0.0) -> list[Span]:
    """Text, a supervised picture with its features, text; the features, or the clean latents, shifted."""
    latents = Key(1).fold("latents").normal((6, 48))
    features = Key(1).fold("features").normal((2, WIDTH))
    return [
        TokenSpan([1, 2], [True, True]),
        LatentSpan(latents + of_latents, (1, 2, 3), True, in_context=pictures == "both"),
        FeatureSpan(features + shift, (1, 1, 2)),
        TokenSpan([3, 4], [True, True]),
    ]


@pytest.mark.parametrize("pictures", ["both", "features"])
def test_the_noisy_copy_sees_neither_of_its_own(pictures: Pictures) -> None:
    model = whole_model(pictures, transformer={"latent_weights": "separate"})

    def run(spans: list[Span]) -> tuple[Tensor, Tensor]:
        [batch], _ = pack([spans], [Shape(1, 64, 64)], channels=48, pad_id=0, fixed_shape=False)
        with torch.no_grad():
            hidden, memory = model.context(batch)
            x = Key(2).fold("x").normal((1, 6, 48)).double()
            half = torch.tensor([0.5], dtype=torch.float64)
            return hidden, model.velocity(x, half, half / 2, half * 2, batch.refine, batch.item, memory)

    hidden, F = run(document(pictures))
    shifted, same = run(document(pictures, shift=1.0))
    assert torch.equal(F, same) and F.abs().max() > 1e-2
    assert (hidden[:, -2:] - shifted[:, -2:]).abs().max() > 1e-3  # the text after it reads the features
    assert torch.equal(hidden[:, :2], shifted[:, :2])
    other, _ = run(document(pictures, of_latents=1.0))
    reads_latents = (hidden[:, -2:] - other[:, -2:]).abs().max() > 1e-6
    assert reads_latents == (pictures == "both")


def test_the_layout_of_both_blocks() -> None:
    """The features are a bidirectional block behind the latents; neither is a target or a start of joint tokens."""
    [batch], _ = pack([document("both")], [Shape(1, 64, 64)], channels=48, pad_id=9, fixed_shape=False)
    assert batch.context.block[0].tolist() == [0, 1, *[2] * 6, 3, 3, 4, 5]
    assert batch.context.position[0, :, 2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
    assert batch.features is not None and batch.features.at.tolist() == [8, 9]
    assert batch.features.place.tolist() == [[0, 0], [0, 1]]
    assert batch.target[0].tolist() == [2, *[IGNORE] * 8, 3, 4, IGNORE]
    assert batch.is_latent[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.is_block[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    [seen] = dense(batch.context.fields, batch.context.fields)
    assert seen[8:10, :10].all() and not seen[:8, 8:].any() and seen[11, :12].all()
    moved = batch.to("cpu")
    assert moved.features is not None and torch.equal(moved.features.values, batch.features.values)


def test_text_alone_is_unchanged_to_the_bit() -> None:
    """The logits of a document without pictures are those of the model without an encoder: no cost, no new weight."""
    plain, model = whole_model(None).float(), whole_model("both").float()
    assert {n: v.shape for n, v in model.state_dict().items() if not n.startswith("features.")} == {
        n: v.shape for n, v in plain.state_dict().items()
    }
    spans: list[Span] = [TokenSpan(list(range(20)), [True] * 20)]
    [batch], _ = pack([spans], [Shape(1, 32, 0)], channels=48, pad_id=0)
    assert batch.features is None
    with torch.no_grad():
        logits = [one.token.read(one.context(batch)[0]) for one in (plain, model)]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="features of pictures need a model"):
        histories_of(plain.double(), [document("both")])


def test_gradients_reach_the_projector() -> None:
    model = whole_model("features")
    [batch], _ = pack([document("features")], [Shape(1, 64, 64)], channels=48, pad_id=0)
    model.context(batch)[0][0, 5].sum().backward()
    assert model.features is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.features.parameters() if p.ndim > 1)


# ---- a model and its encoder ---------------------------------------------------------------------------------------


def test_a_model_without_a_codec_reads_pictures() -> None:
    model = whole_model("features")
    model.codec = None
    given = Document((Image(picture(1, 17, 23), Role.USER), Text("which", Role.USER)))
    spans = model.spans(given)
    assert [span.grid for span in spans if isinstance(span, FeatureSpan)] == [(1, 2, 3)]
    assert Engine(model).generate(given, max_tokens=2, max_images=0).stop_reason in ("length", "end", "images")
    with pytest.raises(ValueError, match="no codec: give no clips"):
        model.spans(Document((Image(picture(), Role.ASSISTANT, True),)))


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = whole_model("both")
    model.encoder = None
    with pytest.raises(ValueError, match="has no encoder; set model.encoder"):
        model.spans(Document((Image(picture(), Role.USER),)))
    with pytest.raises(ValueError, match='projector = "none" needs features'):
        Omni(OmniConfig(vocab_size=300, encoder=EncoderBlockConfig(width=WIDTH, projector="none")))
    tall = replace(document("both")[2], features=torch.zeros(9, WIDTH), grid=(1, 9, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row or column 9, and the table of positions has 8"):
        histories_of(model, [[TokenSpan([1], [True]), tall]])
    with pytest.raises(ValueError, match="needs"):
        FeatureSpan(torch.zeros(3, WIDTH), (1, 2, 2))
    assert FeatureSpan(torch.zeros(6, WIDTH), (1, 2, 3)).places[2:4] == [(0, 2), (1, 0)]
    [batch], _ = pack([document("both")], [Shape(1, 64, 64)], channels=48, pad_id=0)
    one = type("Pass", (), {"batch": batch})()
    with pytest.raises(ValueError, match="also reads the features of an encoder"):
        sampled_past(object(), one, Key(0))  # type: ignore[arg-type]


def test_projectors(tmp_path: Path) -> None:
    features, place = Key(0).normal((3, WIDTH)), torch.tensor([[0, 0], [0, 1], [1, 0]])
    from omni.encoders import FeatureProjector
    from omni.nn.declare import initialise

    found = {}
    for projector, activation in (("linear", "gelu"), ("mlp", "gelu"), ("mlp", "gelu_tanh")):
        made = FeatureProjector(EncoderBlockConfig(width=WIDTH, projector=projector, activation=activation, table=2), 8)
        initialise(made, Key(0))
        h = made.first(features)
        if projector == "mlp":
            kind = "tanh" if activation == "gelu_tanh" else "none"
            h = made.second(torch.nn.functional.gelu(h, approximate=kind))
        torch.testing.assert_close(made(features, place), h + made.table.weight[[0, 1, 2]])
        found[projector, activation] = h
    assert not torch.equal(found["mlp", "gelu"], found["mlp", "gelu_tanh"])
    same = FeatureProjector(EncoderBlockConfig(width=WIDTH, projector="none"), WIDTH)
    assert torch.equal(same(features, place), features) and not list(same.parameters())
