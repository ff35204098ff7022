"""Feature maps for objectives that compare pictures: latents (B, N, C) -> families of vectors, each (B, D).

    latents       one family, the latents themselves
    projections   also, from a fixed random two-layer network on every latent, means and deviations over 1, 4 and 16
                  runs of consecutive latents: statistics at several scales, without training

Another map is one function registered by name, such as a frozen encoder:

    FEATURES.register("mine")(lambda x_BNC: [encoder(x_BNC).flatten(1)])

It must pass gradients and treat pictures independently (no batch statistics).

Legend: B pictures, N latents, C channels, H width, D numbers in a feature vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from omni.registry import Registry
from omni.rng import Key

FeatureMap = Callable[[Tensor], Sequence[Tensor]]
FEATURES: Registry[FeatureMap] = Registry("feature map", "omni.objectives", entry_points="omni.feature_maps")

WIDTH = 32  # of the random network "projections"
RUNS = (1, 4, 16)  # numbers of runs, of "projections"


@FEATURES.register("latents")
def latents(x_BNC: Tensor) -> list[Tensor]:
    """One family: the latents themselves."""
    return [x_BNC.flatten(1)]


@FEATURES.register("projections")
def projections(x_BNC: Tensor) -> list[Tensor]:
    """The latents, and statistics of a fixed random network on them. Families in a fixed order."""
    num, families = x_BNC.shape[1], [x_BNC.flatten(1)]
    first, second = (w.to(x_BNC.device, x_BNC.dtype) for w in _weights(x_BNC.shape[2]))
    h_BHN = ((x_BNC @ first).tanh() @ second).tanh().mT
    for runs in sorted({min(r, num) for r in RUNS}):
        mean = adaptive_avg_pool1d(h_BHN, runs)
        families.append(mean.flatten(1))
        if runs < num:  # a run of one latent has no deviation
            spread = adaptive_avg_pool1d(h_BHN.pow(2), runs) - mean.pow(2)
            families.append((spread.clamp(min=0) + 1e-6).sqrt().flatten(1))
    return families


@lru_cache
def _weights(channels: int) -> tuple[Tensor, Tensor]:
    """(C, H), (H, H) float32: they depend on the number of channels alone. Keyed by name: never rename the keys."""
    key = Key(0).fold("feature projections", channels)
    return tuple(
        key.fold(name).normal((rows, WIDTH)) * (2 / rows) ** 0.5
        for name, rows in (("first", channels), ("second", WIDTH))
    )  # type: ignore[return-value]
