"""Samplers: free functions over a callable F(x, t, s), one file each, registered by name."""

from typing import Annotated

from pydantic import AfterValidator

from omni.samplers import euler, flow_map, gamma, heun, restart  # noqa: F401  (registration)
from omni.samplers.diffusers_times import from_diffusers
from omni.samplers.schedule import GRIDS, SAMPLERS, Noise, State, Velocity, adds_noise, knobs, num_steps, time_grid


def _known(name: str) -> str:
    SAMPLERS.get(name)
    return name


SamplerName = Annotated[str, AfterValidator(_known)]  # a field of options: an unknown name is an error

__all__ = [
    "GRIDS", "SAMPLERS", "Noise", "SamplerName", "State", "Velocity", "adds_noise", "from_diffusers", "knobs",
    "num_steps", "time_grid",
]  # fmt: skip
