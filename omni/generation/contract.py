"""The equality contract, on any model: cached generation = uncached forward = training forward.

One document, text-image-text-video-text-image-text, is computed three ways:

    training    the packed forward: one context pass, one refine pass with a noisy copy of every block
    uncached    each span recomputes its whole history
    cached      like the engine: text id by id; blocks are refined against the history, then appended clean

The check repeats this for the guidance branches (text dropped, everything dropped), for one document and for a batch of
different lengths. A joint-token head adds its placeholders after every text id that they may follow; every LoRA repeats
it for two documents.

float64 proves equality: a difference below 1e-10 means one function. The engine uses float32, where rounding depends on
the processor and the number of threads; the bound is relative to the largest logit, F or hidden state, with a margin.
Noise and latents are sampled in float32 and cast, so both dtypes compare the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omni.generation.context import append_of, block_runs, group_runs, run_context
from omni.generation.drafting import CacheCall
from omni.heads.joint.training import BatchCall
from omni.model import Omni
from omni.nn.cache import History, Pool
from omni.nn.native_step import CompiledStep
from omni.rng import Key
from omni.sequence.block_context import joined
from omni.sequence.features import FeatureSpan
from omni.sequence.layout import LatentSpan, Shape, Span, Stream, TokenSpan, num_context, pack
from omni.sequence.placeholders import choose_blocks

EXACT = 1e-10  # in float64, absolute
ROUNDING = 2e-5  # in float32, relative: about ten times the measured differences


@dataclass(frozen=True)
class Check:
    """One line of the contract check: the largest difference and its bound `bar`. unit: of both; "of the largest" is
    relative to the largest compared logit, F or hidden state."""

    name: str
    value: float
    bar: float
    unit: str = "absolute"

    @property
    def holds(self) -> bool:
        return self.value <= self.bar


@dataclass(frozen=True)
class Outputs:
    """Logits after every id span and F of every block, in document order."""

    logits: list[Tensor]  # (n, V) each
    flows: list[Tensor]  # (N, C) each


def verify(model: Omni, seed: int = 0) -> list[Check]:
    """Check the contract on the model's weights, in float64 and in float32. Returns one Check per comparison.

    The model is in float32 and evaluation mode afterwards.
    """
    model, key = model.float().eval(), Key(seed).fold("verify")
    checks: list[Check] = []
    with torch.inference_mode():
        try:
            model.double()
            found = list(_differences(model, key))
            checks += [Check(f"float64, {name}", absolute, EXACT) for name, absolute, _ in found]
        finally:
            model.float()
        found = list(_differences(model, key))
        checks += [Check(f"float32, {name}", relative, ROUNDING, "of the largest") for name, _, relative in found]
        native = _by_native_step(model, key)
        checks += [Check(f"float32, {name}", relative, ROUNDING, "of the largest") for name, _, relative in native]
        differ = _text_only(model, key)
    checks.append(Check("float32, text logits without images: bits that differ", differ, 0.0, "entries"))
    return checks


def _by_native_step(model: Omni, key: Key) -> Iterator[tuple[str, float, float]]:
    """Compare the native step of `compile=True`; yields nothing without a compiler or a CPU model."""
    try:
        step = CompiledStep(model.transformer, model.token.output_weight)
    except ValueError:
        return
    documents = [sample_spans(model, key.fold(n), length) for n, length in enumerate((7, 3))]
    alone = [_uncached(model, d, key) for d in documents]
    yield _compare("cached, compiled = uncached", [_cached(model, [d], key, step)[0] for d in documents], alone)


def _differences(model: Omni, key: Key) -> Iterator[tuple[str, float, float]]:
    """(name, absolute difference, relative difference) of each comparison, in the dtype of the weights."""
    documents = [sample_spans(model, key.fold(n), length) for n, length in enumerate((7, 3, 5))]
    whole = documents[0]
    branches = {}
    if model.flow is not None:
        branches = {"text dropped": _without_text(whole), "everything dropped": _last_block_alone(whole)}
    alone = [_uncached(model, d, key) for d in documents]
    yield _compare("training = uncached", [_training(model, [d], key)[0] for d in documents], alone)
    yield _compare("cached = uncached", [_cached(model, [d], key)[0] for d in documents], alone)
    yield _compare("training, packed = alone", _training(model, documents, key), alone)
    yield _compare("cached, batch of lengths = alone", _cached(model, documents, key), alone)
    for name, spans in branches.items():
        reference = [_uncached(model, spans, key)]
        yield _compare(f"guidance branch, {name}: training = uncached", _training(model, [spans], key), reference)
        both = _cached(model, [whole, spans], key)
        yield _compare(f"guidance branch, {name}: cached beside the full one", both, [alone[0], *reference])
    if model.joint is not None:
        yield "joint-token blocks: training = decoding", *_joint_blocks(model, whole, key)
    if model.block_context.is_joint:
        yield "blocks that move together: training = decoding", *_moving_blocks(model, whole, key)
    for name in model.transformer.loras:
        yield from _with_lora(model, name, documents[:2], key)


def _with_lora(
    model: Omni, name: str, documents: Sequence[Sequence[Span]], key: Key
) -> Iterator[tuple[str, float, float]]:
    """The comparisons with an adapter of the text weights."""
    before, model.transformer.active_lora = model.transformer.active_lora, name
    if model.transformer.lora(name).spec.invoked:  # active in some of the texts, and in the blocks
        documents = [
            [replace(s, adapted=n % 4 < 2) if isinstance(s, TokenSpan) else s for n, s in enumerate(spans)]
            for spans in documents
        ]
    try:
        alone = [_uncached(model, d, key) for d in documents]
        yield _compare(f"LoRA {name}: training, packed = uncached", _training(model, documents, key), alone)
        yield _compare(f"LoRA {name}: cached = uncached", _cached(model, documents, key), alone)
    finally:
        model.transformer.active_lora = before


def _history(model: Omni, pool: Pool | None = None) -> History:
    """An empty history with the active LoRA."""
    transformer = model.transformer
    return transformer.new_history(pool or transformer.new_pool(), transformer.active_lora)


def sample_spans(model: Omni, key: Key, length: int = 7) -> list[Span]:
    """The first `length` segments of text-image-text-video-text-image-text, with random ids and latents; text alone
    for a model of text."""
    random = key.python()
    num_text, channels = min(model.config.vocab_size, 256), model.config.channels
    blocks = {1: [(1, 2, 3)], 3: [(2, 2, 2), (2, 2, 2)], 5: [(1, 3, 2)]} if model.flow is not None else {}
    spans: list[Span] = []
    for i in range(length):
        if i in blocks:
            for j, grid in enumerate(blocks[i]):
                count = grid[0] * grid[1] * grid[2]
                spans += _features_for(
                    model, LatentSpan(key.fold("latents", i, j).normal((count, channels)), grid, True)
                )
        else:
            ids = [random.randrange(num_text) for _ in range(2 + random.randrange(4))]
            spans.append(TokenSpan(ids, [True] * len(ids)))
    return spans


def _features_for(model: Omni, block: LatentSpan) -> list[Span]:
    """The block as the context holds it: of a picture, with features of half its sides in a model with an encoder."""
    config, (t, h, w) = model.config.encoder, block.grid
    if config is None or t > 1:
        return [block]
    grid = (1, (h + 1) // 2, (w + 1) // 2)
    values = block.latents.new_zeros(grid[1] * grid[2], config.width)
    values += block.latents.sum() + torch.arange(values.numel()).view_as(values).sin()  # different in every picture
    return [replace(block, in_context=config.pictures == "both"), FeatureSpan(values, grid)]


def _plain(spans: Sequence[Span]) -> list[Span]:
    """The spans as context alone: without blocks to refine."""
    return [replace(s, supervise=False) if isinstance(s, LatentSpan) else s for s in spans]


def _without_text(spans: Sequence[Span]) -> list[Span]:
    return [TokenSpan(s.ids[:1], [True]) if isinstance(s, TokenSpan) else s for s in spans]


def _last_block_alone(spans: Sequence[Span]) -> list[Span]:
    last = [s for s in spans if isinstance(s, LatentSpan)][-1]
    return [TokenSpan([1, 2], [True, True]), last, TokenSpan([3], [True])]


def _noisy(span: LatentSpan, number: int, key: Key) -> tuple[Tensor, float, float]:
    """x (N, C) and the times t, s for the comparison of block `number`."""
    random = key.fold("times", number).python()
    t = 0.1 + 0.9 * random.random()
    noise = key.fold("noise", number).normal(tuple(span.latents.shape))
    return (1 - t) * span.latents + t * noise, t, t * random.random()


# ---- three ways ----------------------------------------------------------------------------------------------------


def _training(model: Omni, documents: Sequence[Sequence[Span]], key: Key) -> list[Outputs]:
    """All documents packed in one batch row. `_noisy` gives the noisy copy of each block."""
    total = sum(num_context(s) + (len(s.latents) if isinstance(s, LatentSpan) else 0) for d in documents for s in d)
    [batch], _ = pack(documents, [Shape(1, total, total)], channels=model.config.channels, pad_id=0, fixed_shape=False)
    batch = batch.to(model.token.embedding.weight.device)
    hidden, memory = model.context(batch)
    logits = model.token.read(hidden)[0]
    noisy = [_noisy(s, n, key) for d in documents for n, s in enumerate(x for x in d if isinstance(x, LatentSpan))]
    if not noisy:
        return _split(documents, logits, logits[:0])
    x = torch.cat([item[0] for item in noisy])[None].to(logits)
    t, s = (_times([float(item[k]) for item in noisy], logits) for k in (1, 2))
    flow = model.velocity(x, t, s, torch.ones_like(t), batch.refine, batch.item, memory)[0]
    return _split(documents, logits, flow)


def _split(documents: Sequence[Sequence[Span]], logits: Tensor, flow: Tensor) -> list[Outputs]:
    out, i, j = [], 0, 0
    for document in documents:
        one = Outputs([], [])
        for span in document:
            n = num_context(span)
            if isinstance(span, TokenSpan):
                one.logits.append(logits[i : i + n])
            elif isinstance(span, LatentSpan):
                one.flows.append(flow[j : j + len(span.latents)])
                j += len(span.latents)
            i += n
        out.append(one)
    return out


def _uncached(model: Omni, spans: Sequence[Span], key: Key) -> Outputs:
    """Each span lays out and recomputes its whole history."""
    out, number = Outputs([], []), 0
    for index, span in enumerate(spans):
        if isinstance(span, TokenSpan):
            out.logits.append(training_prefix(model, spans[: index + 1])[-len(span.ids) :])
        if not isinstance(span, LatentSpan):
            continue
        x, t, s = _noisy(span, number, key)
        number += 1
        fresh = _history(model)
        run_context(model, [append_of(fresh, spans[:index], 0)])
        out.flows.append(_velocity(model, [fresh], [span.grid], x, [t], [s]))
    return out


def training_prefix(model: Omni, spans: Sequence[Span]) -> Tensor:
    """Logits (N, V) of all context positions of spans, in one packed pass, as training computes them."""
    shape, channels = Shape(1, 4096, 0), model.config.channels
    [batch], _ = pack([_plain(spans)], [shape], channels=channels, pad_id=0, fixed_shape=False)
    batch = batch.to(model.token.embedding.weight.device)
    hidden, _ = model.context(batch)
    return model.token.read(hidden)[0]


def _cached(
    model: Omni, documents: Sequence[Sequence[Span]], key: Key, step: CompiledStep | None = None
) -> list[Outputs]:
    """Like the engine, with a history per document: ids one at a time, of all documents in one pass; blocks are refined
    in one pass, then appended. step: native code, where it serves."""
    pool = model.transformer.new_pool()
    histories, number = [_history(model, pool) for _ in documents], [0] * len(documents)
    outputs, logits, pieces = [Outputs([], []) for _ in documents], [[] for _ in documents], [*map(_pieces, documents)]
    while any(pieces):
        now = [(r, p.pop(0)) for r, p in enumerate(pieces) if p]
        blocks = [(r, piece, _noisy(piece, number[r], key)) for r, piece in now if isinstance(piece, LatentSpan)]
        if blocks:
            x, t, s = zip(*(noisy for _, _, noisy in blocks), strict=True)
            grids = [piece.grid for _, piece, _ in blocks]
            F = _velocity(model, [histories[r] for r, _, _ in blocks], grids, torch.cat(x), t, s)
            for (r, _, _), one in zip(blocks, F.split([len(part) for part in x]), strict=True):
                outputs[r].flows.append(one)
                number[r] += 1
        now = [(r, piece) for r, piece in now if num_context(piece)]
        hidden = run_context(model, [append_of(histories[r], [p], 0) for r, p in now], 0, step)[0] if now else []
        for (r, piece), states in zip(now, hidden, strict=True):
            if isinstance(piece, TokenSpan):
                logits[r].append(model.token.read(states[-1]))
    for r, document in enumerate(documents):
        at = 0
        for span in document:
            if isinstance(span, TokenSpan):
                outputs[r].logits.append(torch.stack(logits[r][at : at + len(span.ids)]))
                at += len(span.ids)
    return outputs


def _pieces(spans: Sequence[Span]) -> list[Span]:
    """One span per id and one per block."""
    out: list[Span] = []
    for span in spans:
        out += [TokenSpan([i], [True], span.adapted) for i in span.ids] if isinstance(span, TokenSpan) else [span]
    return out


def _velocity(
    model: Omni, histories: Sequence[History], grids: Sequence[tuple[int, int, int]], x: Tensor, t: Sequence[float],
    s: Sequence[float],
) -> Tensor:  # fmt: skip
    """F (N, C) of one block after each history, all in one pass: x (N, C)."""
    like = model.token.embedding.weight
    stream, runs = block_runs(list(zip(histories, grids, strict=True)), like.device)
    item = torch.tensor([[b for b, run in enumerate(runs.runs) for _ in range(run.num)]], device=like.device)
    start, end = _times(t, like), _times(s, like)
    return model.velocity(x[None].to(like), start, end, torch.ones_like(start), stream, item, runs)[0]


def _times(values: Sequence[float], like: Tensor) -> Tensor:
    """`values` rounded to float32, in the dtype and on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32).to(like)


