"""Speculative decoding: the joint-token head drafts K tokens in one pass, a second pass verifies them.

    round   cache | y            y: spans that the cache does not hold yet: the prompt, a picture, the last id
      draft   one pass over [y, K placeholders]: K ids; y is written to the cache
      sweep   `sweeps` times: one pass over [x_1 .. x_K] samples every id of the draft again, each with its own
              noise (Jacobi iteration; arXiv 2305.10427). K sweeps from any draft give autoregressive decoding
      verify  one pass over [x_1 .. x_K], written to the cache: the distribution of every next id
      emit    the accepted ids and one more (samplers.verification); the cache drops the rejected ids
      on      recurrent drafting: the head drafts from the last id and the hidden state before it, from the
              verification pass: a round of one pass
      again   the verification logits after the first rejected token give the next draft (as a sweep does): one pass

A block ends where a picture begins or the turn ends. No draft makes a header malformed: each id is verified under the
mask of its own phase. With verify = "coupled" the ids equal those of autoregressive decoding.

Legend: R batch rows, K drafted tokens, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omni.errors import NotFiniteError
from omni.generation.context import append_text
from omni.generation.drafting import CacheCall, StateCall
from omni.generation.events import Drafted, Event
from omni.generation.row import Row
from omni.generation.runtime import Runtime
from omni.heads.joint import Draft
from omni.nn.cache import KVCache
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.samplers.token import masked_scores, token_log_probs, token_uniform
from omni.samplers.verification import Verified, agreed, block, rejection
from omni.sequence.layout import Span, TokenSpan

Wanted = dict[int, tuple[list[int], bool]]  # of a request: the ids of its draft, and whether one more may follow


def speculative_round(
    runtime: Runtime, decoding: Sequence[Row], rows: Sequence[Row], cache: KVCache
) -> Iterator[tuple[int, Event]]:
    """One round for decoding requests with equal `Row.drafting`; the other batch rows of the cache do not change."""
    assert runtime.model.joint is not None
    is_recurrent = runtime.model.joint.head.is_recurrent and runtime.model.joint.head.length > 1
    again, options = bool(decoding[0].leftover), decoding[0].options.speculative
    draft: Draft | None = None
    start: Tensor | None = None
    if again:
        proposals = {row.number: row.leftover for row in decoding}
    elif decoding[0].state is not None:
        draft = _draft_recurrently(runtime, decoding, len(rows))
        proposals = {row.number: draft.ids[row.number].tolist() for row in decoding}
    else:
        draft, start = _draft(runtime, decoding, rows, cache)
        proposals = {row.number: draft.ids[row.number].tolist() for row in decoding}
    wanted: Wanted = {row.number: _usable(runtime, row, proposals[row.number]) for row in decoding}
    base = [list(field) for field in (cache.lengths, cache.next_position, cache.next_block)]
    for _ in range(options.sweeps):
        for row, hidden in _read_drafts(runtime, decoding, rows, cache, start, wanted):
            ids = wanted[row.number][0]
            redrawn = _autoregressive_ids(runtime, row, ids, runtime.model.token.read(hidden))[: len(ids)]
            wanted[row.number] = _usable(runtime, row, redrawn.tolist())
            cache.truncate(row.number, *(field[row.number] for field in base))
    reads = options.sweeps + (options.verify != "none")
    passes = (start is not None) + (reads if _is_read(start, wanted) else 0)
    if options.verify == "none":
        for row in decoding:
            ids = wanted[row.number][0]
            legal = _legal(runtime, row, ids)
            emitted = yield from _emit(runtime, row, legal, Drafted(len(ids), len(legal), passes))
            row.pending = [TokenSpan(emitted, [False] * len(emitted))]
        return
    for row, hidden in _read_drafts(runtime, decoding, rows, cache, start, wanted):
        r, (ids, whole) = row.number, wanted[row.number]
        verified = _judge(runtime, row, draft, ids, runtime.model.token.read(hidden))
        accepted = int(verified.accepted[0])
        count = accepted + 1 if whole or accepted < len(ids) else accepted
        trace = Drafted(len(ids), accepted, passes, again)
        emitted = yield from _emit(runtime, row, verified.ids[0, :count].tolist(), trace)
        m = len(emitted) - (start is not None)  # the last id waits; without a start, this pass appended one id more
        cache.truncate(r, *(field[r] + m for field in base))
        row.pending = [TokenSpan([emitted[-1]], [False])]
        over = row.phase in ("block", "done") or bool(row.forced)
        row.leftover = [] if over or not row.recycles else verified.ids[0, count : len(ids) + whole].tolist()
        row.state = None if over or not is_recurrent else hidden[len(emitted) - 1]


def _read_drafts(
    runtime: Runtime, decoding: Sequence[Row], rows: Sequence[Row], cache: KVCache, start: Tensor | None, wanted: Wanted
) -> Iterator[tuple[Row, Tensor]]:
    """One pass over the draft of every decoding request, written to the cache; yields the hidden states of each,
    `start` (R, W) first. Without a start, the last id of each request precedes its draft. An id that nothing may follow
    is not read (a round may then need no pass): hidden states (K, W), else (K + 1, W)."""
    ids: list[list[int]] = [[] for _ in rows]
    for row in decoding:
        draft, whole = wanted[row.number]
        read = draft if whole else draft[:-1]
        ids[row.number] = [*_last(row), *read] if start is None else read
    if _is_read(start, wanted):
        hidden = append_text(runtime.model, cache, ids, runtime.step, runtime.control.pad)
        hidden = hidden if start is None else torch.cat([start.unsqueeze(1), hidden], 1)
    else:
        assert start is not None
        hidden = start.unsqueeze(1)
    for row in decoding:
        draft, whole = wanted[row.number]
        yield row, hidden[row.number, : len(draft) + whole]


def _is_read(start: Tensor | None, wanted: Wanted) -> bool:
    """Whether a round needs a pass over its drafts or the ids before them."""
    return start is None or any(whole or len(ids) > 1 for ids, whole in wanted.values())


def _last(row: Row) -> list[int]:
    [span] = row.pending
    assert isinstance(span, TokenSpan) and len(span.ids) == 1
    return span.ids


def _autoregressive_ids(runtime: Runtime, row: Row, ids: Sequence[int], logits: Tensor) -> Tensor:
    """The ids of autoregressive decoding in place of every drafted id, if those before it are right, and after the
    draft: int64, as many as there are logits (K, V) or (K + 1, V)."""
    if not row.options.text.temperature:
        return _scores(runtime, row, ids, logits)[1]
    log_probs = _log_probs(runtime, row, ids, logits)
    return inverse_cdf_sample(log_probs, log_probs.new_tensor(_noise(row, len(log_probs))))


def _draft(runtime: Runtime, decoding: Sequence[Row], rows: Sequence[Row], cache: KVCache) -> tuple[Draft, Tensor]:
    """The head's draft for every batch row of the cache (undefined for other requests), and the hidden states (R, W)
    before the drafts; the pending spans are appended to the cache. The tokens' noise belongs to the request. A head's
    other samples (the component of a latent mixture) depend on the batch: with such a head "rejection" and "block" keep
    the distribution of a reply in another batch, not its ids.
    """
    spans: list[list[Span]] = [[] for _ in rows]
    for row in decoding:
        spans[row.number] = _merged(row.pending)
    joint = runtime.model.joint
    assert joint is not None
    num = max(row.draft_length for row in decoding)
    uniforms = torch.full((len(rows), num), 0.5, dtype=torch.float64)
    for row in decoding:
        if row.options.text.temperature:
            uniforms[row.number] = torch.tensor(_noise(row, num), dtype=torch.float64)
    call = CacheCall(runtime.model, cache, spans, runtime.control.pad, runtime.step)
    first = decoding[0]
    draft = joint.head.sample(call, uniforms.to(runtime.device), first.key.fold("draft", first.num_tokens))
    _require_sound(runtime, decoding, call, draft)
    if first.options.speculative.verify in ("rejection", "block"):  # they judge what was drawn from log_q
        return draft, call.start
    # The same pass gives the distribution of the first token, so its autoregressive id is known and always accepted.
    logits, ids = runtime.model.token.read(call.start), draft.ids.clone()
    for row in decoding:
        ids[row.number, 0] = _autoregressive_ids(runtime, row, (), logits[row.number : row.number + 1])[0]
    return replace(draft, ids=ids), call.start


def _draft_recurrently(runtime: Runtime, decoding: Sequence[Row], num_rows: int) -> Draft:
    """Recurrent drafting: the head's draft after the last id of every decoding request, from the hidden state before
    that id. One batch row per row of the cache; those of other requests are undefined. Ids are sampled like in
    autoregressive decoding, at the request's temperature."""
    joint, first = runtime.model.joint, decoding[0]
    assert joint is not None and first.state is not None
    num = min(max(row.draft_length for row in decoding), joint.head.length - 1)
    states, emitted = first.state.new_zeros(num_rows, len(first.state)), torch.zeros(num_rows, 1, dtype=torch.int64)
    for row in decoding:
        states[row.number], emitted[row.number, 0] = row.state, _last(row)[0]  # type: ignore[assignment]
    wants_log_probs = first.options.speculative.verify in ("rejection", "block")
    noise = {row.number: _noise(row, num) for row in decoding}

    def choose(k: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_p = logits.argmax(-1), torch.zeros_like(logits, dtype=torch.float64)
        for row in decoding:
            temperature = row.options.text.temperature or 0.0
            if temperature or wants_log_probs:
                own = log_p[row.number] = token_log_probs(
                    logits[row.number].float(), temperature, row.options.text.top_p
                )
                ids[row.number] = inverse_cdf_sample(own, own.new_tensor(noise[row.number][k]))
        return ids, log_p

    call = StateCall(runtime.model, states)
    drafting = joint.head.draft_recurrently(call, emitted.to(states.device))
    chosen = [choose(0, next(drafting))]
    while len(chosen) < num:  # until no request may have a further id
        so_far = torch.stack([ids for ids, _ in chosen], 1)
        if not any(_usable(runtime, row, so_far[row.number].tolist())[1] for row in decoding):
            break
        chosen.append(choose(len(chosen), drafting.send(chosen[-1][0])))
    ids, log_probs = (torch.stack(parts, 1) for parts in zip(*chosen, strict=True))
    draft = Draft(ids, log_probs if wants_log_probs else None, len(chosen))
    _require_sound(runtime, decoding, call, draft)
    return draft


def _require_sound(runtime: Runtime, decoding: Sequence[Row], call: CacheCall | StateCall, draft: Draft) -> None:
    """NotFiniteError if the head's logits or probabilities are not finite."""
    wrong = torch.zeros(len(draft.ids), dtype=torch.bool, device=draft.ids.device)
    wrong = wrong if call.unsound is None else wrong | call.unsound
    if draft.log_q is not None:
        wrong = wrong | draft.log_q.gather(-1, draft.ids.unsqueeze(-1)).isnan().flatten(1).any(1)
    found = wrong.tolist()
    for row in decoding:
        if found[row.number]:
            logits = runtime.model.token.read(call.start[row.number : row.number + 1])
            masked_scores(logits, torch.zeros_like(logits), [row.num_tokens])  # raises if the token head caused it
            raise NotFiniteError(
                f"the joint-token head's draft from token {row.num_tokens + 1} of the reply on is not finite: its "
                "weights are damaged; check the model's files with `omni verify`, or take tokens_per_pass = 1"
            )


def _merged(spans: Sequence[Span]) -> list[Span]:
    """The same spans; neighbouring ids share one TokenSpan."""
    out: list[Span] = []
    for span in spans:
        before = out[-1] if out else None
        if isinstance(span, TokenSpan) and isinstance(before, TokenSpan):
            out[-1] = TokenSpan([*before.ids, *span.ids], [*before.supervise, *span.supervise])
        else:
            out.append(span)
    return out


def _noise(row: Row, num: int) -> list[float]:
    """The noise of the row's next tokens, equal to that of autoregressive decoding. "block"
    draws new noise each round: its decision depends on tokens that it then drops, so theirs is no longer uniform."""
    if row.options.speculative.verify == "block":
        return [token_uniform(row.key.fold("block token", row.num_tokens, k)) for k in range(num)]
    return [token_uniform(row.key.fold("token", row.num_tokens + k)) for k in range(num)]


def _usable(runtime: Runtime, row: Row, ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids of a draft that one round can use, and whether one more token may follow. They end at `draft_length`, and
    at the id after which a picture begins or the turn ends."""
    ids, phase = list(ids[: row.draft_length]), row.phase
    for k, token in enumerate(ids):
        phase = runtime.grammar.following(row, phase, token)
        if phase in ("block", "done"):
            return ids[: k + 1], False
    return ids, True


def _masks(runtime: Runtime, row: Row, ids: Sequence[int], num: int) -> Tensor:
    """(num, V) additive masks of the allowed ids in place of every id of a draft, and after it."""
    masks, phase = [], row.phase
    for token in (*ids, None)[:num]:
        masks.append(runtime.grammar.mask_of(row, phase))
        if token is not None and runtime.grammar.following(row, phase, token) not in ("block", "done"):
            phase = runtime.grammar.following(row, phase, token)
    return torch.stack(masks)


def _log_probs(runtime: Runtime, row: Row, ids: Sequence[int], logits: Tensor) -> Tensor:
    """(K + 1, V) float64, or (K, V) as the logits have it: log-probabilities of every next id, under the mask of its
    phase."""
    temperature = row.options.text.temperature
    assert temperature is not None
    return token_log_probs(_scores(runtime, row, ids, logits)[0], temperature, row.options.text.top_p)


def _scores(runtime: Runtime, row: Row, ids: Sequence[int], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K, V) or (K + 1, V), each under the mask of its phase, and the best id of each; see `masked_scores`."""
    numbers = range(row.num_tokens, row.num_tokens + len(logits))
    return masked_scores(logits, _masks(runtime, row, ids, len(logits)), numbers)


def _judge(runtime: Runtime, row: Row, draft: Draft | None, ids: Sequence[int], logits: Tensor) -> Verified:
    drafted, kind, K = torch.tensor([list(ids)], device=logits.device), row.options.speculative.verify, len(ids)
    if kind in ("coupled", "greedy"):
        return agreed(drafted, _after_all(_autoregressive_ids(runtime, row, ids, logits), K)[None])
    log_p = _after_all(_log_probs(runtime, row, ids, logits), K)[None]
    if draft is None or draft.log_q is None:
        raise ValueError(
            f"verify = {kind!r} needs the probabilities of the draft, which this model's joint-token head does not "
            "give; take verify = 'coupled'"
        )
    key = row.key.fold("verify", row.num_tokens)
    coins = key.fold("coins").uniform((1, K), torch.float64).to(logits.device)
    fresh = key.fold("rest").uniform((1, K + 1), torch.float64).to(logits.device)
    judge = rejection if kind == "rejection" else block
    return judge(drafted, draft.log_q[row.number : row.number + 1, :K], log_p, coins, fresh)


def _after_all(each: Tensor, num: int) -> Tensor:
    """`each` padded to num + 1 entries where the last id was not read; the padding is not used."""
    return each if len(each) > num else torch.cat([each, each[-1:]])


def _legal(runtime: Runtime, row: Row, ids: Sequence[int]) -> list[int]:
    """An unverified draft before its first id that its phase does not allow. The first id is allowed (see `_draft`)."""
    phase = row.phase
    for k, token in enumerate(ids):
        if runtime.grammar.mask_of(row, phase)[token] == -torch.inf:
            return list(ids[:k])
        phase = runtime.grammar.following(row, phase, token)
    return list(ids)


def _emit(runtime: Runtime, row: Row, ids: Sequence[int], trace: Drafted) -> Iterator:
    """Emit ids of a request until its phase ends; yields events, returns the emitted ids."""
    row.note(trace)
    yield row.number, trace
    emitted: list[int] = []
    for token in ids:
        emitted.append(token)
        row.num_tokens += 1
        for event in runtime.grammar.advance(row, token):
            yield row.number, event
        if row.phase in ("block", "done") or row.forced:
            break
    return emitted
