"""Speculative decoding: the joint-token head drafts K tokens in one pass, a second pass verifies them.

    round   cache | y            y: spans that the cache does not hold yet: the prompt, a picture, the last id
      draft   one pass over [y, K placeholders]: K ids; y is written to the cache
      sweep   `sweeps` times: one pass over [x_1 .. x_K] samples every id of the draft again, each with its own
              noise (Jacobi iteration; arXiv 2305.10427). K sweeps from any draft give autoregressive decoding
      verify  one pass over [x_1 .. x_K], written to the cache: the distribution of every next id
      emit    the accepted ids and one more (samplers.verification); the cache drops the rejected ids
      on      recurrent drafting: the head drafts from the last id and the hidden state before it, from the
              verification pass: a round of one pass. Heads with placeholders run the last layers for them
      again   the verification logits after the first rejected token give the next draft (as a sweep does): one pass

A block ends where a picture begins or the turn ends. No draft makes a header malformed: each id is verified under the
mask of its own phase. With verify = "coupled" the ids equal those of autoregressive decoding.

Legend: R batch rows, K drafted tokens, V vocabulary, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from omni.errors import NotFiniteError
from omni.generation.context import Append, append_of
from omni.generation.drafting import CacheCall, StateCall
from omni.generation.events import Drafted
from omni.generation.request import Request
from omni.generation.runtime import Runtime
from omni.generation.work import SHORT, Propose, Read, Turn
from omni.heads.joint import Draft
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.samplers.token import masked_scores, token_log_probs, token_uniform
from omni.samplers.verification import Verified, agreed, block, rejection
from omni.sequence.layout import TokenSpan


def speculative_round(runtime: Runtime, request: Request) -> Turn:
    """One round for a request in text or in a header."""
    assert runtime.model.joint is not None
    head, options = runtime.model.joint.head, request.options.speculative
    is_recurrent, again = head.is_recurrent and head.length > 1, bool(request.leftover)
    draft: Draft | None = None
    start: Tensor | None = None  # the hidden state (W,) before the draft, where this round's first pass gave it
    last: list[int] = []  # the id before the draft, where no pass has read it
    if again or request.state is not None:
        last = _last(request)
    if not again:
        append = None if last else append_of(request.history, request.take_pending(), runtime.control.pad)
        if append is not None and len(append) > SHORT:  # within the budget, before the last position
            yield Read([append.part(0, len(append) - 1)])
            append = append.part(len(append) - 1, len(append))
        draft, start = yield Propose(request, append)
    ids, whole = _usable(runtime, request, request.leftover if draft is None else draft.ids[0].tolist())
    history = request.history
    base = history.length, history.next_position, history.next_block
    for _ in range(options.sweeps):
        hidden = yield from _read_draft(runtime, request, last, start, ids, whole)
        redrawn = _autoregressive_ids(runtime, request, ids, runtime.logits(hidden))[: len(ids)]
        ids, whole = _usable(runtime, request, redrawn.tolist())
        history.truncate(*base)
    reads = options.sweeps + (options.verify != "none")
    passes = (start is not None) + (reads if last or whole or len(ids) > 1 else 0)
    if options.verify == "none":
        legal = _legal(runtime, request, ids)
        emitted = yield from _emit(runtime, request, legal, Drafted(len(ids), len(legal), passes))
        request.pending = [request.ids(emitted)]
        return
    hidden = yield from _read_draft(runtime, request, last, start, ids, whole)
    verified = _verify(runtime, request, draft, ids, runtime.logits(hidden))
    accepted = int(verified.accepted[0])
    count = accepted + 1 if whole or accepted < len(ids) else accepted
    trace = Drafted(len(ids), accepted, passes, again)
    emitted = yield from _emit(runtime, request, verified.ids[0, :count].tolist(), trace)
    num = len(emitted) - 1 + len(last)  # the last id waits; a pass without a start has read one id more
    history.truncate(*(field + num for field in base))
    request.pending = [request.ids([emitted[-1]])]
    over = request.phase in ("block", "done") or bool(request.forced)
    request.leftover = [] if over or not request.recycles else verified.ids[0, count : len(ids) + whole].tolist()
    request.state = None if over or not is_recurrent else hidden[len(emitted) - 1]


def _read_draft(
    runtime: Runtime, request: Request, last: list[int], start: Tensor | None, ids: list[int], whole: bool
) -> Turn:
    """One pass over a draft, after `last`. Returns hidden states (K, W), else (K + 1, W): the one before the draft,
    then after each id. An id that nothing may follow is not read; a round may then need no pass."""
    read = [*last, *(ids if whole else ids[:-1])]
    if not read:
        assert start is not None
        return start[None]
    [hidden] = yield Read([append_of(request.history, [request.ids(read)], runtime.control.pad)])
    return hidden if start is None else torch.cat([start[None], hidden])


def _last(request: Request) -> list[int]:
    [span] = request.pending
    assert isinstance(span, TokenSpan) and len(span.ids) == 1
    return span.ids


def _autoregressive_ids(runtime: Runtime, request: Request, ids: Sequence[int], logits: Tensor) -> Tensor:
    """The ids of autoregressive decoding in place of every drafted id, if those before it are right, and after the
    draft: int64, as many as there are logits (K, V) or (K + 1, V)."""
    if not request.options.text.temperature:
        return _scores(runtime, request, ids, logits)[1]
    log_probs = _log_probs(runtime, request, ids, logits)
    return inverse_cdf_sample(log_probs, log_probs.new_tensor(_noise(request, len(log_probs))))


def draft_together(
    runtime: Runtime, proposals: Sequence[Propose], beside: Sequence[Append] = ()
) -> tuple[list[tuple[Draft, Tensor | None] | NotFiniteError], list[Tensor]]:
    """Drafts (1, K) for requests that agree in `Propose.kind`, and the hidden state (W,) before each, if a pass gave
    it; an error for a request whose draft is not finite. And the hidden states of `beside`, which the same
    pass computes; none where no pass was needed.

    The tokens' noise belongs to the request. A head's other samples (the component of a latent mixture) depend on the
    batch: with such a head "rejection" and "block" keep the distribution of a reply in another batch, not its ids.
    """
    requests, joint = [one.request for one in proposals], runtime.model.joint
    assert joint is not None
    call: CacheCall | StateCall
    starts: Sequence[Tensor | None]
    if proposals[0].append is None:
        states = torch.stack([r.state for r in requests if r.state is not None])
        call = StateCall(runtime.model, states, [r.history for r in requests], runtime.native)
        draft, starts = _draft_recurrently(runtime, requests, call), [None] * len(requests)
    else:
        appends = [one.append for one in proposals if one.append is not None]
        call = CacheCall(runtime.model, appends, runtime.control.pad, beside)
        num = max(r.draft_length for r in requests)
        noise = [_noise(r, num) if r.options.text.temperature else [0.5] * num for r in requests]
        uniforms = torch.tensor(noise, dtype=torch.float64, device=runtime.device)
        draft = joint.head.sample(call, uniforms, requests[0].key.fold("draft", requests[0].num_tokens))
        draft, starts = _over_all_ids(draft, runtime.model.config.vocab_size), list(call.start)
    errors = _errors(runtime, requests, call, draft)
    found: list[tuple[Draft, Tensor | None] | NotFiniteError] = []
    for b, (proposal, error) in enumerate(zip(proposals, errors, strict=True)):
        one = _row_of(draft, b)
        if error is None and proposal.append is not None and not proposal.needs_log_q:
            one = _with_first_id(runtime, proposal.request, one, call.start[b])
        found.append(error or (one, starts[b]))
    return found, call.hidden if isinstance(call, CacheCall) else []


def _with_first_id(runtime: Runtime, request: Request, draft: Draft, start: Tensor) -> Draft:
    """The same pass gives the distribution of the first token, so its autoregressive id is known and always
    accepted."""
    first = _autoregressive_ids(runtime, request, (), runtime.logits(start[None]))
    return replace(draft, ids=torch.cat([first[None], draft.ids[:, 1:]], 1))


def _over_all_ids(draft: Draft, vocab_size: int) -> Draft:
    """The draft with probability zero for the ids that its head does not draft."""
    if draft.log_q is None or draft.log_q.shape[-1] == vocab_size:
        return draft
    rest = vocab_size - draft.log_q.shape[-1]
    return replace(draft, log_q=torch.nn.functional.pad(draft.log_q, (0, rest), value=-torch.inf))


def _row_of(draft: Draft, b: int) -> Draft:
    return replace(draft, ids=draft.ids[b : b + 1], log_q=None if draft.log_q is None else draft.log_q[b : b + 1])


def _draft_recurrently(runtime: Runtime, requests: Sequence[Request], call: StateCall) -> Draft:
    """Recurrent drafting: the head's draft after the last id of every request, from the hidden state before that id.
    Ids are sampled like in autoregressive decoding, at the request's temperature."""
    joint = runtime.model.joint
    assert joint is not None
    num = min(max(request.draft_length for request in requests), joint.head.length - 1)
    last = torch.tensor([_last(request) for request in requests], device=runtime.device)
    wants_log_probs = requests[0].options.speculative.verify in ("rejection", "block")
    noise = [_noise(request, num) for request in requests]
    middle = [own if r.options.text.temperature else [0.5] * num for r, own in zip(requests, noise, strict=True)]

    def choose(k: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, log_p = logits.argmax(-1), torch.zeros(0)
        if wants_log_probs:
            log_p = torch.zeros_like(logits, dtype=torch.float64)
        for b, request in enumerate(requests):
            if request.options.text.temperature or wants_log_probs:
                own = _distribution(request, logits[b].float())
                ids[b] = inverse_cdf_sample(own, own.new_tensor(noise[b][k]))
                if wants_log_probs:
                    log_p[b] = own
        return ids, log_p

    drafting = joint.head.draft_recurrently(call, last, torch.tensor(middle, dtype=torch.float64, device=last.device))
    chosen = [choose(0, next(drafting))]
    while len(chosen) < num:  # until no request may have a further id
        so_far = torch.stack([ids for ids, _ in chosen], 1).tolist()
        if not any(_usable(runtime, request, ids)[1] for request, ids in zip(requests, so_far, strict=True)):
            break
        chosen.append(choose(len(chosen), drafting.send(chosen[-1][0])))
    ids, log_probs = (torch.stack(parts, 1) for parts in zip(*chosen, strict=True))
    draft = Draft(ids, log_probs if wants_log_probs else None, len(chosen))
    return _over_all_ids(draft, runtime.model.config.vocab_size)


def _errors(
    runtime: Runtime, requests: Sequence[Request], call: CacheCall | StateCall, draft: Draft
) -> list[NotFiniteError | None]:
    """An error for each request for which the head's logits or probabilities are not finite."""
    wrong = torch.zeros(len(draft.ids), dtype=torch.bool, device=draft.ids.device)
    wrong = wrong if call.unsound is None else wrong | call.unsound
    if draft.log_q is not None:
        wrong = wrong | draft.log_q.gather(-1, draft.ids.unsqueeze(-1)).isnan().flatten(1).any(1)
    flags = zip(requests, wrong.tolist(), strict=True)
    return [_error(runtime, request, call.start[b]) if bad else None for b, (request, bad) in enumerate(flags)]


def _error(runtime: Runtime, request: Request, start: Tensor) -> NotFiniteError:
    logits = runtime.logits(start[None])
    try:
        masked_scores(logits, torch.zeros_like(logits), [request.num_tokens])
    except NotFiniteError as error:  # the token head caused it
        return error
    return NotFiniteError(
        f"the joint-token head's draft from token {request.num_tokens + 1} of the reply on is not finite: its weights "
        "are damaged; check the model's files with `omni verify`, or take tokens_per_pass = 1"
    )


def _noise(request: Request, num: int) -> list[float]:
    """The noise of the request's next tokens, equal to that of autoregressive decoding. "block"
    draws new noise each round: its decision depends on tokens that it then drops, so theirs is no longer uniform."""
    if request.options.speculative.verify == "block":
        return [token_uniform(request.key.fold("block token", request.num_tokens, k)) for k in range(num)]
    return [token_uniform(request.key.fold("token", request.num_tokens + k)) for k in range(num)]


def _usable(runtime: Runtime, request: Request, ids: Sequence[int]) -> tuple[list[int], bool]:
    """The ids of a draft that one round can use, and whether one more token may follow. They end at `draft_length`, and
    at the id after which a picture begins or the turn ends."""
    ids, phase = list(ids[: request.draft_length]), request.phase
    for k, token in enumerate(ids):
        phase = runtime.grammar.following(request, phase, token)
        if phase in ("block", "done"):
            return ids[: k + 1], False
    return ids, True


def _masks(runtime: Runtime, request: Request, ids: Sequence[int], num: int) -> Tensor:
    """(num, V) additive masks of the allowed ids in place of every id of a draft, and after it."""
    masks, phase = [], request.phase
    for token in (*ids, None)[:num]:
        masks.append(runtime.grammar.mask_of(request, phase))
        if token is not None and runtime.grammar.following(request, phase, token) not in ("block", "done"):
            phase = runtime.grammar.following(request, phase, token)
    return torch.stack(masks)


def _log_probs(runtime: Runtime, request: Request, ids: Sequence[int], logits: Tensor) -> Tensor:
    """(K + 1, V) float64, or (K, V) as the logits have it: log-probabilities of every next id, under the mask of its
    phase."""
    return _distribution(request, _scores(runtime, request, ids, logits)[0])


def _distribution(request: Request, scores: Tensor) -> Tensor:
    """Log-probabilities of ids (..., V) float64, by the request's options."""
    o = request.options.text
    return token_log_probs(scores, o.temperature or 0.0, o.top_p or 1.0, o.top_k or 0)


def _scores(runtime: Runtime, request: Request, ids: Sequence[int], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K, V) or (K + 1, V), each under the mask of its phase, and the best id of each; see `masked_scores`."""
    numbers = range(request.num_tokens, request.num_tokens + len(logits))
    return masked_scores(logits, _masks(runtime, request, ids, len(logits)), numbers)


def _verify(runtime: Runtime, request: Request, draft: Draft | None, ids: Sequence[int], logits: Tensor) -> Verified:
    drafted, kind, K = torch.tensor([list(ids)], device=logits.device), request.options.speculative.verify, len(ids)
    if kind in ("coupled", "greedy"):
        return agreed(drafted, _after_all(_autoregressive_ids(runtime, request, ids, logits), K)[None])
    log_p = _after_all(_log_probs(runtime, request, ids, logits), K)[None]
    if draft is None or draft.log_q is None:
        raise ValueError(
            f"verify = {kind!r} needs the probabilities of the draft, which this model's joint-token head does not "
            "give; take verify = 'coupled'"
        )
    key = request.key.fold("verify", request.num_tokens)
    coins = key.fold("coins").uniform((1, K), torch.float64).to(logits.device)
    fresh = key.fold("rest").uniform((1, K + 1), torch.float64).to(logits.device)
    judge = rejection if kind == "rejection" else block
    return judge(drafted, draft.log_q[:, :K], log_p, coins, fresh)


def _after_all(each: Tensor, num: int) -> Tensor:
    """`each` padded to num + 1 entries where the last id was not read; the padding is not used."""
    return each if len(each) > num else torch.cat([each, each[-1:]])


def _legal(runtime: Runtime, request: Request, ids: Sequence[int]) -> list[int]:
    """An unverified draft before its first id that its phase does not allow. The first id is allowed (see
    `draft_together`)."""
    phase = request.phase
    for k, token in enumerate(ids):
        if runtime.grammar.mask_of(request, phase)[token] == -torch.inf:
            return list(ids[:k])
        phase = runtime.grammar.following(request, phase, token)
    return list(ids)


def _emit(runtime: Runtime, request: Request, ids: Sequence[int], trace: Drafted) -> Turn:
    """Emit ids of a request until its phase ends; yields events, returns the emitted ids."""
    request.note(trace)
    yield trace
    emitted: list[int] = []
    for token in ids:
        emitted.append(token)
        request.num_tokens += 1
        yield from runtime.grammar.advance(request, token)
        if request.phase in ("block", "done") or request.forced:
            break
    return emitted
