"""Blocks of tokens in the refine stream: positions and visibility; training equals decoding."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from histories import call_behind
from layouts import CHANNELS, PAD, random_batch, random_spans, small_model

from eval.experiments.joint.training import toy_batch, toy_model
from omni.generation.context import append_of, run_context
from omni.heads.joint import JOINT_HEADS, ExtendedCall, JointConfig, JointHead
from omni.heads.joint.training import BatchCall, teacher_log_probs, within
from omni.model import Omni
from omni.nn.cache import History
from omni.rng import Key
from omni.sequence.layout import IGNORE, LatentSpan, Shape, Span, TokenSpan, pack
from omni.sequence.mask import dense, flex, oracle
from omni.sequence.placeholders import Blocks, block_stream, choose_blocks

K, N = 4, 3


@JOINT_HEADS.register("probe")
class Probe(JointHead):
    """Placeholders without outputs, for tests that need no head."""

    layout = "causal"

    def sample(self, call, uniforms, key, passes=1):  # noqa: ANN001, ANN201
        raise NotImplementedError

    def loss(self, call, lesson):  # noqa: ANN001, ANN201
        raise NotImplementedError


def joint_model(
    head: str = "probe", seed: int = 0, depth: int | None = None, latent_weights: str = "shared", **options: object
) -> Omni:
    """A small model with a joint-token head whose adapters are not zero."""
    plain = small_model(seed, latent_weights=latent_weights)
    joint = JointConfig(head=head, length=K, adapter_rank=2, depth=depth, options=options)
    config = plain.config.model_copy(update={"joint": joint})
    model = Omni(config, Key(seed))
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.copy_(Key(seed).fold("alive", name).normal(tuple(parameter.shape)) * 0.2)
    return model.eval()


def test_a_block_has_the_ids_after_its_start_and_ends_where_supervision_ends() -> None:
    for n in range(20):
        batch = random_batch(Key(n), rows=3)
        starts, blocks = choose_blocks(batch, K, N, Key(n))
        assert blocks.ids.shape == blocks.valid.shape == (3 * N, K)
        for b in range(3 * N):
            r, i = int(starts.row[b]), int(starts.at[b])
            if starts.document[b] < 0:
                assert not blocks.valid[b].any()
                continue
            assert not batch.is_latent[r, i] and blocks.valid[b, 0]
            follows = batch.target[r, i : i + K].tolist()
            length = (follows + [IGNORE]).index(IGNORE)
            assert blocks.valid[b].sum() == length
            assert blocks.ids[b, :length].tolist() == follows[:length]


def test_starts_are_distinct_and_keyed() -> None:
    batch = random_batch(Key(0), num_documents=8)
    starts, blocks = choose_blocks(batch, K, 4, Key(1))
    alive = starts.document >= 0
    there = list(zip(starts.row[alive].tolist(), starts.at[alive].tolist(), strict=True))
    assert len(set(there)) == len(there) > 1
    assert choose_blocks(batch, K, 4, Key(1))[1].names == blocks.names
    assert choose_blocks(batch, K, 4, Key(2))[1].names != blocks.names


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_have_one_rule_in_mask_flex_and_oracle(causal: bool) -> None:
    from torch.nn.attention.flex_attention import create_mask

    for n in range(15):
        batch = random_batch(Key(n), rows=2)
        starts, _ = choose_blocks(batch, K, N, Key(n))
        stream = block_stream(starts, K + 1, causal, clean=n % 3)
        fields = stream.fields
        keys = batch.context.fields.then(fields)
        expected = oracle(fields, keys)
        assert torch.equal(dense(fields, keys), expected)
        predicate = flex(fields, keys).mask_mod
        shape = fields.document.shape[1], keys.document.shape[1]
        assert torch.equal(create_mask(predicate, 2, None, *shape, device="cpu")[:, 0], expected)


def test_the_rule_of_blocks_in_words() -> None:
    """Start after T1 of T0 T1 T2, one clean token c and two placeholders p, q: none sees T2, which is the target of
    c."""
    [batch], _ = pack([[TokenSpan([1, 2, 3], [False, False, True])]], [Shape(1, 3, 0)], channels=4, pad_id=PAD)
    starts, blocks = choose_blocks(batch, 3, 1, Key(0))
    assert blocks.ids.tolist() == [[3, 0, 0]]
    for causal, last in ((True, [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1]]), (False, [[1, 1, 0, 1, 1, 1]] * 2)):
        fields = block_stream(starts, 3, causal, clean=1).fields
        seen = dense(fields, batch.context.fields.then(fields))[0].int().tolist()
        assert seen == [[1, 1, 0, 1, 0, 0], *last]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("clean", [0, 2])
@pytest.mark.parametrize("depth", [None, 1])
def test_training_pass_equals_the_pass_against_a_cache(causal: bool, clean: int, depth: int | None) -> None:
    """The contract for joint-token blocks: the same placeholders after the same text, packed or after a history."""
    model = joint_model(depth=depth)
    spans = [
        TokenSpan([5, 6], [False, True]),
        LatentSpan(Key(3).normal((2, CHANNELS)), (1, 1, 2), True),
        TokenSpan([7, 8, 9, 10, 11], [False, True, True, True, True]),
    ]
    with torch.inference_mode():
        [batch], _ = pack([spans, random_spans(Key(4))], [Shape(1, 60, 60)], channels=CHANNELS, pad_id=PAD)
        hidden, memory = model.context(batch)
        starts, _ = choose_blocks(batch, K, 40, Key(0))
        call = BatchCall(model, starts, hidden, memory)
        inputs = Key(5).normal((len(starts.at), K, 32))
        found = call(inputs, causal, clean)
        compared = 0
        for b in range(len(starts.at)):
            i = int(starts.at[b])
            if starts.document[b] != 0 or i == 0:
                continue
            head, tail = _cut(spans, i)
            for before, after in ((head, [tail]), ([], [*head, tail])):
                behind = call_behind(model, [before], [after], PAD)
                other = behind(inputs[b : b + 1], causal, clean)
                assert (other[0] - found[b]).abs().max() < 1e-5
                assert (behind.start[0] - hidden[0, i]).abs().max() < 1e-5
                assert behind.passes == (2 if clean else 1) and behind.appends[0].history.length == i + 1
            compared += 1
        assert compared >= 4


def _cut(spans: list, i: int) -> tuple[list, TokenSpan]:
    """The spans before context position i, and the id at i as one."""
    out, at = [], 0
    for span in spans:
        n = len(span.ids) if isinstance(span, TokenSpan) else len(span.latents)
        if isinstance(span, TokenSpan) and i < at + n:
            if i > at:
                out.append(TokenSpan(span.ids[: i - at], [False] * (i - at)))
            return out, TokenSpan([span.ids[i - at]], [False])
        out.append(span)
        at += n
    raise AssertionError


@pytest.mark.parametrize("depth", [None, 1])
def test_clean_tokens_in_a_block_see_what_text_sees(depth: int | None) -> None:
    """The continuation by clean ids inside a block equals the context stream, with or without adapters."""
    model = joint_model(depth=depth)
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    [batch], _ = pack([[TokenSpan(ids, [True] * 8)]], [Shape(1, 8, 0)], channels=CHANNELS, pad_id=PAD)
    with torch.inference_mode():
        hidden, memory = model.context(batch)
        starts, blocks = choose_blocks(batch, K, 8, Key(0))
        call = BatchCall(model, starts, hidden, memory)
        for b in range(8):
            if not blocks.valid[b, :3].all():
                continue
            i = int(starts.at[b])
            after = ExtendedCall(call, blocks.ids[:, :3])
            assert (after.start[b] - hidden[0, i + 3]).abs().max() < 1e-5


def test_adapters_act_on_placeholders_alone() -> None:
    """A joint-token head changes no bit of the autoregressive path."""
    plain, model = small_model(), joint_model()
    batch = random_batch(Key(1))
    with torch.inference_mode():
        a, b = plain.context(batch)[0], model.context(batch)[0]
        assert torch.equal(a, b)
        starts, _ = choose_blocks(batch, K, N, Key(0))
        inputs = Key(2).normal((len(starts.at), 2, 32))

        def hidden_of(m: Omni) -> torch.Tensor:
            return BatchCall(m, starts, *m.context(batch))(inputs, clean=1)

        first = hidden_of(model)
        assert model.joint is not None and model.joint.adapters is not None
        model.joint.adapters.layers[0].parts["out"].up.weight.mul_(2)  # type: ignore[union-attr]
        second = hidden_of(model)
        assert torch.equal(first[:, :2], second[:, :2]) and not torch.equal(first[:, 2], second[:, 2])


def test_placeholders_pass_through_the_last_layers_only() -> None:
    model, batch = joint_model(depth=1), random_batch(Key(1))
    assert model.joint is not None and model.joint.adapters is not None and len(model.joint.adapters.layers) == 1
    starts, _ = choose_blocks(batch, K, N, Key(0))
    inputs = Key(2).normal((len(starts.at), 2, 32))
    with torch.inference_mode():
        hidden, memory = model.context(batch)
        before = BatchCall(model, starts, hidden, memory)(inputs)
        for parameter in model.transformer.blocks[0].parameters():
            parameter.zero_()
        assert torch.equal(before, BatchCall(model, starts, hidden, memory)(inputs))
    with pytest.raises(ValueError, match="joint.depth = 3 exceeds the 2 layers"):
        joint_model(depth=3)


def test_a_model_without_a_head_raises() -> None:
    model = small_model()
    batch = random_batch(Key(1))
    starts, _ = choose_blocks(batch, K, N, Key(0))
    with pytest.raises(ValueError, match="no joint-token head"):
        BatchCall(model, starts, *model.context(batch))(torch.zeros(len(starts.at), 1, 32))


@torch.no_grad()
@pytest.mark.parametrize("depth", [None, 1])
def test_placeholders_behind_histories_of_unequal_lengths(depth: int | None) -> None:
    """With weights of the latents' own: text and pictures of any length, then placeholders, as each request alone."""
    model = joint_model(depth=depth, latent_weights="separate").double()
    picture = LatentSpan(Key(3).normal((2, CHANNELS)), (1, 1, 2), True)
    rows = [[TokenSpan([5, 6, 7], [False] * 3), picture, TokenSpan([8], [False])], [TokenSpan([9], [False])]]
    inputs = Key(5).normal((2, 3, 32)).double()
    hidden, together = passed(model, rows, inputs)
    for r, row in enumerate(rows):
        [mine], alone = passed(model, [row], inputs[r : r + 1])
        torch.testing.assert_close(together[r : r + 1], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(hidden[r], mine, rtol=0, atol=1e-12)
    assert model.joint is not None and model.joint.adapters is not None
    model.joint.adapters.layers[-1].parts["out"].up.weight.mul_(2)  # type: ignore[union-attr]
    same, moved = passed(model, rows, inputs)
    assert all(torch.equal(a, b) for a, b in zip(same, hidden, strict=True))
    assert all(float((moved - together)[r].abs().max()) > 1e-3 for r in range(2))


def passed(model: Omni, rows: list[list[Span]], inputs: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of the spans of every request in one context pass, and of the placeholders after them."""
    pool = model.transformer.new_pool()
    return run_context(model, [append_of(History(pool), row, PAD) for row in rows], PAD, None, inputs)


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize("latent_weights", ["shared", "separate", "refine"])
def test_contract_check_covers_blocks(depth: int | None, latent_weights: str) -> None:
    from omni.generation.contract import verify

    checks = verify(joint_model(depth=depth, latent_weights=latent_weights))
    assert sum("joint-token" in check.name for check in checks) == 2
    assert all(check.holds for check in checks), checks


def test_the_teacher_of_few_ids_has_the_others_as_one_more() -> None:
    """`rest`: the probabilities of all ids; without: those given that the id is one of the first. Overlapping blocks
    give the same as separate ones."""
    model = toy_model(JointConfig(length=3, adapter_rank=0), 5, Key(0), width=16, depth=1)
    ids = torch.tensor([[1, 2, 0, 3], [4, 4, 1, 0]])
    batch, starts, blocks = toy_batch(ids[:, :1], ids[:, 1:], 5)
    hidden = model.context(batch)[0].detach()
    whole = teacher_log_probs(model, hidden, starts, blocks)
    rest = teacher_log_probs(model, hidden, starts, blocks, 3, rest=True)
    torch.testing.assert_close(rest[..., :3], whole[..., :3])
    torch.testing.assert_close(rest[..., 3].exp(), whole[..., 3:].exp().sum(-1))
    few = teacher_log_probs(model, hidden, starts, blocks, 3, torch.float32)
    assert few.dtype == torch.float32
    torch.testing.assert_close(few, whole[..., :3].log_softmax(-1).float())
    many = replace(starts, **{f.name: getattr(starts, f.name).repeat(4) for f in fields(starts) if f.name != "per_row"})
    repeated = Blocks(blocks.ids.repeat(4, 1), blocks.valid.repeat(4, 1), blocks.names * 4)
    torch.testing.assert_close(teacher_log_probs(model, hidden, many, repeated), whole.repeat(4, 1, 1))


def test_a_block_ends_before_an_id_that_the_head_does_not_draft() -> None:
    blocks = Blocks(torch.tensor([[1, 7, 2], [0, 1, 2]]), torch.tensor([[True, True, True], [True, True, False]]), ())
    found = within(blocks, 5)
    assert found.valid.tolist() == [[True, False, False], [True, True, False]]
    assert found.ids.tolist() == [[1, 0, 0], [0, 1, 0]] and within(blocks, None) is blocks
