"""Refine the blocks of a picture or clip from noise against the history of its request, with guidance branches beside
it, in the order of a schedule (sequence.schedule).

A pass of the schedule moves some blocks; each has a sampler of its own, which asks for F. What a moving block reads of
the others is the model's own rule (sequence.block_context): finished blocks are context, or stay in the pass.

Legend: N latents of a block, C channels, K branches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.codecs.codec import MAX_LATENT
from omni.document import Document, Role
from omni.errors import in_range, require_finite
from omni.generation.context import Append, append_of, marks_of
from omni.generation.events import BlockStep, Event
from omni.generation.options import PictureOptions
from omni.generation.prefixes import common_length
from omni.generation.request import Media, Request
from omni.generation.runtime import Runtime
from omni.generation.work import Evaluate, Noisy, Read, Turn, item_tensors
from omni.nn.cache import History
from omni.rng import Key
from omni.samplers import SAMPLERS, Call, State
from omni.samplers.base import Noise, Sampling
from omni.sequence.block_context import BlockContext
from omni.sequence.guidance import Drop, open_turn, reduce
from omni.sequence.layout import LatentSpan, Span, TokenSpan, lay_out
from omni.sequence.schedule import Schedule, level_major, masked_order, staggered
from omni.text.compose import block_header, compose


@dataclass(eq=False)
class Block:
    """A block in refinement. x: its latents (N, C) at time t, in the model's dtype. item: what its sampler waits for;
    None at its end."""

    number: int
    x: Tensor
    t: float
    sampling: Sampling | None = None
    item: Call | State | None = None


@dataclass(frozen=True)
class Branches:
    """The guidance branches of a request beside its own history. drops: what each branch leaves out. scales, betas: the
    factor of F, and the guidance embedding, of the own history and of each branch."""

    drops: list[Drop]
    scales: list[float]
    betas: list[float]

    @classmethod
    def of(cls, o: PictureOptions) -> Branches:
        """Of resolved options; a branch of factor 0 is left out."""
        assert o.guidance is not None and o.image_guidance is not None and o.guidance_embedding is not None
        weights: dict[Drop, float] = {"text": o.image_guidance - o.guidance, "all": 1.0 - o.image_guidance}
        drops: list[Drop] = [what for what, weight in weights.items() if weight]
        scales = [o.guidance, *(weights[what] for what in drops)]
        return cls(drops, scales, [1 / o.guidance_embedding, *(1.0 for _ in drops)])  # reduced ones were trained at 1

    def histories(self, request: Request) -> list[History]:
        """The own history, then those of the branches."""
        return [request.history, *(request.branches[what] for what in self.drops)]


def draw(runtime: Runtime, request: Request) -> Turn:
    """Refine all blocks of the request's picture or clip; finished ones are pending context."""
    o, media, context = request.options.picture, request.media, runtime.model.block_context
    assert media is not None
    branches = Branches.of(o)
    if context.unit == "latent":
        for number in range(media.chunks):
            yield from _read_finished(runtime, request, branches)
            yield from draw_latents(runtime, request, number, branches)
        return
    schedule = schedule_of(o, media.chunks if media.kind == "video" else None, context)
    blocks: list[Block] = []
    waits = False  # whether finished blocks are not read yet
    for m in range(schedule.num_passes):
        if m == 0 or (waits and context.finished == "context"):
            yield from _read_finished(runtime, request, branches)
            waits = False
        if m == 0:
            blocks = [_begin(runtime, request, schedule, b) for b in range(media.chunks)]
        moving = [blocks[move.block] for move in schedule.moves(m)]
        yield from _move(runtime, request, _present(schedule, m, blocks, context), moving, branches)
        while len(media.finished) < media.chunks and not schedule.levels[m + 1][len(media.finished)]:
            _finish(runtime, request, blocks[len(media.finished)])
            waits = True


def schedule_of(o: PictureOptions, num_blocks: int | None, context: BlockContext) -> Schedule:
    """The schedule of resolved options for a clip of `num_blocks`, or for a picture (None), which has one block and no
    order. ValueError where the model was not trained for it."""
    assert o.steps is not None
    if num_blocks is None:
        return staggered(1, o.steps, o.steps)
    if o.blocks is not None and not isinstance(o.blocks, str):
        schedule = Schedule(o.blocks, o.steps)
        if schedule.num_blocks != num_blocks:
            raise ValueError(
                f"blocks has {schedule.num_blocks} columns, but the clip has {num_blocks} blocks; give one each"
            )
    elif o.blocks == "level_major":
        schedule = level_major(num_blocks, o.steps, "all")
    else:
        usual = {"finished": o.steps, "before": 1, "all": 0}[context.reads]
        schedule = staggered(num_blocks, o.steps, usual if o.delay is None else min(o.delay, o.steps))
    _require_trained(schedule, context)
    return schedule


