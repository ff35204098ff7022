"""Samplers: free functions over a callable F(x, t, s), one file each, registered by name."""

from omni.samplers import euler, flow_map, gamma, heun, restart  # noqa: F401  (registration)
from omni.samplers.diffusers_times import from_diffusers
from omni.samplers.schedule import GRIDS, SAMPLERS, Noise, State, Velocity, adds_noise, knobs, num_steps, time_grid

__all__ = [
    "GRIDS", "SAMPLERS", "Noise", "State", "Velocity", "adds_noise", "from_diffusers", "knobs", "num_steps", "time_grid"
]  # fmt: skip
