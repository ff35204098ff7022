"""A few text tokens per row against the cache: the hot path of decoding, the same arithmetic as Transformer.extend and
Transformer.draft.

At one token the cost is reading the weights and launching operations. So a single row uses matrix-vector products,
residual sums ride on them, q and k are normed and rotated together, and the norm is written out (torch's composite
rms_norm takes three times as long at this size). It serves rows of equal length; others go through `extend`. The
contract (omni.generation.contract) compares both. `native_step.CompiledStep` is the step of one token as native code.

Legend: R rows, n tokens of each, W width, H query heads, G key heads, D head width, V vocabulary, K positions of the
cache, used or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.lora import Gated
from omni.nn.transformer import Layer, RMSNorm, Transformer, TransformerConfig
from omni.sequence.positions import rotary_table


class TokenStep:
    """`step(h, cache)` appends one position to every row: h (R, W) -> normalised hidden states (R, W);
    `read(hidden)` gives the logits (R, V), before any cap, by `output_weight` (V, W), where there is one."""

    def __init__(self, transformer: Transformer, output_weight: Tensor | None = None) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        self.output_weight = output_weight
        self.layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        self.table: tuple[Tensor, Tensor] | None = None

    def serves(self, cache: KVCache) -> bool:
        return cache.uniform

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        return self._finish(self._append(h, cache, 1))

    def append(self, h: Tensor, cache: KVCache) -> Tensor:
        """The same for n tokens of every row: (R, n, W) -> (R, n, W)."""
        return self._finish(self._append(h.flatten(0, 1), cache, h.shape[1])).view(h.shape)

    def draft(
        self, tokens: Tensor, placeholders: Tensor, cache: KVCache, adapters: Sequence[Gated], causal: bool
    ) -> Tensor:
        """Append tokens (R, c, W), c at least 1; placeholders (R, p, W) behind them read them in the same pass, through
        the last layers alone, one for each of `adapters` (without a gate), and are not kept. (R, c + p, W)."""
        clean, num = tokens.shape[1], tokens.shape[1] + placeholders.shape[1]
        cache.reserve(num)
        at, first = self.enter(cache, clean), self.c.depth - len(adapters)
        cos, sin = self._rotary(cache.next_position, num, tokens)
        h, bias = tokens.flatten(0, 1), _staircase(clean, clean, at, True, tokens)
        for index in range(first):
            h = self._layer(index, h, cos[:, :clean], sin[:, :clean], cache, at, bias)
        h = torch.cat([h.view(tokens.shape), placeholders.to(h.dtype)], 1).flatten(0, 1)
        bias = _staircase(num, clean, at, causal, tokens)
        for index, adapter in enumerate(adapters, first):
            h = self._layer(index, h, cos, sin, cache, at, bias, (adapter, clean))
        self.leave(cache, clean)
        return self._finish(h).view(-1, num, tokens.shape[2])

    def read(self, hidden: Tensor) -> Tensor:
        assert self.output_weight is not None
        return product(self.output_weight, hidden)

    def enter(self, cache: KVCache, num: int = 1) -> int:
        """Announce `num` positions per row; returns the first slot that they take."""
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
        for index in range(self.c.depth):
            h = self._layer(index, h, cos, sin, cache, at, bias)
        self.leave(cache, num)
        return h

    def _layer(
        self, index: int, h: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, at: int, bias: Tensor | None,
        adapter: tuple[Gated, int] | None = None,
    ) -> Tensor:  # fmt: skip
        return _layer(h, cos, sin, cache.k[index], cache.v[index], at, self.layers[index], self.c, bias, adapter)

    def _finish(self, h: Tensor) -> Tensor:
        return _rms_norm(h, self.norm)

    def rotary_row(self, position: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each (D,): with the sign, rotating is x cos + roll(x, D/2) sin."""
        if self.table is None or self.table[0].shape[0] <= position:
            size = 1 << max(8, position.bit_length())
            every = torch.arange(size, device=like.device)[None, :, None].expand(1, size, 3)
            cos, sin = rotary_table(every, self.c.head_dim, self.c.rope_base, like.dtype)
            sign = torch.ones(self.c.head_dim, device=like.device, dtype=like.dtype)
            sign[: self.c.head_dim // 2] = -1
            self.table = (cos[0, 0], sin[0, 0] * sign)
        return self.table[0][position], self.table[1][position]

    def _rotary(self, positions: list[int], num: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """`rotary_row` of `num` positions of every row, each (R, n, 1, D)."""
        self.rotary_row(max(positions) + num - 1, like)  # the table must be long enough for all of them
        assert self.table is not None
        cos, sin = (torch.stack([part[first : first + num] for first in positions]).unsqueeze(2) for part in self.table)
        return cos, sin


def _staircase(num: int, clean: int, at: int, causal: bool, like: Tensor) -> Tensor | None:
    """(n, at + n): 0 where a new position sees a slot, -inf where not; None where a single one sees all. The first
    `clean` positions are causal; the others are too, or see one another."""
    if num == 1:
        return None
    seen = torch.ones(num, at + num, dtype=torch.bool, device=like.device).tril(at)
    if not causal:
        seen[clean:] = True
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)


def _layer(
    h: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int, w: Layer, c: TransformerConfig,
    bias: Tensor | None, adapter: tuple[Gated, int] | None,
) -> Tensor:  # fmt: skip
    """One layer, operation by operation: h (R n, W); writes slots `at` to `at + n`, reads the slots in use. `adapter`
    adds to what comes behind so many clean tokens of each row."""
    H, G, D, n = c.num_heads, c.num_kv_heads, c.head_dim, cos.shape[1]
    x = _rms_norm(h, w.attention_norm)
    qkv = _added(product(w.qkv.weight, x), "qkv", x, n, adapter).view(-1, n, H + 2 * G, D)
    qk = qkv[:, :, : H + G]
    qk = _normalised(qk, c.norm_eps)
    qk[:, :, :H] *= w.q_norm.weight
    qk[:, :, H:] *= w.k_norm.weight
    qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
    keys[:, :, at : at + n] = qk[:, :, H:].transpose(1, 2)
    values[:, :, at : at + n] = qkv[:, :, H + G :].transpose(1, 2)
    past = keys[:, :, : at + n], values[:, :, : at + n]
    o = F.scaled_dot_product_attention(qk[:, :, :H].transpose(1, 2), *past, attn_mask=bias, enable_gqa=H != G)
    o = o.transpose(1, 2).reshape(-1, H * D)
    h = _added(product(w.out.weight, o, h), "out", o, n, adapter)
    x = _rms_norm(h, w.mlp_norm)
    gate, up = _added(product(w.gate_up.weight, x), "gate_up", x, n, adapter).chunk(2, -1)
    y = F.silu(gate) * up
    return _added(product(w.down.weight, y, h), "down", y, n, adapter)


def _added(y: Tensor, part: str, x: Tensor, n: int, adapter: tuple[Gated, int] | None) -> Tensor:
    """y (R n, out), to whose placeholders the adapter has added what it makes of theirs in x (R n, in)."""
    if adapter is not None:
        gated, clean = adapter
        y.view(-1, n, y.shape[1])[:, clean:] += gated(part, x.view(-1, n, x.shape[1])[:, clean:])
    return y


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return _normalised(x, norm.eps) * norm.weight


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), the mean in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def product(weight: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (R, in) times weight (out, in) transposed, plus the residual (R, out): a matrix-vector product for one row."""
    if x.shape[0] > 1:
        y = F.linear(x, weight)
        return y if residual is None else y + residual
    if residual is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.addmv(residual[0], weight, x[0]).unsqueeze(0)