def require_effect(o: PictureOptions, context: BlockContext) -> None:
    """ValueError for resolved options of an order that the model has no use for, or was not trained for: before a
    request begins, whatever it draws. The number of blocks in a matrix is checked with the clip."""
    if o.rounds is not None and context.unit == "block":
        raise ValueError(
            f"rounds = {o.rounds} has no effect: this model refines all latents of a block together; leave it out"
        )
    if o.blocks is not None or o.delay is not None:
        schedule_of(o, len(o.blocks[0]) if isinstance(o.blocks, tuple) else 2, context)


def _require_trained(schedule: Schedule, context: BlockContext) -> None:
    """ValueError for a schedule whose moving blocks would read what no block reads in training."""
    for m, row in enumerate(schedule.levels):
        done = row.count(0)
        if context.finished == "context" and any(row[:done]):
            raise ValueError(
                f"blocks: block {row[:done].index(max(row[:done])) + 1} is unfinished in row {m} where a later one is "
                "finished, but this model reads finished blocks as context, in order; take staggered, or a model with "
                "blocks.finished = 'refine'"
            )
        others = [level for level in row[done:] if level < schedule.num_levels][1:]
        if not context.is_joint and m < schedule.num_passes and (others or len(schedule.moves(m)) > 1):
            raise ValueError(
                f"the schedule has several unfinished blocks in pass {m}, but this model's noisy blocks read finished "
                f"blocks alone; leave out blocks and delay, or give delay = {schedule.num_levels}, the steps"
            )


def _read_finished(runtime: Runtime, request: Request, branches: Branches) -> Turn:
    """Append what is pending, and what the branches lack."""
    appends = [follow(runtime, request, what) for what in branches.drops]
    if request.pending:
        appends.insert(0, append_of(request.history, request.take_pending(), runtime.control.pad))
    appends = [one for one in appends if len(one)]
    if appends:
        yield Read(appends)


def _begin(runtime: Runtime, request: Request, schedule: Schedule, number: int) -> Block:
    """A block at its first time, and its sampler."""
    o, media, model = request.options.picture, request.media, runtime.model
    assert media is not None
    grid, all_times = runtime.grammar.grid(media), o.times()
    size = grid[0] * grid[1] * grid[2], model.config.channels
    levels = sorted({row[number] for row in schedule.levels}, reverse=True)
    times = [all_times[schedule.num_levels - level] for level in levels]
    # x_t = (1 - t) x0 + t eps; a first time t < 1 starts from t eps, with x0 = 0.
    dtype = model.token.embedding.weight.dtype

    def noise(*jump: int) -> Tensor:
        return block_noise(request.key, media.index, number, size, *jump).to(runtime.device)

    start = (times[0] * noise()).to(dtype)
    sampling = _sampling(o, start, times, noise)
    return Block(number, start, times[0], sampling, next(sampling, None))


def _present(schedule: Schedule, m: int, blocks: Sequence[Block], context: BlockContext) -> list[Block]:
    """The blocks of pass m: those that move, and those that they read beside the context. A block that is noise and
    does not move is independent of the others, and is left out."""
    row, moves = schedule.levels[m], {move.block for move in schedule.moves(m)}
    last = len(row) - 1 if context.reads == "all" else max(moves)

    def is_read(number: int) -> bool:
        is_context = row[number] == 0 and context.finished == "context"
        return number <= last and row[number] < schedule.num_levels and not is_context

    return [block for block in blocks if block.number in moves or is_read(block.number)]


def _move(
    runtime: Runtime, request: Request, present: Sequence[Block], moving: Sequence[Block], branches: Branches
) -> Turn:
    """One jump of every moving block; a sampler may ask for F several times."""
    media, context = request.media, runtime.model.block_context
    assert media is not None
    histories = branches.histories(request)
    waiting = list(moving)
    while waiting:
        for block in waiting:
            if isinstance(block.item, State):
                yield from _arrive(request, block, block.item)
                waiting = [one for one in waiting if one is not block]
        if not waiting:
            return
        noisy = [_noisy(runtime, request, block, waiting, context) for block in present]
        found = yield Evaluate(noisy, histories, branches.betas, context.reads == "before")
        F = _guided(_velocities(runtime, found, noisy, branches.betas), branches.scales)
        media.evaluations += len(histories) * len(waiting)
        for block, part in zip(present, F.split([len(one.x) for one in noisy]), strict=True):
            if block in waiting:
                block.item = _answered(block.sampling, part.double())


