"""Cached contexts give the losses and gradients of whole passes; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from layouts import CHANNELS, PAD, small_model

from omni.model import Omni
from omni.nn.lora import LoraSpec
from omni.objectives import OBJECTIVES
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, TokenSpan, pack
from train.context_cache import ContextCache

LORA = LoraSpec(name="pictures", rank=2, alpha=4.0, invoked=True)


def model_of() -> Omni:
    model = small_model(dtype=torch.float64, latent_weights="refine", loras=(LORA,))
    with torch.no_grad():
        for name, parameter in model.transformer.loras.named_parameters():
            parameter.copy_(Key(5).fold(name).normal(tuple(parameter.shape)) * 0.3)
    model.requires_grad_(False)
    model.transformer.active_lora = "pictures"
    return model.train()


def batch_of(adapted: bool, rows: int = 2) -> Batch:
    """Documents that begin alike: text, a reply with a picture, and for some an earlier picture."""
    start, documents = list(range(6)), []
    for n in range(5):
        block = LatentSpan(Key(n).fold("latents").normal((4, CHANNELS)), (1, 2, 2), supervise=True)
        given = LatentSpan(Key(n).fold("given").normal((2, CHANNELS)), (1, 1, 2))
        ids, reply = [*start, 10 + n, 20 + n], [30, 31 + n, 40]
        before = [TokenSpan(ids, [False] * len(ids))]
        before += [given, TokenSpan([50], [False])] if adapted and n % 2 else []
        begun, ended = TokenSpan(reply, [False, adapted, adapted], adapted), TokenSpan([60], [False], adapted)
        documents.append([*before, begun, block, ended])
    [batch], num = pack(
        documents, [Shape(rows, 60, 40)], channels=CHANNELS, pad_id=PAD, copies=2, trim=[not adapted] * 5
    )
    assert num == 5 and adapted == (batch.adapted is not None)
    return replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())


def objectives(*names: str) -> list:
    return [OBJECTIVES.get(name)() for name in names]


def run(call, model: Omni, batch: Batch, names: Sequence[str]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:  # noqa: ANN001
    model.zero_grad()
    terms = call(batch, objectives(*names), Key(1), None, 0.0, None)
    torch.stack([one.sum / max(one.count, 1.0) for one in terms.values()]).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(one.sum.detach()) for name, one in terms.items()}, grads


@pytest.mark.parametrize(
    ("trained", "adapted", "names"),
    [
        (("transformer.blocks.0.latent", "flow.noisy"), False, ("flow_matching",)),
        (("transformer.loras.", "flow.clean"), True, ("next_token",)),
        (("transformer.loras.", "flow.clean", "flow.noisy"), True, ("next_token", "flow_matching")),
    ],
)
def test_losses_and_gradients_equal_whole_passes(
    trained: tuple[str, ...], adapted: bool, names: tuple[str, ...]
) -> None:
    model, batch = model_of(), batch_of(adapted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    cache = ContextCache(model, 1 << 20, has_rest=adapted)
    whole = run(model, model, batch, names)
    for _ in range(2):  # computed, then kept
        cached = run(cache, model, batch, names)
        assert cached[0] == pytest.approx(whole[0], rel=1e-12)
        assert cached[1].keys() == whole[1].keys()
        for name, grad in whole[1].items():
            torch.testing.assert_close(cached[1][name], grad, rtol=1e-9, atol=1e-12)
    assert cache.num_hits == 5 == cache.num_computed and cache._prefix is not None and len(cache._prefix[0]) == 6


def test_a_full_memory_computes_again_and_targets_before_a_reply_are_refused() -> None:
    model, batch = model_of(), batch_of(False)
    cache = ContextCache(model, 1)
    first, second = (cache.context(batch)[1] for _ in range(2))
    assert cache.num_bytes == 0 and cache.num_computed == 10
    assert all(torch.equal(a, b) for a, b in zip(first.keys, second.keys, strict=True))
    batch.target[0, 0] = 3
    with pytest.raises(ValueError, match="a target before its LoRA is invoked"):
        ContextCache(model, 1 << 20, has_rest=True).context(batch)
