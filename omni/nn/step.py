"""One text token per row against the cache: the hot path of decoding, the same arithmetic as Transformer.extend.

At one token the cost is reading the weights and launching operations. So a single row uses matrix-vector products,
residual sums ride on them, q and k are normed and rotated together, and the norm is written out (torch's composite
rms_norm takes three times as long at this size). It serves rows of equal length; others go through `extend`. The
contract (omni.verify) compares both. `compiled_step.CompiledStep` is the same step as native code.

Legend: R rows, W width, H query heads, G key heads, D head width, V vocabulary, K positions of the cache, used or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.transformer import Layer, RMSNorm, Transformer, TransformerConfig
from omni.positions import rotary_table


class TokenStep:
    """`step(h, cache)` appends one position to every row: h (R, W) -> normalised hidden states (R, W);
    `read(hidden)` gives the logits (R, V) by `output_weight` (V, W), where there is one."""

    def __init__(self, transformer: Transformer, output_weight: Tensor | None = None) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        self.output_weight = output_weight
        self.layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        self.table: tuple[Tensor, Tensor] | None = None

    def serves(self, cache: KVCache) -> bool:
        return cache.uniform

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        at = self.enter(cache)
        cos, sin = self._rotary(cache.next_position, h)
        for index, w in enumerate(self.layers):
            h = _layer(h, cos, sin, cache.k[index], cache.v[index], at, w, self.c)
        self.leave(cache)
        return _rms_norm(h, self.norm)

    def read(self, hidden: Tensor) -> Tensor:
        assert self.output_weight is not None
        return product(self.output_weight, hidden)

    def enter(self, cache: KVCache) -> int:
        """Announce one position per row; returns the slot that it takes."""
        cache.reserve(1)
        at = cache.lengths[0]
        for r in range(cache.rows):
            cache.block[r, at] = cache.next_block[r]
        cache.document[:, at] = 0
        return at

    def leave(self, cache: KVCache) -> None:
        cache.advance([1] * cache.rows)
        for r in range(cache.rows):
            cache.next_block[r] += 1
            cache.next_position[r] += 1

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

    def _rotary(self, positions: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """`rotary_row` of every row, each (R, 1, D)."""
        self.rotary_row(max(positions), like)  # the table must be long enough for all of them
        rows = [self.rotary_row(position, like) for position in positions]
        cos, sin = (torch.stack(part).unsqueeze(1) for part in zip(*rows, strict=True))
        return cos, sin


def _layer(
    h: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int, w: Layer, c: TransformerConfig
) -> Tensor:
    """One layer, operation by operation: writes slot `at`, reads the slots in use."""
    H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
    qkv = product(w.qkv.weight, _rms_norm(h, w.attention_norm)).view(-1, H + 2 * G, D)
    qk = qkv[:, : H + G]
    qk = _normalised(qk, c.norm_eps)
    qk[:, :H] *= w.q_norm.weight
    qk[:, H:] *= w.k_norm.weight
    qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
    keys[:, :, at] = qk[:, H:]
    values[:, :, at] = qkv[:, H + G :]
    past = keys[:, :, : at + 1], values[:, :, : at + 1]
    o = F.scaled_dot_product_attention(qk[:, :H].unsqueeze(2), *past, enable_gqa=H != G)
    h = product(w.out.weight, o.reshape(-1, H * D), h)
    gate, up = product(w.gate_up.weight, _rms_norm(h, w.mlp_norm)).chunk(2, -1)
    return product(w.down.weight, F.silu(gate) * up, h)


def _rms_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    return _normalised(x, norm.eps) * norm.weight


def _normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), the mean in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def product(weight: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (R, in) times weight (out, in) transposed, plus the residual (R, out): a matrix-vector product for one row."""
    if x.shape[0] > 1:
        y = F.linear(x, weight)
        return y if residual is None else y + residual
    if residual is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.addmv(residual[0], weight, x[0]).unsqueeze(0)