def _noisy(runtime: Runtime, request: Request, block: Block, waiting: Sequence[Block], context: BlockContext) -> Noisy:
    """What the network reads of a block: the call of its sampler; of one that is not to move, its present latents."""
    media = request.media
    assert media is not None
    grid = runtime.grammar.grid(media)
    before = block.number - (len(media.finished) if context.finished == "context" else 0)
    start = before * max(grid)
    if block in waiting:
        if not isinstance(block.item, Call):
            raise ValueError(f"the sampler ended at time {block.t} too early: it must yield a State after every jump")
        return Noisy(block.item.x.to(block.x.dtype), block.item.t, block.item.s, grid, start)
    if block.t > 0:
        return Noisy(block.x, block.t, block.t, grid, start)
    t, x = context.context_time, (1 - context.context_time) * block.x
    if context.context_noise:
        key = request.key.fold("context noise", media.index, block.number, media.evaluations)
        x = x + t * key.normal(tuple(x.shape)).to(x)
    return Noisy(x, t, t, grid, start)


def _answered(sampling: Sampling | None, F: Tensor) -> Call | State | None:
    """What the sampler waits for after an answer; None at its end."""
    assert sampling is not None
    try:
        return sampling.send(F)
    except StopIteration:
        return None


def _arrive(request: Request, block: Block, state: State) -> Iterator[Event]:
    """The block is at the end of a jump."""
    assert request.media is not None
    assert block.sampling is not None
    block.x, block.t = state.x.to(block.x.dtype), state.t
    yield from _report(request.media, block, state.step, state.steps)
    block.item = next(block.sampling, None)


def _report(media: Media, block: Block, step: int, steps: int) -> Iterator[Event]:
    """The event of a step. NotFiniteError for latents that are not finite or out of range."""
    if not in_range(block.x, MAX_LATENT):
        kind = "picture" if media.kind == "image" else f"chunk {block.number + 1} of clip"
        where = f"the latents of {kind} {media.index + 1}, after step {step} of {steps},"
        require_finite(block.x, where, "lower the guidance, or check the model's files with `omni verify`", MAX_LATENT)
    yield BlockStep(media.index, step, steps, block.x.float(), block.number)


def _finish(runtime: Runtime, request: Request, block: Block) -> None:
    """The next block in order is finished: pending as clean context."""
    media = request.media
    assert media is not None
    if block.t != 0 or block.item is not None:
        raise ValueError(f"the sampler is at time {block.t} after its last jump: it must end there, at 0")
    x = block.x.float()
    media.finished.append(x)
    if runtime.grammar.holds_latents(media):
        request.pending.append(LatentSpan(x, runtime.grammar.grid(media)))
        request.length += len(x)


def draw_latents(runtime: Runtime, request: Request, number: int, branches: Branches) -> Turn:
    """Refine one block whose latents have times of their own: in each round some of them, in random order, from noise
    to data in all jumps of the sampler (MAR, arXiv 2406.11838)."""
    media, o = request.media, request.options.picture
    assert media is not None
    num, order = math.prod(runtime.grammar.grid(media)), request.key.fold("latent order", media.index, number)
    schedule = masked_order(num, min(o.rounds or num, num), order)
    size = num, runtime.model.config.channels
    x = block_noise(request.key, media.index, number, size)
    x = x.to(runtime.device, runtime.model.token.embedding.weight.dtype)
    for m in range(schedule.num_passes):
        moving = [move.block for move in schedule.moves(m)]
        is_known = [level == 0 for level in schedule.levels[m]]
        x = yield from _draw_some(runtime, request, number, x, moving, is_known, branches)
        yield from _report(media, Block(number, x, 0.0), m + 1, schedule.num_passes)
    _finish(runtime, request, Block(number, x, 0.0))


