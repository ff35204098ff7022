"""Prompts of many lengths against transformers (Llama class, SDPA): time to the first token, and extra memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from typing import Any

from pydantic import Field

from eval.metrics.timing import alternate, medians
from eval.peers import build_llama, llama_decode
from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.speed.comparison import SIZES, build_omni, ids_like, machine, num_prompt_ids, prompt_of
from eval.tasks.speed.text import omni_decode


class LengthsOptions(TaskOptions):
    """lengths: of the prompts in bytes, an id each. size: of SIZES."""

    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    size: str = "8m"
    repeats: int = Field(default=3, ge=1)


def length_rows(options: LengthsOptions) -> list[str]:
    ends = [str(length) for length in options.lengths]
    return [f"{row}_{end}" for end in ends for row in ("time", "memory", "milliseconds")] + [
        "time_worst",
        "memory_worst",
    ]


@task("engine_prefill", LengthsOptions, rows=length_rows)
def engine_prefill(context: Context, options: LengthsOptions) -> Outcome:
    """time, memory: ours over theirs, float32. memory: the highest resident size during the run, over that before
    it."""
    measures, worst = [], {"time": 0.0, "memory": 0.0}
    for length in options.lengths:
        ours = build_omni(context, options.size, 4096, pictures=False).eval()
        ours.config = ours.config.model_copy(update={"max_context": 2 * length + 64})
        width, depth, heads, hidden = SIZES[options.size]
        prompt = prompt_of(length)
        num = num_prompt_ids(ours, prompt)
        theirs = llama_decode(build_llama(width, depth, heads, hidden, 4096, num + 8), ids_like(1, num), 1)
        runs: dict[str, Callable[[], Any]] = {"ours": omni_decode(ours, [prompt], 1), "theirs": theirs}
        found, peaks = (
            medians(alternate(runs, options.repeats)),
            {name: extra_memory(run) for name, run in runs.items()},
        )
        note = (
            f"{num} ids; {peaks['ours'] / 2**20:.0f} and {peaks['theirs'] / 2**20:.0f} MiB; {machine('transformers')}"
        )
        values = {"time": found["ours"] / found["theirs"], "memory": peaks["ours"] / max(peaks["theirs"], 1)}
        measures += [Measure(f"{name}_{length}", value, "x", note) for name, value in values.items()]
        measures.append(Measure(f"milliseconds_{length}", 1e3 * found["ours"], "ms", note))
        worst = {name: max(worst[name], value) for name, value in values.items()}
    measures += [Measure(f"{name}_worst", value, "x") for name, value in worst.items()]
    return Outcome(measures)


def extra_memory(run: Callable[[], Any]) -> int:
    """Bytes of the highest resident size during a run above that before it."""
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest resident size begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        [line] = [line for line in file if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10
