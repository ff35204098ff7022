"""JointTokens: a joint-token head, with the transformer adapters of its placeholders."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn

from omni.config import Frozen
from omni.heads.joint.base import build_head
from omni.nn.lora import Adapters, initialise_adapters
from omni.nn.transformer import TransformerConfig
from omni.rng import Key


class JointConfig(Frozen):
    """head: a name of JOINT_HEADS, with its options. length: K, the most tokens that one pass drafts.

    adapter_rank: of the placeholders' adapters; 0: none; placeholders use the text weights.
    depth: layers that placeholders pass through, the last ones of the transformer; None: all. Fewer make drafts
    cheaper.
    vocabulary: the head drafts the first ids alone, that many; None: all text ids. The ids of a BPE tokenizer are in
    the order of their merges, so the first are the most frequent. Reading fewer rows of a large output projection
    makes drafts cheaper (arXiv 2502.14856); verification is of all ids, so replies do not change.
    """

    head: str = "push_forward"
    length: int = Field(default=8, ge=1, le=64)
    adapter_rank: int = Field(default=32, ge=0, le=1 << 16)
    depth: int | None = Field(default=None, ge=1)
    vocabulary: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)


class JointTokens(nn.Module):
    """The head and its adapters. Names of weights are stored: never rename them."""

    def __init__(self, c: JointConfig, transformer: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.c = c
        self.depth = c.depth or transformer.depth
        if self.depth > transformer.depth:
            raise ValueError(
                f"joint.depth = {self.depth} exceeds the {transformer.depth} layers of the transformer; "
                "use fewer, or leave it out for all"
            )
        if c.vocabulary is not None and c.vocabulary > vocab_size:
            raise ValueError(
                f"joint.vocabulary = {c.vocabulary} exceeds the {vocab_size} ids of the model; use fewer, or leave it "
                "out for all"
            )
        self.head = build_head(c.head, c.options, c.length, c.vocabulary or vocab_size, transformer.width)
        self.adapters: Adapters | None = None
        if c.adapter_rank and self.head.layout != "none":
            t = transformer
            sizes = (
                (t.width, (t.num_heads + 2 * t.num_kv_heads) * t.head_dim),
                (t.num_heads * t.head_dim, t.width),
                (t.width, 2 * t.hidden),
                (t.hidden, t.width),
            )
            self.adapters = Adapters(self.depth, sizes, c.adapter_rank)

    def initialise(self, key: Key) -> None:
        """Adapters as in `initialise_adapters`; the head's own weights as in `JointHead.initialise`."""
        self.head.initialise(key.fold("joint head"))
        if self.adapters is not None:
            initialise_adapters(self.adapters, key)
