"""Any order of refining the blocks of a clip: the engine's calls equal the training forward, pass by pass, and its
passes are those of the schedule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scripted import follow, living
from torch import Tensor

from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Role, Text, Video
from omni.generation import denoise
from omni.generation.contract import verify
from omni.generation.engine import Engine
from omni.generation.events import BlockStep, Failed, VideoPart
from omni.generation.options import GenerationOptions
from omni.generation.work import Noisy
from omni.model import Omni
from omni.sequence.block_context import BlockContext, joined
from omni.sequence.layout import LatentSpan, Shape, TokenSpan, pack
from omni.sequence.schedule import Schedule, level_major, staggered

CHUNKS, STEPS, N = 3, 3, 12  # blocks of the clip, steps, latents of a block
CLIP = Video(torch.zeros(2 * CHUNKS, 8, 12, 3, dtype=torch.uint8), 8.0, Role.ASSISTANT, supervise=True)
REGIMES = [
    BlockContext(reads="before"), BlockContext(reads="before", finished="refine"),
    BlockContext(reads="before", finished="refine", context_time=0.2), BlockContext(reads="all"),
    BlockContext(reads="all", finished="refine"), BlockContext(reads="all", context_time=0.2),
]  # fmt: skip
FALLS = ((2, 2, 2), (2, 1, 2), (1, 1, 2), (0, 0, 1), (0, 0, 0))  # the second block starts first
ORDERS: dict[str, tuple[dict[str, Any], Schedule]] = {
    "together": ({"delay": 0}, staggered(CHUNKS, STEPS, 0)),
    "pyramid": ({"delay": 1}, staggered(CHUNKS, STEPS, 1)),
    "two passes for a start": ({"delay": 1.5}, staggered(CHUNKS, STEPS, 1.5)),
    "one after another": ({"delay": 1000}, staggered(CHUNKS, STEPS, STEPS)),
    "matrix": ({"blocks": FALLS, "steps": 2}, Schedule(FALLS, 2)),
    "level by level": ({"blocks": "level_major"}, level_major(CHUNKS, STEPS, "all")),
}


@pytest.fixture(scope="module")
def whole(tiny_model) -> Omni:  # noqa: ANN001
    model = living(tiny_model)
    model.codec = PixelCodec(PixelConfig(patch=4, frames_per_chunk=2))
    return model.double()


def with_blocks(model: Omni, context: BlockContext) -> Omni:
    model.config = model.config.model_copy(update={"blocks": context})
    return model


@pytest.fixture
def model(whole: Omni) -> Iterator[Omni]:
    """Random weights in float64; the regime of a test does not stay."""
    config = whole.config
    yield whole
    whole.config = config


@dataclass
class Pass:
    """One evaluation: what the network read of each block, by number; F of those that moved; finished blocks."""

    done: int = 0
    blocks: dict[int, Noisy] = field(default_factory=dict)
    moved: list[int] = field(default_factory=list)
    F: Tensor | None = None


def clip_script(model: Omni) -> list[int]:
    [ids] = [span.ids for span in model.spans(Document((CLIP,)))[:1] if isinstance(span, TokenSpan)]
    return ids[ids.index(Engine(model).control.video) :]


def refined(model: Omni, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[Pass], list[Tensor]]:
    """The passes of a clip of three blocks, and its final latents."""
    passes, noisy, guided = [Pass()], denoise._noisy, denoise._guided

    def watched(runtime: Any, request: Any, block: Any, waiting: Any, context: Any) -> Noisy:
        found = noisy(runtime, request, block, waiting, context)
        passes[-1].blocks[block.number], passes[-1].done = found, len(request.media.finished)
        passes[-1].moved += [block.number] if block in waiting else []
        return found

    def summed(F: Tensor, scales: Any) -> Tensor:
        passes[-1].F = guided(F, scales)
        passes.append(Pass())
        return passes[-2].F  # type: ignore[return-value]

    monkeypatch.setattr(denoise, "_noisy", watched)
    monkeypatch.setattr(denoise, "_guided", summed)
    engine, ended = Engine(model), {}
    follow(engine, lambda request: clip_script(model))
    request = GenerationOptions(max_images=1, max_tokens=8, **{"steps": STEPS, **options})
    for event in engine.stream("move", request):
        assert not isinstance(event, Failed)
        if isinstance(event, BlockStep) and event.step == event.steps:
            ended[event.block] = event.latents
    return passes[:-1], [ended[b] for b in range(CHUNKS)]


@torch.no_grad()
@pytest.mark.parametrize("context", REGIMES, ids=lambda c: f"{c.reads}-{c.finished}-{c.context_time}")
@pytest.mark.parametrize("order", ORDERS)
def test_every_pass_equals_the_training_forward(
    model: Omni, monkeypatch: pytest.MonkeyPatch, order: str, context: BlockContext
) -> None:
    """The document with the reply's clip is packed for training; its blocks get the times and noisy latents of a pass.
    Blocks that have not started are hidden, finished ones as the regime defines."""
    given, schedule = ORDERS[order]
    with_blocks(model, context)
    passes, latents = refined(model, monkeypatch, **given)
    assert len(passes) == schedule.num_passes
    spans = model.spans(Document((Text("move"), CLIP)))
    at = [i for i, span in enumerate(spans) if isinstance(span, LatentSpan)]
    for i, x in zip(at, latents, strict=True):
        spans[i] = LatentSpan(x, spans[i].grid, supervise=True)  # type: ignore[union-attr]
    [batch], _ = pack([spans], [Shape(1, 200, 100)], channels=48, pad_id=0, fixed_shape=False)
    _, memory = model.context(batch)
    for m, one in enumerate(passes):
        assert one.moved == [move.block for move in schedule.moves(m)]
        assert one.F is not None
        x, times = batch.refine_latents[0].double(), torch.ones(CHUNKS, 2)
        for b, block in one.blocks.items():
            x[b * N : (b + 1) * N], times[b] = block.x, torch.tensor([block.t, block.s])
        done = torch.arange(CHUNKS) < (one.done if context.finished == "context" else 0)
        hidden = torch.tensor([b not in one.blocks and not done[b] for b in range(CHUNKS)])
        stream = joined(batch.refine, batch.item, batch.item_names, context, done, hidden)
        ones = torch.ones(CHUNKS)  # as in the engine
        t, s = times.unbind(1)
        found = model.velocity(x[None], t, s, ones, stream, batch.item, memory)[0].split(N)
        for b, F in zip(one.blocks, one.F.split(N), strict=True):
            if b in one.moved:
                torch.testing.assert_close(F, found[b], rtol=0, atol=1e-10)


def test_blocks_read_what_the_regime_says(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second block in refinement changes with the noisy first one if it reads it, and the first with the second."""
    firsts = {}
    for reads in ("before", "all"):
        with_blocks(model, BlockContext(reads=reads))
        passes, _ = refined(model, monkeypatch, delay=0)
        monkeypatch.undo()
        firsts[reads] = passes[0].F
    with_blocks(model, BlockContext())
    alone, _ = refined(model, monkeypatch)
    for reads, equal in (("before", True), ("all", False)):
        assert (float((firsts[reads][:N] - alone[0].F).abs().max()) < 1e-12) is equal  # type: ignore[index]


