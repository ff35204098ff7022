"""Launches of the Triton kernels of attention with its tangent: recorded instead of run, compiled in threads, timed.

with caught() as launches:
    attend_with_tangent(..., backend="triton")   # no kernel runs: the results are not written
failures = compile_all(launches)
launches[0].run()
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from omni.nn.attention import jvp_launch

HEAD_START_CYCLES = 2_000_000  # of the device, about a millisecond


class Launch(NamedTuple):
    """A kernel and its launch arguments."""

    kernel: Any
    grid: tuple[int, int]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.fn.__name__

    @property
    def tiles(self) -> tuple[int, int, int, int]:
        """Queries, keys, warps, stages."""
        return tuple(self.options.get(key, 0) for key in ("BQ", "BK", "num_warps", "num_stages"))  # type: ignore[return-value]

    def run(self) -> None:
        """Launch it again."""
        self.kernel[self.grid](*self.arguments, **self.options)

    @property
    def compiled_for(self) -> tuple[Any, ...]:
        """The key of a Triton compilation: options, dtypes, alignment of pointers, integers 1 or 16 n."""

        def of(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(of, x))
            if isinstance(x, torch.Tensor):
                return x.dtype, x.data_ptr() % 16 == 0
            return (x == 1, x % 16 == 0) if isinstance(x, int) else type(x)

        return self.name, of(self.arguments), tuple(self.options.items())

    def compile(self) -> Any:
        """Compile the kernel for these arguments, without a launch."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


@contextlib.contextmanager
def recorded_launches(also_run: Sequence[str] = ()) -> Iterator[list[Launch]]:
    """Record every launch inside the context in the yielded list; only the kernels of `also_run` run."""
    launches: list[Launch] = []
    real = jvp_launch.launch_kernel

    def launch_kernel(*given: Any) -> None:
        launches.append(Launch(*given))
        if launches[-1].name in also_run:
            launches[-1].run()

    jvp_launch.launch_kernel = launch_kernel
    try:
        yield launches
    finally:
        jvp_launch.launch_kernel = real


def compile_all(launches: Sequence[Launch]) -> list[tuple[Launch, str]]:
    """Compile the launches in parallel, each kind once. Returns the failed launches and their errors."""

    def attempt(launch: Launch) -> str:
        try:
            launch.compile()
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return ""

    kinds = list({launch.compiled_for: launch for launch in launches}.values())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return [(launch, message) for launch, message in zip(kinds, pool.map(attempt, kinds), strict=True) if message]


def milliseconds(run: Callable[[], object], budget: float = 80.0, most: int = 20) -> float:
    """The median time by CUDA events, after two uncounted runs: 3 to `most` runs, in about `budget` milliseconds."""
    times: list[float] = []
    for number in range(most + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)  # the host gets ahead; else a short run's time would be its launch time
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(before.elapsed_time(after))
        if len(times) >= 3 and sum(times) > budget:
            break
    return statistics.median(times)
