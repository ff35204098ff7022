"""One text token per row against the cache: the hot path of decoding, the same arithmetic as Transformer.extend.

At one token the cost is reading the weights and launching operations. So the matrices are kept transposed and
contiguous (a row vector times such a matrix reads it once, in order), the weights of the norms are folded into the
matrices behind them, q and k are normed and rotated together, and residual sums ride on the matrix products. A plan is
a snapshot: it holds copies of the weights of its moment. It serves rows of equal length on shared weights only; other
cases go through `extend`. The contract (omni.verify) compares both.

Legend: R rows, W width, H query heads, G key heads, D head width, K cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.nn.cache import KVCache
from omni.nn.transformer import Block, Transformer
from omni.positions import rotary_table


@dataclass(frozen=True)
class _Layer:
    qkv: Tensor  # (W, (H + 2G) D)
    qk_scale: Tensor  # (H + G, D)
    out: Tensor  # (H D, W)
    gate_up: Tensor  # (W, 2 M)
    down: Tensor  # (M, W)


class StepPlan:
    """`step(h, cache)` appends one position to every row: h (R, W) -> normalised hidden states (R, W)."""

    def __init__(self, transformer: Transformer) -> None:
        self.c = transformer.c
        self.norm = transformer.norm
        with torch.no_grad():
            self.layers = [_layer(block) for block in transformer.blocks]  # type: ignore[arg-type]
        self.table: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def serves(transformer: Transformer, cache: KVCache) -> bool:
        return cache.uniform and transformer.c.latent_weights == "shared"

    def step(self, h: Tensor, cache: KVCache) -> Tensor:
        c, R = self.c, h.shape[0]
        H, G, D = c.num_heads, c.num_kv_heads, c.head_dim
        cache.reserve(1)
        at = cache.lengths[0]
        for r in range(R):
            cache.block[r, at] = cache.next_block[r]
        cache.document[:, at] = 0
        cos, sin = self._rotary(cache.next_position, h)
        eps, gqa = c.norm_eps, H != G
        for index, layer in enumerate(self.layers):
            qkv = torch.mm(F.rms_norm(h, (c.width,), None, eps), layer.qkv).view(R, H + 2 * G, D)
            qk = F.rms_norm(qkv[:, : H + G], (D,), None, eps) * layer.qk_scale
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
            keys, values = cache.k[index], cache.v[index]
            keys[:, :, at] = qk[:, H:]
            values[:, :, at] = qkv[:, H + G :]
            o = F.scaled_dot_product_attention(
                qk[:, :H].unsqueeze(2), keys[:, :, : at + 1], values[:, :, : at + 1], enable_gqa=gqa
            )
            h = torch.addmm(h, o.reshape(R, H * D), layer.out)
            gate, up = torch.mm(F.rms_norm(h, (c.width,), None, eps), layer.gate_up).chunk(2, -1)
            h = torch.addmm(h, F.silu(gate) * up, layer.down)
        cache.advance([1] * R)
        for r in range(R):
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
        if len(set(positions)) == 1:
            p = positions[0]
            return self.table[0][p], self.table[1][p]
        index = torch.tensor(positions, device=like.device)
        return self.table[0][index].unsqueeze(1), self.table[1][index].unsqueeze(1)


def _layer(block: Block) -> _Layer:
    w, c = block.text, block.c
    q_scale = w.q_norm.weight.expand(c.num_heads, -1)
    k_scale = w.k_norm.weight.expand(c.num_kv_heads, -1)
    return _Layer(
        (w.qkv.weight * w.attention_norm.weight).T.contiguous(),
        torch.cat([q_scale, k_scale]).contiguous(),
        w.out.weight.T.contiguous(),
        (w.gate_up.weight * w.mlp_norm.weight).T.contiguous(),
        w.down.weight.T.contiguous(),
    )
