"""The pooled context of a block: equal in training, after a cache, and to a loop over what each block sees."""

from __future__ import annotations

import pytest
import torch
from layouts import CHANNELS, VOCABULARY, random_batch, small_model

from omni.generation.contract import verify
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.sequence.mask import oracle


def pooling_model(weights: str = "shared") -> Omni:
    plain = small_model(dtype=torch.float64, latent_weights=weights)
    config = plain.config.model_copy(
        update={"flow": FlowHeadConfig(channels=CHANNELS, num_frequencies=4, pool_layers=(0, 1))}
    )
    model = Omni(config, Key(0)).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.flow is not None and model.flow.pool is not None
    with torch.no_grad():
        for name, parameter in model.flow.pool.named_parameters():
            parameter.copy_(Key(3).fold(name).normal(tuple(parameter.shape)) * 0.5)
    return model.eval()


@pytest.mark.parametrize("weights", ["shared", "refine"])
def test_the_contract_holds_and_the_pool_has_an_effect(weights: str) -> None:
    model, batch = pooling_model(weights), random_batch(Key(4), num_documents=4, copies=2, rows=2)
    for check in verify(model):
        assert check.holds, check
    assert model.flow is not None and model.flow.pool is not None
    with torch.no_grad():
        memory, t = model.double().context(batch)[1], torch.full((batch.num_items,), 0.5, dtype=torch.float64)
        x = batch.refine_latents.double()
        pooled = model.velocity(x, t, t, torch.ones_like(t), batch.refine, batch.item, memory)
        model.flow.pool.project.weight.zero_()
        other = model.velocity(x, t, t, torch.ones_like(t), batch.refine, batch.item, memory)
    assert (pooled - other).abs().max() > 1e-3


@torch.no_grad()
def test_packed_pool_is_the_mean_over_what_each_item_sees() -> None:
    model, batch = pooling_model(), random_batch(Key(4), num_documents=4, copies=2, rows=2)
    assert model.flow is not None and model.flow.pool is not None
    pool = model.flow.pool
    memory = model.double().context(batch)[1]
    found = pool(batch.refine, batch.item, memory, batch.num_items)
    seen = oracle(batch.refine.fields, memory.fields)
    S, values = batch.item.shape[1], [memory.values[n].transpose(1, 2).flatten(2) for n in pool.layers]
    for item, first in enumerate(batch.item_first.tolist()):
        row, at = divmod(first, S)
        mine = torch.cat([one[row, seen[row, at]] for one in values], -1)
        weight = pool.score(mine)[:, 0].exp()
        mean = (weight[:, None] * mine).sum(0) / weight.sum() if len(mine) else mine.new_zeros(mine.shape[1])
        mean = mean / (mean.square().mean() + 1e-6).sqrt()
        torch.testing.assert_close(found[item], pool.project(mean), rtol=1e-10, atol=1e-10)


def test_a_new_pool_changes_nothing_and_wrong_layers_are_refused() -> None:
    model = pooling_model()
    fresh = Omni(model.config, Key(1)).flow
    assert fresh is not None and fresh.pool is not None
    assert not any(bool(p.any()) for name, p in fresh.pool.named_parameters())
    transformer = TransformerConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="pool_layers names layer 2"):
        OmniConfig(transformer=transformer, flow=FlowHeadConfig(pool_layers=(2,)), vocab_size=VOCABULARY)
