"""Speculative decoding in the engine: the strings of autoregressive decoding, or its distribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripted import with_head
from torch import Tensor

import omni
from omni.document import Text
from omni.errors import NotFiniteError
from omni.generation.engine import Engine
from omni.generation.events import Drafted
from omni.generation.options import GenerationOptions
from omni.generation.reply import Reply
from omni.generation.request import Request
from omni.generation.speculative import _noise
from omni.heads.joint import JOINT_HEADS, Draft, ExtendedCall, JointHead
from omni.model import Omni
from omni.nn.cache import History
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample
from omni.sequence.layout import Shape, TokenSpan, pack
from omni.text.chat import messages_to_document

K = 4


@JOINT_HEADS.register("roll_out")
class RollOut(JointHead):
    """Drafts the ids of autoregressive decoding, token by token: K passes, for tests."""

    layout = "causal"
    mask: Tensor | None = None  # of decoding

    def sample(self, call, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:  # noqa: ANN001
        ids, distributions = uniforms[:, :0].long(), []
        for k in range(self.num_tokens(uniforms)):
            start = call.start if k == 0 else ExtendedCall(call, ids).start
            scores = call.read(start).double()
            distributions.append((scores if self.mask is None else scores + self.mask).log_softmax(-1))
            ids = torch.cat([ids, inverse_cdf_sample(distributions[-1], uniforms[:, k]).unsqueeze(1)], 1)
        return Draft(ids, torch.stack(distributions, 1))

    def loss(self, call, lesson):  # noqa: ANN001, ANN201
        raise NotImplementedError


@JOINT_HEADS.register("four_ids")
class FourIds(JointHead):
    """Drafts the first four ids with equal probabilities in any context: allowed under the mask, and inaccurate."""

    def sample(self, call, uniforms: Tensor, key: Key, passes: int = 1) -> Draft:  # noqa: ANN001
        distribution = torch.full((*uniforms.shape, self.vocab_size), -torch.inf, dtype=torch.float64)
        distribution[..., :4] = -math.log(4)
        return Draft(inverse_cdf_sample(distribution, uniforms), distribution)

    def loss(self, call, lesson):  # noqa: ANN001, ANN201
        raise NotImplementedError


@pytest.fixture(params=["product", "roll_out", "sequential"])
def engine(request: pytest.FixtureRequest, tiny_model) -> Iterator[Engine]:  # noqa: ANN001
    """Random weights with likely pictures and a likely end."""
    engine = Engine(with_head(tiny_model, request.param))
    lift(engine)
    yield engine


def lift(engine: Engine) -> None:
    mask = engine.grammar.allowed["text"]
    mask[engine.control.end] += 2.0
    mask[engine.control.image] += 4.0


def text_alone(engine: Engine) -> Tensor:
    """A mask without the end and pictures."""
    c, mask = engine.control, engine.grammar.allowed["text"]
    mask[[c.end, c.image, c.video]] = -torch.inf
    return mask


def same(a: Reply, b: Reply) -> bool:
    if a.text != b.text or a.stop_reason != b.stop_reason or len(a.images) != len(b.images):
        return False
    pairs = zip(a.images, b.images, strict=True)
    return all(x.size == y.size and max(map(_gap, x.tobytes(), y.tobytes())) <= 1 for x, y in pairs)


def _gap(x: int, y: int) -> int:
    return abs(x - y)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_coupled_equals_autoregressive_decoding(engine: Engine, temperature: float) -> None:
    common = {
        "temperature": temperature,
        "top_p": 0.9 if temperature else 1.0,
        "max_tokens": 24,
        "max_images": 2,
        "steps": 1,
    }
    for seed in range(6):
        plain = engine.generate("say", seed=seed, tokens_per_pass=1, **common)
        together = engine.generate("say", seed=seed, **common)
        assert same(plain, together)
        assert not plain.drafts and together.drafts
        for d in together.drafts:  # a pass of the head gives the first token exactly
            assert (d.passes > 1) <= d.accepted <= d.drafted <= K


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_images_ends_a_reply_as_in_autoregressive_decoding(engine: Engine, temperature: float) -> None:
    """With likely pictures every reply begins one picture more than its limit."""
    engine.grammar.allowed["text"][engine.control.end] = -torch.inf
    engine.grammar.allowed["text"][engine.control.image] = 5.0 if temperature else 100.0
    for budget in (0, 1):
        common = {"temperature": temperature, "max_tokens": 200, "max_images": budget, "steps": 1, "seed": 1}
        plain = engine.generate("say", tokens_per_pass=1, **common)
        assert same(plain, engine.generate("say", **common))
        assert plain.stop_reason == "images" and len(plain.images) == budget


@pytest.mark.filterwarnings("ignore::omni.sequence.context_limit.ContextWarning")
def test_the_longest_context_ends_a_reply_as_in_autoregressive_decoding(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No draft exceeds the longest context, and a picture without room is not started."""
    longest, commit = [0], History.commit

    def committed(history: History, *arguments) -> None:  # noqa: ANN002
        commit(history, *arguments)
        longest.append(history.length)

    monkeypatch.setattr(History, "commit", committed)
    engine.grammar.allowed["text"][engine.control.end] = -torch.inf
    reasons = set()
    for limit, seed in itertools.product((16, 30), range(2)):
        engine.model.config = engine.model.config.model_copy(update={"max_context": limit})
        common = {"temperature": 1.0, "steps": 1, "max_images": 1, "seed": seed}
        plain = engine.generate("say", tokens_per_pass=1, **common)
        longest[:] = [0]
        assert same(plain, engine.generate("say", **common)) and max(longest) <= limit
        reasons.add(plain.stop_reason)
    assert "length" in reasons


