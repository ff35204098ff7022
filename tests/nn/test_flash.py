"""Packed streams by segments of variable length equal the dense mask: forward, gradients, the model and its losses.

A stand-in computes the kernel's function on the CPU (flash_stand_in.py).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from flash_stand_in import StandIn, flash_attn_varlen_func
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layouts import CHANNELS, PAD, random_batch, small_model
from torch import Tensor

from omni.model import Omni
from omni.nn.attention import flash
from omni.nn.attention.backends import AttentionMask, attend, choose_backend
from omni.nn.attention.flash import context_calls, copy_calls, flash_context, flash_copies
from omni.nn.compiled import require_compilable
from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, Span, TokenSpan, pack
from omni.sequence.mask import Fields

Row = list[list[int]]  # documents of a batch row; n > 0: n text tokens; -n: a block of n latents
SEGMENTS = st.lists(st.one_of(st.integers(1, 5), st.integers(-5, -1)), min_size=1, max_size=6)
ROWS = st.lists(st.lists(SEGMENTS, min_size=0, max_size=3), min_size=1, max_size=3)
FORMS = st.sampled_from([(0, 4), (1e18, 4), (1e18, 1)])  # text as segments; as a whole; blocks in several calls
WINDOWS = st.sampled_from([None, 1, 2, 4, 9])
TOLERANCE = 1e-12


def fields_of(rows: list[Row], padding: int = 0) -> Fields:
    """The context stream, by hand."""
    laid = []
    for row in rows:
        positions = []
        for number, segments in enumerate(row):
            block = 0
            for size in segments:
                positions += [(number, block + (n if size > 0 else 0)) for n in range(abs(size))]
                block += size if size > 0 else 1
        laid.append(positions)
    length = max(1, max(map(len, laid)) + padding)
    laid = [one + [(-1, n) for n in range(len(one), length)] for one in laid]
    document, block = torch.tensor(laid).unbind(-1)
    return Fields(document, block, torch.zeros_like(document))


def inputs(R: int, Q: int, K: int, H: int = 4, G: int = 2, D: int = 4) -> list[Tensor]:
    shapes = {"q": (R, Q, H, D), "k": (R, K, G, D), "v": (R, K, G, D), "cotangent": (R, Q, H, D)}
    drawn = [Key(1).fold(name).normal(shape, torch.float64).transpose(1, 2) for name, shape in shapes.items()]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def windowed(mask: AttentionMask, window: int | None, context: int) -> Tensor:
    """(R, Q, K) bool, by the words: of the first `context` keys, those behind the query's block by less than window."""
    seen = mask.boolean()[:, 0].clone()
    if window is None:
        return seen
    queries, keys = mask.queries, mask.keys
    for r in range(seen.shape[0]):
        for i in range(seen.shape[1]):
            of_document = (keys.document[r, :context] == queries.document[r, i]).nonzero().flatten()
            before = keys.block[r, of_document] < queries.block[r, i]
            first = int(of_document[0]) + int(before.sum()) if len(of_document) else 0  # of its block, in the stream
            seen[r, i, : max(0, min(first - window + 1, context))] = False
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, cap: float | None, scale: float | None) -> Tensor:
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    return scores.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v


def differences(found: Tensor, wanted: Tensor, drawn: list[Tensor], used: Tensor) -> list[float]:
    """The largest of outputs and of all gradients, over the used positions; padding is finite."""
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    cotangent = drawn[3] * used[:, None, :, None]
    gradients = [torch.autograd.grad(out, drawn[:3], cotangent, retain_graph=True) for out in (found, wanted)]
    pairs = [(found * used[:, None, :, None], wanted * used[:, None, :, None]), *zip(*gradients, strict=True)]
    return [float((a - b).detach().abs().max()) for a, b in pairs]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The kernel of the CPU, for the backend's name."""
    function = StandIn()
    monkeypatch.setitem(flash.KERNELS, "cpu", lambda: function)
    yield function
    choose_backend.cache_clear()


