"""The engine: ordered events, keyed draws independent of the batch, constrained headers, guidance as trained."""

from __future__ import annotations

import pytest
import torch

import omni
from omni.codecs.pixels import PixelCodec
from omni.document import Document, Image, Role, Text
from omni.engine import Engine
from omni.guidance import drop, reduce
from omni.layout import TokenSpan
from omni.prefill import append_spans, refine_stream
from omni.refinement import null_spans
from omni.reply import BlockDone, BlockStart, BlockStep, GenerationOptions, Stop, TextDelta
from omni.rng import Key
from omni.samplers.token import draw_token


@pytest.fixture(scope="module")
def model(tiny_model) -> omni.Omni:  # noqa: ANN001
    """Random weights, every part alive."""
    model = omni.from_pretrained(tiny_model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "velocity" in name:
                parameter.copy_(Key(0).fold(name).normal(tuple(parameter.shape)) * 0.2)
    return model


def force(model: omni.Omni, script: list[int]) -> Engine:
    """An engine whose token choices follow a script (per row), so that structure can be tested on random weights."""
    engine = Engine(model)
    choose = engine._choose

    def scripted(rows, logits):  # noqa: ANN001, ANN202
        chosen = choose(rows, logits)
        return [
            script[r.num_tokens - 1] if r.num_tokens <= len(script) else c for r, c in zip(rows, chosen, strict=True)
        ]

    engine._choose = scripted  # type: ignore[method-assign]
    return engine


def picture_script(engine: Engine, h: int, w: int) -> list[int]:
    c = engine.control
    return [*engine.tokenizer.encode("hi "), c.image, c.size(h), c.size(w), *engine.tokenizer.encode("ok"), c.end]


def test_events_come_in_order_and_make_the_reply(model: omni.Omni) -> None:
    script = picture_script(Engine(model), 2, 3)
    events = list(force(model, script).stream("draw", steps=3, seed=1))
    kinds = [type(e).__name__ for e in events]
    text = [e for e in events if isinstance(e, TextDelta)]
    assert "".join(e.text for e in text) == "hi ok"
    order = [k for k in kinds if k != "TextDelta"]
    assert order == ["BlockStart", "BlockStep", "BlockStep", "BlockStep", "BlockDone", "Stop"]
    start = next(e for e in events if isinstance(e, BlockStart))
    done = next(e for e in events if isinstance(e, BlockDone))
    assert start.grid == (1, 2, 3) and done.part.image.size == (12, 8)  # type: ignore[union-attr]
    assert [e.step for e in events if isinstance(e, BlockStep)] == [1, 2, 3]
    assert isinstance(events[-1], Stop) and events[-1].reason == "end"
    reply = force(model, script).generate("draw", steps=3, seed=1)
    assert [type(p).__name__ for p in reply.parts] == ["TextPart", "ImagePart", "TextPart"]
    assert [s.role for s in reply.document.segments][1:] == [Role.ASSISTANT] * 3


def test_logits_are_capped_wherever_they_are_read(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt, after one id alone (the hot path), and after a picture."""
    monkeypatch.setattr(model.token, "logit_cap", 0.05)
    engine = force(model, picture_script(Engine(model), 2, 2))
    seen, choose = [], engine._choose

    def watched(rows, logits):  # noqa: ANN001, ANN202
        seen.append(float(logits.abs().max()))
        return choose(rows, logits)

    engine._choose = watched  # type: ignore[method-assign]
    engine.generate("draw", steps=1, seed=1)
    assert len(seen) > 6 and min(seen) > 0.01 and max(seen) <= 0.05


def test_a_clip_is_a_row_of_chunks(model: omni.Omni) -> None:
    c = Engine(model).control
    script = [c.video, c.size(3), c.size(1), c.size(2), c.end]
    reply = force(model, script).generate("move", steps=2)
    [clip] = reply.parts
    assert clip.frames.shape == (3, 4, 8, 3)  # type: ignore[union-attr]


def test_a_size_of_pictures_is_not_a_clips(model: omni.Omni) -> None:
    c = Engine(model).control
    script = [c.video, c.size(3), c.size(1), c.size(2), c.end]
    [clip] = force(model, script).generate("move", steps=2, image_size=(8, 8)).parts
    assert clip.frames.shape == (3, 4, 8, 3)  # type: ignore[union-attr]


def test_a_forced_picture_needs_a_codec(tiny_model) -> None:  # noqa: ANN001
    bare = omni.from_pretrained(tiny_model)
    bare.codec = None
    with pytest.raises(ValueError, match="no codec"):
        bare.generate("draw", force_image=True)


def test_the_codec_goes_where_the_model_goes(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    seen: list[str] = []
    monkeypatch.setattr(PixelCodec, "to", lambda self, device: seen.append(str(device)) or self)
    omni.from_pretrained(tiny_model, device="meta")
    assert seen == ["meta"]


def test_changes_count_beside_options(model: omni.Omni) -> None:
    one = GenerationOptions(steps=1, force_image=True, image_size=(8, 8), max_tokens=1, max_images=1)
    both = [Engine(model).generate("x", one, seed=3), Engine(model).generate("x", one.model_copy(update={"seed": 3}))]
    assert both[0].images[0].tobytes() == both[1].images[0].tobytes()
    assert both[0].images[0].tobytes() != Engine(model).generate("x", one).images[0].tobytes()
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        Engine(model).generate("x", one, stpes=4)


def test_defaults_of_a_model_are_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'stpes' is no default .*did you mean 'steps'"):
        GenerationOptions().resolved({"stpes": 4})
    with pytest.raises(ValueError, match="give it with each request"):
        GenerationOptions().resolved({"max_tokens": 4})


def test_resolved_options_can_be_given_again(model: omni.Omni) -> None:
    resolved = Engine(model).resolve(GenerationOptions(steps=2))
    assert Engine(model).resolve(resolved) == resolved


def test_a_network_trained_with_guidance_is_told_it(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[float]] = []
    velocity = model.velocity

    def listening(x, t, s, beta, *rest):  # noqa: ANN001, ANN002, ANN202
        told.append(beta.tolist())
        return velocity(x, t, s, beta, *rest)

    monkeypatch.setattr(model, "velocity", listening)
    plain = {"force_image": True, "image_size": (8, 8), "steps": 1, "max_tokens": 1, "max_images": 1}
    for told_guidance, guidance in ((None, 1.0), (2.0, 1.0), (2.0, 3.0)):
        model.generate("draw", guidance=guidance, told_guidance=told_guidance, **plain)
    assert told == [[1.0], [0.5], [0.5, 1.0]]  # the reduced history was trained at 1


def test_alone_equals_in_a_batch(model: omni.Omni) -> None:
    """Rows of different lengths and phases share passes and still give what each gives alone, bit for bit in pixels."""
    prompts = ["a", "draw me something rather long, please", "b c"]
    options = GenerationOptions(
        steps=2, max_tokens=12, max_images=2, temperature=1.0, force_image=True, image_size=(8, 8)
    )
    together = model.generate_batch(prompts, options, seeds=[1, 2, 3])
    for prompt, seed, reply in zip(prompts, [1, 2, 3], together, strict=True):
        alone = model.generate_batch([prompt], options, seeds=[seed])[0]
        assert alone.text == reply.text and len(alone.images) == len(reply.images) > 0
        for a, b in zip(alone.images, reply.images, strict=True):
            difference = max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))
            assert difference <= 1  # float rounding may move a pixel by one level


def count_passes(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions of every pass over the context, as they happen."""
    passes, extend = [], model.transformer.extend

    def counted(h, *arguments):  # noqa: ANN001, ANN202
        passes.append(h.shape[1])
        return extend(h, *arguments)

    monkeypatch.setattr(model.transformer, "extend", counted)
    return passes


def test_a_forced_picture_costs_one_pass_and_is_delivered_before_it_is_encoded(
    model: omni.Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(model, monkeypatch)
    options = GenerationOptions(steps=2, force_image=True, image_size=(8, 8), max_images=1, max_tokens=5)
    prompt = sum(len(s.ids) for s in model.spans(Document((Text("draw"),)), True))  # type: ignore[union-attr]
    when = {type(event): list(passes) for event in Engine(model).stream("draw", options)}
    assert when[BlockStart] == []
    assert when[BlockStep] == when[BlockDone] == [prompt + 3]
    assert when[Stop][:2] == [prompt + 3, 4 + 1]  # the picture and its end, once more text is asked for


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)])
def test_room_in_the_cache_changes_nothing(model: omni.Omni, lengths: tuple[int, int]) -> None:
    """Blocks refined in the free slots of the cache, against a copy of its keys and values; twice, as samplers do."""
    spans = [[TokenSpan([r + n for n in range(length)], [False] * length)] for r, length in enumerate(lengths)]
    key = Key(7)
    with torch.inference_mode():
        cache = model.transformer.new_cache(2, 6)  # too small for the block, so it grows
        append_spans(model, cache, spans, 0)
        stream, x = refine_stream(cache, (1, 2, 2), "cpu"), key.normal((2, 4, model.config.flow.channels))
        t = torch.tensor([0.9, 0.4])
        room = cache.memory(room=4)
        found = [model.velocity(scale * x, t, 0.5 * t, torch.ones(2), stream, None, room) for scale in (1, 2)]
        plain = cache.memory()
        wanted = [model.velocity(scale * x, t, 0.5 * t, torch.ones(2), stream, None, plain) for scale in (1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert float((found[0] - found[1]).abs().max()) > 1e-3
        ahead = append_spans(model, cache, spans, 0)  # what stood in the free slots is not context
        fresh = model.transformer.new_cache(2, 32)
        for _ in range(2):
            clean = append_spans(model, fresh, spans, 0)
        assert torch.equal(ahead, clean)


def test_seed_decides_the_picture(model: omni.Omni) -> None:
    make = lambda seed: model.generate("x", force_image=True, image_size=(8, 8), steps=2, max_tokens=1, seed=seed)  # noqa: E731
    assert make(1).images[0].tobytes() == make(1).images[0].tobytes() != make(2).images[0].tobytes()


def test_header_is_always_well_formed(model: omni.Omni) -> None:
    """Whatever random weights say at temperature 2: sizes within the grid, text without control ids, budgets kept."""
    options = GenerationOptions(steps=1, temperature=2.0, max_tokens=40, max_images=3)
    for reply in model.generate_batch(["q"] * 12, options, seeds=range(12)):
        assert len(reply.images) <= 3
        for picture in reply.images:
            assert picture.width <= 4 * model.config.max_grid and picture.height <= 4 * model.config.max_grid


def test_guidance_of_one_is_no_guidance_and_others_change_the_picture(model: omni.Omni) -> None:
    def picture(**changes: float) -> bytes:
        reply = model.generate("draw", force_image=True, image_size=(8, 8), steps=2, max_tokens=1, **changes)
        return reply.images[0].tobytes()

    assert picture(guidance=1.0, image_guidance=1.0) == picture()
    assert picture(guidance=3.0) != picture()


def test_null_branch_is_the_document_that_training_drops_to(model: omni.Omni) -> None:
    """The engine's null history composes to the ids of guidance.drop, up to the picture."""
    engine = Engine(model)
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8)
    history = (Text("draw it"), Image(pixels), Text("so?"), Text("Here: ", Role.ASSISTANT))
    target = Image(pixels, Role.ASSISTANT, supervise=True)
    from omni.layout import LatentSpan
    from omni.row import Media, Row

    for what in ("text", "images", "all"):
        trained = drop(Document((*history, target)), what)
        assert trained is not None
        spans = model.spans(trained)
        row = Row(0, GenerationOptions(), list(history), engine.tokenizer.stream())
        row.media = Media("image", 0, rows=2, columns=2)
        inferred = null_spans(engine, row, what)
        last = max(i for i, s in enumerate(spans) if isinstance(s, LatentSpan))
        flat = lambda group: [s.ids if not isinstance(s, LatentSpan) else s.grid for s in group]  # noqa: E731
        assert flat(inferred) == flat(spans[:last]), what


def test_reduce_keeps_roles() -> None:
    segments = (Text("a"), Text("b", Role.ASSISTANT), Text("c"))
    assert [s.role for s in reduce(segments, "text")] == [Role.USER, Role.ASSISTANT, Role.USER]
    assert all(isinstance(s, Text) and s.text == "" for s in reduce(segments, "all"))
    assert reduce(segments, "images") == segments
    assert drop(Document(segments), "text") is None


def test_stop_strings_are_held_back_and_cut(model: omni.Omni) -> None:
    script = [*Engine(model).tokenizer.encode("one STOP two")]
    events = list(force(model, script).stream("x", stop=("STOP",)))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "one "
    assert events[-1] == Stop("stop")


def test_length_limit(model: omni.Omni) -> None:
    script = [*Engine(model).tokenizer.encode("abcdefgh")]
    reply = force(model, script).generate("x", max_tokens=3)
    assert reply.text == "abc" and reply.stop_reason == "length"


def test_draws_follow_temperature_and_top_p() -> None:
    score = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.tensor([draw_token(score, 0.7, 0.9, Key(0).fold(n)) for n in range(4000)])
    p = (score.double() / 0.7).softmax(-1)
    p[2:] = 0  # 0.79 + 0.19 reach 0.9 with two tokens
    found = torch.bincount(draws, minlength=4) / len(draws)
    assert float((found - p / p.sum()).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps = 0: must be a whole number from 1 to 1000"),
        ({"temperature": -1.0}, "temperature = -1.0: must be a number from 0 to 100"),
        ({"top_p": 0.0}, "top_p = 0.0: must be a number from 1e-06 to 1"),
        ({"image_size": (7, 8)}, "7 x 8"),
        ({"max_tokens": 0}, "max_tokens = 0: must be a whole number from 1 to 1000000"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
        ({"told_guidance": 0.0}, "told_guidance = 0.0: must be a number from 0.001 to 100"),
        ({"adaptive": True}, "adaptive = True has no effect on one token a pass"),
        ({"force_image": True, "max_images": 0}, "max_images of at least 1, got 0"),
    ],
)
def test_impossible_options_are_named(model: omni.Omni, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate("draw", **changes)


def test_empty_prompt_is_refused(model: omni.Omni) -> None:
    for prompt in ("", "   "):
        with pytest.raises(ValueError, match="empty"):
            model.generate(prompt)
