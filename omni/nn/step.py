"""One text token per row against the cache: the hot path of decoding, the same arithmetic as Transformer.extend.

At one token the cost is reading the weights and launching operations. So a single row uses matrix-vector products,
residual sums ride on them, and q and k are normed and rotated together. It serves rows of equal length on shared
weights; other cases go through `extend`. The contract (omni.verify) compares both. (Compiling the layers gained nothing
on the CPU: the time goes into reading the weights.)

Legend: R rows, W width, H query heads, G key heads, D head width, K positions of the cache, used or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.transformer import Layer, Transformer, TransformerConfig
from omni.positions import rotary_table


class TokenStep:
    """`step(h, cache)` appends one position to every row: h (R, W) -> normalised hidden states (R, W)."""

    def __init__(self, transformer: Transformer) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        self.layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        self.table: tuple[Tensor, Tensor] | None = None

    def serves(self, cache: KVCache) -> bool:
        return cache.uniform and self.c.latent_weights == "shared"

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        cache.reserve(1)
        at = cache.lengths[0]
        for r in range(h.shape[0]):
            cache.block[r, at] = cache.next_block[r]
        cache.document[:, at] = 0
        cos, sin = self._rotary(cache.next_position, h)
        for index, w in enumerate(self.layers):
            h = _layer(h, cos, sin, cache.k[index], cache.v[index], at, w, self.c)
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


def _layer(
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


def product(weight: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """x (R, in) times weight (out, in) transposed, plus the residual (R, out): a matrix-vector product for one row."""
    if x.shape[0] > 1:
        y = F.linear(x, weight)
        return y if residual is None else y + residual
    if residual is None:
        return torch.mv(weight, x[0]).unsqueeze(0)
    return torch.addmv(residual[0], weight, x[0]).unsqueeze(0)
