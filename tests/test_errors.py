"""Values that are not finite raise an error that names the token, the step or the codec; they give no output."""

from __future__ import annotations

import math

import pytest
import torch
from scripted import force, living
from torch import Tensor

from omni.codecs.codec import MAX_LATENT
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.errors import NotFiniteError, in_range, require_finite
from omni.generation.engine import Engine
from omni.model import Omni
from omni.samplers.token import masked_scores, token_log_probs

PICTURE = {"force_image": True, "image_size": (8, 8), "max_tokens": 2, "max_images": 1, "steps": 2}
WRONG = [math.nan, math.inf, -math.inf]


@pytest.fixture
def model(tiny_model) -> Omni:  # noqa: ANN001
    return living(tiny_model)


def poison(model: Omni, name: str, value: float, at: tuple[int, ...] = (0, 0)) -> None:
    with torch.no_grad():
        model.get_parameter(name)[at] = value


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("name", ["transformer.blocks.1.text.gate_up.weight", "token.embedding.weight"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_weight_that_is_not_finite_raises(model: Omni, name: str, value: float, temperature: float) -> None:
    poison(model, name, value)
    with pytest.raises(NotFiniteError, match=r"logits of token 1 of the reply are not finite .*omni verify"):
        model.generate("hello", temperature=temperature)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_cap_hides_no_infinity(model: Omni, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """tanh of infinity is 1, a finite score."""
    monkeypatch.setattr(model.token, "logit_cap", 12.0)
    with torch.no_grad():
        weight = model.token.embedding.weight
        capped = model.token.read(torch.ones_like(weight[:3]))
    assert torch.equal(capped, model.token.read(torch.ones_like(weight[:3])).detach())  # as in training
    poison(model, "token.embedding.weight", value, (ord("!"), 5))
    with pytest.raises(NotFiniteError, match="logits of token 1"):
        model.generate("hello")


def test_an_overflow_inside_the_network_raises(model: Omni) -> None:
    """A finite weight gives a hidden state whose square overflows: the final norm returns zero, so all logits are 0."""
    poison(model, "transformer.blocks.1.text.down.weight", 3e38)
    with pytest.raises(NotFiniteError, match="logits of token 1 of the reply are all 0"):
        model.generate("hello")


def test_the_error_names_the_token(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second token's logits alone are not finite."""
    engine, reads, read = Engine(model), [], model.token.read

    def second(hidden: Tensor) -> Tensor:
        reads.append(len(hidden))
        return read(hidden) * (math.nan if len(reads) == 2 else 1)

    monkeypatch.setattr(model.token, "read", second)
    with pytest.raises(NotFiniteError, match="logits of token 2 of the reply are not finite .nan"):
        engine.generate("hello")


def test_scores_without_a_valid_id_raise() -> None:
    no = -math.inf
    with pytest.raises(NotFiniteError, match="the mask leaves no id for token 8 of the reply"):
        masked_scores(torch.ones(2, 2), torch.tensor([[0.0, no], [no, no]]), [6, 7])
    with pytest.raises(NotFiniteError, match="logits of token 8 of the reply are all 0"):
        masked_scores(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.zeros(2), [6, 7])
    with pytest.raises(NotFiniteError, match="logits of token 8 of the reply are not finite .-inf.; a weight"):
        masked_scores(torch.tensor([[1.0, 1.0], [0.0, no]]), torch.tensor([0.0, no]), [6, 7])
    logits = torch.tensor([[0.0, -1.0, 4.0], [5.0, 0.0, 5.0], [-3.0, -2.0, 0.0]])
    mask = torch.tensor([[0.0, 0.0, no], [no, 0.0, no], [0.0, 0.0, no]])
    scores, ids = masked_scores(logits, mask, range(3))
    assert ids.tolist() == [0, 1, 1]  # a 0 that is the best or the only score is valid
    assert torch.equal(scores, logits + mask)


def test_a_mask_without_ids_raises(model: Omni) -> None:
    engine = Engine(model)
    engine.grammar.allowed["text"][:] = -math.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFiniteError, match="the mask leaves no id for token 1 of the reply"):
            engine.generate("hello", temperature=temperature)


def test_the_smallest_temperature_is_greedy() -> None:
    """Scores divided by it overflow; the result is the argmax."""
    score = torch.tensor([1.0, 12.0, -3.0])
    for temperature in (5e-324, 1e-300, 1e-30):
        assert token_log_probs(score, temperature).exp().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("sampler", ["euler", "heun", "flow_map", "restart", "gamma"])
def test_latents_that_are_not_finite_raise(model: Omni, value: float, sampler: str) -> None:
    poison(model, "flow.velocity.weight", value)
    with pytest.raises(NotFiniteError, match=r"latents of picture 1, after step 1 of 2, are not finite .*guidance"):
        model.generate("draw", sampler=sampler, **PICTURE)


@pytest.mark.parametrize("value", [1e5, 1e30, -1e30])
def test_latents_out_of_range_raise(model: Omni, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """A large guidance weight gives such latents: finite, and decoded to black or white."""
    velocity = model.velocity
    monkeypatch.setattr(model, "velocity", lambda *given: velocity(*given) * 0 + value)
    with pytest.raises(NotFiniteError, match=r"picture 1, after step 1 of 2, reach -?5\S*, beyond 10000; "):
        model.generate("draw", **PICTURE)


def test_the_error_names_the_block(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk of the second clip, after a picture."""
    c, passes, velocity = Engine(model).control, [], model.velocity

    def later(*given):  # noqa: ANN002, ANN202
        passes.append(0)
        return velocity(*given) * (math.nan if len(passes) > 4 else 1.0)

    monkeypatch.setattr(model, "velocity", later)
    clip = [c.video, c.size(2), c.size(8), c.size(1), c.size(1)]
    script = [c.image, c.size(1), c.size(1), *clip]
    with pytest.raises(NotFiniteError, match="latents of chunk 2 of clip 2, after step 1 of 2,"):
        force(model, script).generate("move", steps=2, max_images=3)


@pytest.mark.parametrize("value", [*WRONG, 1e30, 2 * MAX_LATENT])
def test_a_codec_rejects_invalid_latents(value: float) -> None:
    codec = PixelCodec(PixelConfig(patch=2))
    latents = torch.zeros(2, 2, 2, 12)
    latents[1, 1, 0, 3] = value
    with pytest.raises(NotFiniteError, match="latents given to codec 'pixels'"):
        codec.decode(latents)
    with pytest.raises(NotFiniteError, match="latents given to codec 'pixels'"):
        codec.decode_video([latents[:1], latents[1:]])
    codec.decode(latents.clamp(-3, 3).nan_to_num())


def test_ranges() -> None:
    require_finite(torch.zeros(0), "nothing", "")
    assert in_range(torch.tensor([3e38, -3e38])) and not in_range(torch.tensor([1.0, -2.0]), 1.5)
    with pytest.raises(NotFiniteError, match="^they reach -7, beyond 5; go home$"):
        require_finite(torch.tensor([6, -7]), "they", "go home", 5)
    with pytest.raises(NotFiniteError, match=r"^they are not finite \(inf\); go home$"):
        require_finite(torch.tensor([1.0, math.inf]), "they", "go home")
