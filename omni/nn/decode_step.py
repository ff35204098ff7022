"""The decoding step: a few text tokens per batch row against the cache. Same arithmetic as Transformer.extend and
Transformer.draft.

For one token, the cost is reading weights and launching operations. So a single batch row uses matrix-vector products,
residual sums are fused into them, and q and k are normalised and rotated together. The norm is written out: torch's
composite rms_norm takes three times as long at this size. The step serves batch rows of equal length; others use
`extend`. The contract check (omni.generation.contract) compares both. `native_step.CompiledStep` is the one-token step
in native code.

Legend: R batch rows, n tokens of each, W width, H query heads, G key heads, D head width, V vocabulary, K positions of
the cache, used or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.nn.cache import KVCache
from omni.nn.layer import Activation, Layer, RMSNorm, activation, run_layer
from omni.nn.lora import Gated
from omni.nn.transformer import Transformer
from omni.sequence.positions import rotary_table


class TokenStep:
    """`step(h, cache)` appends one position to every batch row: h (R, W) -> normalised hidden states (R, W).
    `read(hidden)` returns the logits (R, V) before any cap, with `output_weight` (V, W) if given."""

    def __init__(self, transformer: Transformer, output_weight: Tensor | None = None) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        self.output_weight = output_weight
        self.layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        projections = [m for layer in self.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        self.has_bias = any(m.bias is not None for m in projections)
        self.table: tuple[Tensor, Tensor] | None = None

    def supports(self, cache: KVCache) -> bool:
        return cache.uniform

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        return self._finish(self._append(h, cache, 1))

    def append(self, h: Tensor, cache: KVCache) -> Tensor:
        """`step` for n tokens of every batch row: (R, n, W) -> (R, n, W)."""
        return self._finish(self._append(h.flatten(0, 1), cache, h.shape[1])).view(h.shape)

    def draft(
        self, tokens: Tensor, placeholders: Tensor, cache: KVCache, adapters: Sequence[Gated], causal: bool
    ) -> Tensor:
        """Append tokens (R, c, W), c >= 1. In the same pass, placeholders (R, p, W) after them attend to them, in the
        last layers only, one layer for each of `adapters` (ungated); placeholders are not cached. Returns (R, c + p,
        W)."""
        clean, num = tokens.shape[1], tokens.shape[1] + placeholders.shape[1]
        cache.reserve(num)
        at, first = self.enter(cache, clean), self.c.depth - len(adapters)
        cos, sin = self._rotary(cache.next_position, num, tokens)
        h, bias = tokens.flatten(0, 1), _staircase(clean, clean, at, True, tokens)
        operations = StepOperations(cos[:, :clean], sin[:, :clean], self.has_bias)
        for index in range(first):
            h = self._layer(index, h, operations, cache, at, bias)
        h = torch.cat([h.view(tokens.shape), placeholders.to(h.dtype)], 1).flatten(0, 1)
        bias = _staircase(num, clean, at, causal, tokens)
        operations = StepOperations(cos, sin, self.has_bias)
        for index, adapter in enumerate(adapters, first):
            h = self._layer(index, h, operations, cache, at, bias, (adapter, clean))
        self.leave(cache, clean)
        return self._finish(h).view(-1, num, tokens.shape[2])

    def read(self, hidden: Tensor) -> Tensor:
        assert self.output_weight is not None
        return product(self.output_weight, hidden)

    def enter(self, cache: KVCache, num: int = 1) -> int:
        """Set the fields of `num` new positions per batch row; returns their first slot."""
        cache.reserve(num)
        at = cache.lengths[0]
        for r in range(cache.rows):
            for k in range(num):
                cache.block[r, at + k] = cache.next_block[r] + k
        cache.document[:, at : at + num] = 0
        return at

    def leave(self, cache: KVCache, num: int = 1) -> None:
        cache.advance([num] * cache.rows)
        for r in range(cache.rows):
            cache.next_block[r] += num
            cache.next_position[r] += num

    def _append(self, h: Tensor, cache: KVCache, num: int) -> Tensor:
        at = self.enter(cache, num)
        cos, sin = self._rotary(cache.next_position, num, h)
        bias = _staircase(num, num, at, True, h)
        operations = StepOperations(cos, sin, self.has_bias)
        for index in range(self.c.depth):
            h = self._layer(index, h, operations, cache, at, bias)
        self.leave(cache, num)
        return h

    def _layer(
        self, index: int, h: Tensor, operations: StepOperations, cache: KVCache, at: int, bias: Tensor | None,
        adapter: tuple[Gated, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """One layer on h (R n, W): writes slots `at` to `at + n`, attends to the used slots."""
        keys, values, n, c = cache.k[index], cache.v[index], operations.num, self.c
        H = c.num_heads

        def attention(qk: Tensor, v: Tensor) -> Tensor:
            keys[:, :, at : at + n] = qk[:, :, H:].transpose(1, 2)
            values[:, :, at : at + n] = v.transpose(1, 2)
            past = keys[:, :, : at + n], values[:, :, : at + n]
            q = qk[:, :, :H].transpose(1, 2)
            return F.scaled_dot_product_attention(q, *past, attn_mask=bias, enable_gqa=c.num_kv_heads != H)

        return run_layer(operations.of(self.layers[index], adapter), c, h, attention)

    def _finish(self, h: Tensor) -> Tensor:
        return _rms_norm(h, self.norm)

    def rotary_row(self, position: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each (D,): rotation is x cos + roll(x, D/2) sin."""
        if self.table is None or self.table[0].shape[0] <= position:
            size = 1 << max(8, position.bit_length())
            every = torch.arange(size, device=like.device)[None, :, None].expand(1, size, 3)
            cos, sin = rotary_table(every, self.c.head_dim, self.c.rope_base, like.dtype, self.c.rotary)
            sign = torch.ones(self.c.head_dim, device=like.device, dtype=like.dtype)
            sign[: self.c.head_dim // 2] = -1
            self.table = (cos[0, 0], sin[0, 0] * sign)
        return self.table[0][position], self.table[1][position]

    def _rotary(self, positions: list[int], num: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`rotary_row` for `num` positions of every batch row, each (R, n, 1, D)."""
        self.rotary_row(max(positions) + num - 1, like)  # extends the table
        assert self.table is not None
        cos, sin = (torch.stack([part[first : first + num] for first in positions]).unsqueeze(2) for part in self.table)
        return cos, sin


def _staircase(num: int, clean: int, at: int, causal: bool, like: Tensor) -> Tensor | None:
    """(n, at + n): 0 where a new position sees a slot, else -inf; None for a single position, which sees all. The first
    `clean` positions are causal; the others are causal, or see one another."""
    if num == 1:
        return None
    seen = torch.ones(num, at + num, dtype=torch.bool, device=like.device).tril(at)
    if not causal:
        seen[clean:] = True
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)


class StepOperations:
    """nn.layer's operations on tokens (R n, W), fused where that is faster: queries and keys are one tensor, and the
    last projection of attention and of the MLP is added to its residual in one operation. `adapter`: an adapter, and
    how many clean tokens of each batch row it skips."""

    def __init__(self, cos: Tensor, sin: Tensor, has_bias: bool) -> None:
        self.cos, self.sin, self.num, self.has_bias = cos, sin, cos.shape[1], has_bias

    def of(self, weights: Layer, adapter: tuple[Gated, int] | None) -> StepOperations:
        """The same for another layer."""
        self.weights, self.adapter = weights, adapter
        self.is_plain = adapter is None and not self.has_bias
        return self

    def routed(self, function: Callable, x: Tensor) -> Any:
        return function(self.weights, x)

    def norm(self, norm: RMSNorm, x: Tensor | Pending) -> Tensor:
        x = x.alone() if isinstance(x, Pending) else x
        return _rms_norm(x, norm)

    def project(self, w: Layer, part: str, x: Tensor) -> Tensor:
        module = getattr(w, part)
        y = product(module.weight, x)
        return y if self.is_plain else self.adapted(module, part, x, y)

    def output(self, w: Layer, part: str, x: Tensor) -> Pending:
        return Pending(getattr(w, part), part, x, self)

    def adapted(self, module: nn.Linear, part: str, x: Tensor, y: Tensor) -> Tensor:
        """The projection y of x with its bias, and at placeholders with what the adapter adds."""
        if module.bias is not None:
            y = y + module.bias
        if self.adapter is not None:
            (gated, clean), n = self.adapter, self.num
            y.view(-1, n, y.shape[1])[:, clean:] += gated(part, x.view(-1, n, x.shape[1])[:, clean:])
        return y

    def heads(self, w: Layer, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(queries and keys (R, n, H + G, D), values (R, n, G, D))."""
        c = w.c
        H, G = c.num_heads, c.num_kv_heads
        qkv = qkv.view(-1, self.num, H + 2 * G, c.head_dim)
        qk = qkv[:, :, : H + G]
        if c.qk_norm == "head":
            qk = _normalised(qk, c.norm_eps)
            qk[:, :, :H] *= w.q_norm.scale(qk.dtype)
            qk[:, :, H:] *= w.k_norm.scale(qk.dtype)
        return qk, qkv[:, :, H + G :]

    def arrange(self, queries_keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        turned = queries_keys.roll(queries_keys.shape[-1] // 2, -1)
        return torch.addcmul(queries_keys * self.cos, turned, self.sin), values

    def merge(self, x: Tensor) -> Tensor:
        """(R, H, n, D) -> (R n, H D)."""
        return x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])

    def gated(self, name: Activation, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if name == "silu" else activation(name, gate)) * up

    def add(self, h: Tensor, y: Tensor | Pending, gate: None, scale: float) -> Tensor:
        if isinstance(y, Pending):
            if scale == 1:
                return y.onto(h)
            y = y.alone()
        return h + (y if scale == 1 else y * scale)


class Pending(NamedTuple):
    """A projection of x (R n, in) that is not computed yet."""

    module: nn.Linear
    part: str
    x: Tensor
    operations: StepOperations

    def alone(self) -> Tensor:
        return self._adapted(product(self.module.weight, self.x))

    def onto(self, h: Tensor) -> Tensor:
        """The projection plus h, in one operation."""
        return self._adapted(product(self.module.weight, self.x, h))

    def _adapted(self, y: Tensor) -> Tensor:
        o = self.operations
        return y if o.is_plain else o.adapted(self.module, self.part, self.x, y)


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return _normalised(x, norm.eps) * norm.scale(x.dtype)


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), the mean in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def product(weight: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (R, in) times the transpose of weight (out, in), plus the residual (R, out). One batch row: a matrix-vector
    product."""
    if x.shape[0] > 1:
        y = F.linear(x, weight)
        return y if residual is None else y + residual
    if residual is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.addmv(residual[0], weight, x[0]).unsqueeze(0)
