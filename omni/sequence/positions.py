"""Rotary positions with three coordinates (time, row, column), in units of one text token or one latent cell.

A head of width D has D / 2 frequencies; frequency i rotates the pair (i, i + D / 2) by position[axis(i)] frequency(i)
(RoFormer, arXiv 2104.09864; the half-split convention of Llama). RotarySpec assigns axes to frequencies. A text token
has three equal coordinates, which gives the 1-D rotary table of decoder language models.

Legend: R batch rows, N positions, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from omni.config import Frozen
from omni.sequence.rotary_scaling import RotaryScaling

Layout = Literal["modulo", "sections", "interleaved"]
Base = Annotated[float, Field(gt=1, le=1e12)]


class RotarySpec(Frozen):
    """The axis of each frequency, and the frequencies.

    layout: "modulo", frequency i is of axis i mod 3, so each axis has high and low ones; "sections", the first
        sections[0] are of time, the next of rows, then of columns (Qwen2-VL, arXiv 2409.12191); "interleaved", those of
        rows at 1, 4, 7, ... and of columns at 2, 5, 8, ... below 3 sections[1] and 3 sections[2], the rest of time
        (Qwen3-VL, Cosmos 3).
    bases: one base per axis, with frequencies counted within the axis (SenseNova-U1). None: one base, LayerSpec's
        rope_base, with frequencies counted over all axes.
    partial: the share of D that rotates. scaling: of the frequencies, for longer contexts (sequence.rotary_scaling).
    Trained weights depend on it.
    """

    layout: Layout = "modulo"
    sections: tuple[int, int, int] | None = None
    bases: tuple[Base, Base, Base] | None = None
    partial: float = Field(default=1.0, gt=0, le=1)
    scaling: RotaryScaling | None = None

    @field_validator("scaling", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value  # as older models store it

    def check(self, head_dim: int) -> None:
        """ValueError if the values do not fit a head of this width."""
        if (self.sections is None) != (self.layout == "modulo"):
            raise ValueError(
                f"rotary.sections = {self.sections} with rotary.layout = {self.layout!r}: give both or none"
            )
        num = self.num_turning(head_dim)
        if num < 1:
            raise ValueError(
                f"rotary.partial = {self.partial} of a head of width {head_dim} rotates nothing; give at least "
                f"{2 / head_dim:g}"
            )
        if self.scaling is not None:
            if self.bases is not None:
                raise ValueError(f"rotary.scaling with rotary.bases = {list(self.bases)}: leave one of them out")
            self.scaling.check(num)
        if self.sections is not None and (min(self.sections) < 0 or sum(self.sections) != num):
            raise ValueError(f"rotary.sections = {list(self.sections)} must add up to the {num} frequencies of a head")
        counts = torch.bincount(self.axes(num), minlength=3).tolist()
        if self.sections is not None and counts != list(self.sections):
            raise ValueError(
                f"rotary.sections = {list(self.sections)} cannot be interleaved: of {num} frequencies, rows have at "
                f"most {(num + 1) // 3} and columns {num // 3}; this would be {counts}"
            )

    def num_turning(self, head_dim: int) -> int:
        """The number of nonzero frequencies."""
        return int(head_dim * self.partial) // 2

    def axes(self, num: int, device: torch.device | str = "cpu") -> Tensor:
        """(num,) int64: the axis of each frequency."""
        index = torch.arange(num, device=device)
        if self.sections is None:
            return index % 3
        if self.layout == "sections":
            return torch.repeat_interleave(torch.arange(3), torch.tensor(self.sections)).to(device)
        low = torch.tensor([3 * n for n in self.sections], device=device)[index % 3]
        return torch.where(index < low, index % 3, 0)

    def frequencies(self, head_dim: int, base: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """(D / 2,) in radians per unit of position; zero for dimensions that do not rotate."""
        num = self.num_turning(head_dim)
        index = torch.arange(num, device=device)
        if self.scaling is not None:
            found = self.scaling.frequencies(base, num, device).to(dtype)
        elif self.bases is None:
            found = base ** (-index.to(dtype) * 2 / (2 * num))
        else:
            axes = self.axes(num, device)
            found = torch.zeros(num, dtype=dtype, device=device)
            for axis, own in enumerate(self.bases):
                where = axes == axis
                count = int(where.sum())
                found[where] = own ** (-torch.arange(count, device=device).to(dtype) / max(count, 1))
        return torch.nn.functional.pad(found, (0, head_dim // 2 - num))


def rotary_table(
    position: Tensor,
    head_dim: int,
    base: float,
    dtype: torch.dtype = torch.float32,
    rotary: RotarySpec | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (R, 1, N, D), for `position` (R, N, 3); the first half of sin is negative. Angles are computed
    in float32 (float64 for float64)."""
    rotary, device = rotary or RotarySpec(), position.device
    work = torch.float64 if dtype == torch.float64 else torch.float32
    is_plain = type(position) is Tensor and not torch.compiler.is_compiling()
    once = _turning_once if is_plain else _turning
    frequency, axes = once(rotary, head_dim, base, work, device)  # type: ignore[arg-type]  # frozen: hashable
    angle = position.to(work)[..., axes] * frequency  # (R, N, D/2)
    cos, sin = angle.cos(), angle.sin()
    if rotary.scaling is not None and (magnitude := rotary.scaling.magnitude()) != 1:
        turning = rotary.num_turning(head_dim)  # the other dimensions keep their size
        cos = torch.cat([cos[..., :turning] * magnitude, cos[..., turning:]], -1)
        sin = sin * magnitude
    cos, sin = cos.to(dtype), sin.to(dtype)
    return torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([-sin, sin], -1).unsqueeze(1)


def _turning(
    rotary: RotarySpec, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The frequencies, and the axis of each: (D / 2,) both."""
    with torch.inference_mode(False):
        turning = rotary.axes(rotary.num_turning(head_dim), device)
        axes = torch.nn.functional.pad(turning, (0, head_dim // 2 - len(turning)))
        return rotary.frequencies(head_dim, base, dtype, device), axes


_turning_once = lru_cache(maxsize=64)(_turning)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (R, H, N, D) by a table of `rotary_table`."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)
