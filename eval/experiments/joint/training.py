"""A tiny Omni on blocks of tokens with a known joint: train the backbone first, then the joint-token head on it.

A batch row is [BOS, x_1 .. x_K], or [BOS, prefix.., x_1 .. x_K] where a prefix selects the joint; the block starts at
the last position before x_1. The backbone is frozen while the head trains, so the noise intervals of the data (see
heads.joint.push_forward) are constant.

Legend: B rows, P positions before the block, K tokens of a block, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.heads import FlowHeadConfig
from omni.heads.joint import JointConfig, JointHead, LossInputs
from omni.heads.joint.training import BatchCall, teacher_log_probs
from omni.model import Omni, OmniConfig
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.sequence.layout import IGNORE, Batch, Stream
from omni.sequence.placeholders import Blocks, Starts
from train.optim.optimiser import Optimiser
from train.optim.schedule import fall, rise

WARMUP_STEPS = 100

Draw = Callable[[Key, int], tuple[Tensor, Tensor]]  # (prefix (B, P - 1), block (B, K)) int64 of a number of rows
Teacher = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budget:
    """Steps of the backbone, then of the head; batch rows; AdamW's peak rate (warm-up, cosine to zero)."""

    backbone_steps: int = 2000
    head_steps: int = 3000
    rows: int = 256
    rate: float = 2e-3


def toy_model(joint: JointConfig | None, vocab_size: int, key: Key, width: int = 64, depth: int = 2) -> Omni:
    """About 0.1 M parameters. BOS is the id after the vocabulary."""
    transformer = TransformerConfig(width=width, depth=depth, num_heads=4, num_kv_heads=4, head_dim=width // 4)
    flow = FlowHeadConfig(channels=1, num_frequencies=2)
    return Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=vocab_size + 1, joint=joint), key)


def beside(backbone: Omni, joint: JointConfig, key: Key) -> Omni:
    """A new model with the backbone's weights and a joint-token head initialised by `key`."""
    model = Omni(backbone.config.model_copy(update={"joint": joint}), key)
    left = model.load_state_dict(backbone.state_dict(), strict=False)
    assert all(name.startswith("joint.") for name in left.missing_keys), left
    return model


def toy_batch(prefix: Tensor, block: Tensor, bos: int) -> tuple[Batch, Starts, Blocks]:
    """One document a row; the block is supervised, the prefix is not."""
    B, K = block.shape
    first = torch.full((B, 1), bos, dtype=torch.int64)
    ids = torch.cat([first, prefix, block], 1)
    T, P = ids.shape[1], 1 + prefix.shape[1]
    target = torch.full_like(ids, IGNORE)
    target[:, P - 1 : -1] = block
    zeros, at = torch.zeros_like(ids), torch.arange(T).expand(B, T)
    context = Stream(zeros, at, zeros, at.unsqueeze(-1).expand(B, T, 3))
    none = torch.zeros(B, 0, dtype=torch.int64)
    refine = Stream(none, none, none, torch.zeros(B, 0, 3, dtype=torch.int64))
    batch = Batch(
        ids, torch.zeros(B, T, 1), zeros.bool(), target, context, torch.zeros(B, 0, 1), refine, none,
        torch.zeros(0, dtype=torch.int64), documents=tuple(range(B)), num_context=B * T,
    )  # fmt: skip
    row, last = torch.arange(B), torch.full((B,), P - 1)
    starts = Starts(row, last, torch.zeros_like(row), last + 1, last + 1, 1)
    names = tuple((n, P - 1, 0) for n in range(B))
    return batch, starts, Blocks(block, torch.ones_like(block, dtype=torch.bool), names)


def toy_call(model: Omni, prefix: Tensor, num_tokens: int) -> BatchCall:
    """The backbone after given prefixes (B, P - 1), to sample or score blocks with."""
    filler = torch.zeros(len(prefix), num_tokens, dtype=torch.int64)
    batch, starts, _ = toy_batch(prefix, filler, model.config.vocab_size - 1)
    return BatchCall(model, starts, *model.context(batch))


def train(model: Omni, draw: Draw, budget: Budget, key: Key, teacher: Teacher | None = None) -> dict[str, list[float]]:
    """Both stages. Returns the losses of every step, by name. Depends on the key alone. teacher: (prefix, block) ->
    (B, K, V) log-probabilities that define the noise intervals; None is the model's own autoregression."""
    joint = [p for name, p in model.named_parameters() if name.startswith("joint.")]
    rest = [p for name, p in model.named_parameters() if not name.startswith(("joint.", "flow."))]
    losses = optimise(rest, budget.backbone_steps, budget, _backbone_loss(model, draw, budget, key.fold("backbone")))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in joint:
        parameter.requires_grad_(True)
    if joint:
        loss = _head_loss(model, draw, budget, key.fold("head"), teacher)
        losses |= optimise(joint, budget.head_steps, budget, loss)
    return losses


Loss = Callable[[int, float], dict[str, Tensor]]


def _backbone_loss(model: Omni, draw: Draw, budget: Budget, key: Key) -> Loss:
    """Next-token loss of keyed blocks, by step."""

    def loss(step: int, progress: float) -> dict[str, Tensor]:
        batch, _, _ = toy_batch(*draw(key.fold(step), budget.rows), model.config.vocab_size - 1)
        hidden, _ = model.context(batch)
        where = batch.target != IGNORE
        return {"next_token": torch.nn.functional.cross_entropy(model.token.read(hidden[where]), batch.target[where])}

    return loss


def _head_loss(model: Omni, draw: Draw, budget: Budget, key: Key, teacher: Teacher | None) -> Loss:
    """The head's own loss on keyed blocks, by step."""
    head = head_of(model)

    def loss(step: int, progress: float) -> dict[str, Tensor]:
        prefix, block = draw(key.fold(step), budget.rows)
        batch, starts, blocks = toy_batch(prefix, block, model.config.vocab_size - 1)
        hidden, memory = model.context(batch)
        log_probs = torch.zeros(0)
        if head.needs_teacher:
            log_probs = teacher(prefix, block) if teacher else teacher_log_probs(model, hidden, starts, blocks)
        call = BatchCall(model, starts, hidden, memory)
        terms = head.loss(call, LossInputs(blocks, log_probs, key.fold("noise", step), progress))
        return {name: term.weight * term.sum / max(term.count, 1.0) for name, term in terms.items()}

    return loss


def optimise(parameters: list[Tensor], steps: int, budget: Budget, loss: Loss) -> dict[str, list[float]]:
    """Run `steps` steps on the sum of the losses that `loss` (of step and progress) returns by name. Returns them."""
    losses: dict[str, list[float]] = {}
    adamw = torch.optim.AdamW(parameters, lr=budget.rate, betas=(0.9, 0.99), weight_decay=0.0)
    optimiser = Optimiser({"adamw": adamw})
    for step in range(steps):
        found = loss(step, step / steps)
        torch.stack(list(found.values())).sum().backward()
        optimiser.clip()
        optimiser.step(rise(step, WARMUP_STEPS) * fall(step / steps, "cosine"))
        optimiser.zero_grad()
        for name, value in found.items():
            losses.setdefault(name, []).append(float(value.detach()))
    return losses


def head_of(model: Omni) -> JointHead:
    """The joint-token head of a model that has one."""
    assert model.joint is not None
    return model.joint.head


def uniforms(num: int, length: int, key: Key) -> Tensor:
    """(num, length) float64: the noise of the tokens."""
    return key.fold("uniforms").uniform((num, length), torch.float64)
