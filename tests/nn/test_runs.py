"""A pass over the histories of many requests: attention run by run equals a dense mask, and each history alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from histories import histories_of, read, text
from layouts import CHANNELS, PAD, random_spans, small_model
from torch import Tensor

from omni.generation.context import append_of, block_runs, placeholder_runs, run_context
from omni.generation.drafting import CacheCall
from omni.heads.joint import JointConfig
from omni.model import Omni
from omni.nn.cache import History, Pool
from omni.nn.runs import QUERIES, Run, Runs
from omni.rng import Key
from omni.sequence.layout import LatentSpan, Shape, Span, TokenSpan, pack

H, G, D = 4, 2, 8


@dataclass
class Dense:
    """One history as all its keys and values, the runs of a pass included: lists of (G, D)."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def attention(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Of one query (H, D) over n keys (G, D), by the formula: (H, D)."""
    k, v = (torch.stack(part, 1).repeat_interleave(H // G, 0) for part in (keys, values))  # (H, n, D)
    return torch.einsum("hn,hnd->hd", (torch.einsum("hd,hnd->hn", q, k) / math.sqrt(D)).softmax(-1), v)


def random_pass(
    key: Key, histories: list[History], dense: list[Dense], sizes: list[tuple[int, int, bool]], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Runs]:
    """Attention (N, H, D) of one pass, by runs and by a mask. sizes: (history, positions, causal) of each run, those of
    one history in their order. All positions are committed."""
    num = [sum(size for number, size, _ in sizes if number == n) for n in range(len(histories))]
    for history, extra in zip(histories, num, strict=True):
        history.reserve(extra)
    runs, first, behind = [], 0, [0] * len(histories)
    for number, size, causal in sizes:
        runs.append(Run(histories[number], first, size, histories[number].length + behind[number], causal))
        first += size
        behind[number] += size
    q, k, v = (key.fold(name).normal((first, heads, D), dtype) for name, heads in (("q", H), ("k", G), ("v", G)))
    made = Runs(runs)
    assert made.num == first
    found = made.attend(0, *(part.transpose(0, 1)[None].contiguous() for part in (q, k, v)))[0].transpose(0, 1)
    wanted = torch.empty_like(q)
    for run, (number, size, causal) in zip(runs, sizes, strict=True):
        one, at = dense[number], slice(run.first, run.first + size)
        start = len(one.keys)
        one.keys += list(k[at])
        one.values += list(v[at])
        for i in range(size):
            stop = start + i + 1 if causal else start + size
            wanted[run.first + i] = attention(q[run.first + i], one.keys[:stop], one.values[:stop])
    for history, extra in zip(histories, num, strict=True):
        history.commit(extra, 0, 0)
    return found, wanted, made


@pytest.mark.parametrize("seed", range(4))
def test_runs_of_many_histories_equal_a_dense_mask(seed: int) -> None:
    """Text, blocks and single positions of histories of different lengths, in an order that mixes them; twelve passes,
    in which all histories move."""
    random = Key(seed).fold("runs").python()
    pool = Pool(1, G, D, dtype=torch.float64)
    histories, dense = [History(pool) for _ in range(5)], [Dense() for _ in range(5)]
    for n in range(12):
        sizes = [(random.randrange(5), random.choice((1, 1, random.randint(2, 9))), random.random() < 0.6)
                 for _ in range(random.randint(1, 7))]  # fmt: skip
        found, wanted, _ = random_pass(Key(seed).fold(n), histories, dense, sizes, torch.float64)
        assert float((found - wanted).abs().max()) < 1e-12
    assert len({one.length for one in histories}) > 2


@pytest.mark.parametrize("before", [0, 1, 300])
@pytest.mark.parametrize("num", [QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 3])
def test_long_text_equals_the_dense_mask(before: int, num: int) -> None:
    """Also in pieces of QUERIES, behind a run of another history."""
    pool, other = Pool(1, G, D, dtype=torch.float64), 300
    histories = [History(pool) for _ in range(2)]
    q = Key(before).fold("q").normal((1, H, before + other + num, D), torch.float64)
    k, v = (Key(before).fold(name).normal((1, G, before + other + num, D), torch.float64) for name in "kv")
    if before:
        first = histories[0]
        first.reserve(before)
        Runs([Run(first, 0, before, 0, True)]).attend(0, q[:, :, :before], k[:, :, :before], v[:, :, :before])
        first.commit(before, before, before)
    histories[0].reserve(num)
    histories[1].reserve(other)
    made = Runs([Run(histories[1], 0, other, 0, False), Run(histories[0], other, num, before, True)])
    found = made.attend(0, q[:, :, before:], k[:, :, before:], v[:, :, before:])[0, :, other:]
    own = [*range(before), *range(before + other, before + other + num)]
    keys, values = (part[0, :, own].repeat_interleave(H // G, 0) for part in (k, v))
    seen = torch.ones(num, before + num, dtype=torch.bool).tril(before)
    scores = (q[0, :, before + other :] @ keys.transpose(1, 2) / math.sqrt(D)).masked_fill(~seen, -math.inf)
    assert float((found - scores.softmax(-1) @ values).abs().max()) < 1e-12


def test_results_keep_the_dtype_of_the_queries() -> None:
    """Under autocast queries are bfloat16; the pool is float32."""
    one = History(Pool(1, G, D))
    one.reserve(4)
    q, k, v = (Key(0).fold(name).normal((1, heads, 4, D)) for name, heads in (("q", H), ("k", G), ("v", G)))
    for runs in ([Run(one, 0, 4, 0, True)], [Run(one, 0, 2, 0, False), Run(one, 2, 2, 2, True)]):
        wanted = Runs(runs).attend(0, q, k, v)
        found = Runs(runs).attend(0, q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert found.dtype == torch.bfloat16 and wanted.dtype == torch.float32
        assert float((found.float() - wanted).abs().max()) < 0.05


def test_first_keeps_whole_runs_of_every_history() -> None:
    """The clean tokens of blocks of tokens, without their placeholders."""
    histories = histories_of(small_model(), [[text([1] * n)] for n in (3, 7)])
    runs = placeholder_runs(histories, 5, causal=False, clean=2)
    assert [(r.first, r.num, r.at, r.causal) for r in runs.runs] == [
        (0, 2, 3, True), (2, 3, 5, False), (5, 2, 7, True), (7, 3, 9, False)
    ]  # fmt: skip
    assert [(r.first, r.num, r.at) for r in runs.first(2).runs] == [(0, 2, 3), (2, 2, 7)]
    starts = histories[0].start + 3, histories[1].start + 7
    assert runs.slots.tolist() == [start + n for start in starts for n in range(5)]


# ---- passes of a model ---------------------------------------------------------------------------------------------


def documents(num: int) -> list[list[Span]]:
    """Any mixtures of text, pictures and clips, of different lengths."""
    return [random_spans(Key(n).fold("document"), 2 + 3 * n) for n in range(num)]


def length(spans: list[Span]) -> int:
    return sum(len(s.ids) if isinstance(s, TokenSpan) else len(s.latents) for s in spans)


def context(model: Omni, spans: list[Span]) -> Tensor:
    """Hidden states (n, W) of one document in one pass with a mask, as in training."""
    [batch], _ = pack([spans], [Shape(1, length(spans), 200)], channels=CHANNELS, pad_id=PAD, fixed_shape=False)
    return model.context(batch)[0][0]


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_passes_of_many_requests_equal_the_training_pass(weights: str) -> None:
    """Each request reads its document span by span, in passes that all share."""
    model = small_model(dtype=torch.float64, latent_weights=weights)
    many = documents(6)
    wanted = [context(model, spans) for spans in many]
    histories = histories_of(model, [[]] * len(many))
    hidden: list[list[Tensor]] = [[] for _ in many]
    left = [list(spans) for spans in many]
    while any(left):
        now = [n for n, spans in enumerate(left) if spans]
        found = read(model, [histories[n] for n in now], [[left[n].pop(0)] for n in now], PAD)
        for n, states in zip(now, found, strict=True):
            hidden[n].append(states)
    for n, spans in enumerate(many):
        assert float((torch.cat(hidden[n]) - wanted[n]).abs().max()) < 1e-10
        assert histories[n].length == length(spans)


@torch.inference_mode()
def test_parts_of_an_append_equal_the_whole() -> None:
    """Cut anywhere between blocks, each part in a pass of its own, beside other requests."""
    model = small_model(dtype=torch.float64)
    for n, spans in enumerate(documents(6)):
        [whole, parts, other] = histories_of(model, [[]] * 3)
        [wanted] = read(model, [whole], [spans], PAD)
        append, start, found = append_of(parts, spans, PAD), 0, []
        random = Key(n).python()
        while start < len(append):
            rest = append.part(start, len(append))
            stop = rest.legal_stop(random.randint(1, 7))
            cut = append.laid.latents[start + stop : start + stop + 1]
            if cut and cut[0] is not None:  # a block is never cut
                assert append.laid.block[start + stop] != append.laid.block[start + stop - 1]
            appends = [append_of(other, [text([start % 9])], PAD), rest.part(0, stop)]
            found.append(run_context(model, appends, PAD)[0][1])
            start += stop
        assert float((torch.cat(found) - wanted).abs().max()) < 1e-10
        assert (parts.next_position, parts.next_block) == (whole.next_position, whole.next_block)
        assert parts.marks == whole.marks and parts.length == whole.length == len(append)


@torch.inference_mode()
def test_blocks_of_many_requests_equal_each_alone() -> None:
    """Refinement of blocks of different sizes after different histories, each at its own times, in one pass."""
    model, many, grids = small_model(dtype=torch.float64), documents(4), [(1, 2, 3), (1, 1, 1), (2, 2, 2), (1, 4, 1)]
    histories = histories_of(model, many, PAD)

    def refine(chosen: list[int]) -> tuple[Tensor, ...]:
        stream, runs = block_runs([(histories[n], grids[n]) for n in chosen], torch.device("cpu"))
        counts = [math.prod(grids[n]) for n in chosen]
        x = torch.cat([Key(n).normal((math.prod(grids[n]), CHANNELS), torch.float64) for n in chosen])[None]
        t = torch.tensor([0.9 - 0.2 * n for n in chosen], dtype=torch.float64)
        item = torch.arange(len(chosen)).repeat_interleave(torch.tensor(counts))[None]
        return model.velocity(x, t, 0.5 * t, 1 - 0.1 * t, stream, item, runs)[0].split(counts)

    together = refine([0, 1, 2, 3])
    for n, one in enumerate(together):
        [alone] = refine([n])
        assert float((one - alone).abs().max()) < 1e-12
    spans = [*many[2], LatentSpan(Key(2).normal((8, CHANNELS), torch.float64), grids[2], True)]
    [batch], _ = pack([spans], [Shape(1, 200, 200)], channels=CHANNELS, pad_id=PAD)
    _, memory = model.context(batch)  # the block sees what precedes it, as in training
    t = torch.full((batch.num_items,), 0.5, dtype=torch.float64)
    wanted = model.velocity(batch.refine_latents.double(), t, 0.5 * t, 1 - 0.1 * t, batch.refine, batch.item, memory)
    assert float((together[2] - wanted[batch.item == batch.num_items - 1]).abs().max()) < 1e-6  # packed in float32


def joint_model(depth: int | None) -> Omni:
    plain = small_model()
    joint = JointConfig(head="product", length=4, adapter_rank=2, depth=depth)
    model = Omni(plain.config.model_copy(update={"joint": joint}), Key(0))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.copy_(Key(0).fold("alive", name).normal(tuple(parameter.shape)) * 0.2)
    return model.double().eval()


@torch.inference_mode()
@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("given", [{"causal": True}, {"causal": False}, {"clean": 2}, {"causal": False, "clean": 2}])
def test_placeholders_of_many_requests_equal_each_alone(depth: int | None, given: dict[str, Any]) -> None:
    """After histories of different lengths, and appends of different lengths, some with latents; committed nowhere."""
    model, many = joint_model(depth), [[text([n, 1]), *spans] for n, spans in enumerate(documents(4))]
    latents = LatentSpan(Key(0).normal((2, CHANNELS)), (1, 1, 2))
    ends = [[text([5])], [text([7, 8, 9])], [latents, text([2])], [text([3])]]
    inputs = Key(1).normal((4, 4, 32), torch.float64)

    def call(chosen: list[int]) -> CacheCall:
        histories = histories_of(model, [many[n] for n in chosen], PAD)
        return CacheCall(model, [append_of(h, ends[n], PAD) for h, n in zip(histories, chosen, strict=True)], PAD)

    together = call([0, 1, 2, 3])
    found, again = together(inputs, **given), together(inputs * 2, **given)
    assert together.passes == (3 if "clean" in given else 2)
    for n in range(4):
        alone = call([n])
        assert float((found[n] - alone(inputs[n : n + 1], **given)[0]).abs().max()) < 1e-10
        assert float((again[n] - alone(inputs[n : n + 1] * 2, **given)[0]).abs().max()) < 1e-10
        assert float((together.start[n] - alone.start[0]).abs().max()) < 1e-10
        assert together.appends[n].history.length == length(many[n]) + length(ends[n])


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_finite_stays_so_and_stays_alone(causal: bool) -> None:
    """The kernel of the CPU without a mask returns 0 where all scores are NaN. Other requests of the pass keep every
    bit."""
    pool = Pool(1, G, D)
    histories = [History(pool) for _ in range(3)]
    for one in histories:
        one.reserve(5)
    runs = [Run(histories[0], 0, 3, 0, causal), Run(histories[1], 3, 1, 0, causal), Run(histories[2], 4, 5, 0, causal)]
    q, k, v = (Key(0).fold(name).normal((1, heads, 9, D)) for name, heads in (("q", H), ("k", G), ("v", G)))
    clean = Runs(runs).attend(0, q, k, v)
    for part in (q, k):
        for value in (math.nan, math.inf):
            kept, part[0, 0, 4:, 2] = part.clone(), value
            found = Runs(runs).attend(0, q, k, v)
            assert bool(found[0, 0, 4:].isnan().any(-1).all()) and torch.equal(found[:, :, :4], clean[:, :, :4])
            alone = Runs([Run(histories[2], 0, 5, 0, causal)]).attend(0, *(x[:, :, 4:] for x in (q, k, v)))
            assert bool(alone[0, 0].isnan().any(-1).all())
            part.copy_(kept)