def _draw_some(
    runtime: Runtime, request: Request, number: int, x: Tensor, moving: Sequence[int], is_known: Sequence[bool],
    branches: Branches,
) -> Turn:  # fmt: skip
    """One round: latents `moving` of x (N, C) go from noise to data given the known ones. Returns x after it."""
    media, o = request.media, request.options.picture
    assert media is not None
    at, grid = torch.tensor(moving, device=runtime.device), runtime.grammar.grid(media)

    def noise(*jump: int) -> Tensor:
        return block_noise(request.key, media.index, number, (x.shape[0], x.shape[1]), *jump).to(runtime.device)[at]

    grid_times = o.times()
    sampling = _sampling(o, grid_times[0] * x[at].double(), grid_times, noise)
    item, found, arrived = next(sampling, None), None, x[at]
    while item is not None:
        if isinstance(item, State):
            arrived, item = item.x, next(sampling, None)
            continue
        times = [(0.0, 0.0) if known else (1.0, 1.0) for known in is_known]
        for n in moving:
            times[n] = item.t, item.s
        noisy = [Noisy(x.index_copy(0, at, item.x.to(x.dtype)), item.t, item.s, grid, each=times)]
        if found is None or not runtime.model.has_latent_head:  # a latent head reads the same states in every jump
            found = yield Evaluate(noisy, branches.histories(request), branches.betas)
            media.evaluations += len(branches.betas)
        F = _guided(_velocities(runtime, found, noisy, branches.betas), branches.scales)
        item = _answered(sampling, F[at].double())
    return x.index_copy(0, at, arrived.to(x.dtype))


def _sampling(o: PictureOptions, start: Tensor, times: list[float], noise: Noise) -> Sampling:
    """The sampler of a request, begun."""
    assert o.sampler is not None
    return SAMPLERS.get(o.sampler)(start.double(), times, noise, **({} if o.gamma is None else {"gamma": o.gamma}))


def _velocities(runtime: Runtime, found: Tensor, noisy: Sequence[Noisy], betas: Sequence[float]) -> Tensor:
    """F of each branch (K, N, C) from the result of an Evaluate: by the head of each latent where the model has one."""
    flow = runtime.model.flow
    if flow is None or flow.head is None:
        return found
    x = torch.cat([block.x for block in noisy]).expand(len(betas), -1, -1)
    t, s, beta, item = item_tensors([(noisy, betas)], x.device)
    return flow.of_latents(found, x, t, s, beta, item.view(x.shape[:2]))


def _guided(F: Tensor, scales: Sequence[float]) -> Tensor:
    """The sum (N, C) of the branches' F (K, N, C), each times its scale."""
    if len(F) == 1:
        return F[0]
    total = scales[1] * F[1]
    for scale, one in zip(scales[2:], F[2:], strict=True):
        total = total + scale * one
    return total + scales[0] * F[0]


def block_noise(key: Key, index: int, block: int, size: tuple[int, int], *jump: int) -> Tensor:
    """Standard normal (N, C): the start of block `block` of the reply's `index`-th picture or clip; with `jump`, the
    noise that a sampler adds at that step."""
    return key.fold("block noise", index, block, *jump).normal(size)


def follow(runtime: Runtime, request: Request, what: Drop) -> Append:
    """The append that makes the history of a branch equal to the reduced history before the next block. What the branch
    read for an earlier picture is kept as far as it is the same."""
    if what not in request.branches:
        request.branches[what] = History(runtime.pool, request.history.lora, request.history.invoked)
    history = request.branches[what]
    spans = null_spans(runtime, request, what)
    laid = lay_out(spans, runtime.control.pad)
    whole = Append(history, laid, marks_of(spans))
    keep = common_length(history.marks, whole)
    if keep < history.length:
        history.truncate(keep, laid.position[keep][0], laid.block[keep])
    return whole.part(keep, len(whole))


def null_spans(runtime: Runtime, request: Request, what: Drop) -> list[Span]:
    """The reduced history before the next block, equal to `guidance.drop` in training. Its media keep the latents that
    the history holds."""
    media = request.media
    assert media is not None
    history = reduce(open_turn(request.segments, Role.ASSISTANT), what)
    invokes = request.history.invoked
    [*spans, last] = compose(
        Document(history), runtime.tokenizer, request.encoded, is_open=True, invokes=invokes, reply_invoked=True
    )
    assert isinstance(last, TokenSpan)
    clip = None if media.kind == "image" else (media.chunks, media.rate)
    header = block_header(runtime.control, media.rows, media.columns, clip)
    grid = runtime.grammar.grid(media)
    ids = [*last.ids, *header]
    return [*spans, TokenSpan(ids, [False] * len(ids), invokes), *(LatentSpan(z, grid) for z in media.finished)]