@pytest.mark.parametrize("verify", ["coupled", "rejection", "none"])
@pytest.mark.parametrize("head", ["product", "sequential", "push_forward", "masked"])
def test_a_head_that_is_not_finite_raises(tiny_model, head: str, verify: str) -> None:  # noqa: ANN001
    """Also where verification would correct the ids: the weights are damaged."""
    engine = Engine(with_head(tiny_model, head))
    text_alone(engine)
    common = {"temperature": 1.0, "max_tokens": 8, "verify": verify}
    if verify != "rejection" or head in ("product", "sequential"):
        assert engine.generate("say", **common).stop_reason == "length"
    assert engine.model.joint is not None
    with torch.no_grad():
        for parameter in engine.model.joint.head.parameters():
            parameter.view(-1)[0] = math.nan
    with pytest.raises(NotFiniteError, match="token [1-4] of the reply (on is|are) not finite"):  # no mask hides a NaN
        engine.generate("say", **common)
    with torch.no_grad():
        engine.model.get_parameter("transformer.blocks.0.text.qkv.weight")[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="logits of token 1 of the reply are not finite"):
        engine.generate("say", **common)


def test_a_perfect_draft_is_accepted_whole(tiny_model) -> None:  # noqa: ANN001
    engine = Engine(with_head(tiny_model, "roll_out"))
    assert engine.model.joint is not None
    engine.model.joint.head.mask = text_alone(engine)  # type: ignore[assignment]
    reply = engine.generate("say", temperature=1.0, max_tokens=40, seed=3, max_images=0)
    assert len(reply.drafts) == 8 and all(d.accepted == d.drafted for d in reply.drafts)


@pytest.mark.parametrize("verify", ["none", "coupled"])
def test_sweeps_converge_to_autoregressive_decoding(tiny_model, verify: str) -> None:  # noqa: ANN001
    """From wrong drafts: as many sweeps as tokens give autoregressive decoding, one sweep does not."""
    engine = Engine(with_head(tiny_model, "four_ids"))
    lift(engine)
    common = {"temperature": 1.0, "max_tokens": 24, "max_images": 2, "steps": 1, "verify": verify}
    agree = {n: 0 for n in (0, 1, K)}
    for seed in range(6):
        plain = engine.generate("say", seed=seed, tokens_per_pass=1, **{**common, "verify": None})
        for n in agree:
            agree[n] += same(plain, engine.generate("say", seed=seed, sweeps=n, **common))
    assert agree == ({0: 6, 1: 6, K: 6} if verify == "coupled" else {**agree, K: 6})
    assert agree[0] < 6 or verify == "coupled"


