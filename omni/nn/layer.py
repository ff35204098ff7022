"""One layer of the transformer: how published decoders differ (LayerSpec), the weights, and the arithmetic, defined
once.

`run_layer` is the only definition. It is written over an object of operations:

    Operations          tensors: the context stream, the refine stream (modulated), blocks of tokens (adapters)
    DualOperations      a value with its tangent: the refine stream under forward-mode differentiation

To add a decoder variant: a field of the spec, its weight in `Layer` and `declare`, a line in `run_layer`, a row of
VARIANTS in tests/nn/test_layer.py. The native step, code of its own, refuses every other value by itself.

Legend: R batch rows, N positions, W width, H query heads, G key heads, D head width, M width of the MLP, I items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from omni.nn import tangent
from omni.nn.declare import HIDDEN, Declared, of_linear
from omni.nn.lora import Adapter
from omni.nn.tangent import Dual
from omni.sequence.positions import RotarySpec, rotate

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]
# Fields with values that are not implemented yet: field -> the implemented values.
SERVED: dict[str, tuple[Any, ...]] = {
    "qk_norm": ("head", "width", "none"),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "time": ("modulation",),
}


class LayerSpec(Frozen):
    """The definition of a layer. `mlp_width` None: 8/3 of the width, rounded up to a multiple of 32.

    qkv_bias, out_bias, mlp_bias: biases of the projections before and after attention, and of the MLP.
    qk_norm: RMSNorm of queries and keys: per "head" (Qwen 3), over the "width" of all heads together (OLMo 2), per
        rotary "axis" (SenseNova-U1), or "none".
    norm_placement: "before" attention and MLP (Llama), "after" them (OLMo 2, arXiv 2501.00656), or "both" (Gemma 2,
        arXiv 2408.00118). norm_offset: a norm multiplies by norm_offset + w (1 in Gemma). norm_eps: of all norms.
    activation: of the MLP's gate: "silu" (SwiGLU), "gelu", "gelu_tanh" (GeGLU, arXiv 2002.05202), or "relu2".
    rope_base, rotary: see sequence.positions. window: the most positions a query sees, itself included (Mistral); a
        block has the window of its first position, and sees the whole of itself.
    attention_scale: factor of the scores; None: 1 / sqrt(head_dim). attention_cap: c; scores are c tanh(s / c) (Gemma
        2). residual_scale: factor of the residual branches (Granite).
    time: where times and guidance enter noisy blocks: by "modulation" of each layer (adaLN, PixArt-alpha), or added to
        the "input" of the first one (BAGEL, Lance, Cosmos 3). modulation_eps: epsilon of the normalised modulation
        vectors.
    """

    width: int = Field(default=320, ge=1, le=1 << 16)
    num_heads: int = Field(default=5, ge=1, le=1024)
    num_kv_heads: int = Field(default=5, ge=1, le=1024)
    head_dim: int = Field(default=64, ge=2, le=1024)
    mlp_width: int | None = Field(default=None, ge=1, le=1 << 18)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "width", "axis"] = "head"
    norm_placement: Literal["before", "after", "both"] = "before"
    norm_offset: float = Field(default=0.0, ge=0, le=1)
    norm_eps: float = Field(default=1e-6, ge=0, le=1)
    activation: Activation = "silu"
    rope_base: float = Field(default=10000.0, gt=1, le=1e12)
    rotary: RotarySpec = RotarySpec()
    window: int | None = Field(default=None, ge=1)
    attention_scale: float | None = Field(default=None, gt=0)
    attention_cap: float | None = Field(default=None, gt=0)
    residual_scale: float = Field(default=1.0, gt=0, le=1e3)
    time: Literal["modulation", "input"] = "modulation"
    modulation_eps: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _shapes_fit(self) -> LayerSpec:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        self.rotary.check(self.head_dim)
        if self.rotary.bases is not None and self.rope_base != type(self).model_fields["rope_base"].default:
            bases = list(self.rotary.bases)
            raise ValueError(f"rope_base = {self.rope_base:g} has no effect with rotary.bases = {bases}; leave one out")
        return self

    @model_validator(mode="after")
    def _is_served(self) -> LayerSpec:
        refuse_unserved(self, SERVED)
        return self

    @property
    def hidden(self) -> int:
        """The width of the MLP. Weights have this size: never change the default rule."""
        return self.mlp_width or -(-self.width * 8 // 3 // 32) * 32

    @property
    def query_scale(self) -> float:
        """The factor of queries in attention whose scores have the factor 1 / sqrt(head_dim)."""
        return 1.0 if self.attention_scale is None else self.attention_scale * math.sqrt(self.head_dim)


def refuse_unserved(spec: Frozen, served: dict[str, tuple[Any, ...]]) -> None:
    """ValueError naming the first field whose value is not implemented yet."""
    for name, values in served.items():
        value = getattr(spec, name)
        if value not in values:
            known = ", ".join(map(repr, values))
            raise ValueError(f"{name} = {value!r} is not implemented yet; implemented: {known}")


# ---- weights -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times offset + weight."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def declare(self) -> dict[str, Declared]:
        return {"weight": Declared("constant", 1.0 - self.offset)}

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The factor of the normalised values, (width,)."""
        weight = self.weight
        if self.offset:
            weight = weight + self.offset
        return weight if weight.dtype == dtype else weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale(x.dtype), self.eps)

    def dual(self, x: Dual) -> Dual:
        """`forward` of a value with its tangent."""
        return tangent.rms_norm(x, self.scale(x.value.dtype), self.eps)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) scale, over the last axis. scale: (D,), or more axes of x (..., D)."""
    if not torch.is_grad_enabled():
        return normalised(x, eps).mul_(scale)
    # CUDA's autocast returns float32 (torch 2.12 on); queries and keys must keep the dtype of the values.
    if scale.dim() == 1:
        return F.rms_norm(x, x.shape[-1:], scale, eps).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], None, eps).to(x.dtype) * scale


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) without a graph, in float32 or better: a third of the composite's operations."""
    norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.promote_types(x.dtype, torch.float32))
    y = x * torch.addcmul(constant(eps, norm.dtype, norm.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return y if y.dtype == x.dtype else y.to(x.dtype)


@cache
def constant(value: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a constant, made once; for code without a graph."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


class Layer(nn.Module):
    """One set of layer weights: the projections around attention, and the MLP. depth: layers of the transformer; the
    last projections of attention and MLP start smaller by the factor 1 / sqrt(2 depth). Names of weights are keys of
    checkpoints and of initial values: never rename them."""

    def __init__(self, c: LayerSpec, depth: int = 1) -> None:
        super().__init__()
        self.c, self.depth = c, depth
        norm = (c.norm_eps, c.norm_offset)
        self.attention_norm = RMSNorm(c.width, *norm)
        self.qkv = nn.Linear(c.width, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm != "none":
            whole = c.qk_norm == "width"
            self.q_norm = RMSNorm(c.head_dim * (c.num_heads if whole else 1), *norm)
            self.k_norm = RMSNorm(c.head_dim * (c.num_kv_heads if whole else 1), *norm)
        self.out = nn.Linear(c.num_heads * c.head_dim, c.width, bias=c.out_bias)
        self.mlp_norm = RMSNorm(c.width, *norm)
        self.gate_up = nn.Linear(c.width, 2 * c.hidden, bias=c.mlp_bias)
        self.down = nn.Linear(c.hidden, c.width, bias=c.mlp_bias)
        if c.norm_placement == "both":
            self.attention_post_norm = RMSNorm(c.width, *norm)
            self.mlp_post_norm = RMSNorm(c.width, *norm)

    def declare(self) -> dict[str, Declared]:
        """All four matrices are "hidden": Muon updates them."""
        last = replace(HIDDEN, divisor=math.sqrt(2 * self.depth))
        return {
            **of_linear("qkv", self.qkv, HIDDEN), **of_linear("out", self.out, last),
            **of_linear("gate_up", self.gate_up, HIDDEN), **of_linear("down", self.down, last),
        }  # fmt: skip

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H D + 2 G D) -> queries and keys (..., H + G, D), values (..., G, D)."""
        c = self.c
        heads = qkv.unflatten(-1, (-1, c.head_dim))
        return heads[..., : -c.num_kv_heads, :], heads[..., -c.num_kv_heads :, :]

    def by_kind(self, queries_keys: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H + G, D) -> all queries (..., H D), all keys (..., G D)."""
        at = self.c.num_heads
        return queries_keys[..., :at, :].flatten(-2), queries_keys[..., at:, :].flatten(-2)

    def by_head(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The inverse of `by_kind`."""
        return torch.cat([queries, keys], -1).unflatten(-1, (-1, self.c.head_dim))

    def qk_scale(self, dtype: torch.dtype) -> Tensor:
        """The factor of normalised queries and keys, (H + G, D)."""
        scales = self.q_norm.scale(dtype), self.k_norm.scale(dtype)
        nums = self.c.num_heads, self.c.num_kv_heads
        return torch.cat([scale.expand(num, -1) for scale, num in zip(scales, nums, strict=True)])


# ---- the arithmetic ------------------------------------------------------------------------------------------------

NOT_MODULATED = (None,) * 6


def run_layer(o: Any, c: LayerSpec, h: Any, attention: Callable[..., Any], modulation: Any = NOT_MODULATED) -> Any:
    """The residual stream h after attention and MLP.

    o: operations; they hold the weights of every position and the rotary table. attention(queries_keys, values) closes
    over mask, cache and memory. modulation: (shift, scale, gate) of attention, then of the MLP; None: not modulated.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
    norms_input, norms_output = c.norm_placement != "after", c.norm_placement != "before"

    def heads(w: Layer, x: Any) -> Any:
        x = o.norm(w.attention_norm, x) if norms_input else x
        x = x if scale_a is None else o.modulate(x, scale_a, shift_a)
        return o.heads(w, o.project(w, "qkv", x))

    def merged(w: Layer, x: Any) -> Any:
        y = o.output(w, "out", x)
        return o.norm(w.attention_post_norm if norms_input else w.attention_norm, y) if norms_output else y

    def mlp(w: Layer, x: Any) -> Any:
        x = o.norm(w.mlp_norm, x) if norms_input else x
        x = x if scale_m is None else o.modulate(x, scale_m, shift_m)
        y = o.output(w, "down", o.gated(c.activation, o.project(w, "gate_up", x)))
        return o.norm(w.mlp_post_norm if norms_input else w.mlp_norm, y) if norms_output else y

    mixed = o.merge(attention(*o.arrange(*o.routed(heads, h))))
    h = o.add(h, o.routed(merged, mixed), gate_a, c.residual_scale)
    return o.add(h, o.routed(mlp, h), gate_m, c.residual_scale)


class Operations:
    """Operations on tensors (R, N, W). text, latent: the two sets of weights. is_latent: (R, N), True where a position
    uses the second set; or one bool for all. adapter: what is added to projections by the first set (nn.lora)."""

    def __init__(
        self, text: Layer, latent: Layer | None, is_latent: Tensor | bool, rotary: tuple[Tensor, Tensor],
        adapter: Adapter | None = None,
    ) -> None:  # fmt: skip
        self.text, self.latent, self.is_latent = text, latent, is_latent
        self.rotary, self.adapter = rotary, adapter
        if adapter is not None and latent is not None and isinstance(is_latent, Tensor):
            self.adapter = adapter.at(~is_latent)

    def routed(self, function: Callable, x: Tensor) -> Any:
        """function(weights, x) with the weights of each position; returns a tensor, or nested tuples of tensors."""
        if self.latent is None or self.is_latent is False:
            return function(self.text, x)
        if self.is_latent is True:
            return function(self.latent, x)
        where = self.is_latent
        parts = function(self.text, x[~where]), function(self.latent, x[where])
        return _merged(*parts, where)

    def norm(self, norm: RMSNorm, x: Tensor) -> Tensor:
        return rms_norm(x, norm.scale(x.dtype), norm.eps)  # not norm(x): the call costs as much as the arithmetic

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x scale + shift, of a normalised x."""
        return torch.addcmul(shift, x, scale)

    def project(self, w: Layer, part: str, x: Tensor) -> Tensor:
        """The projection named `part`."""
        y = getattr(w, part)(x)
        return y if self.adapter is None or w is self.latent else y + self.adapter(part, x)

    output = project

    def heads(self, w: Layer, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (..., H + G, D) after QK-norm, values (..., G, D)."""
        queries_keys, v = w.split(qkv)
        if w.c.qk_norm == "head":
            queries_keys = rms_norm(queries_keys, w.qk_scale(queries_keys.dtype), w.c.norm_eps)
        elif w.c.qk_norm == "width":
            q, k = w.by_kind(queries_keys)
            queries_keys = w.by_head(self.norm(w.q_norm, q), self.norm(w.k_norm, k))
        return queries_keys, v

    def arrange(self, queries_keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((q (R, H, N, D), k (R, G, N, D)) rotated, v (R, G, N, D)) of the output of `heads`."""
        turned = rotate(queries_keys.transpose(1, 2), *self.rotary)
        at = turned.shape[1] - values.shape[-2]
        q, scale = turned[:, :at], self.text.c.query_scale
        return (q if scale == 1 else q * scale, turned[:, at:]), values.transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """(R, H, N, D) -> (R, N, H D)."""
        return x.transpose(1, 2).flatten(2)

    def gated(self, name: Activation, gate_up: Tensor) -> Tensor:
        """The activation of the first half, times the second."""
        gate, up = gate_up.chunk(2, -1)
        acted = activation(name, gate)
        return acted * up if torch.is_grad_enabled() else acted.mul_(up)

    def add(self, h: Tensor, y: Tensor, gate: Tensor | None, scale: float) -> Tensor:
        """h + y scale gate; without a gate h + y scale."""
        y = y if scale == 1 else y * scale
        if gate is None:
            return h + y if torch.is_grad_enabled() else y.add_(h)  # y is new
        return torch.addcmul(h, y, gate)


def _merged(text: Any, latent: Any, where: Tensor) -> Any:
    """Results of the two sets of weights, placed at their positions; nested tuples element by element."""
    if isinstance(text, tuple):
        return tuple(_merged(a, b, where) for a, b in zip(text, latent, strict=True))
    out = text.new_empty(*where.shape, *text.shape[1:])
    out[~where], out[where] = text, latent
    return out


def activation(name: Activation, x: Tensor) -> Tensor:
    """The activation of the gate, by its name in LayerSpec."""
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class DualOperations:
    """The same operations on Duals, rule by rule (see nn.tangent), for the refine stream with one set of weights.

    Not torch.func.jvp, which multiplies by the zero tangents of weights and context.
    """

    def __init__(self, weights: Layer, rotary: tuple[Tensor, Tensor], adapter: Adapter | None = None) -> None:
        self.weights, self.rotary, self.adapter = weights, rotary, adapter

    def routed(self, function: Callable, x: Dual) -> Any:
        return function(self.weights, x)

    def norm(self, norm: RMSNorm, x: Dual) -> Dual:
        return norm.dual(x)

    def modulate(self, x: Dual, scale: Dual, shift: Dual) -> Dual:
        return tangent.add(tangent.product(x, scale), shift)

    def project(self, w: Layer, part: str, x: Dual) -> Dual:
        """The projection named `part`; a bias has no tangent."""
        module = getattr(w, part)
        if module.bias is None:
            y = tangent.linear(module, x)
        else:
            y = Dual(module(x.value), F.linear(x.tangent, module.weight))
        if self.adapter is None:
            return y
        return tangent.add(y, tangent.linear(partial(self.adapter, part), x))

    output = project

    def heads(self, w: Layer, qkv: Dual) -> tuple[Dual, Dual]:
        queries_keys, v = map(Dual, *(w.split(part) for part in qkv))
        if w.c.qk_norm == "head":
            queries_keys = tangent.rms_norm(queries_keys, w.qk_scale(queries_keys.value.dtype), w.c.norm_eps)
        elif w.c.qk_norm == "width":
            q, k = map(Dual, *(w.by_kind(part) for part in queries_keys))
            q, k = self.norm(w.q_norm, q), self.norm(w.k_norm, k)
            queries_keys = Dual(w.by_head(q.value, k.value), w.by_head(q.tangent, k.tangent))
        return queries_keys, v

    def arrange(self, queries_keys: Dual, values: Dual) -> tuple[tuple[Dual, Dual], Dual]:
        turned = tangent.linear(lambda y: rotate(y.transpose(1, 2), *self.rotary), queries_keys)
        at, scale = turned.value.shape[1] - values.value.shape[-2], self.weights.c.query_scale
        q = tangent.linear(lambda y: y[:, :at] if scale == 1 else y[:, :at] * scale, turned)
        k = tangent.linear(lambda y: y[:, at:], turned)
        return (q, k), tangent.linear(lambda y: y.transpose(1, 2), values)

    def merge(self, x: Dual) -> Dual:
        return tangent.linear(lambda y: y.transpose(1, 2).flatten(2), x)

    def gated(self, name: Activation, gate_up: Dual) -> Dual:
        gate, up = map(Dual, *(part.chunk(2, -1) for part in gate_up))
        acted = tangent.silu(gate) if name == "silu" else tangent.lift(lambda y: activation(name, y), gate)
        return tangent.product(acted, up)

    def add(self, h: Dual, y: Dual, gate: Dual, scale: float) -> Dual:
        y = y if scale == 1 else tangent.linear(lambda part: part * scale, y)
        return tangent.add(h, tangent.product(y, gate))
