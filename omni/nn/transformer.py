"""The transformer in two streams: context (finished, clean, cached) and refine (in generation).

    context(h, stream)          causal over blocks; returns the Memory that refine attends to
    extend(h, ..., runs)        the context stream of requests: after the positions that their histories hold
    refine(h, ..., memory)      modulated by a condition vector per copy; attends to the memory and itself
    draft(h, ..., memory)       the same for blocks of tokens: not modulated; adapters instead

Either all positions share one set of weights, or latents have their own, which tokens never use. With
`latent_weights = "separate"` latents use it in both streams (mixture of transformers, arXiv 2411.04996). With "refine"
they use it in the refine stream only: finished blocks use the text weights, and training the latents' weights leaves
the context unchanged. Those of the refine stream may also be an expert of another width and with fewer layers (pi0,
arXiv 2410.24164): it attends to the keys and values of the context in the layers that it has. With shared weights and
no refine stream the module is an ordinary decoder.

nn.layer defines a layer. Modulation follows adaLN with one shared projection and a table per layer (PixArt-alpha,
arXiv 2310.00426). Each modulation vector is normalised, v / sqrt(mean(v^2) + eps), as in Terminal Velocity Matching
(arXiv 2511.19797); eps = 1 keeps its slope at zero equal to 1.

Legend: R batch rows, N positions (T context, S refine), W width, H query heads, G key heads, D head width, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.nn.attention.backends import LONG, AttentionMask, attend, attend_dual, choose_backend
from omni.nn.attention.flash import serves_copies
from omni.nn.attention.jvp import attend_with_tangent
from omni.nn.cache import History, Memory, Pair, Pool, join
from omni.nn.declare import ZERO, Declared, of_linear
from omni.nn.layer import (
    NOT_MODULATED,
    DualOperations,
    Layer,
    Operations,
    RMSNorm,
    constant,
    normalised,
    run_layer,
)
from omni.nn.lora import Adapter, Lora, together
from omni.nn.runs import Runs
from omni.nn.tail import Tail
from omni.nn.tangent import Dual, lift, linear
from omni.nn.transformer_config import ExpertSpec, TransformerConfig
from omni.sequence.layout import Stream
from omni.sequence.positions import rotary_table

__all__ = ["Block", "ExpertSpec", "Transformer", "TransformerConfig", "spread"]

OFFSETS = (0.0, 1.0, 1.0, 0.0, 1.0, 1.0)  # of normalised modulation vectors: scales and gates are around 1


class Block(nn.Module):
    """One layer of the transformer, for both streams. refines: whether the refine stream passes through it."""

    def __init__(self, c: TransformerConfig, refines: bool = True) -> None:
        super().__init__()
        self.c, spec = c, c.refine_spec
        self.text = Layer(c, c.depth)
        self.latent = Layer(spec, c.depth) if refines and c.latent_weights != "shared" else None
        self.modulation_table = nn.Parameter(torch.zeros(6, spec.width)) if refines else None

    def declare(self) -> dict[str, Declared]:
        return {} if self.modulation_table is None else {"modulation_table": ZERO}

    def forward(
        self,
        h_RNW: Tensor | Dual,
        rotary: tuple[Tensor, Tensor],
        attention: Callable[..., Any],
        latent: Tensor | bool,
        condition: tuple[Tensor | Dual, Tensor | None] | None = None,
        adapter: Adapter | None = None,
    ) -> Any:
        """Apply the layer.

        With `condition` (latents of the refine stream): h_RNW, or a Dual of it -> the same type. Without (context
        stream and blocks of tokens): returns (h_RNW, k, v). Keys and values are outputs because FSDP gathers sharded
        weights in the backward only for outputs.

        `attention(q, k, v)` closes over mask, cache and memory. `latent`: which positions are latents.
        `condition`: six vectors per copy (I, 6, W), a Dual if h_RNW is one, and the copy of each position, or None.
        `adapter`: what is added to projections by the text weights (see nn.lora).
        """
        if condition is None:
            assert not isinstance(h_RNW, Dual)
            kept: list[Tensor] = []

            def keeping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                kept[:] = k, v
                return attention(q, k, v)

            return self.layer(h_RNW, rotary, keeping, latent, adapter=adapter), *kept
        has_graph = torch.is_grad_enabled() or isinstance(condition[0], Dual)
        vectors, item = lift(partial(self.normalise, has_graph=has_graph), condition[0]), condition[1]
        if isinstance(h_RNW, Dual):
            assert latent is True
            return self.dual(h_RNW, rotary, attention, linear(lambda v: spread(v, item), vectors), adapter)
        modulation: Any = spread(vectors, item).chunk(6, -1)
        return self.layer(h_RNW, rotary, attention, latent, modulation, adapter)

    def layer(
        self,
        h_RNW: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention: Callable[[Tensor, Tensor, Tensor], Tensor],
        latent: Tensor | bool,
        modulation: Any = NOT_MODULATED,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """nn.layer.run_layer on tensors."""
        operations = Operations(self.text, self.latent, latent, rotary, adapter)
        return run_layer(operations, self.c, h_RNW, lambda qk, v: attention(qk[0], qk[1], v), modulation)

    def dual(
        self, h: Dual, rotary: tuple[Tensor, Tensor], attention: Callable[[Dual, Dual, Dual], Dual], modulation: Dual,
        adapter: Adapter | None = None,
    ) -> Dual:  # fmt: skip
        """nn.layer.run_layer on Duals, for the refine stream with its tangent."""
        weights, adapter = (self.latent, None) if isinstance(self.latent, Layer) else (self.text, adapter)
        six = [Dual(*parts) for parts in zip(*(part.chunk(6, -1) for part in modulation), strict=True)]
        operations = DualOperations(weights, rotary, adapter)
        return run_layer(operations, self.c, h, lambda qk, v: attention(qk[0], qk[1], v), six)

    def normalise(self, vectors_I6W: Tensor, has_graph: bool = True) -> Tensor:
        """The six vectors per copy plus the layer's own table, normalised: (I, 6 W). has_graph: they are
        differentiated."""
        assert self.modulation_table is not None
        vectors_I6W = vectors_I6W + self.modulation_table.to(vectors_I6W.dtype)
        if not has_graph:
            v = normalised(vectors_I6W, self.c.modulation_eps)
            return (v + constant(OFFSETS, v.dtype, v.device)[:, None]).flatten(1)
        power = vectors_I6W.pow(2).mean(-1, keepdim=True)
        v = vectors_I6W * (power + self.c.modulation_eps).rsqrt()
        v = v + v.new_tensor(OFFSETS)[:, None]
        return v.flatten(1).to(vectors_I6W.dtype)  # CUDA's autocast takes powers in float32


class Transformer(nn.Module):
    """See the module docstring. Hidden states in, hidden states out; heads embed inputs and compute predictions.

    refines: False for a model of text alone, which has no weights of the refine stream. active_lora: the LoRA of packed
    batches, by name; requests name their own (History.lora).
    """

    def __init__(self, c: TransformerConfig, refines: bool = True) -> None:
        super().__init__()
        self.c, width = c, c.refine_spec.width
        self.blocks = nn.ModuleList(Block(c, refines and index in c.refining) for index in range(c.depth))
        self.norm = RMSNorm(c.width, c.norm_eps, c.norm_offset)
        if refines:
            self.refine_norm = RMSNorm(width, c.norm_eps, c.norm_offset)
            self.modulation = nn.Linear(width, 6 * width)
        self.refines = refines
        self.loras = nn.ModuleDict({spec.name: Lora(spec, c) for spec in c.loras})
        self.active_lora: str | None = None

    def declare(self) -> dict[str, Declared]:
        return of_linear("modulation", self.modulation, ZERO) if self.refines else {}

    def backend(self, device: torch.device, length: int = 0) -> str:
        probe = self.modulation.weight if self.refines else self.norm.weight
        training = torch.is_grad_enabled() and probe.requires_grad
        return choose_backend(self.c.attention, device.type, training, length > LONG)

    def _block_backend(self, stream: Stream, dtype: torch.dtype, length: int) -> str:
        """The backend of a pass against memory. flash-attn has no order inside a copy, and no float32, which central
        differences take: SDPA serves these."""
        backend = self.backend(stream.position.device, length)
        return "sdpa" if backend == "flash" and not serves_copies(stream.fields, dtype) else backend

    def new_pool(self, max_positions: int = 1 << 24) -> Pool:
        """An empty pool of keys and values, on the device and in the dtype of the weights."""
        weight, c = self.norm.weight, self.c
        return Pool(c.depth, c.num_kv_heads, c.head_dim, weight.device, weight.dtype, max_positions)

    def new_history(self, pool: Pool, lora: str | None = None) -> History:
        """An empty history that is computed with this LoRA, or without one. ValueError for an unknown name."""
        return History(pool, lora, lora is not None and self.lora(lora).spec.invoked)

    def _enter(self, h: Any, position: Tensor) -> tuple[Any, Callable[[int], tuple[Tensor, Tensor]]]:
        """The residual stream (or a Dual of it) in autocast's dtype if autocast is on, and the rotary table of each
        layer."""
        value, c = h.value if isinstance(h, Dual) else h, self.c
        device = value.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
        h = linear(lambda part: part.to(dtype), h) if isinstance(h, Dual) else h.to(dtype)
        table = rotary_table(position, c.head_dim, c.rope_base, dtype, c.rotary)
        if c.window_rope_base is None:
            return h, lambda index: table
        plain = c.rotary.model_copy(update={"scaling": None})
        local = rotary_table(position, c.head_dim, c.window_rope_base, dtype, plain)
        return h, lambda index: table if c.window_of(index) is None else local

    def _loras(self, runs: Runs | None, adapted: Tensor | None = None) -> Callable[[int], Adapter | None]:
        """What the LoRA of a pass adds in each layer: the active one in a packed batch, else those of the histories.
        adapted: (R, T) bool, where an invoked LoRA is active in a packed batch; None: nowhere."""
        gates: dict[str, Tensor | None] = {} if runs is None else runs.gates
        if runs is None and self.active_lora is not None:
            if not self.lora(self.active_lora).spec.invoked:
                gates = {self.active_lora: None}
            elif adapted is not None:
                gates = {self.active_lora: adapted.to(self.norm.weight.dtype).unsqueeze(-1)}
        if not gates:
            return lambda index: None
        found = [(self.lora(name), gate) for name, gate in gates.items()]
        return lambda index: together(*(one.of_layer(index, gate) for one, gate in found))

    def lora(self, name: str) -> Lora:
        """The LoRA of this name. ValueError if there is none."""
        if name not in self.loras:
            raise ValueError(f"this model has no LoRA {name!r}; it has {sorted(self.loras) or 'none'}")
        return self.loras[name]  # type: ignore[return-value]

    # ---- context stream -------------------------------------------------------------------------------------------

    def context(
        self, h_RTW: Tensor, stream: Stream, is_latent: Tensor, adapted: Tensor | None = None,
        past: Memory | None = None,
    ) -> tuple[Tensor, Memory]:  # fmt: skip
        """The whole context in one pass, as in training. Returns normalised hidden states (R, T, W) and the Memory.
        adapted: (R, T) bool, where an invoked LoRA is active; None: nowhere. past: earlier positions of the same
        documents, which were computed before; the Memory returned holds them too."""
        backend, c = self.backend(h_RTW.device, h_RTW.shape[1]), self.c
        h_RTW, rotary = self._enter(h_RTW, stream.position)
        fields = stream.fields if past is None else past.fields.then(stream.fields)
        masks = {window: AttentionMask(stream.fields, fields, window) for window in self._windows()}
        for mask in masks.values():
            mask.prepare(backend, h_RTW.dtype)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attention_of(index: int) -> Callable[..., Tensor]:
            mask = masks[c.window_of(index)]

            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                pair = (k, v) if past is None else join((past.keys[index], past.values[index]), (k, v))
                return attend(q, *pair, mask, backend, c.attention_cap)

            return attention

        latent, lora_of = is_latent if c.latent_weights == "separate" else False, self._loras(None, adapted)
        for index, block in enumerate(self.blocks):
            h_RTW, k, v = block(h_RTW, rotary(index), attention_of(index), latent, None, lora_of(index))
            k, v = (k, v) if past is None else join((past.keys[index], past.values[index]), (k, v))
            keys.append(k)
            values.append(v)
        return self.norm(h_RTW), Memory(keys, values, fields)

    def _windows(self) -> set[int | None]:
        return {self.c.window_of(index) for index in range(self.c.depth)}

    def extend(
        self, h_1NW: Tensor, position: Tensor, is_latent: Tensor | bool, runs: Runs, tail: Tail | None = None
    ) -> Tensor:
        """One pass over the positions of `runs`, which it writes after the committed positions of their histories.

        position: (1, N, 3) int64. is_latent: (1, N) bool, or False where no position is a latent. Returns normalised
        hidden states (1, N, W); with a tail of P placeholders (1, N + P, W).
        """
        h_1NW, rotary = self._enter(h_1NW, position)
        latent, lora_of = is_latent if self.c.latent_weights == "separate" else False, self._loras(runs)
        first = self.c.depth if tail is None else self.c.depth - len(tail.adapters)
        for index, layer in enumerate(self.blocks):
            adapter = lora_of(index)
            if tail is not None and index >= first:
                if index == first:
                    runs = tail.runs
                    h_1NW = torch.cat([h_1NW, tail.inputs.to(h_1NW.dtype)], 1)
                    _, rotary = self._enter(h_1NW, torch.cat([position, tail.position], 1))
                    latent = F.pad(latent, (0, tail.inputs.shape[1])) if isinstance(latent, Tensor) else latent
                    lora_of = self._loras(runs)
                adapter = together(tail.adapters[index - first], lora_of(index))
            h_1NW, _, _ = layer(h_1NW, rotary(index), self._attend(runs, index), latent, None, adapter)
        return self.norm(h_1NW)

    def _attend(self, runs: Runs, index: int) -> Callable[..., Tensor]:
        """The attention of a layer in a pass over histories."""
        return partial(runs.attend, index, window=self.c.window_of(index), cap=self.c.attention_cap)

    # ---- refine stream --------------------------------------------------------------------------------------------

    def refine(
        self, h_RSW: Tensor | Dual, stream: Stream, memory: Memory | Runs, condition_IW: Tensor | Dual,
        item: Tensor | None,
    ) -> Any:  # fmt: skip
        """Copies of blocks; each attends to the context before its block and to itself. memory: a packed context, or
        the runs of blocks of requests; their keys and values take free slots and are not committed.

        condition_IW: one vector per copy. item: (R, S) int64, the copy of each position (negative: padding), or None if
        every batch row is one copy. Returns normalised hidden states (R, S, W); for Duals, a Dual. W is the expert's
        width, if there is one.
        """
        h_RSW, rotary = self._enter(h_RSW, stream.position)
        attention_of, lora_of = self._attention(stream, memory, h_RSW), self._loras_of(memory)
        base = lift(lambda c: self.modulation(F.silu(c)).unflatten(-1, (6, -1)), condition_IW)
        for index in self.c.refining:
            layer, adapter = self.blocks[index], lora_of(index)
            h_RSW = layer(h_RSW, rotary(index), attention_of(index), True, (base, item), adapter)
        return self.refine_norm.dual(h_RSW) if isinstance(h_RSW, Dual) else self.refine_norm(h_RSW)

    def _loras_of(self, memory: Memory | Runs) -> Callable[[int], Adapter | None]:
        return self._loras(memory if isinstance(memory, Runs) else None)

    def draft(
        self,
        h_RSW: Tensor,
        stream: Stream,
        memory: Memory | Runs,
        adapters: Sequence[Adapter | None],
        layers: range | None = None,
    ) -> Tensor:
        """Blocks of tokens in the refine stream: like `refine`, with the text weights, the final norm of the context
        stream, no modulation, and the adapter of each layer. h_RSW: placeholders, or clean tokens before them in their
        block. layers: the layers to run (None: all). Returns hidden states (R, S, W), normalised after the last layer
        of the transformer. Commits nothing.
        """
        layers = range(self.c.depth) if layers is None else layers
        h_RSW, rotary = self._enter(h_RSW, stream.position)
        attention_of, lora_of = self._attention(stream, memory, h_RSW), self._loras_of(memory)
        for index, own in zip(layers, adapters, strict=True):
            adapter = together(own, lora_of(index))
            h_RSW, _, _ = self.blocks[index](h_RSW, rotary(index), attention_of(index), False, None, adapter)
        return self.norm(h_RSW) if layers.stop == self.c.depth else h_RSW

    def _attention(
        self, stream: Stream, memory: Memory | Runs, h: Tensor | Dual
    ) -> Callable[[int], Callable[..., Any]]:
        """The attention of each layer of a pass over blocks."""
        if isinstance(memory, Runs):  # their order and bounds are those of the runs, not of the stream
            return partial(self._attend, memory)
        num_keys = memory.keys[0].shape[2] + stream.position.shape[1]
        value, cap = h.value if isinstance(h, Dual) else h, self.c.attention_cap
        backend = self._block_backend(stream, value.dtype, num_keys)
        if not isinstance(h, Dual):
            for window in self._windows():
                memory.mask(stream, window).prepare(backend, h.dtype)

        def of(index: int) -> Callable[..., Any]:
            past = memory.keys[index], memory.values[index]
            mask = memory.mask(stream, self.c.window_of(index))

            def attention(q: Any, k: Any, v: Any) -> Any:
                if isinstance(q, Dual):
                    return self._attend_dual(q, k, v, past, mask)
                return attend(q, *join(past, (k, v)), mask, backend, cap)

            return attention

        return of

    def _attend_dual(self, q: Dual, k: Dual, v: Dual, past: Pair, mask: AttentionMask) -> Dual:
        """Attention with its tangent, by the method `tangents`."""
        if self.c.tangents in ("forward", "central"):
            return attend_dual(q, k, v, *past, mask, self.c.attention_cap)
        k_past, v_past = (part.to(q.value.dtype) for part in past)
        out, rate = attend_with_tangent(
            q.value, k.value, v.value, q.tangent, k.tangent, v.tangent, k_past, v_past, mask, self.c.tangents
        )
        return Dual(out, rate)


def spread(value_IX: Tensor, item: Tensor | None) -> Tensor:
    """(I, X) per copy -> (R, S, X) per position; with `item` None, one copy per batch row: (R, 1, X)."""
    if item is None:
        return value_IX.unsqueeze(1)
    return value_IX.index_select(0, item.clamp(min=0).flatten()).unflatten(0, item.shape)