def test_sweeps_raise_acceptance(tiny_model) -> None:  # noqa: ANN001
    engine = Engine(with_head(tiny_model, "four_ids"))
    text_alone(engine)
    accepted = []
    for n in range(K + 1):
        reply = engine.generate("say", temperature=1.0, max_tokens=40, max_images=0, seed=1, sweeps=n)
        accepted.append(sum(d.accepted for d in reply.drafts) / len(reply.drafts))
        assert all(d.accepted >= min(1 + n, d.drafted) for d in reply.drafts)
    assert accepted[0] < accepted[1] < accepted[K] == K


def test_verification_logits_after_a_rejection_give_the_next_draft(tiny_model) -> None:  # noqa: ANN001
    """Equal strings with fewer drafts of the head; each leftover comes from the previous round."""
    engine = Engine(with_head(tiny_model, "four_ids"))
    text_alone(engine)
    common = {"temperature": 1.0, "max_tokens": 40, "max_images": 0, "seed": 4}
    anew, again = (engine.generate("say", recycle=recycle, **common) for recycle in (False, True))
    assert anew.text == again.text == engine.generate("say", tokens_per_pass=1, **common).text
    heads = [sum(not d.again for d in reply.drafts) for reply in (anew, again)]
    assert heads[1] < heads[0] == len(anew.drafts)
    for before, after in itertools.pairwise(again.drafts):
        left = before.drafted - before.accepted
        assert after.again == (left > 0) and (not after.again or after.drafted <= left)


def four_ids_alone(engine: Engine) -> Engine:
    """Only the first four ids are allowed, and they are likely."""
    with torch.no_grad():
        engine.model.token.embedding.weight[:4] *= 20
    for mask in engine.grammar.allowed.values():
        mask[:] = -torch.inf
        mask[:4] = 0
    return engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recurrent_drafting_takes_one_pass_a_round(tiny_model, temperature: float) -> None:  # noqa: ANN001
    """The strings of autoregressive decoding, alone and in a batch; after the first round each id is read once."""
    engine = four_ids_alone(Engine(with_head(tiny_model, "sequential")))
    lengths: list[int] = []
    extend = engine.model.transformer.extend

    def counted(h: Tensor, *arguments) -> Tensor:  # noqa: ANN002
        lengths.append(h.shape[1])
        return extend(h, *arguments)

    engine.model.transformer.extend = counted  # type: ignore[method-assign]
    options = GenerationOptions(temperature=temperature, max_tokens=40, max_images=0)
    replies = [engine.generate("say", options.changed({"seed": seed})) for seed in range(8)]
    rounds = [d for reply in replies for d in reply.drafts[1:]]
    assert all(d.passes == 1 and d.drafted < K for d in rounds)
    # Each reply: the prompt, which is read once by all, and the first draft; then the last id with its draft.
    assert len(lengths) == 2 * len(replies) + len(rounds) and max(lengths[1:]) == K
    accepted = sum(d.accepted for d in rounds)
    assert accepted < sum(d.drafted for d in rounds) and (accepted > 0 or not temperature)
    plain = options.changed({"tokens_per_pass": 1})
    for seed, reply in enumerate(replies):
        assert reply.text == engine.generate("say", plain.changed({"seed": seed})).text
    together = engine.generate_batch(["say"] * 8, options, seeds=range(8))
    assert [(r.text, r.drafts) for r in together] == [(r.text, r.drafts) for r in replies]


def test_adaptive_drafts_follow_acceptance(tiny_model) -> None:  # noqa: ANN001
    """Equal strings; drafts are short after rejections, and grow to the limit after full acceptance."""
    common = {"temperature": 1.0, "max_tokens": 40, "max_images": 0, "seed": 2}
    for head, longest in (("four_ids", 3), ("roll_out", K)):
        engine = Engine(with_head(tiny_model, head))
        mask = text_alone(engine)
        if head == "roll_out":
            engine.model.joint.head.mask = mask  # type: ignore[union-attr, assignment]
        plain, adapted = engine.generate("say", **common), engine.generate("say", adaptive=True, **common)
        assert plain.text == adapted.text
        lengths = [d.drafted for d in adapted.drafts if not d.again]
        assert lengths[0] == K and max(lengths[1:-1]) == longest