@settings(max_examples=50)
@given(ROWS, st.integers(0, 3), FORMS, WINDOWS, st.sampled_from([None, 0.7]), st.sampled_from([None, 0.3]))
@example(
    [[[-3, -2, 4, -1, -2, 2]], [[-4], [5, -2]]], 2, (0, 4), None, None, None
)  # blocks first, neighbours, blocks of one
@example([[[3, -4, 2, -4, 3]]], 0, (1e18, 1), 3, 0.7, 0.3)
@example([[], [[2]]], 1, (0, 4), None, None, None)  # a row of padding
def test_the_context_equals_the_dense_mask(
    rows: list[Row], padding: int, form: tuple[float, int], window: int | None, cap: float | None, scale: float | None
) -> None:
    fields = fields_of(rows, padding)
    mask, used = AttentionMask(fields, fields), fields.document >= 0
    drawn, kernel = inputs(*fields.document.shape, fields.document.shape[1]), StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "KEY_COST", form[0])
        patch.setattr(flash, "GATHERED", form[1])
        found = flash_context(*drawn[:3], mask, window=window, cap=cap, scale=scale, kernel=kernel)
    assert len(kernel.calls) <= 2 or form[1] == 1
    seen = windowed(mask, window, fields.document.shape[1]) | ~used[:, :, None]
    assert max(differences(found, dense(*drawn[:3], seen, cap, scale), drawn, used)) < TOLERANCE
    if window is None and cap is None and scale is None:
        plain = attend(*drawn[:3], mask, "math")
        assert max(differences(found, plain, drawn, used)) < TOLERANCE


@settings(max_examples=40)
@given(st.integers(0, 1 << 30), st.integers(1, 2), st.integers(1, 3), WINDOWS, st.sampled_from([None, 0.7]))
def test_copies_of_blocks_equal_the_dense_mask(
    seed: int, copies: int, rows: int, window: int | None, cap: float | None
) -> None:
    batch = random_batch(Key(seed), num_documents=3, copies=copies, rows=rows)
    if not batch.num_items:
        return
    T, (R, S) = batch.context.document.shape[1], batch.item.shape
    mask = AttentionMask(batch.refine.fields, batch.context.fields.then(batch.refine.fields))
    drawn, used, kernel = inputs(R, S, T + S), batch.item >= 0, StandIn()
    found = flash_copies(*drawn[:3], mask, window=window, cap=cap, kernel=kernel)
    [(queries, _, causal)] = kernel.calls
    assert queries == batch.num_refine and not causal
    seen = windowed(mask, window, T) | ~used[:, :, None]
    assert max(differences(found, dense(*drawn[:3], seen, cap, None), drawn, used)) < TOLERANCE


def calls_of(rows: list[Row], padding: int = 0, window: int | None = None) -> list[tuple[int, bool]]:
    """(gathered keys, causal) of each call of a pass over the context."""
    fields = fields_of(rows, padding)
    mask = AttentionMask(fields, fields)
    assert context_calls(mask, window) is context_calls(mask, window)  # planned once
    return [(call.num_gathered, call.causal) for call in context_calls(mask, window)]


def test_calls_and_gathered_keys() -> None:
    assert calls_of([[[5], [3]], [[4, 1]]], padding=3) == [(0, True)]  # text: one call, nothing is gathered
    assert calls_of([[[2, -1, 3]]]) == [(0, True)]  # a block of one is text
    assert calls_of([[[3, -2, 1, -4], [-2]]]) == [(0, True), (5 + 10 + 2, False)]
    assert calls_of([[[3, -2, 1, -4]]], window=3) == [(0, True), (4 + 6, False)]
    assert calls_of([[[-2, -3]]]) == [(2 + 5, False)]  # no text
    large = 2000  # a block of 2,000: its rows are worth more than the text's keys
    assert calls_of([[[10, -large, 10]]]) == [(10 + 20 + large, True), (10 + large, False)]
    assert calls_of([[]]) == [(0, True)]
    assert calls_of([[[-2, -3]]], padding=2) == [(2 + 5, False)]  # padding is no text
    often = [10, -600] * 10  # the keys of its text would be too many
    assert calls_of([[often]])[0] == (0, True) and calls_of([[often[:6]]])[0] == (10 + 620 + 1230, True)


