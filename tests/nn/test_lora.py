"""LoRA of the text weights: off, it changes no bit; on, it is the dense sum; one request has it, its neighbour not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from histories import read, text
from layouts import random_batch, small_model
from torch import Tensor

from omni.losses import BatchFlowCall
from omni.model import Omni
from omni.nn.cache import History
from omni.nn.lora import LoraSpec, rows_of
from omni.rng import Key

SPECS = (
    LoraSpec(name="chat", rank=3, alpha=5.0),
    LoraSpec(name="few", rank=2, rank_stabilised=True, targets=("v_proj", "gate_up_proj"), layers=(1,)),
)


def model_of(**settings: object) -> Omni:
    """A float64 model with two adapters that are not at their zero start."""
    model = small_model(dtype=torch.float64, loras=SPECS, **settings)
    with torch.no_grad():
        for name, parameter in model.transformer.loras.named_parameters():
            parameter.copy_(Key(5).fold(name).normal(tuple(parameter.shape)) * 0.3)
    return model


def logits_of(model: Omni, ids: list[int], lora: str | None) -> Tensor:
    """Of every position, one id at a time after a history."""
    history = History(model.transformer.new_pool(), lora)
    return torch.cat([model.token.read(read(model, [history], [[text([n])]])[0]) for n in ids])


@torch.no_grad()
def dense(model: Omni, name: str) -> Omni:
    """The model with the change B A of every target added to a copy of its weights, from the definition."""
    other = model_of()
    other.load_state_dict(model.state_dict())
    lora, rows = model.transformer.lora(name), rows_of(model.config.transformer)
    for index, targets in lora.layers.items():
        for target, pair in targets.items():  # type: ignore[operator]
            part, first, last = rows[target]
            change = lora.spec.factor * pair.up.weight @ pair.down.weight
            getattr(other.transformer.blocks[int(index)].text, part).weight[first:last] += change
    return other


@torch.no_grad()
@pytest.mark.parametrize("name", ["chat", "few"])
def test_an_adapter_is_the_dense_sum_and_merges(name: str) -> None:
    model, ids = model_of(), [3, 1, 4, 1, 5]
    off, on = logits_of(model, ids, None), logits_of(model, ids, name)
    assert (on - off).abs().max() > 1e-3
    torch.testing.assert_close(on, logits_of(dense(model, name), ids, None), rtol=1e-12, atol=1e-12)
    model.transformer.lora(name).merge_into(model.transformer.blocks)
    torch.testing.assert_close(logits_of(model, ids, None), on, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_off_changes_no_bit_and_requests_share_a_pass() -> None:
    model, plain = model_of(), small_model(dtype=torch.float64)
    pool = model.transformer.new_pool()
    histories = [History(pool, lora) for lora in (None, "chat", "few")]
    prompts = [[text([7, 8, 9])], [text([7, 8, 9])], [text([7, 8])]]
    together = read(model, histories, prompts)
    alone = [read(model, [History(model.transformer.new_pool(), h.lora)], [p])[0]
             for h, p in zip(histories, prompts, strict=True)]  # fmt: skip
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(logits_of(model, [7, 8, 9], None), logits_of(plain, [7, 8, 9], None))
    assert (together[0] - together[1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("weights", ["shared", "separate", "refine"])
def test_training_uses_the_active_adapter_with_its_tangent(weights: str) -> None:
    """A packed batch equals that of the dense sum; with shared weights the refine stream uses the adapter too."""
    model, batch = model_of(latent_weights=weights), random_batch(Key(4), num_documents=2, copies=2, rows=1)
    batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
    merged = model_of(latent_weights=weights)
    merged.transformer.lora("chat").merge_into(merged.transformer.blocks)
    model.transformer.active_lora = "chat"
    for one, other in zip(_outputs(model, batch), _outputs(merged, batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def _outputs(model: Omni, batch: object) -> list[Tensor]:
    hidden, memory = model.context(batch)  # type: ignore[arg-type]
    t = torch.linspace(0.2, 0.9, batch.num_items, dtype=torch.float64)  # type: ignore[attr-defined]
    call, x = BatchFlowCall(model, batch, memory, torch.ones_like(t)), batch.refine_latents  # type: ignore
    rate = call.derivative(x, t, 0.5 * t, torch.ones_like(x), torch.ones_like(t), 0.5 * torch.ones_like(t))
    return [hidden, call(x, t, 0.5 * t), rate]


def test_gradients_reach_the_adapter_alone() -> None:
    model = model_of().train()
    model.requires_grad_(False)
    model.transformer.loras["chat"].requires_grad_(True)
    model.transformer.active_lora = "chat"
    batch = random_batch(Key(4), num_documents=2, rows=1)
    model.context(replace(batch, latents=batch.latents.double()))[0].pow(2).sum().backward()
    grads = {name: p.grad for name, p in model.transformer.loras["chat"].named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values()), grads


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="has no LoRA 'other'; it has \\['chat', 'few'\\]"):
        model_of().transformer.lora("other")
    with pytest.raises(ValueError, match="two LoRAs are called 'chat'"):
        small_model(loras=(SPECS[0], SPECS[0]))
    with pytest.raises(ValueError, match="gate_up_proj and \\['gate_proj'\\], which is in it"):
        LoraSpec(name="x", targets=("gate_proj", "gate_up_proj"))
    with pytest.raises(ValueError, match="LoRA 'x' names layer 5 of a transformer of 2 layers"):
        small_model(loras=(LoraSpec(name="x", layers=(5,)),))