def test_a_batch_of_any_options_gives_each_request_its_own_reply(engine: Engine) -> None:
    """Requests with and without drafts, of different lengths, with pictures: each reply equals that alone."""
    prompts = ["a", "draw me something rather long, please", "b c", "d"]
    options = [
        GenerationOptions(temperature=1.0, max_tokens=20, steps=1, max_images=1, tokens_per_pass=n)
        for n in (4, 1, 2, 3)
    ]
    together = engine.generate_batch(prompts, options, seeds=[1, 2, 3, 4])
    for prompt, one, seed, reply in zip(prompts, options, [1, 2, 3, 4], together, strict=True):
        assert same(reply, engine.generate_batch([prompt], [one], seeds=[seed])[0])
        assert all(d.drafted <= (one.speculative.tokens_per_pass or 0) for d in reply.drafts)


def test_forced_ids_are_emitted(engine: Engine) -> None:
    common = {"temperature": 1.0, "max_tokens": 20, "steps": 1, "max_images": 2, "seed": 5}
    for more in ({"force_image": True}, {"image_size": (8, 8)}, {"stop": ("a", "e", "i")}):
        assert same(engine.generate("x", tokens_per_pass=1, **common, **more), engine.generate("x", **common, **more))


def test_a_draft_cannot_make_a_header_malformed(engine: Engine) -> None:
    """Also without verification: headers have size tokens and turns end with the end token, for any draft."""
    for seed in range(6):
        reply = engine.generate("x", temperature=1.0, max_tokens=24, steps=1, max_images=2, seed=seed, verify="none")
        assert reply.stop_reason in ("end", "length", "images") and len(reply.images) <= 2
        largest = engine.model.config.max_grid * engine.model.codec.spec.stride[1]  # type: ignore[union-attr]
        assert all(max(image.size) <= largest for image in reply.images)


def test_events_report_accepted_tokens(engine: Engine) -> None:
    events = list(engine.stream("x", temperature=1.0, max_tokens=12, max_images=0, seed=1))
    reply = engine.generate("x", temperature=1.0, max_tokens=12, max_images=0, seed=1)
    assert [e for e in events if isinstance(e, Drafted)] == list(reply.drafts) != []


def test_block_verification_uses_new_noise_every_round(tiny_model) -> None:  # noqa: ANN001
    """Verification "block" depends on rejected tokens, so their noise is not reused. Rejection keeps common noise."""
    engine = Engine(with_head(tiny_model, "product"))
    for kind in ("block", "rejection", "coupled"):
        options = engine.resolve(GenerationOptions(verify=kind, temperature=1.0))
        request = Request(0, History(engine.pool), options, (Text("say"),), engine.tokenizer.stream())
        first = _noise(request, 4)
        request.num_tokens += 1
        assert bool(set(first) & set(_noise(request, 4))) == (kind != "block")


NUM_REPLIES = 1000


