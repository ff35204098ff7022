"""Low-rank adapters (LoRA, arXiv 2106.09685): every projection y = W x of a layer becomes y + B A x.

    Adapters    at placeholders of tokens only, gated as in arXiv 2507.11851: adding a joint-token head changes no bit
                at other positions
    Lora        at all positions that use the text weights, of the requests that ask for it (LoraSpec); the targets
                have the names of published decoders, so that files in peft's format fit (importers.peft)

B starts at zero: a new adapter changes nothing. Where no position of a pass uses an adapter it is not computed.

Legend: R batch rows, S positions, W width, H query heads, G key heads, D head width, M width of the MLP, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from omni.nn.declare import FAN_IN, ZERO, Declared, declarations
from omni.rng import Key

# Projections of a layer, in the order of `sizes`; names of stored weights: never change them.
PARTS = ("qkv", "out", "gate_up", "down")
Target = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"
]


class Adapter(Protocol):
    """What a layer adds to its projections in one pass."""

    def at(self, where: Tensor) -> Adapter:
        """The adapter in a pass over the positions where (R, S) is True alone."""
        ...

    def __call__(self, part: str, x: Tensor) -> Tensor:
        """The term (..., out) to add to the projection `part` of x (..., in)."""
        ...


class LowRank(nn.Module):
    """x (..., in) -> B A x (..., out). B starts at zero, so a new adapter changes nothing."""

    def __init__(self, size_in: int, size_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(size_in, rank, bias=False)
        self.up = nn.Linear(rank, size_out, bias=False)

    def declare(self) -> dict[str, Declared]:
        return {"down.weight": FAN_IN, "up.weight": ZERO}

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


@dataclass(frozen=True)
class Gate:
    """(R, S, 1): 1 where an adapter applies, 0 elsewhere; None: it applies everywhere."""

    value: Tensor | None

    def at(self, where: Tensor) -> Gate:
        value = self.value
        return self if value is None else Gate(value.expand(*where.shape, 1)[where])

    def __call__(self, y: Tensor) -> Tensor:
        return y if self.value is None else y * self.value.to(y.dtype)


# ---- at placeholders -----------------------------------------------------------------------------------------------


class LayerAdapter(nn.Module):
    """The low-rank terms of the four projections of one layer, by name."""

    def __init__(self, sizes: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: LowRank(*size, rank) for name, size in zip(PARTS, sizes, strict=True)})


@dataclass(frozen=True)
class Gated:
    """A layer's adapter in one pass. `gate` (R, S, 1): 1 at placeholders, 0 at clean tokens; None: 1 everywhere."""

    adapter: LayerAdapter
    gate: Tensor | None

    def at(self, where: Tensor) -> Gated:
        return Gated(self.adapter, Gate(self.gate).at(where).value)

    def __call__(self, part: str, x: Tensor) -> Tensor:
        return Gate(self.gate)(self.adapter.parts[part](x))