def test_finished_blocks_are_shown_at_their_time(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled, with new noise in every pass if wished; the reply keeps the block itself."""
    for noise in (False, True):
        context = BlockContext(reads="before", finished="refine", context_time=0.25, context_noise=noise)
        passes, latents = refined(model=with_blocks(model, context), monkeypatch=monkeypatch, delay=STEPS)
        monkeypatch.undo()
        shown = [one.blocks[0] for one in passes if 0 not in one.moved]
        assert len(shown) == 2 * STEPS and all((block.t, block.s) == (0.25, 0.25) for block in shown)
        rest = torch.stack([block.x - 0.75 * latents[0] for block in shown])
        if noise:
            assert float(rest.std()) == pytest.approx(0.25, rel=0.05)
            assert float((rest[0] - rest[1]).abs().max()) > 0.1
        else:
            assert float(rest.abs().max()) < 1e-6


def test_a_model_on_finished_blocks_goes_one_after_another(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, latents = refined(model, monkeypatch)
    assert [one.moved for one in passes] == [[b] for b in range(CHUNKS) for _ in range(STEPS)]
    monkeypatch.undo()
    again = refined(model, monkeypatch, delay=STEPS)[1]
    assert all(torch.equal(a, b) for a, b in zip(latents, again, strict=True))


@pytest.mark.parametrize("sampler", ["heun", "flow_map", "gamma", "restart"])
def test_samplers_of_neighbours_go_in_step(model: Omni, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """Heun asks twice for each jump but the last; a block in its last jump waits for the others."""
    with_blocks(model, BlockContext(reads="before"))
    passes, _ = refined(model, monkeypatch, delay=1, sampler=sampler)
    moved = [one.moved for one in passes]
    if sampler == "heun":
        assert moved == [[0], [0], [0, 1], [0, 1], [0, 1, 2], [1, 2], [1, 2], [2], [2]]
    else:
        assert moved == [[0], [0, 1], [0, 1, 2], [1, 2], [2]]
    for one in passes:
        assert one.F is not None and one.F.isfinite().all()


def test_evaluations_count_every_moving_block_and_branch(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance 1 there is no branch; else one, for every jump of every block."""
    with_blocks(model, BlockContext(reads="before"))
    engine = Engine(model)
    follow(engine, lambda request: clip_script(model))
    for guidance, evaluations in ((1.0, CHUNKS * STEPS), (3.0, 2 * CHUNKS * STEPS)):
        options = GenerationOptions(steps=STEPS, delay=1, guidance=guidance, max_images=1, max_tokens=8)
        reply = engine.generate("move", options)
        [part] = [part for part in reply.parts if isinstance(part, VideoPart)]
        assert part.evaluations == evaluations


def test_a_clip_beside_other_requests_equals_it_alone(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    with_blocks(model, BlockContext(reads="all"))
    options = GenerationOptions(steps=STEPS, delay=1, guidance=2.0, max_images=1, max_tokens=8)

    def clips(prompts: list[str]) -> list[Tensor]:
        engine = Engine(model)
        follow(engine, lambda request: clip_script(model))
        replies = engine.generate_batch(prompts, options, seeds=list(range(len(prompts))))
        return [part.frames for reply in replies for part in reply.parts if isinstance(part, VideoPart)]

    together, alone = clips(["a", "bcd", "e"]), clips(["a"])
    assert len(together) == 3 and torch.equal(together[0], alone[0])


def test_a_picture_has_no_order_of_blocks(model: Omni) -> None:
    """The matrix of a model's clips, with a column per block, does not keep it from drawing pictures."""
    with_blocks(model, BlockContext(reads="all"))
    options = {"steps": 2, "force_image": True, "image_size": (8, 8), "max_images": 1, "max_tokens": 1}
    plain, matrix = (
        Engine(model).generate("draw", GenerationOptions(**{**options, **own})) for own in ({}, {"blocks": FALLS})
    )
    assert matrix.images[0].tobytes() == plain.images[0].tobytes()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "options", "words"),
    [
        (BlockContext(), {"delay": 1}, "this model's noisy blocks read finished blocks alone"),
        (BlockContext(), {"blocks": "level_major"}, "read finished blocks alone"),
        (BlockContext(reads="all"), {"blocks": ((1, 1, 1), (1, 0, 1), (0, 0, 0))}, "block 1 is unfinished in row 1"),
        (BlockContext(reads="all"), {"blocks": ((1, 1), (0, 0))}, "blocks has 2 columns, but the clip has 3 blocks"),
    ],
)
def test_a_schedule_that_the_model_was_not_trained_for_is_refused(
    model: Omni, context: BlockContext, options: dict[str, Any], words: str
) -> None:
    with_blocks(model, context)
    engine = Engine(model)
    follow(engine, lambda request: clip_script(model))
    with pytest.raises(ValueError, match=words):
        engine.generate("move", GenerationOptions(max_images=1, max_tokens=8, **options))


