"""Times as diffusers' flow schedulers write them, as a list for `time_grid` and `GenerationOptions.grid`.

FlowMapEulerDiscreteScheduler and FlowMatchEulerDiscreteScheduler have our clock: sigma = 1 is noise, 0 is data,
timestep = num_train_timesteps * sigma, and a step is sample + (sigma_r - sigma_t) * velocity: our jump x + (s - t) F.
What differs is the unit of timesteps, and that a list given to `set_timesteps` (and `.timesteps`) has no last 0.
"""

from __future__ import annotations

from collections.abc import Iterable

from omni.samplers.schedule import time_grid


def from_diffusers(
    *,
    sigmas: Iterable[float] | None = None,
    timesteps: Iterable[float] | None = None,
    num_train_timesteps: int = 1000,
) -> list[float]:
    """Times from a scheduler's `.sigmas` or `.timesteps` (lists or tensors), the last 0 added where it is missing.

    What a scheduler holds after `set_timesteps` has its shift in it; a list on its way there does not.
    ValueError unless exactly one is given, and for values that do not decrease from at most 1 (sigmas) to 0, such as
    those of a scheduler with `invert_sigmas`.
    """
    if sigmas is not None and timesteps is None:
        times = [float(sigma) for sigma in sigmas]
    elif timesteps is not None and sigmas is None:
        times = [float(timestep) / num_train_timesteps for timestep in timesteps]
    else:
        raise ValueError("give either sigmas or timesteps of the scheduler, one of the two")
    if times and times[-1] != 0:
        times.append(0.0)
    return time_grid(max(len(times) - 1, 1), grid=times)
