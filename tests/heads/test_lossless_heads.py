"""Every head under every verification that it supports: emitted tokens have the distribution of autoregressive
decoding.

Three tokens over three ids from a random model, in rounds. Requests with the same ids so far share their passes; the
probabilities of autoregressive decoding are a table over all strings. `slow`: 200,000 samples, as documented; by
default a tenth.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from eval.experiments.joint.training import head_of, toy_batch, toy_call, toy_model
from omni.heads.joint import JOINT_HEADS, JointConfig
from omni.heads.joint.training import teacher_log_probs
from omni.model import Omni
from omni.rng import Key
from omni.samplers.token import token_log_probs
from omni.samplers.verification import block, coupled, rejection

V, K, LENGTH = 3, 2, 3  # ids (and BOS, which is masked), drafted tokens, tokens of a reply
HEADS = {
    "product": ("product", {}),
    "product, first": ("product", {"reads_first": True}),
    "cp": ("cp", {"num_states": 3}),
    "hmm": ("hmm", {"num_states": 3}),
    "tree": ("tree", {"num_states": 3}),
    "sequential": ("sequential", {}),
    "latent_mixture": ("latent_mixture", {}),
    "push_forward": ("push_forward", {}),
    "push_forward, categorical": ("push_forward", {"mode": "categorical"}),
    "push_forward, gumbel": ("push_forward", {"noise": "gumbel", "mode": "categorical"}),
    "masked": ("masked", {}),
    "simplex": ("simplex", {}),
}
WITHOUT_LOG_Q = ("push_forward", "simplex")  # these support verification by common noise only


def random_model(name: str) -> Omni:
    """All weights of the head are random, also those that start at zero."""
    head, options = HEADS[name]
    joint = JointConfig(head=head, length=K, adapter_rank=2, options=options)
    model = toy_model(joint, V, Key(0), width=16, depth=1)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.startswith("joint."):
                parameter.copy_(Key(1).fold(part).normal(tuple(parameter.shape)) / math.sqrt(parameter.shape[-1]))
        model.token.embedding.weight.mul_(2)
    return model.eval()


@torch.inference_mode()
def log_probs_of(model: Omni, temperature: float, top_p: float) -> dict[tuple[int, ...], Tensor]:
    """log P(. | x) (V + 1,) of autoregressive decoding after every string that a round can reach."""
    found = {}
    n = LENGTH + K
    ids = torch.tensor(list(itertools.product(range(V), repeat=n)))
    batch, starts, blocks = toy_batch(torch.zeros(len(ids), 0, dtype=torch.int64), ids, V)
    log_probs = teacher_log_probs(model, model.context(batch)[0], starts, blocks)
    log_probs[..., V] = -torch.inf
    for row, distribution in zip(ids.tolist(), token_log_probs(log_probs, temperature, top_p), strict=True):
        for k in range(n):
            found[tuple(row[:k])] = distribution[k]
    return found


@torch.inference_mode()
def replies(model: Omni, kind: str, log_probs: dict[tuple[int, ...], Tensor], num: int) -> Tensor:
    """(V^LENGTH,) int64: how many of `num` replies equal each string. Drafts as in the engine: a token keeps its
    uniform in all rounds (tokens of a simplex also depend on the noise of later ones), except with "block"."""
    counts = torch.zeros(V**LENGTH, dtype=torch.int64)
    own = Key(2).fold(kind, "own").uniform((num, LENGTH + K), torch.float64)
    waiting = {(): torch.arange(num)}
    while waiting:
        prefix_ids, members = waiting.popitem()
        rows, key = len(members), Key(2).fold(kind, *prefix_ids)
        prefix = torch.tensor(prefix_ids, dtype=torch.int64).expand(rows, -1)
        if kind != "block":
            noise = own[members, len(prefix_ids) : len(prefix_ids) + K + 1]
        else:
            noise = key.fold("noise").uniform((rows, K + 1), torch.float64)
        draft = head_of(model).sample(toy_call(model, prefix, K), noise[:, :K], key.fold("draft"))
        ids = draft.ids.clamp(max=V - 1) if kind == "coupled" else draft.ids
        table = torch.stack([log_probs[(*prefix_ids, *x)] for k in range(K + 1) for x in _strings(k)])
        first = torch.tensor([sum((V + 1) ** j for j in range(k)) for k in range(K + 1)])
        code = torch.stack([torch.zeros(rows, dtype=torch.int64), *_codes(ids)], 1)
        log_p = table[first + code]
        if kind == "coupled":
            verified = coupled(ids, log_p, noise)
        else:
            assert draft.log_q is not None
            coins, fresh = (key.fold(n).uniform((rows, K + 1), torch.float64) for n in ("coins", "rest"))
            judge = {"rejection": rejection, "block": block}[kind]
            verified = judge(ids, draft.log_q, log_p, coins[:, :K], fresh)
        for n in range(K + 1):
            here = verified.accepted == n
            strings, index = torch.unique(verified.ids[here, : n + 1], dim=0, return_inverse=True)
            for number, x in enumerate(strings.tolist()):
                whole, found = (*prefix_ids, *x), members[here][index == number]
                if len(whole) >= LENGTH:
                    counts[sum(i * V**j for j, i in enumerate(whole[:LENGTH]))] += len(found)
                else:
                    waiting[whole] = torch.cat([waiting.get(whole, found[:0]), found])
    return counts


def _strings(length: int) -> list[tuple[int, ...]]:
    """Over V + 1 ids; the one with BOS stands for any other, as no token after it is reached."""
    every = itertools.product(range(V + 1), repeat=length)
    return [tuple(min(i, V - 1) for i in x) for x in every]


def _codes(ids: Tensor) -> list[Tensor]:
    found, code = [], torch.zeros(len(ids), dtype=torch.int64)
    for k in range(ids.shape[1]):
        code = code * (V + 1) + ids[:, k]
        found.append(code)
    return found


def exact(log_probs: dict[tuple[int, ...], Tensor]) -> Tensor:
    out = torch.zeros(V**LENGTH, dtype=torch.float64)
    for x in itertools.product(range(V), repeat=LENGTH):
        value = sum(float(log_probs[x[:k]][x[k]]) for k in range(LENGTH))
        out[sum(i * V**j for j, i in enumerate(x))] = math.exp(value)
    return out


CASES = [
    (name, kind)
    for name in HEADS
    for kind in (("coupled",) if name in WITHOUT_LOG_Q else ("coupled", "rejection", "block"))
]


@pytest.mark.parametrize(
    ("num", "setting"),
    [
        (10_000, (0.7, 0.9)),
        pytest.param(200_000, (0.7, 0.9), marks=pytest.mark.slow),
        pytest.param(200_000, (1.0, 1.0), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_lossless(name: str, kind: str, num: int, setting: tuple[float, float]) -> None:
    """At this temperature and top-p, of the target."""
    model = random_model(name)
    log_probs = log_probs_of(model, *setting)
    p = exact(log_probs)
    assert abs(float(p.sum()) - 1) < 1e-9
    found = replies(model, kind, log_probs, num).double() / num
    # The total variation of num exact samples is about half of the sum of sqrt(2 p (1 - p) / (pi num)).
    expected = float((2 * p * (1 - p) / (math.pi * num)).sqrt().sum()) / 2
    assert float((found - p).abs().sum()) / 2 < 2 * expected


@pytest.mark.parametrize("name", ["product", "masked"])
def test_unverified_drafts_differ(name: str) -> None:
    """Control: drafts without verification have another distribution."""
    model = random_model(name)
    log_probs = log_probs_of(model, 1.0, 1.0)
    num, key = 20_000, Key(3)
    draft = head_of(model).sample(
        toy_call(model, torch.zeros(num, 0, dtype=torch.int64), K), key.uniform((num, K), torch.float64), key
    )
    pairs = torch.bincount(draft.ids.clamp(max=V - 1) @ torch.tensor([1, V]), minlength=V * V).double() / num
    assert float((pairs - _pairs(log_probs)).abs().sum()) / 2 > 0.05


def _pairs(log_probs: dict[tuple[int, ...], Tensor]) -> Tensor:
    out = torch.zeros(V * V, dtype=torch.float64)
    for a, b in itertools.product(range(V), repeat=2):
        out[a + V * b] = math.exp(float(log_probs[()][a] + log_probs[(a,)][b]))
    return out


def test_every_head_is_tested() -> None:
    ours = {name for name in JOINT_HEADS.names() if JOINT_HEADS.get(name).__module__.startswith("omni.")}
    assert {head for head, _ in HEADS.values()} == ours