@pytest.mark.parametrize(
    ("context", "options", "words"),
    [
        (BlockContext(), {"delay": 1}, "this model's noisy blocks read finished blocks alone"),
        (BlockContext(unit="latent"), {"blocks": "level_major"}, "this model's noisy blocks read finished blocks"),
        (BlockContext(reads="all"), {"rounds": 4}, "rounds = 4 has no effect: this model refines all latents"),
        (BlockContext(reads="all"), {"blocks": ((1, 1), (1, 0), (0, 0))}, "block 1 is unfinished in row 1"),
    ],
)
def test_an_order_without_effect_is_refused_before_the_reply(
    model: Omni, context: BlockContext, options: dict[str, Any], words: str
) -> None:
    """Also where the reply would be text, and among a model's defaults."""
    engine = Engine(with_blocks(model, context))
    with pytest.raises(ValueError, match=words):
        engine.resolve(GenerationOptions(**options))
    model.defaults, own = {**model.defaults, **options}, model.defaults
    try:
        with pytest.raises(ValueError, match=words):
            engine.add("hello")
    finally:
        model.defaults = own
    engine.resolve(GenerationOptions(steps=3, **({"rounds": 4} if context.unit == "latent" else {"delay": 3})))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": "stagered"}, "unknown order 'stagered'.*staggered"),
        ({"blocks": "level_major", "delay": 1}, "delay has an effect with blocks = 'staggered' only"),
        ({"blocks": [[1, 2], [0, 0]]}, r"the first row of blocks is \[1, 2\]; every block starts as noise, at level 2"),
        ({"blocks": [[2, 2], [0, 0]], "steps": 3}, "at level 3, the steps"),
        ({"blocks": [[1, 1], [1, 1]]}, "row 1 equals row 0"),
        ({"blocks": 3}, "must be a name, or a matrix"),
        ({"blocks": [[1.0], [0.0]]}, "blocks = .*must be a name, or a matrix of integer levels"),
        ({"delay": -1}, "0 to 1000"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationOptions(**options)


def test_a_matrix_gives_the_number_of_steps() -> None:
    given = GenerationOptions(blocks=[[4, 4], [0, 4], [0, 0]])
    assert given.resolved({"steps": 8, "delay": 2.0}).picture.steps == 4
    assert given.resolved({"grid": [1, 0.5, 0]}).picture.grid == "uniform"  # as with other steps than the grid's
    assert GenerationOptions(delay=0).resolved({"blocks": "level_major"}).picture.blocks is None
    default = {"blocks": [[2, 2], [1, 2], [0, 1], [0, 0]]}
    for own, steps, stays in (
        ({}, 2, True),
        ({"steps": 2}, 2, True),
        ({"steps": 4}, 4, False),
        ({"grid": (1, 0)}, 1, False),
    ):
        found = GenerationOptions(**own).resolved(default).picture
        assert found.steps == steps and (found.blocks is not None) is stays
    assert GenerationOptions.model_validate(json.loads(given.model_dump_json())) == given


# ---- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", REGIMES[:1] + REGIMES[3:5], ids=lambda c: f"{c.reads}-{c.finished}")
def test_verify_compares_blocks_that_move_together(
    tiny_model,
    monkeypatch: pytest.MonkeyPatch,
    context: BlockContext,  # noqa: ANN001
) -> None:
    model = with_blocks(living(tiny_model), context)
    checks = [check for check in verify(model) if "move together" in check.name]
    assert len(checks) == 2 and all(check.holds for check in checks)
    monkeypatch.setattr("omni.generation.contract.joined", lambda refine, *rest: refine)
    assert not any(check.holds for check in verify(model) if "move together" in check.name)