def exact(model: Omni) -> Tensor:
    """(64,): the probability of each string of three tokens of four ids, from a forward pass of every string."""
    prompt = model.spans(messages_to_document("x"), generation_prompt=True)
    strings = [[code // 4**n % 4 for n in range(3)] for code in range(64)]
    rows = [[*prompt, TokenSpan(ids, [True] * 3)] for ids in strings]
    length = 3 + sum(len(span.ids) for span in prompt if isinstance(span, TokenSpan))  # one string per row
    [batch], _ = pack(rows, [Shape(64, length, 0)], channels=model.config.flow.channels, pad_id=0)
    hidden, _ = model.transformer.context(model.embed(batch), batch.context, batch.is_latent)
    logits = model.token.read(hidden)[:, -4:-1, :4].double()
    return logits.log_softmax(-1).gather(-1, torch.tensor(strings)[..., None]).sum((1, 2)).exp()


def frequencies(engine: Engine, first_seed: int, **options: object) -> Tensor:
    """(64,): how often each string of three tokens of four ids is the reply, over NUM_REPLIES seeds."""
    one = GenerationOptions(temperature=1.0, max_tokens=3, **options)  # type: ignore[arg-type]
    seeds = range(first_seed, first_seed + NUM_REPLIES)
    replies = [
        r
        for part in (seeds[n : n + 500] for n in range(0, NUM_REPLIES, 500))
        for r in engine.generate_batch(["x"] * 500, one, part)
    ]
    ids = [engine.tokenizer.encode(reply.text) for reply in replies]
    code = torch.tensor([sum(i * 4**n for n, i in enumerate(row)) for row in ids])
    return torch.bincount(code, minlength=64).double() / NUM_REPLIES


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("four_ids", "block"),
        ("four_ids", "none"),
        ("sequential", "rejection"),
        ("product", "rejection"),
        ("masked", "rejection"),
        pytest.param("four_ids", "rejection", marks=pytest.mark.slow),
        pytest.param("sequential", "block", marks=pytest.mark.slow),
    ],
)
def test_the_distribution_of_replies(tiny_model, head: str, kind: str) -> None:  # noqa: ANN001
    """Rejection and block verification have the distribution of autoregressive decoding; unverified drafts do not. The
    product and the masked head draft three of the four ids alone."""
    settings: dict[str, Any] = {"vocabulary": 3} if head in ("product", "masked") else {}
    settings |= {"depth": 1, "options": {"trains": "drafts"}} if head == "masked" else {}
    engine = four_ids_alone(Engine(with_head(tiny_model, head, **settings)))
    with torch.inference_mode():
        wanted = exact(engine.model)
    assert float(wanted.sum()) == pytest.approx(1)
    distance = float((wanted - frequencies(engine, 10_000, verify=kind)).abs().sum() / 2)
    assert distance > 0.2 if kind == "none" else distance < 0.07


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_pass": 0}, "tokens_per_pass = 0: must be a whole number from 1 to 64"),
        ({"tokens_per_pass": 9}, "tokens_per_pass = 9 is too many: its joint-token head drafts 4"),
        ({"verify": "coupeld"}, "unknown verification 'coupeld'"),
        ({"sweeps": -1}, "sweeps = -1: must be a whole number from 0 to 64"),
        ({"sweeps": 1, "verify": "block"}, "verify = 'block' needs the distribution of a draft, which sweeps change"),
        ({"sweeps": 1, "tokens_per_pass": 1}, "sweeps = 1 has no effect on one token a pass"),
        ({"verify": "none", "tokens_per_pass": 1}, "verify = 'none' has no effect on one token a pass"),
        ({"recycle": True, "verify": "block"}, "recycle has no effect with verify = 'block'"),
        ({"verify": "greedy", "temperature": 0.5}, "verify = 'greedy' has no meaning at temperature 0.5"),
    ],
)
def test_impossible_options_raise(tiny_model, changes: dict, message: str) -> None:  # noqa: ANN001
    engine = Engine(with_head(tiny_model, "product"))
    with pytest.raises(ValueError, match=message):
        engine.generate("x", **changes)


def test_drafts_without_a_joint_token_head_raise(tiny_model) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="no joint-token head"):
        Engine(omni.from_pretrained(tiny_model)).generate("x", tokens_per_pass=2)


def test_drafts_are_a_default_of_the_model(tiny_model) -> None:  # noqa: ANN001
    """Without it a reply is decoded id by id; the request decides."""
    model = with_head(tiny_model, "product")

    def passes(**options: int) -> int | None:
        return Engine(model).resolve(GenerationOptions(**options)).speculative.tokens_per_pass  # type: ignore[arg-type]

    assert (passes(), passes(tokens_per_pass=2)) == (K, 2)
    model.defaults = {}
    assert (passes(), passes(tokens_per_pass=2)) == (1, 2)
