"""The engine: ordered events, keyed samples independent of the batch, constrained headers, guidance as trained."""

from __future__ import annotations

import itertools

import pytest
import torch
from histories import histories_of, read, text
from scripted import force, living

import omni
from omni.codecs.pixels import PixelCodec
from omni.document import Document, Image, Role, Text, Video
from omni.generation import turn
from omni.generation.context import block_runs
from omni.generation.denoise import null_spans
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStart, BlockStep, Stop, TextDelta, VideoPart
from omni.generation.options import GenerationOptions
from omni.nn.cache import History
from omni.rng import Key
from omni.samplers.token import sample_token
from omni.sequence.guidance import drop, reduce
from omni.sequence.layout import TokenSpan
from omni.text.compose import frame_rate


@pytest.fixture(scope="module")
def model(tiny_model) -> omni.Omni:  # noqa: ANN001
    """Random weights; no part is at its zero start."""
    return living(tiny_model)


def picture_script(engine: Engine, h: int, w: int) -> list[int]:
    c = engine.control
    return [*engine.tokenizer.encode("hi "), c.image, c.size(h), c.size(w), *engine.tokenizer.encode("ok"), c.end]


def test_events_are_ordered_and_give_the_reply(model: omni.Omni) -> None:
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


def test_logits_are_capped_on_every_path(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt, after one id alone (the hot path), and after a picture."""
    monkeypatch.setattr(model.token, "logit_cap", 0.05)
    engine = force(model, picture_script(Engine(model), 2, 2))
    seen, choose = [], turn.choose

    def watched(request, scores):  # noqa: ANN001, ANN202
        seen.append(float(scores.values[scores.values.isfinite()].abs().max()))
        return choose(request, scores)

    monkeypatch.setattr(turn, "choose", watched)
    engine.generate("draw", steps=1, seed=1)
    assert len(seen) > 6 and min(seen) > 0.01 and max(seen) <= 0.05


def clip_script(engine: Engine, chunks: int, rate: int) -> list[int]:
    """A clip of chunks x 1 x 2 latents, and the end."""
    c = engine.control
    return [c.video, *map(c.size, (chunks, rate, 1, 2)), c.end]


def test_a_clip_has_the_chunks_and_rate_of_its_header(model: omni.Omni) -> None:
    """The clip in the next prompt has the header that the model emitted."""
    engine = Engine(model)
    reply = force(model, clip_script(engine, 3, 24)).generate("move", steps=2)
    [clip] = reply.parts
    assert isinstance(clip, VideoPart) and clip.frames.shape == (3, 4, 8, 3) and clip.fps == 24
    segment = reply.document.segments[-1]
    assert isinstance(segment, Video) and segment.fps == 24 and torch.equal(segment.frames, clip.frames)
    spans = model.spans(reply.document)
    header = [token for span in spans if isinstance(span, TokenSpan) for token in span.ids if token in engine.control]
    assert header[-8:-2] == [engine.control.assistant, *clip_script(engine, 3, 24)[:-1]]


@pytest.mark.parametrize(("fps", "rate"), [(24, 24), (23.976, 24), (0.5, 1), (64.4, 64)])
def test_a_forced_frame_rate_sets_header_and_clip(model: omni.Omni, fps: float, rate: int) -> None:
    """The mask forces the header's id, whatever the logits are; the clip has the requested number."""
    engine = Engine(model)
    engine.grammar.allowed = {  # a clip of one chunk, sampled by the model
        name: torch.full_like(mask, -torch.inf).index_fill(0, torch.tensor(ids), 0)
        for (name, mask), ids in zip(
            engine.grammar.allowed.items(),
            ([engine.control.video], [engine.control.size(1)], [*map(engine.control.size, range(1, 65))],
             [engine.control.size(1)], [engine.control.size(1)]),
            strict=True,
        )
    }  # fmt: skip
    for temperature in (0.0, 1.0):
        events = list(engine.stream("move", steps=1, fps=float(fps), max_images=1, temperature=temperature))
        [clip] = [event.part for event in events if isinstance(event, BlockDone)]
        assert isinstance(clip, VideoPart) and clip.fps == fps and frame_rate(clip.fps) == rate
        assert events[-1] == Stop("images")


@pytest.mark.parametrize("fps", [0.0, 0.49, 64.5, -8.0, float("nan"), float("inf")])
def test_a_frame_rate_without_an_id_raises(model: omni.Omni, fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        model.generate("move", fps=fps)


def test_a_clip_without_a_rate_token_raises_before_encoding(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.codec, "encode", lambda pixels: pytest.fail("it was encoded"))
    clip = Video(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), 0.2)
    with pytest.raises(ValueError, match="0.2 frames per second has no rate token"):
        model.generate(Document((clip, Text("what is this?"))))


def test_image_size_does_not_apply_to_clips(model: omni.Omni) -> None:
    script = clip_script(Engine(model), 3, 8)
    [clip] = force(model, script).generate("move", steps=2, image_size=(8, 8)).parts
    assert clip.frames.shape == (3, 4, 8, 3)  # type: ignore[union-attr]


def test_a_picture_beyond_the_budget_ends_the_reply(model: omni.Omni) -> None:
    """A mask that forbids pictures would give endless text instead."""
    script = picture_script(Engine(model), 1, 1)[:-1]  # text, a picture, text
    again = [*script, *script, *script]
    reply = force(model, again).generate("three pictures", steps=1, max_images=1)
    assert [type(part).__name__ for part in reply.parts] == ["TextPart", "ImagePart", "TextPart"]
    assert reply.text == "hi okhi " and reply.stop_reason == "images"
    none = force(model, again).generate("three pictures", max_images=0)
    assert none.text == "hi " and none.stop_reason == "images" and not none.images
    clip = force(model, clip_script(Engine(model), 1, 8)).generate("move", max_images=0)
    assert clip.parts == [] and clip.stop_reason == "images"


def test_max_images_does_not_change_text_without_pictures(model: omni.Omni) -> None:
    engine = Engine(model)
    engine.grammar.allowed["text"][[engine.control.image, engine.control.video]] = -torch.inf
    with_pictures, without = (
        engine.generate("say", temperature=1.0, max_tokens=12, max_images=n, seed=3) for n in (16, 0)
    )
    assert with_pictures.text == without.text != "" and with_pictures.stop_reason == without.stop_reason


def test_a_forced_picture_needs_a_codec(tiny_model) -> None:  # noqa: ANN001
    bare = omni.from_pretrained(tiny_model)
    bare.codec = None
    with pytest.raises(ValueError, match="no codec"):
        bare.generate("draw", force_image=True)


def test_the_codec_moves_with_the_model(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    seen: list[str] = []
    monkeypatch.setattr(PixelCodec, "to", lambda self, device: seen.append(str(device)) or self)
    monkeypatch.setattr("omni.pretrained.require_device", lambda name: name)
    omni.from_pretrained(tiny_model, device="meta")
    assert seen == ["meta"]


def test_what_computes_nothing_is_refused(tiny_model) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="device 'meta' is not available; use cpu"):
        omni.from_pretrained(tiny_model, device="meta")
    with pytest.raises(ValueError, match="dtype = torch.int32 is not a floating type; use torch.float32"):
        omni.from_pretrained(tiny_model, dtype=torch.int32)


def test_without_a_codec_a_picture_ends_the_reply(tiny_model) -> None:  # noqa: ANN001
    bare = omni.from_pretrained(tiny_model)
    bare.codec = None
    tokenizer = Engine(bare).tokenizer
    script = [*tokenizer.encode("Here: "), tokenizer.control.image]
    reply = force(bare, script).generate("draw", max_tokens=40)
    assert (reply.text, reply.stop_reason, reply.images) == ("Here: ", "images", [])


def test_an_impossible_image_size_is_named(model: omni.Omni) -> None:
    for size in ((1, 1), (8, 13), (8192, 8), (8, 4096)):
        with pytest.raises(
            ValueError, match=rf"image_size = {size[0]} x {size[1]} .* multiple of 4 x 4 .* at most 32 x"
        ):
            model.generate("draw", force_image=True, image_size=size)


def test_prompts_are_a_list(model: omni.Omni) -> None:
    for prompts in ("draw a cat", {"role": "user", "content": "x"}, Document((Text("x"),)), 3):
        with pytest.raises(ValueError, match="prompts must be a list of prompts, got a .*; put it in a list"):
            model.generate_batch(prompts)  # type: ignore[arg-type]
    replies = model.generate_batch(["x", "x"], {"max_tokens": 2, "seed": 1}, seeds=[1, 1])
    assert replies[0].text == replies[1].text


def test_changes_override_options(model: omni.Omni) -> None:
    one = GenerationOptions(steps=1, force_image=True, image_size=(8, 8), max_tokens=1, max_images=1)
    both = [Engine(model).generate("x", one, seed=3), Engine(model).generate("x", one.model_copy(update={"seed": 3}))]
    assert both[0].images[0].tobytes() == both[1].images[0].tobytes()
    assert both[0].images[0].tobytes() != Engine(model).generate("x", one).images[0].tobytes()
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        Engine(model).generate("x", one, stpes=4)


def test_unknown_defaults_of_a_model_raise() -> None:
    with pytest.raises(ValueError, match=r"'stpes' is no default .*did you mean 'steps'"):
        GenerationOptions().resolved({"stpes": 4})
    with pytest.raises(ValueError, match="give it with each request"):
        GenerationOptions().resolved({"max_tokens": 4})


def test_resolved_options_can_be_given_again(model: omni.Omni) -> None:
    resolved = Engine(model).resolve(GenerationOptions(steps=2))
    assert Engine(model).resolve(resolved) == resolved


def test_beta_is_one_over_the_guidance_of_the_embedding(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    betas: list[list[float]] = []
    velocity = model.velocity

    def listening(x, t, s, beta, *rest):  # noqa: ANN001, ANN002, ANN202
        betas.append(beta.tolist())
        return velocity(x, t, s, beta, *rest)

    monkeypatch.setattr(model, "velocity", listening)
    plain = {"force_image": True, "image_size": (8, 8), "steps": 1, "max_tokens": 1, "max_images": 1}
    for embedding, guidance in ((None, 1.0), (2.0, 1.0), (2.0, 3.0)):
        model.generate("draw", guidance=guidance, guidance_embedding=embedding, **plain)
    assert betas == [[1.0], [0.5], [0.5, 1.0]]  # the reduced history was trained at 1


def test_a_reply_does_not_depend_on_the_batch(model: omni.Omni) -> None:
    """Requests of different lengths and phases share passes, and each reply equals that of the request alone."""
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
    """The number of positions of every pass over the context, in order."""
    passes, extend = [], model.transformer.extend

    def counted(h, *arguments):  # noqa: ANN001, ANN202
        passes.append(h.shape[1])
        return extend(h, *arguments)

    monkeypatch.setattr(model.transformer, "extend", counted)
    return passes


def test_a_forced_picture_takes_one_pass_and_is_delivered_before_encoding(
    model: omni.Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = count_passes(model, monkeypatch)
    options = GenerationOptions(steps=2, force_image=True, image_size=(8, 8), max_images=1, max_tokens=5)
    prompt = sum(len(s.ids) for s in model.spans(Document((Text("draw"),)), True))  # type: ignore[union-attr]
    when = {type(event): list(passes) for event in Engine(model).stream("draw", options)}
    assert when[BlockStart] == when[BlockStep] == when[BlockDone] == [prompt + 3]  # a step gives its events at its end
    assert when[Stop][:2] == [prompt + 3, 4 + 1]  # the picture and its end, appended when text follows


@pytest.mark.parametrize(("limit", "expected"), [(3, 1), (4, 2)])
def test_the_last_picture_of_a_full_reply_is_not_encoded(
    model: omni.Omni, monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    """The header of the picture is ids 1 to 3 of the reply; only an id after it needs a pass over its latents."""
    passes = count_passes(model, monkeypatch)
    options = GenerationOptions(steps=1, force_image=True, image_size=(8, 8), max_images=1, max_tokens=limit)
    reply = Engine(model).generate("draw", options)
    assert (len(passes), len(reply.images), reply.stop_reason) == (expected, 1, "length")


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3), (23, 15)])
def test_refinement_in_free_slots_equals_a_copy(model: omni.Omni, lengths: tuple[int, int]) -> None:
    """Refinement in the free slots of a history equals refinement in new slots; run twice. With 23 and 15 positions
    the block needs more pages than the text."""
    spans = [[text(range(r, r + length))] for r, length in enumerate(lengths)]
    with torch.inference_mode():
        histories, x = histories_of(model, spans), Key(7).normal((1, 8, model.config.flow.channels))
        t, item = torch.tensor([0.9, 0.4]), torch.tensor([[0] * 4 + [1] * 4])

        def refine(scale: float, histories: list[History]) -> torch.Tensor:
            stream, runs = block_runs([(one, (1, 2, 2)) for one in histories], torch.device("cpu"))
            return model.velocity(scale * x, t, 0.5 * t, torch.ones(2), stream, item, runs)

        found = [refine(scale, histories) for scale in (1, 2)]
        wanted = [refine(scale, histories_of(model, spans)) for scale in (1, 2)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert float((found[0] - found[1]).abs().max()) > 1e-3
        assert [one.length for one in histories] == list(lengths)
        ahead = read(model, histories, spans)  # old values in the free slots are not context
        fresh = histories_of(model, spans)
        clean = read(model, fresh, spans)
        assert all(torch.equal(a, b) for a, b in zip(ahead, clean, strict=True))


def test_the_seed_determines_the_picture(model: omni.Omni) -> None:
    make = lambda seed: model.generate("x", force_image=True, image_size=(8, 8), steps=2, max_tokens=1, seed=seed)  # noqa: E731
    assert make(1).images[0].tobytes() == make(1).images[0].tobytes() != make(2).images[0].tobytes()


def test_header_is_always_well_formed(model: omni.Omni) -> None:
    """With random weights at temperature 2: sizes within the grid, text without control ids, limits respected."""
    options = GenerationOptions(steps=1, temperature=2.0, max_tokens=40, max_images=3)
    for reply in model.generate_batch(["q"] * 12, options, seeds=range(12)):
        assert len(reply.images) <= 3
        for picture in reply.images:
            assert picture.width <= 4 * model.config.max_grid and picture.height <= 4 * model.config.max_grid


def test_guidance_1_has_no_effect_and_others_change_the_picture(model: omni.Omni) -> None:
    def picture(**changes: float) -> bytes:
        reply = model.generate("draw", force_image=True, image_size=(8, 8), steps=2, max_tokens=1, **changes)
        return reply.images[0].tobytes()

    assert picture(guidance=1.0, image_guidance=1.0) == picture()
    assert picture(guidance=3.0) != picture()


def test_null_branch_equals_the_reduced_document_of_training(model: omni.Omni) -> None:
    """The engine's null history composes to the ids of guidance.drop, up to the picture."""
    engine = Engine(model)
    pixels = torch.zeros(8, 8, 3, dtype=torch.uint8)
    history = (Text("draw it"), Image(pixels), Text("so?"), Text("Here: ", Role.ASSISTANT))
    from omni.generation.request import Media, Request
    from omni.sequence.layout import LatentSpan

    image, video = Image(pixels, Role.ASSISTANT, True), Video(pixels[None], 30.2, Role.ASSISTANT, True)
    both = [(image, Media("image", 0, rows=2, columns=2)), (video, Media("video", 0, 1, 30, rows=2, columns=2))]
    for what, (target, media) in itertools.product(("text", "images", "all"), both):
        trained = drop(Document((*history, target)), what)
        assert trained is not None
        spans = model.spans(trained)
        request = Request(
            0, History(engine.pool), GenerationOptions(), history, engine.tokenizer.stream(), list(history)
        )
        request.latents[history[1]] = model.encode_media([history[1]])[0]
        request.media = media
        inferred = null_spans(engine.runtime, request, what)
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


def test_samples_follow_temperature_and_top_p() -> None:
    score = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = torch.tensor([sample_token(score, 0.7, 0.9, Key(0).fold(n)) for n in range(4000)])
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
        ({"guidance_embedding": 0.0}, "guidance_embedding = 0.0: must be a number from 0.001 to 100"),
        ({"adaptive": True}, "adaptive = True has no effect on one token a pass"),
        ({"force_image": True, "max_images": 0}, "max_images of at least 1, got 0"),
    ],
)
def test_impossible_options_are_named(model: omni.Omni, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate("draw", **changes)


def test_empty_prompt_raises(model: omni.Omni) -> None:
    for prompt in ("", "   "):
        with pytest.raises(ValueError, match="empty"):
            model.generate(prompt)