def test_padding_is_cheap_and_may_lie_anywhere() -> None:
    fields = fields_of([[[3]]], padding=200)
    [call] = context_calls(AttentionMask(fields, fields))
    assert call.longest_query <= flash.PADDING
    zero = torch.zeros(1, 7, dtype=torch.int64)
    fields = Fields(torch.tensor([[-1, -1, 0, 0, -1, -1, 1]]), torch.tensor([[1, 0, 0, 0, 0, 0, 0]]), zero)
    mask, drawn = AttentionMask(fields, fields), inputs(1, 7, 7)
    found = flash_context(*drawn[:3], mask, kernel=StandIn())
    assert max(differences(found, attend(*drawn[:3], mask, "math"), drawn, fields.document >= 0)) < TOLERANCE


def test_many_blocks_take_calls_with_bounded_keys() -> None:
    """The backward computes those of blocks again."""
    many = [1, *[-8] * 20]  # P = 161: calls of at most 4 P keys
    text, *sums = [num for num, _ in calls_of([[many]])]
    assert text == 1 and len(sums) == 3 and max(sums) <= 4 * 161 and sum(sums) == sum(1 + 8 * n for n in range(1, 21))
    fields, kernel = fields_of([[many]]), StandIn()
    drawn = inputs(1, 161, 161)
    found = flash_context(*drawn[:3], AttentionMask(fields, fields), kernel=kernel)
    assert [causal for *_, causal in kernel.calls] == [True, False, False, False]
    torch.autograd.grad(found, drawn[:3], drawn[3])
    assert [causal for *_, causal in kernel.calls[4:]] == [False] * 3


