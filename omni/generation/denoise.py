"""Refine blocks of latents from noise against the cache, with all guidance branches in one pass.

Legend: B batch rows of a pass, N latents of a block, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from omni.codecs.codec import MAX_LATENT
from omni.document import Document, Role
from omni.errors import in_range, require_finite
from omni.generation.context import refine_stream
from omni.generation.events import BlockStep, Event
from omni.generation.grammar import Grammar
from omni.generation.row import Row
from omni.generation.runtime import Runtime
from omni.nn.cache import KVCache
from omni.rng import Key
from omni.samplers import SAMPLERS, State, run_sampler
from omni.sequence.guidance import Drop, open_turn, reduce
from omni.sequence.layout import LatentSpan, Span, TokenSpan
from omni.text.compose import block_header, compose


def groups(grammar: Grammar, rows: list[Row]) -> list[list[Row]]:
    """Groups of requests whose blocks share a pass: equal grid, times, guidance and sampler."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        assert row.media is not None
        o = row.options.picture
        guidance = (o.guidance, o.image_guidance, o.guidance_embedding)
        at = (grammar.grid(row.media), tuple(o.times()), guidance, o.sampler, o.gamma)
        groups.setdefault(at, []).append(row)
    return list(groups.values())


def draw(runtime: Runtime, group: list[Row], rows: list[Row], cache: KVCache) -> Iterator[tuple[int, Event]]:
    """Refine one block of each row of the group; its latents are appended to `media.finished`."""
    options = group[0].options.picture
    assert group[0].media is not None and options.sampler is not None
    grid = runtime.grammar.grid(group[0].media)
    count = grid[0] * grid[1] * grid[2]
    channels = runtime.model.config.flow.channels
    times = options.times()
    here = (runtime.device, runtime.model.token.embedding.weight.dtype)

    def noise(*jump: int) -> Tensor:
        drawn = []
        for r in group:
            assert r.media is not None
            drawn.append(block_noise(r.key, r.media.index, len(r.media.finished), (count, channels), *jump))
        return torch.stack(drawn)

    # x_t = (1 - t) x0 + t eps; a first time t < 1 starts from t eps, with x0 = 0.
    x = (times[0] * noise()).to(*here)
    call = _guided_call(runtime, group, rows, cache, grid)
    extra = {} if options.gamma is None else {"gamma": options.gamma}
    for state in run_sampler(SAMPLERS.get(options.sampler), call, x, times, noise, **extra):
        x = state.x
        if not in_range(x, MAX_LATENT):
            _refuse(group, x, state)
        for b, row in enumerate(group):
            assert row.media is not None
            yield row.number, BlockStep(row.media.index, state.step, state.steps, x[b].float())
    for b, row in enumerate(group):
        assert row.media is not None
        row.media.finished.append(x[b].float())


def _refuse(group: list[Row], x: Tensor, state: State) -> None:
    """NotFiniteError for the first request of the group whose latents in x (B, N, C) are not finite or out of range."""
    for row, latents in zip(group, x, strict=True):
        assert row.media is not None
        kind = "picture" if row.media.kind == "image" else f"chunk {len(row.media.finished) + 1} of clip"
        where = f"the latents of {kind} {row.media.index + 1}, after step {state.step} of {state.steps},"
        way_out = "lower the guidance, or check the model's files with `omni verify`"
        require_finite(latents, where, way_out, MAX_LATENT)


def block_noise(key: Key, index: int, block: int, size: tuple[int, int], *jump: int) -> Tensor:
    """Standard normal (N, C): the start of block `block` of the reply's `index`-th picture or clip; with `jump`, the
    noise that a sampler adds at that step."""
    return key.fold("block noise", index, block, *jump).normal(size)


def _guided_call(runtime: Runtime, group: list[Row], rows: list[Row], cache: KVCache, grid: tuple[int, int, int]):  # noqa: ANN202
    """F(x, t, s) of the group, with all guidance branches of all rows in one pass; those of no weight are left out."""
    options = group[0].options.picture
    w_text, w_image = options.guidance, options.image_guidance
    assert w_text is not None and w_image is not None
    weights: dict[Drop, float] = {"text": w_image - w_text, "all": 1.0 - w_image}
    branches: list[Drop] = [what for what, weight in weights.items() if weight]
    memory_cache = cache if len(group) == len(rows) and not branches else cache.fork([r.number for r in group])
    for what in branches:
        null = runtime.model.transformer.new_cache(len(group), 64)
        runtime.append(null, [null_spans(runtime, r, what) for r in group])
        memory_cache = memory_cache.stack(null)
    memory = memory_cache.memory(room=grid[0] * grid[1] * grid[2])
    stream = refine_stream(memory_cache, grid, runtime.device)
    B, K = memory_cache.rows, len(branches) + 1
    assert options.guidance_embedding is not None
    beta = torch.ones(B, device=runtime.device, dtype=torch.float32)
    beta[: len(group)] = 1 / options.guidance_embedding  # reduced histories were trained at 1

    def call(x: Tensor, t: float, s: float) -> Tensor:
        ones = torch.ones(B, device=x.device, dtype=torch.float32)
        F = runtime.model.velocity(x.repeat(K, 1, 1), ones * t, ones * s, beta, stream, None, memory)
        for row in group:
            row.media.evaluations += K  # type: ignore[union-attr]
        if K == 1:
            return F
        full, *reduced = F.chunk(K)
        return sum((weights[what] * part for what, part in zip(branches, reduced, strict=True)), w_text * full)

    return call


def null_spans(runtime: Runtime, row: Row, what: Drop) -> list[Span]:
    """The reduced history before the next block, equal to `guidance.drop` in training. Its media keep the latents that
    the cache holds."""
    media = row.media
    assert media is not None
    history = reduce(open_turn(row.segments, Role.ASSISTANT), what)
    spans = compose(Document(history), runtime.tokenizer, row.encoded)
    last = spans[-1]
    assert isinstance(last, TokenSpan) and last.ids[-1] == runtime.control.end
    clip = None if media.kind == "image" else (media.chunks, media.rate)
    ids = [*last.ids[:-1], *block_header(runtime.control, media.rows, media.columns, clip)]
    grid = runtime.grammar.grid(media)
    return [*spans[:-1], TokenSpan(ids, [False] * len(ids)), *(LatentSpan(z, grid) for z in media.finished)]
