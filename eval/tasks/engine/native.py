"""The native step: many texts in one batch against one after another, and the share of the memory bandwidth that it
reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from eval.metrics.timing import alternate, medians
from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.speed.comparison import build_omni, machine, prompt_of
from eval.tasks.speed.text import omni_decode


class NativeOptions(TaskOptions):
    """tokens: of each text. texts: in the batch. large: the size whose weights do not fit into a cache."""

    tokens: int = Field(default=64, ge=1)
    texts: int = Field(default=8, ge=2)
    large: str = "90m"
    repeats: int = Field(default=3, ge=1)


@task("engine_native", NativeOptions, rows=("batch", "bandwidth", "gigabytes_per_second"))
def engine_native(context: Context, options: NativeOptions) -> Outcome:
    """batch: eight long texts one after another, over the same in one batch (8 M). bandwidth: bytes of the weights that
    one token reads, over its time, in percent of the bandwidth of reading memory."""
    small = build_omni(context, "8m", 4096, pictures=False, bf16_values=True).eval()
    prompt = prompt_of(16)
    one = omni_decode(small, [prompt], options.tokens, compile=True)
    runs: dict[str, Callable[[], Any]] = {
        "one by one": lambda: [one() for _ in range(options.texts)],
        "together": omni_decode(small, [prompt] * options.texts, options.tokens, compile=True),
    }
    found = medians(alternate(runs, options.repeats))
    large = build_omni(context, options.large, 4096, pictures=False, bf16_values=True).eval()
    run = omni_decode(large, [prompt], options.tokens, compile=True)
    weights = [p for layer in large.transformer.blocks for p in layer.text.parameters()] + [large.token.output_weight]  # type: ignore[union-attr]
    size = 2 * sum(p.numel() for p in weights)
    del weights, large
    seconds = medians(alternate({"run": run}, options.repeats))["run"] / options.tokens
    memory = bandwidth()
    return Outcome([
        Measure("batch", found["one by one"] / found["together"], "x", machine()),
        Measure("bandwidth", 100 * size / seconds / memory, "%", f"of {memory / 1e9:.1f} GB/s; {machine()}"),
        Measure("gigabytes_per_second", size / seconds / 1e9, "GB/s", machine()),
    ])  # fmt: skip


def bandwidth() -> float:
    """Bytes per second of reading a gigabyte, the median of nine."""
    data = torch.ones(1 << 28)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        data.max()
        seconds.append(time.perf_counter() - start)
    return data.numel() * 4 / statistics.median(seconds)