@pytest.mark.parametrize(
    ("latents", "blocks", "text", "of_text", "of_blocks", "pairs"),
    [(256, 4, 2000, 0, 2.17, 1.33), (256, 1, 2000, 0, 0.56, 1.11), (1024, 4, 2000, 2.66, 2.34, 1.0)],
)
def test_the_cost_of_a_chat_with_pictures(
    latents: int, blocks: int, text: int, of_text: float, of_blocks: float, pairs: float
) -> None:
    """Gathered keys per position of the context, and pairs of queries and keys computed per visible one."""
    piece = text // (blocks + 1)
    segments = [piece, *[-latents, piece] * blocks]
    fields = fields_of([[segments]])
    num = fields.document.shape[1]
    calls = context_calls(AttentionMask(fields, fields))
    assert [call.num_gathered / num for call in calls] == pytest.approx([of_text, of_blocks], abs=0.01)
    computed, visible, end = 0, 0, 0
    for size in segments:
        end += abs(size)
        visible += size * end - size * (size - 1) // 2 if size > 0 else -size * end
    for call in calls:
        n, m = call.query_bounds.diff().long(), call.key_bounds.diff().long()
        computed += int((n * m - call.causal * n * (n - 1) // 2).sum())
    assert computed / visible == pytest.approx(pairs, abs=0.01)


def mixed() -> Batch:
    """Every layout that the model can have: documents of text, that begin with a block, neighbouring blocks."""
    blocks = [LatentSpan(Key(n).normal((size, CHANNELS)), (1, 1, size), True) for n, size in enumerate((4, 1, 6, 2))]
    text = [TokenSpan([n + 1, n + 2, n + 3], [True] * 3) for n in range(4)]
    documents: list[list[Span]] = [
        [text[0], blocks[0], text[1], blocks[1], blocks[2]], [text[2]], [blocks[3], text[3]], [blocks[0], blocks[3]],
    ]  # fmt: skip
    [batch], count = pack(documents, [Shape(2, 24, 40)], channels=CHANNELS, pad_id=PAD, copies=2)
    assert count == 4 and batch.num_context < batch.ids.numel()
    return replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())


def model_of(attention: str, weights: str) -> Omni:
    return small_model(attention=attention, latent_weights=weights, dtype=torch.float64)


@pytest.mark.parametrize("key_cost", [0, 256])
@pytest.mark.parametrize("weights", ["shared", "separate"])
def test_the_model_equals_math(weights: str, key_cost: int, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, memory and velocities; two calls a layer over the context, one over copies."""
    monkeypatch.setattr(flash, "KEY_COST", key_cost)
    batch, results = mixed(), []
    used, t = batch.context.document >= 0, torch.linspace(0.2, 0.9, batch.num_items, dtype=torch.float64)
    for attention in ("flash", "math"):
        model = model_of(attention, weights)
        hidden, memory = model.context(batch)
        velocity = model.velocity(
            batch.refine_latents, t, 0.2 * t, torch.ones_like(t), batch.refine, batch.item, memory
        )
        kept = [part.transpose(1, 2)[used] for pair in memory.layers for part in pair]
        results.append([hidden[used], velocity[batch.item >= 0], *kept])
    assert max(float((a - b).detach().abs().max()) for a, b in zip(*results, strict=True)) < 1e-12
    assert [causal for *_, causal in stand_in.calls] == [True, False] * 2 + [False] * 2


def test_losses_and_gradients_equal_math(stand_in: StandIn) -> None:
    """Of the next token, a flow, and a flow map, whose tangents have their own path."""
    batch, results = mixed(), []
    objectives = [build_objective(name) for name in ("next_token", "flow_matching", "mean_flow")]
    for attention in ("flash", "math"):
        model = model_of(attention, "separate").train()
        terms = model(batch, objectives, Key(0))
        losses = torch.stack([one.sum for one in terms.values()])
        assert len(losses) >= 3 and bool((losses != 0).all())
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)
        results.append([losses, *(g for g in gradients if g is not None)])
    assert len(results[0]) > 20
    assert max(float(((a - b).abs().max() / b.abs().max()).detach()) for a, b in zip(*results, strict=True)) < 1e-10
    assert stand_in.calls


def test_copies_with_an_order_inside_use_sdpa(stand_in: StandIn) -> None:
    """Ranks: blocks of tokens. The kernel of CUDA has no float32, which central differences take."""
    model, batch = model_of("flash", "shared").transformer, mixed()
    ranked = replace(batch.refine, rank=torch.zeros_like(batch.refine.copy))
    assert model._block_backend(batch.refine, torch.float64, 9) == "flash"
    assert model._block_backend(ranked, torch.float64, 9) == "sdpa"
    there = Fields(*(torch.zeros(1, 1, dtype=torch.int64, device="meta") for _ in range(3)))
    object.__setattr__(there, "copy", type("On", (), {"device": torch.device("cuda")})())
    assert flash.serves_copies(there, torch.bfloat16) and not flash.serves_copies(there, torch.float32)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    fields, kernel = fields_of([[[2, -2]]]), StandIn()
    mask, (q, k, v, _) = AttentionMask(fields, fields), inputs(1, 4, 4)

    def refused(message: str, q: Tensor = q, mask: AttentionMask = mask, **given: float) -> None:
        with pytest.raises(ValueError, match=message):
            flash_context(q, k, v, mask, kernel=kernel, **given)  # type: ignore[arg-type]

    refused("window = 0 of attention must be at least 1", window=0)
    refused("cap = 0.0 of attention must be above 0", cap=0.0)
    refused("scale = -1.0 of attention must be above 0", scale=-1.0)
    refused("serves packed streams only", q=q[:, :, :2])
    refused("heads up to 256 wide, not 264; use attention = 'flex'", q=torch.zeros(1, 4, 4, 264))
    for document, block in (([0, 1, 0, 0], [0, 0, 1, 2]), ([0, 0, 0, 0], [0, 2, 1, 3])):
        split = Fields(torch.tensor([document]), torch.tensor([block]), fields.copy)
        refused("each document in one piece", mask=AttentionMask(split, split))
    copies = replace(fields, copy=fields.copy + 1)
    refused("serves the context stream; use flash_copies", mask=AttentionMask(copies, copies))
    pieces = replace(copies, copy=torch.tensor([[1, 2, 1, 1]]))
    with pytest.raises(ValueError, match="copy 1 of batch row 0 lies in several pieces"):
        copy_calls(AttentionMask(pieces, fields.then(pieces)))
    two_bounds = replace(copies, block=torch.tensor([[1, 1, 2, 2]]))
    with pytest.raises(ValueError, match="copy 1 of batch row 0 lies in several pieces"):
        copy_calls(AttentionMask(two_bounds, fields.then(two_bounds)))
    ranked = replace(copies, rank=copies.copy)
    with pytest.raises(ValueError, match="without an order inside"):
        copy_calls(AttentionMask(ranked, fields.then(ranked)))
    assert not kernel.calls
    with pytest.raises(ValueError, match="compile=true does not support attention = 'flash'"):
        require_compilable(small_model(attention="flash").transformer.c)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match="needs flash-attn: pip install 'omni-flow"):
        flash.KERNELS["cuda"]()
    stand_in = type(sys)("flash_attn")
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    assert flash.KERNELS["cuda"]() is flash_attn_varlen_func


def test_the_stand_in_refuses_what_the_kernel_refuses() -> None:
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    x = torch.ones(2, 2, 8, dtype=torch.bfloat16)

    def call(x: Tensor = x, bounds: Tensor = bounds, longest: int = 2, **given: object) -> Tensor:
        return flash_attn_varlen_func(x, x, x, bounds, bounds, longest, longest, **given)  # type: ignore[arg-type]

    assert torch.equal(call(causal=True), x)
    assert float(call(window_size=(0, 0))[0, 0, 0]) == 1
    for wrong in (
        {"x": x.double()}, {"x": torch.ones(2, 2, 264, dtype=torch.bfloat16)},
        {"x": torch.ones(2, 8, 2, dtype=torch.bfloat16).mT}, {"bounds": bounds.long()}, {"bounds": bounds + 1},
        {"longest": 3}, {"longest": torch.tensor(2)},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            call(**wrong)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError):
        call(dropout_p=0.1)


@pytest.mark.skipif(not (torch.cuda.is_available() and flash.available("cuda")), reason="no CUDA with flash-attn")
@pytest.mark.parametrize("given", [{}, {"window": 40, "cap": 2.0, "scale": 0.2}])
@pytest.mark.parametrize("key_cost", [0, 1 << 30])
def test_the_package_equals_the_stand_in(
    given: dict[str, float], key_cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, in bfloat16: outputs and gradients within rounding of the stand-in in float64."""
    monkeypatch.setattr(flash, "KEY_COST", key_cost)
    published = inspect.signature(flash.KERNELS["cuda"]()).parameters
    assert list(published) == list(inspect.signature(flash_attn_varlen_func).parameters)[:-1]  # without `dtypes`
    fields = fields_of([[[100, -64, 30, -7], [50]], [[-64, -64, 20]]], 9)
    fields = Fields(fields.document.cuda(), fields.block.cuda(), fields.copy.cuda())
    mask, used, results = AttentionMask(fields, fields), fields.document >= 0, []
    drawn = [x.detach().bfloat16() for x in inputs(*used.shape, used.shape[1], D=64)]
    for kernel, dtype in ((None, torch.bfloat16), (StandIn(), torch.float64)):
        q, k, v = (x.to("cuda", dtype).requires_grad_() for x in drawn[:3])
        out = flash_context(q, k, v, mask, kernel=kernel, **given)  # type: ignore[arg-type]
        cotangent = drawn[3].to("cuda", dtype) * used[:, None, :, None]
        results.append([out * used[:, None, :, None], *torch.autograd.grad(out, (q, k, v), cotangent)])
    for found, wanted in zip(*results, strict=True):
        assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-2
