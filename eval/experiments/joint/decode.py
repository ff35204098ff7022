"""Speculative decoding of text ids with a joint-token head: rounds of draft and verification, as in the engine.

No pictures, no control tokens, no early end of a batch row: a table of heads measures the heads alone. The parts are
the engine's own (CacheCall, run_context, the draft verifications).

Legend: R batch rows, P ids of a context, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from eval.experiments.joint.training import head_of
from omni.generation.context import Append, append_of, run_context
from omni.generation.drafting import CacheCall
from omni.heads.joint import Draft
from omni.model import Omni
from omni.nn.cache import History
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.samplers.token import token_log_probs
from omni.samplers.verification import Verified, block, coupled, rejection
from omni.sequence.layout import TokenSpan


class Decoding(Protocol):
    """The options that decoding reads."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...


@dataclass(frozen=True)
class Pace:
    """Emitted ids (R, num_tokens), and the rate: tokens of all rows over wall time."""

    ids: Tensor
    tokens_per_second: float


@dataclass(frozen=True)
class Rounds(Pace):
    """kept: accepted drafted tokens per round (without the token that verification adds). positions (K,): the share of
    rounds that accept the first k + 1 tokens."""

    accepted: float
    positions: tuple[float, ...]


@torch.inference_mode()
def decode_plain(model: Omni, contexts: Tensor, run: Decoding, key: Key) -> Pace:
    """Autoregressive decoding with the cache."""
    noise, start = _noise(contexts, run, key), time.perf_counter()
    histories, last = _prefill(model, contexts)
    emitted = []
    for at in range(run.num_tokens):
        hidden = _read(model, histories, last[:, None])[:, 0]
        last = inverse_cdf_sample(token_log_probs(model.token.read(hidden), run.temperature, run.top_p), noise[:, at])
        emitted.append(last)
    ids = torch.stack(emitted, 1)
    return Pace(ids, ids.numel() / (time.perf_counter() - start))


@torch.inference_mode()
def decode_rounds(model: Omni, contexts: Tensor, kind: str, run: Decoding, key: Key) -> Rounds:
    """Speculative decoding, with draft verification `kind`: "coupled", "greedy" (coupled at temperature 0; drafts with
    noise 1/2 are the medians of a head's distributions, as in the engine), "rejection" or "block"."""
    greedy = kind == "greedy"
    noise = torch.full_like(_noise(contexts, run, key), 0.5) if greedy else _noise(contexts, run, key)
    temperature, top_p = (0.0, 1.0) if greedy else (run.temperature, run.top_p)
    start = time.perf_counter()
    histories, last = _prefill(model, contexts)
    emitted: list[list[int]] = [[] for _ in contexts]
    accepted_at, number, total = torch.zeros(run.length), 0, 0
    while min(map(len, emitted)) < run.num_tokens:
        at = torch.tensor([min(len(row), run.num_tokens) for row in emitted])  # finished rows continue, uncounted
        own = noise[torch.arange(len(emitted))[:, None], at[:, None] + torch.arange(run.length + 1)]
        draws = key.fold("round", kind, number)
        if kind == "block":  # it depends on drafts that it discards, so their noise is used
            own = draws.fold("tokens").uniform(tuple(own.shape), torch.float64)
        call = CacheCall(model, _appends(histories, last[:, None]))
        draft = head_of(model).sample(call, own[:, :-1], draws.fold("draft"))
        if kind in ("coupled", "greedy"):  # the first autoregressive token is in the same pass
            first = inverse_cdf_sample(token_log_probs(model.token.read(call.start), temperature, top_p), own[:, 0])
            draft = replace(draft, ids=torch.cat([first[:, None], draft.ids[:, 1:]], 1))
        base = [(one.length, one.next_position, one.next_block) for one in histories]
        hidden = torch.cat([call.start.unsqueeze(1), _read(model, histories, draft.ids)], 1)
        log_p = token_log_probs(model.token.read(hidden), temperature, top_p)
        verified = _judge(kind, draft, log_p, own, draws)
        counted = torch.tensor([len(row) < run.num_tokens for row in emitted])
        accepted_at += (verified.accepted[counted, None] > torch.arange(run.length)).sum(0)
        total += int(counted.sum())
        for r, accepted in enumerate(verified.accepted.tolist()):
            emitted[r] += verified.ids[r, : accepted + 1].tolist()
            histories[r].truncate(*(field + accepted for field in base[r]))
        last = torch.tensor([row[-1] for row in emitted])
        number += 1
    seconds = time.perf_counter() - start
    ids = torch.tensor([row[: run.num_tokens] for row in emitted])
    shares = tuple((accepted_at / total).tolist())
    return Rounds(ids, ids.numel() / seconds, sum(shares), shares)


def _judge(kind: str, draft: Draft, log_p: Tensor, noise: Tensor, key: Key) -> Verified:
    if kind in ("coupled", "greedy"):
        return coupled(draft.ids, log_p, noise)
    assert draft.log_q is not None
    coins = key.fold("coins").uniform(tuple(draft.ids.shape), torch.float64)
    fresh = key.fold("rest").uniform(tuple(noise.shape), torch.float64)
    return {"rejection": rejection, "block": block}[kind](draft.ids, draft.log_q, log_p, coins, fresh)


def _noise(contexts: Tensor, run: Decoding, key: Key) -> Tensor:
    """(R, num_tokens + K + 1): one uniform per token, and K + 1 more for blocks that exceed the end."""
    return key.fold("tokens").uniform((len(contexts), run.num_tokens + run.length + 1), torch.float64)


def _prefill(model: Omni, contexts: Tensor) -> tuple[list[History], Tensor]:
    """Histories of BOS and the contexts without their last ids; and the last ids."""
    pool = model.transformer.new_pool()
    histories = [History(pool) for _ in contexts]
    first = torch.full((len(contexts), 1), model.config.vocab_size - 1)
    _read(model, histories, torch.cat([first, contexts[:, :-1]], 1))
    return histories, contexts[:, -1]


def _appends(histories: Sequence[History], ids: Tensor) -> list[Append]:
    """Ids (R, n) after the histories."""
    spans = [TokenSpan(row, [False] * len(row)) for row in ids.tolist()]
    return [append_of(history, [span], 0) for history, span in zip(histories, spans, strict=True)]


def _read(model: Omni, histories: Sequence[History], ids: Tensor) -> Tensor:
    """Hidden states (R, n, W) of ids (R, n), appended to the histories."""
    return torch.stack(run_context(model, _appends(histories, ids))[0])
