"""The flow-map head: average velocity F(x, t, s, context) of a block of latents.

Convention: t = 1 is noise, t = 0 data, s <= t the end of the jump; the jump is x + (s - t) F. The head embeds noisy
latents and the condition (t, t - s, guidance), and computes F from hidden states; the transformer is elsewhere. A time
input is embedded by sinusoids with angular frequencies up to `max_frequency`, then by an MLP of its own; the embeddings
are added. Low frequencies keep derivatives in t and s small: flow maps are trained through them.

F is affine in the network's output G. So every parametrisation has the same jump, and objectives and samplers do not
depend on it. With n^2 = (1 - t)^2 + t^2, data and noise of deviation 1:

    velocity      F = G                             jump x - (t - s) G         (flow matching, MeanFlow, TVM)
    simple_edm    F = ((2 t - 1) / n^2) x + G / n   jump c_skip x + c_out G    (IMM, arXiv 2503.07565; see below)
    x             F = (x - G) / t                   jump (s / t) x + (1 - s / t) G, G is the data

    c_skip = ((1 - t)(1 - s) + t s) / n^2           c_out = -((1 - s) t - (1 - t) s) / n

The denoiser of EDM and CTM (arXiv 2206.00364, 2310.02279) is simple_edm with -G. In simple_edm G has deviation of about
1 at every t.

Legend: R batch rows, S positions, C channels, W width, I items (copies).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.config import Frozen
from omni.heads.latent import LatentHead
from omni.heads.pooling import ContextPool
from omni.nn.declare import ZERO, Declared, of_linear
from omni.nn.transformer import spread

Parametrisation = Literal["velocity", "simple_edm", "x"]


class FlowHeadConfig(Frozen):
    """The configuration of the flow head.

    channels: channels of the latents.
    time_scale: factor of t and t - s before embedding. 1 for objectives with derivatives in time, which it multiplies
        too; 1000 in IMM, which separates nearly equal times.
    max_frequency: of the embedding, in radians per unit of (scaled) time.
    parametrisation: the meaning of the network's output, see the module docstring.
    scale_input: divide x by n before embedding (EDM's c_in), so that its deviation is 1 at every t.
    pool_layers: the layers whose context values are pooled into the condition of a block (heads.pooling); None: it has
        the times and the guidance alone.
    clean_width: hidden units of the layer before the projection of clean latents into the context (as LLaVA-1.5's
        projector, arXiv 2310.03744); None: one linear projection.
    head_depth: None, or the number of blocks of the latent head (heads.latent, MAR). The transformer
        then reads known latents and masks in place of noisy ones.
    min_time: for "x" only: below it F = (x - G) / min_time, finite at t = 0. The jump to s = t is still x. The optimal
        G is then x - min_time F, not the data. From JiT (arXiv 2511.13720).
    """

    channels: int = Field(default=64, ge=1, le=1 << 16)
    time_scale: float = Field(default=1.0, gt=0)
    max_frequency: float = Field(default=16.0, gt=0)
    num_frequencies: int = Field(default=32, ge=1, le=1 << 16)
    parametrisation: Parametrisation = "velocity"
    scale_input: bool = False
    min_time: float = Field(default=0.05, gt=0, le=1)
    pool_layers: tuple[int, ...] | None = None
    clean_width: int | None = Field(default=None, ge=1, le=1 << 16)
    head_depth: int | None = Field(default=None, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _without_choices(cls, data: Any) -> Any:
        """Format 1 of config.json had `choices` and `choice_bits`; no model has them now."""
        if not isinstance(data, dict) or not data.keys() & {"choices", "choice_bits"}:
            return data
        if data.get("choices"):
            raise ValueError(
                f"choices = {list(data['choices'])} is not supported by this version; retrain the model without "
                "it, or use the version of Omni that trained it"
            )
        return {name: value for name, value in data.items() if name not in ("choices", "choice_bits")}


class ScalarEmbedding(nn.Module):
    """(I,) -> (I, W): sinusoids of `scale` times the value, then a two-layer MLP."""

    def __init__(self, width: int, c: FlowHeadConfig, scale: float) -> None:
        super().__init__()
        self.c, self.scale = c, scale
        self.up = nn.Linear(2 * c.num_frequencies, width)
        self.down = nn.Linear(width, width)

    def declare(self) -> dict[str, Declared]:
        """Both matrices start by their fan-in; keyed by name."""
        return of_linear("up", self.up) | of_linear("down", self.down)

    def forward(self, value_I: Tensor) -> Tensor:
        # Not a buffer: model.to(bfloat16) would round it; at time_scale 1000 the error is 30 radians.
        lowest, highest = math.log(0.25), math.log(self.c.max_frequency)
        octaves = torch.linspace(lowest, highest, self.c.num_frequencies, device=value_I.device, dtype=torch.float32)
        angle = value_I[:, None] * (octaves.exp() * self.scale).to(value_I.dtype)
        features = torch.cat([angle.cos(), angle.sin()], -1).to(self.up.weight.dtype)
        return self.down(torch.nn.functional.silu(self.up(features)))


class FlowHead(nn.Module):
    """Embeds clean latents for the context stream and noisy ones for the refine stream; computes F. Names of weights
    are keys of checkpoints and of initial values: never rename them. width: of the refine stream; context_width: of the
    context stream, if it is another. value_width: numbers of one layer's values at a position."""

    def __init__(self, width: int, c: FlowHeadConfig, context_width: int | None = None, value_width: int = 0) -> None:
        super().__init__()
        self.c = c
        self.clean_first = None if c.clean_width is None else nn.Linear(c.channels, c.clean_width)
        self.clean = nn.Linear(c.clean_width or c.channels, context_width or width)
        self.noisy = nn.Linear(c.channels, width)
        self.time = ScalarEmbedding(width, c, c.time_scale)
        self.gap = ScalarEmbedding(width, c, c.time_scale)
        self.guidance = ScalarEmbedding(width, c, 1.0)
        self.modulation = nn.Linear(width, 2 * width)
        self.velocity = nn.Linear(width, c.channels)
        self.pool = None if c.pool_layers is None else ContextPool(c.pool_layers, value_width, width)
        self.head = None if c.head_depth is None else LatentHead(c.channels, width, c.head_depth)

    def declare(self) -> dict[str, Declared]:
        """The modulation and the output projection start at zero, so the network's output G does too."""
        read = of_linear("modulation", self.modulation, ZERO) | of_linear("velocity", self.velocity, ZERO)
        first = {} if self.clean_first is None else of_linear("clean_first", self.clean_first)
        return first | of_linear("clean", self.clean) | of_linear("noisy", self.noisy) | read

    def embed_clean(self, latents_RNC: Tensor) -> Tensor:
        """Finished latents, for the context stream: (R, N, C) -> (R, N, W)."""
        if self.clean_first is not None:
            latents_RNC = torch.nn.functional.gelu(self.clean_first(latents_RNC))
        return self.clean(latents_RNC)

    def embed(self, x_RSC: Tensor, t_I: Tensor, item: Tensor | None) -> Tensor:
        """Noisy latents at t, for the refine stream: (R, S, C) -> (R, S, W). `item` as in `read`."""
        return self.noisy(self._scaled(x_RSC, t_I, item))

    def _scaled(self, x_RSC: Tensor, t_I: Tensor, item: Tensor | None) -> Tensor:
        """Noisy latents as they are embedded: divided by n with `scale_input`."""
        if not self.c.scale_input:
            return x_RSC
        return (x_RSC / _deviation(_per_position(t_I, item))).to(x_RSC.dtype)

    def embed_known(self, x_RSC: Tensor, t_I: Tensor, item: Tensor | None) -> Tensor:
        """For a model with a latent head: latents at t = 0, and the mask in place of the others: (R, S, W)."""
        assert self.head is not None
        known = self.noisy(x_RSC)
        return torch.where(_per_position(t_I, item) == 0, known, self.head.mask.to(known.dtype))

    def of_latents(
        self, z_RSW: Tensor, x_RSC: Tensor, t_I: Tensor, s_I: Tensor, guidance_I: Tensor, item: Tensor | None
    ) -> Tensor:
        """F (R, S, C) by the latent head, from hidden states z (R, S, W)."""
        assert self.head is not None
        condition = self.condition(t_I, s_I, guidance_I)
        x = self._scaled(x_RSC, t_I, item)
        hidden = self.head(z_RSW, x, spread(condition.to(z_RSW.dtype), item))
        return self.read(hidden, condition, item, x_RSC, t_I)

    def condition(self, t_I: Tensor, s_I: Tensor, guidance_I: Tensor) -> Tensor:
        """(I, W) from the start and end times, and the guidance embedding of beta = 1 / w (1: no guidance)."""
        return self.time(t_I) + self.gap(t_I - s_I) + self.guidance(guidance_I)

    def read(self, hidden_RSW: Tensor, condition_IW: Tensor, item: Tensor | None, x_RSC: Tensor, t_I: Tensor) -> Tensor:
        """F (R, S, C) of x at t. `item` (R, S): the condition and time of each position (None: one item per batch row).

        Except for "velocity", computed in t's dtype (float32 or better) and returned in x's.
        """
        vectors = self.modulation(torch.nn.functional.silu(condition_IW))
        scale, shift = spread(vectors.to(hidden_RSW.dtype), item).chunk(2, -1)
        output = self.velocity(hidden_RSW * (1 + scale) + shift)
        if self.c.parametrisation == "velocity":
            return output
        t = _per_position(t_I, item)
        return average_velocity(output, x_RSC, t, self.c.parametrisation, self.c.min_time).to(x_RSC.dtype)


def average_velocity(
    output: Tensor, x: Tensor, t: Tensor, parametrisation: Parametrisation, min_time: float = 0.05
) -> Tensor:
    """F from the network's output G at (x, t): all broadcast; see the module docstring. Independent of s."""
    if parametrisation == "velocity":
        return output
    if parametrisation == "x":
        return (x - output) / t.clamp(min=min_time)
    n = _deviation(t)
    return (2 * t - 1) / n**2 * x + output / n


def _deviation(t: Tensor) -> Tensor:
    """n: the deviation of x_t when data and noise have deviation 1."""
    return ((1 - t) ** 2 + t**2).sqrt()


def _per_position(t_I: Tensor, item: Tensor | None) -> Tensor:
    """The time of each position's item: (I,) -> (R, S, 1), or (R, 1, 1) if `item` is None. In t's dtype."""
    return spread(t_I.unsqueeze(-1), item)
