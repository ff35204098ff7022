"""Rotary positions of published decoders: rope_theta with rope_scaling (older files), or rope_parameters (transformers
5), as a base and a RotarySpec. A key that is not known, or a scaling that is not implemented, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from omni.config import Frozen, build
from omni.sequence.positions import RotarySpec
from omni.sequence.rotary_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RotaryScaling,
    YarnScaling,
)

ALIASES = {"su": "longrope"}  # names of older files


class _Rope(Frozen):
    """What every rope dictionary may hold."""

    model_config = ConfigDict(strict=True)

    rope_theta: float | None = Field(default=None, gt=1, le=1e12)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)


class _Default(_Rope):
    pass


class _Linear(_Rope):
    factor: float


class _Llama3(_Rope):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int | None = None


class _Yarn(_Rope):
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    finetuned: Literal[True] = True  # a note of some files


class _LongRope(_Rope):
    short_factor: list[float]
    long_factor: list[float]
    factor: float | None = None
    attention_factor: float | None = None
    original_max_position_embeddings: int | None = None


KINDS: dict[str, type[_Rope]] = {
    "default": _Default, "linear": _Linear, "dynamic": _Linear, "llama3": _Llama3, "yarn": _Yarn, "longrope": _LongRope,
}  # fmt: skip


def merged(
    source: str,
    new: Mapping[str, Any] | None,
    theta: float | None,
    scaling: Mapping[str, Any] | None,
    partial: float | None = None,
) -> dict[str, Any]:
    """One dictionary of rope_parameters, or of rope_theta and rope_scaling. ValueError where they contradict."""
    if new is not None and scaling is not None and dict(new) != dict(scaling):
        raise ValueError(
            f"{source}: rope_parameters and rope_scaling are both given, and differ; leave one of them out"
        )
    found = dict(new if new is not None else scaling or {})
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if value is not None and found.setdefault(name, value) != value:
            raise ValueError(f"{source}: {name} = {value} and {found[name]} in rope_parameters; leave one of them out")
    return found


def read_rope(
    data: Mapping[str, Any], source: str, *, theta: float, max_positions: int, original: int | None, context: int
) -> tuple[float, RotarySpec]:
    """(base, rotary) of one rope dictionary. theta: the base where none is given. max_positions, original: those of the
    config. context: the length that "dynamic" and "longrope" are fixed to. ValueError names the key."""
    data = dict(data)
    old = data.pop("type", None)
    kind = data.pop("rope_type", old or "default")
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else repr(kind)
    if kind not in KINDS:
        raise ValueError(f"{source}: rope_type = {kind!r:.80} is not implemented; implemented: {', '.join(KINDS)}")
    found = build(data, KINDS[kind], source)
    first = original or getattr(found, "original_max_position_embeddings", None) or max_positions
    try:
        scaling = _scaling(kind, found, first, max_positions, context)
    except ValueError as error:
        raise ValueError(f"{source}, {kind}: {error}") from None
    return found.rope_theta or theta, RotarySpec(partial=found.partial_rotary_factor, scaling=scaling)


def _scaling(kind: str, rope: Any, original: int, max_positions: int, context: int) -> RotaryScaling | None:
    """The scaling of one kind. original: the length that the frequencies were trained for."""
    if kind == "linear":
        return LinearScaling(factor=rope.factor)
    if kind == "dynamic":
        return DynamicScaling(factor=rope.factor, original_length=max_positions, length=max(context, max_positions))
    if kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return Llama3Scaling(
            factor=rope.factor, low_frequency_factor=low, high_frequency_factor=high, original_length=original
        )
    if kind == "yarn":
        return YarnScaling(
            factor=rope.factor or max_positions / original,
            original_length=original,
            beta_fast=rope.beta_fast or 32.0,
            beta_slow=rope.beta_slow or 1.0,
            truncate=rope.truncate,
            attention_factor=rope.attention_factor,
            mscale=rope.mscale,
            mscale_all_dim=rope.mscale_all_dim,
        )
    return None if kind == "default" else _longrope(rope, original, max_positions, context)


def _longrope(rope: _LongRope, original: int, max_positions: int, context: int) -> LongRopeScaling:
    """The magnitude is sqrt(1 + ln(factor) / ln(original)), unless it is given (Phi-3)."""
    factor = rope.factor or max_positions / original
    published = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=tuple(rope.short_factor),
        long_factors=tuple(rope.long_factor),
        original_length=original,
        length=context,
        attention_factor=published if rope.attention_factor is None else rope.attention_factor,
    )
