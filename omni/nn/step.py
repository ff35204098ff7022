"""One text token per row against the cache: the hot path of decoding, the same arithmetic as Transformer.extend.

At one token the cost is reading the weights and launching operations. So a single row uses matrix-vector products,
residual sums ride on them, and q and k are normed and rotated together. With `compiled` one compiled function serves
all layers: a third of the time on a small model, after half a minute of compiling (and again whenever the cache has
doubled); it needs a C++ compiler. It serves rows of equal length on shared weights; other cases go through `extend`.
The contract (omni.verify) compares both.

Legend: R rows, W width, H query heads, G key heads, D head width, K positions of the cache, used or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.transformer import Layer, Transformer, TransformerConfig
from omni.positions import rotary_table


class TokenStep:
    """`step(h, cache)` appends one position to every row: h (R, W) -> normalised hidden states (R, W)."""

    def __init__(self, transformer: Transformer, compiled: bool = False) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        self.layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        self.table: tuple[Tensor, Tensor] | None = None
        self.compiled: Callable[..., Tensor] | None = torch.compile(_whole_cache, dynamic=False) if compiled else None

    def serves(self, cache: KVCache) -> bool:
        return cache.uniform and self.c.latent_weights == "shared"

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        cache.reserve(1)
        at = cache.lengths[0]
        for r in range(h.shape[0]):
            cache.block[r, at] = cache.next_block[r]
        cache.document[:, at] = 0
        cos, sin = self._rotary(cache.next_position, h)
        if self.compiled is None:
            for index, w in enumerate(self.layers):
                h = _used_cache(h, cos, sin, cache.k[index], cache.v[index], at, w, self.c)
        else:
            where = torch.arange(cache.capacity, device=h.device)
            bias = torch.zeros(cache.capacity, device=h.device, dtype=h.dtype).masked_fill_(where > at, -math.inf)
            slot = torch.tensor([at], device=h.device)
            for index, w in enumerate(self.layers):
                weights = (w.qkv.weight, w.q_norm.weight, w.k_norm.weight, w.out.weight, w.gate_up.weight)
                norms = (w.down.weight, w.attention_norm.weight, w.mlp_norm.weight)
                h = self.compiled(h, cos, sin, cache.k[index], cache.v[index], slot, bias, weights + norms, self.c)
        cache.advance([1] * h.shape[0])
        for r in range(h.shape[0]):
            cache.next_block[r] += 1
            cache.next_position[r] += 1
        return self.norm(h)

    def _rotary(self, positions: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, signed sin), each (R, 1, D): with the sign, rotating is x cos + roll(x, D/2) sin."""
        if self.table is None or self.table[0].shape[0] <= max(positions):
            size = 1 << max(8, max(positions).bit_length())
            position = torch.arange(size, device=like.device)[None, :, None].expand(1, size, 3)
            cos, sin = rotary_table(position, self.c.head_dim, self.c.rope_base, like.dtype)
            sign = torch.ones(self.c.head_dim, device=like.device, dtype=like.dtype)
            sign[: self.c.head_dim // 2] = -1
            self.table = (cos[0, 0], sin[0, 0] * sign)
        index = torch.tensor(positions, device=like.device)
        return self.table[0][index].unsqueeze(1), self.table[1][index].unsqueeze(1)


def _used_cache(
    h: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: int, w: Layer, c: TransformerConfig
) -> Tensor:
    """One layer, operation by operation: writes slot `at`, reads the slots in use."""
    H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
    qkv = product(w.qkv.weight, w.attention_norm(h)).view(-1, H + 2 * G, D)
    scale = torch.cat([w.q_norm.weight.expand(H, -1), w.k_norm.weight.expand(G, -1)])
    qk = F.rms_norm(qkv[:, : H + G], (D,), None, c.norm_eps) * scale
    qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
    keys[:, :, at] = qk[:, H:]
    values[:, :, at] = qkv[:, H + G :]
    past = keys[:, :, : at + 1], values[:, :, : at + 1]
    o = F.scaled_dot_product_attention(qk[:, :H].unsqueeze(2), *past, enable_gqa=H != G)
    h = product(w.out.weight, o.reshape(-1, H * D), h)
    gate, up = product(w.gate_up.weight, w.mlp_norm(h)).chunk(2, -1)
    return product(w.down.weight, F.silu(gate) * up, h)


def _whole_cache(
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    bias: Tensor,
    weights: tuple[Tensor, ...],
    c: TransformerConfig,
) -> Tensor:
    """The same layer for the compiler: shapes never change, `bias` (K,) hides the slots that are not in use."""
    qkv_weight, q_scale, k_scale, out_weight, gate_up_weight, down_weight, attention_scale, mlp_scale = weights
    H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
    qkv = F.linear(F.rms_norm(h, (c.width,), attention_scale, c.norm_eps), qkv_weight).view(-1, H + 2 * G, D)
    q = F.rms_norm(qkv[:, :H], (D,), q_scale, c.norm_eps)
    k = F.rms_norm(qkv[:, H : H + G], (D,), k_scale, c.norm_eps)
    q, k = (x * cos + x.roll(D // 2, -1) * sin for x in (q, k))
    keys.index_copy_(2, slot, k.unsqueeze(2))
    values.index_copy_(2, slot, qkv[:, H + G :].unsqueeze(2))
    q = q.view(-1, G, H // G, 1, D) / math.sqrt(D)
    p = ((q * keys.unsqueeze(2)).sum(-1) + bias).softmax(-1)  # (R, G, H / G, K)
    o = (p.unsqueeze(-1) * values.unsqueeze(2)).sum(-2)
    h = h + F.linear(o.reshape(-1, H * D), out_weight)
    gate, up = F.linear(F.rms_norm(h, (c.width,), mlp_scale, c.norm_eps), gate_up_weight).chunk(2, -1)
    return h + F.linear(F.silu(gate) * up, down_weight)


def product(weight: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (R, in) times weight (out, in) transposed, plus the residual (R, out): a matrix-vector product for one row."""
    if x.shape[0] > 1:
        y = F.linear(x, weight)
        return y if residual is None else y + residual
    if residual is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.addmv(residual[0], weight, x[0]).unsqueeze(0)
