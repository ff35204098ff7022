"""What one user of the model waits for on this machine, in new processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import torch
from pydantic import Field

from eval.task import Context, Measure, Outcome, task
from eval.tasks.pretrained.smol_speed import spread
from eval.tasks.smol import laptop_process
from eval.tasks.smol.answers import SmolOptions, dtype_of
from eval.tasks.smol.laptop_process import WAYS, Waited
from eval.tasks.speed.comparison import machine

ROWS = ("loading", "imports", "first_text", "picture", "tokens_per_second", "memory_gb")
VALUES = {"first_text": ("text", "s"), "picture": ("picture", "s"), "tokens_per_second": ("native", "tokens/s")}


class SmolLaptopOptions(SmolOptions):
    """processes: of each way, alternating; medians count. repeats: timed replies of a process with native code."""

    processes: int = Field(default=3, ge=1)
    repeats: int = Field(default=3, ge=1)


@task("smol_laptop", SmolLaptopOptions, rows=ROWS)
def smol_laptop(context: Context, options: SmolLaptopOptions) -> Outcome:
    """loading: of from_pretrained; imports: before it, of torch and the library. first_text, picture: after loading.
    tokens_per_second: of native code. memory_gb: the largest resident memory of all processes, in 10^9 bytes."""
    dtype, model = dtype_of(context, options), context.model_path or ""
    found: dict[str, list[Waited]] = {way: [] for way in WAYS}
    for _ in range(options.processes):
        for way in WAYS:
            found[way].append(in_new_process(way, dtype, model, options.max_tokens, options.repeats))
    note = f"{dtype}; {machine()}"
    return Outcome(measures_of(found, note), notes=["files are in the system's cache; " + note])


def in_new_process(way: str, dtype: str, model: str, tokens: int, repeats: int) -> Waited:
    """Measure in a new process, with as many threads as here. ValueError with the end of its errors where it fails."""
    command = [sys.executable, "-m", laptop_process.__name__, way, dtype, model, str(tokens), str(repeats)]
    changes = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **changes})
    if done.returncode:
        raise ValueError(f"the process of {way!r} failed: {done.stderr.strip()[-500:]}")
    return Waited(**json.loads(done.stdout.splitlines()[-1]))


def measures_of(found: dict[str, list[Waited]], note: str) -> list[Measure]:
    """The rows of all processes."""
    every = [one for ones in found.values() for one in ones]
    loads, imports = [one.load_seconds for one in every], [one.import_seconds for one in every]
    peaks = {way: max(one.peak_gigabytes for one in ones) for way, ones in found.items()}
    memory = ", ".join(f"{way} {peak:.2f}" for way, peak in peaks.items())
    out = [
        Measure("loading", statistics.median(loads), "s", f"{spread(loads)}; {note}"),
        Measure("imports", statistics.median(imports), "s", f"{spread(imports)}; {note}"),
        Measure("memory_gb", max(peaks.values()), "GB", f"{memory}; {note}"),
    ]
    for row, (way, unit) in VALUES.items():
        values = [one.value for one in found[way]]
        out.append(Measure(row, statistics.median(values), unit, f"{spread(values)}; {note}"))
    return out