# ---- comparisons ---------------------------------------------------------------------------------------------------


def _compare(name: str, found: Sequence[Outputs], wanted: Sequence[Outputs]) -> tuple[str, float, float]:
    pairs = list(zip(found, wanted, strict=True))
    logits = _worst([(x, y) for a, b in pairs for x, y in zip(a.logits, b.logits, strict=True)])
    flows = _worst([(x, y) for a, b in pairs for x, y in zip(a.flows, b.flows, strict=True)])
    absolute, relative = torch.tensor([logits, flows], dtype=torch.float64).amax(0).tolist()  # amax propagates NaN
    return name, absolute, relative


def _worst(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The largest absolute difference, and the same relative to the largest second value. Propagates NaN."""
    if not pairs:
        return 0.0, 0.0
    difference = float(torch.stack([(x - y).abs().max() for x, y in pairs]).max())
    largest = float(torch.stack([y.abs().max() for _, y in pairs]).max())
    return difference, difference / largest if largest else difference


def _joint_blocks(model: Omni, spans: Sequence[Span], key: Key) -> tuple[float, float]:
    """Largest absolute and relative difference between hidden states of placeholders (and of their start) in the packed
    forward and after a cache, causal and not causal."""
    assert model.joint is not None
    device, num = model.token.embedding.weight.device, model.joint.head.length
    plain = _plain(spans)
    channels = model.config.channels
    [batch], _ = pack([plain], [Shape(1, 4096, 0)], channels=channels, pad_id=0, fixed_shape=False)
    batch = batch.to(device)
    hidden, memory = model.context(batch)
    starts, _ = choose_blocks(batch, num, batch.num_targets, key)
    inputs = key.fold("placeholders").normal((len(starts.at), num, hidden.shape[-1])).to(hidden)
    pairs: list[tuple[Tensor, Tensor]] = []
    for causal in (True, False):
        found = BatchCall(model, starts, hidden, memory)(inputs, causal)
        for b, at in enumerate(starts.at.tolist()):
            if at == 0 or starts.document[b] < 0:  # a cache is not empty; padding has no document
                continue
            before, last = _split_at(plain, at)
            last_alone = [TokenSpan([last], [False])]
            pool = model.transformer.new_pool()
            cached, whole = _history(model, pool), _history(model, pool)
            run_context(model, [append_of(cached, before, 0)])
            for append in (append_of(cached, last_alone, 0), append_of(whole, [*before, *last_alone], 0)):
                behind = CacheCall(model, [append])(inputs[b : b + 1], causal)
                pairs.append((behind[0], found[b]))
    return _worst(pairs)


def _moving_blocks(model: Omni, spans: Sequence[Span], key: Key) -> tuple[float, float]:
    """Largest absolute and relative difference between F of blocks that move together in the packed forward and after a
    cache; with none of them finished, and with the first one finished."""
    context, at = model.block_context, _first_clip(spans)
    clip = [span for span in spans[at : at + 2] if isinstance(span, LatentSpan)]
    [batch], _ = pack([spans], [Shape(1, 4096, 4096)], channels=clip[0].latents.shape[1], pad_id=0, fixed_shape=False)
    like = model.token.embedding.weight
    batch = batch.to(like.device)
    _, memory = model.context(batch)
    number = sum(isinstance(span, LatentSpan) for span in spans[:at])
    pairs: list[tuple[Tensor, Tensor]] = []
    for done in range(2 if context.finished == "context" else 1):
        blocks = [_noisy(s, n, key) for n, s in enumerate(span for span in spans if isinstance(span, LatentSpan))]
        x, t, s = zip(*blocks, strict=True)
        is_finished = torch.tensor([number <= n < number + done for n in range(len(blocks))])
        stream = joined(batch.refine, batch.item, batch.item_names, context, is_finished)
        start, end = _times(t, like), _times(s, like)
        noisy = torch.cat(x)[None].to(like)
        packed = model.velocity(noisy, start, end, torch.ones_like(start), stream, batch.item, memory)
        history = _history(model)
        run_context(model, [append_of(history, spans[: at + done], 0)])
        moving = range(number + done, number + 2)
        starts = [sum(max(one.grid) for one in clip[done:b]) for b in range(done, 2)]
        where = [(one.grid, start) for one, start in zip(clip[done:], starts, strict=True)]
        after, runs = group_runs([(history, where, context.reads == "before")], like.device)
        counts = [len(x[n]) for n in moving]
        item = torch.tensor([[b for b, num in enumerate(counts) for _ in range(num)]], device=like.device)
        noisy = torch.cat([x[n] for n in moving])[None].to(like)
        start, end = start[list(moving)], end[list(moving)]
        cached = model.velocity(noisy, start, end, torch.ones_like(start), after, item, runs)[0].split(counts)
        packed = packed[0].split([len(one) for one in x])
        pairs += [(one, packed[n]) for one, n in zip(cached, moving, strict=True)]
    return _worst(pairs)


def _first_clip(spans: Sequence[Span]) -> int:
    """The index of the first of two blocks that follow one another."""
    kinds = [isinstance(span, LatentSpan) for span in spans]
    return next(n for n, pair in enumerate(zip(kinds, kinds[1:], strict=False)) if all(pair))


def _split_at(spans: Sequence[Span], at: int) -> tuple[list[Span], int]:
    """The spans before context position `at`, and the id at `at`."""
    out: list[Span] = []
    for span in spans:
        n = num_context(span)
        if isinstance(span, TokenSpan) and at < n:
            return [*out, *([span.part(0, at)] if at else [])], span.ids[at]
        out.append(span)
        at -= n
    raise ValueError(f"no id at position {at}")


def _text_only(model: Omni, key: Key) -> float:
    """Number of entries that differ between the training forward of a text document and a plain decoder stack."""
    random = key.fold("text").python()
    num = 24
    ids = [random.randrange(min(model.config.vocab_size, 256)) for _ in range(num)]
    full = training_prefix(model, [TokenSpan(ids, [True] * num)])
    device = full.device
    position = torch.arange(num, device=device)[None, :, None].expand(1, num, 3)
    block = torch.arange(num, device=device)[None]
    zeros = torch.zeros_like(block)
    h = model.token.embed(torch.tensor([ids], device=device))
    hidden, _ = model.transformer.context(h, Stream(zeros, block, zeros, position), zeros.bool())
    return float((model.token.read(hidden)[0] != full).sum())
