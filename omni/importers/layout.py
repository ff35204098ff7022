"""The weights of a published decoder in Omni's layout: which rows of which published tensors make each weight.

Names on the left are those of the published classes (safetensors files of transformers); a GGUF file is renamed to them
by its reader. Queries, keys and values become one matrix, as do gate and up; rotary dimensions get Omni's order.

Legend: D head width, r dimensions of a head that rotate, H query heads, G key heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omni.importers.families import Decoder

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """All rows of a published tensor, or `stop - start` of them from `start`; order: the published row of each."""

    name: str
    shape: Shape  # of the published tensor
    start: int
    stop: int
    order: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """A weight of Omni: the rows of its parts, one after another."""

    name: str
    parts: tuple[Part, ...]

    @property
    def shape(self) -> Shape:
        rows = sum(part.stop - part.start for part in self.parts)
        return (rows, *self.parts[0].shape[1:])


def rotary_order(head_dim: int, rotating: int) -> Tensor:
    """The published dimension of each of ours, (D,): published decoders rotate (i, i + r / 2) among the first r
    dimensions, Omni (i, i + D / 2) for i below r / 2. A permutation: attention is unchanged."""
    half, turn = head_dim // 2, rotating // 2
    rest = torch.arange(rotating, head_dim)
    return torch.cat([
        torch.arange(turn), rest[: half - turn], torch.arange(turn, rotating), rest[half - turn :]
    ])  # fmt: skip


def layout_of(c: Decoder, rotating: int, prefix: str) -> list[Weight]:
    """All weights of the model but those of new ids. rotating: r. prefix: of the published names, such as "model."."""
    one = _Names(c, rotating, prefix)
    made = [one.whole("token.embedding.weight", f"{prefix}embed_tokens.weight", (c.vocab_size, c.hidden_size))]
    if not c.tie_word_embeddings:
        made.append(one.whole("token.unembedding.weight", head_name(prefix), (c.vocab_size, c.hidden_size)))
    made.append(one.whole("transformer.norm.weight", f"{prefix}norm.weight", (c.hidden_size,)))
    for layer in range(c.num_hidden_layers):
        made += one.layer(layer)
    return made


def head_name(prefix: str) -> str:
    """The name of the output matrix beside decoder names with this prefix."""
    outer = {"language_model.model.": "language_model.lm_head.weight"}
    return outer.get(prefix, "lm_head.weight")


NORMS: Mapping[str, Mapping[str, str]] = {  # placement -> ours -> published
    "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {"attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


class _Names:
    """Makes the weights of one config."""

    def __init__(self, c: Decoder, rotating: int, prefix: str) -> None:
        self.c, self.prefix = c, prefix
        head_dim = c.heads[2]
        self.order = None if rotating == head_dim else rotary_order(head_dim, rotating)

    def whole(self, name: str, published: str, shape: Shape) -> Weight:
        return Weight(name, (Part(published, shape, 0, shape[0]),))

    def layer(self, index: int) -> Iterator[Weight]:
        c, ours = self.c, f"transformer.blocks.{index}.text."
        theirs = f"{self.prefix}layers.{index}."
        for name, published in NORMS[c.norm_placement].items():
            yield self.whole(f"{ours}{name}.weight", f"{theirs}{published}.weight", (c.hidden_size,))
        (H, G, D), attention, mlp = c.heads, f"{theirs}self_attn.", f"{theirs}mlp."
        if c.qk_norm != "none":
            for name, heads in (("q_norm", H), ("k_norm", G)):
                count = heads if c.qk_norm == "width" else 1
                yield Weight(f"{ours}{name}.weight", (self.rotated(f"{attention}{name}.weight", (count * D,), count),))
        yield from self.qkv(f"{ours}qkv.", attention)
        yield from self.linear(f"{ours}out.", f"{attention}o_proj.", (c.hidden_size, H * D), "out_bias")
        yield from self.gate_up(f"{ours}gate_up.", mlp)
        yield from self.linear(f"{ours}down.", f"{mlp}down_proj.", (c.hidden_size, c.intermediate_size), "mlp_bias")

    def linear(self, ours: str, theirs: str, shape: Shape, bias: str) -> Iterator[Weight]:
        for kind, size in self.kinds(shape, bias):
            yield self.whole(f"{ours}{kind}", f"{theirs}{kind}", size)

    def kinds(self, shape: Shape, bias: str) -> list[tuple[str, Shape]]:
        """The weight, and the bias where the family has one."""
        has_bias = self.c.biases.get(bias, False)
        return [("weight", shape), *([("bias", shape[:1])] if has_bias else [])]

    def rotated(self, name: str, shape: Shape, heads: int, start: int = 0) -> Part:
        """`heads` heads of a tensor from row `start`, each in Omni's rotary order."""
        D = self.c.heads[2]
        stop = start + heads * D
        if self.order is None:
            return Part(name, shape, start, stop)
        order = (start + torch.arange(heads)[:, None] * D + self.order).flatten()
        return Part(name, shape, start, stop, order)

    def qkv(self, ours: str, theirs: str) -> Iterator[Weight]:
        H, G, D = self.c.heads
        counts = ("q_proj", H), ("k_proj", G), ("v_proj", G)
        for kind, (_, *columns) in self.kinds(((H + 2 * G) * D, self.c.hidden_size), "qkv_bias"):
            parts, start = [], 0
            for published, heads in counts:
                fused = self.c.has_fused_weights
                name = f"{theirs}qkv_proj.{kind}" if fused else f"{theirs}{published}.{kind}"
                shape = ((H + 2 * G) * D if fused else heads * D, *columns)
                if published == "v_proj":
                    parts.append(Part(name, shape, start, start + heads * D))
                else:
                    parts.append(self.rotated(name, shape, heads, start))
                start += heads * D if fused else 0
            yield Weight(f"{ours}{kind}", tuple(parts))

    def gate_up(self, ours: str, theirs: str) -> Iterator[Weight]:
        c, M = self.c, self.c.intermediate_size
        if c.has_fused_weights:
            yield from self.linear(ours, f"{theirs}gate_up_proj.", (2 * M, c.hidden_size), "mlp_bias")
            return
        for kind, shape in self.kinds((M, c.hidden_size), "mlp_bias"):
            names = [f"{theirs}{half}_proj.{kind}" for half in ("gate", "up")]
            yield Weight(f"{ours}{kind}", tuple(Part(name, shape, 0, M) for name in names))
