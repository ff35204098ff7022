"""Refine one block of latents from noise against the history of its request, with guidance branches beside it.

Legend: N latents of a block, C channels, K branches.
"""

from __future__ import annotations

from torch import Tensor

from omni.codecs.codec import MAX_LATENT
from omni.document import Document, Role
from omni.errors import in_range, require_finite
from omni.generation.context import Append, append_of, marks_of
from omni.generation.events import BlockStep
from omni.generation.prefixes import common_length
from omni.generation.request import Request
from omni.generation.runtime import Runtime
from omni.generation.work import Evaluate, Read, Turn
from omni.nn.cache import History
from omni.rng import Key
from omni.samplers import SAMPLERS, State
from omni.sequence.guidance import Drop, open_turn, reduce
from omni.sequence.layout import LatentSpan, Span, TokenSpan, lay_out
from omni.text.compose import block_header, compose


def draw(runtime: Runtime, request: Request) -> Turn:
    """Refine the next block of the request; its latents are appended to `media.finished`."""
    o, media = request.options.picture, request.media
    assert media is not None and o.sampler is not None and o.guidance is not None and o.image_guidance is not None
    weights: dict[Drop, float] = {"text": o.image_guidance - o.guidance, "all": 1.0 - o.image_guidance}
    branches: list[Drop] = [what for what, weight in weights.items() if weight]
    appends = [follow(runtime, request, what) for what in branches]
    if request.pending:
        appends.insert(0, append_of(request.history, request.take_pending(), runtime.control.pad))
    appends = [one for one in appends if len(one)]
    if appends:
        yield Read(appends)
    grid = runtime.grammar.grid(media)
    histories = [request.history, *(request.branches[what] for what in branches)]
    assert o.guidance_embedding is not None
    betas = [1 / o.guidance_embedding, *(1.0 for _ in branches)]  # reduced histories were trained at 1
    scales = [o.guidance, *(weights[what] for what in branches)]
    size, times = (grid[0] * grid[1] * grid[2], runtime.model.config.flow.channels), o.times()
    # x_t = (1 - t) x0 + t eps; a first time t < 1 starts from t eps, with x0 = 0.
    dtype = runtime.model.token.embedding.weight.dtype

    def noise(*jump: int) -> Tensor:
        return block_noise(request.key, media.index, len(media.finished), size, *jump).to(runtime.device)

    start = (times[0] * noise()).to(dtype)
    knobs = {} if o.gamma is None else {"gamma": o.gamma}
    sampling = SAMPLERS.get(o.sampler)(start.double(), times, noise, **knobs)
    item, x = next(sampling, None), start
    while item is not None:
        if isinstance(item, State):
            x = item.x.to(dtype)
            if not in_range(x, MAX_LATENT):
                _refuse(request, x, item)
            yield BlockStep(media.index, item.step, item.steps, x.float())
            item = next(sampling, None)
            continue
        F = yield Evaluate(item.x.to(dtype), item.t, item.s, grid, histories, betas)
        media.evaluations += len(histories)
        item = sampling.send(_guided(F, scales).double())
    media.finished.append(x.float())


def _guided(F: Tensor, scales: list[float]) -> Tensor:
    """The sum (N, C) of the branches' F (K, N, C), each times its scale."""
    if len(F) == 1:
        return F[0]
    total = scales[1] * F[1]
    for scale, one in zip(scales[2:], F[2:], strict=True):
        total = total + scale * one
    return total + scales[0] * F[0]


def _refuse(request: Request, x: Tensor, state: State) -> None:
    """NotFiniteError for latents x (N, C) that are not finite or out of range."""
    media = request.media
    assert media is not None
    kind = "picture" if media.kind == "image" else f"chunk {len(media.finished) + 1} of clip"
    where = f"the latents of {kind} {media.index + 1}, after step {state.step} of {state.steps},"
    way_out = "lower the guidance, or check the model's files with `omni verify`"
    require_finite(x, where, way_out, MAX_LATENT)


def block_noise(key: Key, index: int, block: int, size: tuple[int, int], *jump: int) -> Tensor:
    """Standard normal (N, C): the start of block `block` of the reply's `index`-th picture or clip; with `jump`, the
    noise that a sampler adds at that step."""
    return key.fold("block noise", index, block, *jump).normal(size)


def follow(runtime: Runtime, request: Request, what: Drop) -> Append:
    """The append that makes the history of a branch equal to the reduced history before the next block. What the branch
    read for an earlier picture is kept as far as it is the same."""
    if what not in request.branches:
        request.branches[what] = History(runtime.pool)
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
    spans = compose(Document(history), runtime.tokenizer, request.encoded)
    last = spans[-1]
    assert isinstance(last, TokenSpan) and last.ids[-1] == runtime.control.end
    clip = None if media.kind == "image" else (media.chunks, media.rate)
    ids = [*last.ids[:-1], *block_header(runtime.control, media.rows, media.columns, clip)]
    grid = runtime.grammar.grid(media)
    return [*spans[:-1], TokenSpan(ids, [False] * len(ids)), *(LatentSpan(z, grid) for z in media.finished)]
