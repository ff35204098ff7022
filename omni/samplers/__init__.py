"""Samplers: free functions that ask for F(x, t, s), one file each, registered by name. See `base` for the contract."""

from omni.samplers.base import (
    SAMPLERS,
    Call,
    Noise,
    Sampler,
    SamplerName,
    Sampling,
    State,
    Velocity,
    adds_noise,
    knobs,
    run_sampler,
)
from omni.samplers.diffusers_times import from_diffusers
from omni.samplers.schedule import GRIDS, num_steps, time_grid

__all__ = [
    "GRIDS", "SAMPLERS", "Call", "Noise", "Sampler", "SamplerName", "Sampling", "State", "Velocity", "adds_noise",
    "from_diffusers", "knobs", "num_steps", "run_sampler", "time_grid",
]  # fmt: skip
