"""Samplers: free functions over a callable F(x, t, s), one file each, registered by name."""

from omni.samplers import euler, flow_map  # noqa: F401  (registration)
from omni.samplers.schedule import SAMPLERS, State, time_grid

__all__ = ["SAMPLERS", "State", "time_grid"]