class Adapters(nn.Module):
    """One LayerAdapter for every layer that placeholders pass through."""

    def __init__(self, depth: int, sizes: Sequence[tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LayerAdapter(sizes, rank) for _ in range(depth))

    def gated(self, gate: Tensor | None) -> list[Gated]:
        """The adapters of the layers, each with `gate` (R, S, 1)."""
        return [Gated(layer, gate) for layer in self.layers]  # type: ignore[arg-type]


@torch.no_grad()
def initialise_adapters(adapters: Adapters, key: Key) -> None:
    """A normal with deviation 1/sqrt(fan in), keyed by name; B zero."""
    declared = declarations(adapters)
    for name, parameter in adapters.named_parameters():
        if declared[name] == ZERO:
            parameter.zero_()
        else:
            parameter.copy_(key.fold("adapter", name).normal(tuple(parameter.shape)) / math.sqrt(parameter.shape[1]))


# ---- of the text weights -------------------------------------------------------------------------------------------


class LoraSpec(Frozen):
    """One adapter of the text weights: y + (alpha / rank) B A x, with alpha / sqrt(rank) if rank_stabilised (arXiv
    2312.03732).

    targets: projections, by their names in published decoders; qkv_proj and gate_up_proj are the fused ones of Phi-3.
    layers: which layers have it; None: all. invoked: it is active only where spans are `adapted` (sequence.layout):
    pictures, and replies that begin with the invocation id (activated LoRA, arXiv 2504.12397). A reply that ends there
    at once is left to the text weights, which have read the prompt without the adapter: see generation.turn.
    """

    name: str = Field(pattern="^[A-Za-z0-9_-]{1,64}$")
    rank: int = Field(default=16, ge=1, le=1 << 12)
    alpha: float = Field(default=16.0, gt=0)
    rank_stabilised: bool = False
    targets: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    layers: tuple[int, ...] | None = None
    invoked: bool = False

    @model_validator(mode="after")
    def _targets_are_apart(self) -> LoraSpec:
        twice = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
        given = set(self.targets)
        if not given or len(given) < len(self.targets):
            raise ValueError(f"targets = {list(self.targets)}: give each target once, and at least one")
        for fused, parts in twice.items():
            if fused in given and given & parts:
                raise ValueError(f"targets has {fused} and {sorted(given & parts)}, which is in it; give one of them")
        return self

    @property
    def factor(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def rows_of(c: Any) -> dict[str, tuple[str, int, int]]:
    """Target -> (projection of a layer, first and last + 1 of its output rows). c: a LayerSpec."""
    q, k, m = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden
    return {
        "q_proj": ("qkv", 0, q), "k_proj": ("qkv", q, q + k), "v_proj": ("qkv", q + k, q + 2 * k),
        "qkv_proj": ("qkv", 0, q + 2 * k), "o_proj": ("out", 0, c.width),
        "gate_proj": ("gate_up", 0, m), "up_proj": ("gate_up", m, 2 * m), "gate_up_proj": ("gate_up", 0, 2 * m),
        "down_proj": ("down", 0, c.width),
    }  # fmt: skip


class Lora(nn.Module):
    """The weights of one LoraSpec, layers.INDEX.TARGET.{down, up}. c: the transformer's configuration."""

    def __init__(self, spec: LoraSpec, c: Any) -> None:
        super().__init__()
        self.spec, self.rows = spec, rows_of(c)
        layers = range(c.depth) if spec.layers is None else spec.layers
        if wrong := [index for index in layers if not 0 <= index < c.depth]:
            raise ValueError(f"LoRA {spec.name!r} names layer {wrong[0]} of a transformer of {c.depth} layers")
        inputs = {"qkv": c.width, "out": c.num_heads * c.head_dim, "gate_up": c.width, "down": c.hidden}
        self.sizes = {"qkv": self.rows["qkv_proj"][2], "out": c.width, "gate_up": 2 * c.hidden, "down": c.width}

        def low_rank(target: str) -> LowRank:
            part, first, last = self.rows[target]
            return LowRank(inputs[part], last - first, spec.rank)

        self.layers = nn.ModuleDict(
            {str(index): nn.ModuleDict({target: low_rank(target) for target in spec.targets}) for index in layers}
        )

    def of_layer(self, index: int, gate: Tensor | None) -> LoraTerm | None:
        """What layer `index` adds; gate (R, S, 1), or None: everywhere."""
        return LoraTerm(self, str(index), Gate(gate)) if str(index) in self.layers else None

    @torch.no_grad()
    def merge_into(self, blocks: nn.ModuleList) -> None:
        """Add the adapter to the text weights of the layers, in float32 or better; their dtypes stay."""
        for index, targets in self.layers.items():
            for target, pair in targets.items():  # type: ignore[operator]
                part, first, last = self.rows[target]
                weight = getattr(blocks[int(index)].text, part).weight
                wide = torch.promote_types(weight.dtype, torch.float32)
                change = pair.up.weight.to(wide) @ pair.down.weight.to(wide) * self.spec.factor
                weight[first:last] = (weight[first:last].to(wide) + change).to(weight.dtype)


@dataclass(frozen=True)
class LoraTerm:
    """The LoRA of one layer in one pass."""

    lora: Lora
    index: str
    gate: Gate

    def at(self, where: Tensor) -> LoraTerm:
        return LoraTerm(self.lora, self.index, self.gate.at(where))

    def __call__(self, part: str, x: Tensor) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], self.lora.sizes[part])
        for target, pair in self.lora.layers[self.index].items():  # type: ignore[operator]
            own, first, last = self.lora.rows[target]
            if own == part:
                y[..., first:last] = pair(x) * self.lora.spec.factor
        return self.gate(y)


@dataclass(frozen=True)
class Sum:
    """Several adapters of one layer."""

    terms: tuple[Adapter, ...]

    def at(self, where: Tensor) -> Sum:
        return Sum(tuple(term.at(where) for term in self.terms))

    def __call__(self, part: str, x: Tensor) -> Tensor:
        first, *others = (term(part, x) for term in self.terms)
        return sum(others, first)


def together(*adapters: Adapter | None) -> Adapter | None:
    """The sum of those that there are; None without any."""
    found = tuple(one for one in adapters if one is not None)
    return found[0] if len(found) == 1 else Sum(found) if found else None
