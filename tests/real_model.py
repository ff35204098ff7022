"""A head on the toy transformer with distributions far from uniform, and checks of heads without placeholders."""

from __future__ import annotations

from typing import Any

import torch
from histories import call_behind, text
from torch import Tensor

from eval.experiments.joint.training import Budget, head_of, toy_call, toy_model, train, uniforms
from omni.heads.joint import JointConfig, JointHead
from omni.model import Omni
from omni.rng import Key

K, V = 3, 4


def check_behind_a_real_model(name: str, loss: str, options: dict[str, Any]) -> JointHead:
    """One pass after a cache; its distribution equals that of training; training changes only the head."""
    model = toy_model(JointConfig(head=name, length=K, options=options), V, Key(0), width=16, depth=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    prefix = torch.tensor([[1, 2], [3, 0]])

    def draw(key: Key, rows: int) -> tuple[Tensor, Tensor]:
        return torch.randint(0, V, (rows, 2), generator=key.generator()), torch.tensor([[1, 3, 0]]).expand(rows, K)

    losses = train(model, draw, Budget(0, 20, rows=16, rate=1e-2), Key(0))[loss]
    assert losses[-1] < losses[0]
    assert all(n.startswith("joint.") or torch.equal(p, before[n]) for n, p in model.named_parameters())
    head, model = head_of(model), model.eval()
    with torch.inference_mode():
        call, ids = toy_call(model, prefix, K), torch.tensor([[0, 1, 2], [3, 4, 1]])
        beside = head.log_prob(call, ids, Key(0)).value
        assert call.passes == 0
        behind = call_behind(
            model, [[text([V, a])] for a, _ in prefix.tolist()], [[text([b])] for _, b in prefix.tolist()]
        )
        draft = head.sample(behind, uniforms(2, K, Key(1)), Key(0))
        assert behind.passes == 1 and draft.ids.shape == (2, K)
        assert (head.log_prob(behind, ids, Key(0)).value - beside).abs().max() < 1e-4
    return head


def alive_model(name: str, length: int, vocab_size: int, token_scale: float, scale: float, **options: Any) -> Omni:
    """Width 16, float64, distributions far from uniform: weights that start at zero get deviation `scale`."""
    config = JointConfig(head=name, length=length, adapter_rank=2, options=options)
    model = toy_model(config, vocab_size, Key(0), width=16, depth=1).double().eval()
    with torch.no_grad():
        model.token.embedding.weight.mul_(token_scale)
        for part, parameter in model.named_parameters():
            if ".up." in part or "decoder" in part or "placeholder" in part:
                parameter.copy_(Key(0).fold("alive", part).normal(tuple(parameter.shape), torch.float64) * scale)
    return model
