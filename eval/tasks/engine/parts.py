"""Where the time of a step goes: matrix products, attention, the codec, and all else."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.engine.together import TEXT, fresh
from eval.tasks.speed.comparison import GRID, PATCH, build_omni, machine
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions

PARTS = ("products", "attention", "codec", "other")
CASES = ("token", "tokens_16", "picture_64")


class PartsOptions(TaskOptions):
    """tokens: of each text. repeats: runs; the sum counts."""

    tokens: int = Field(default=64, ge=1)
    repeats: int = Field(default=5, ge=1)


def part_rows(options: PartsOptions) -> list[str]:
    return [f"{case}_{part}" for case in CASES for part in (*PARTS, "ms")]


@task("engine_parts", PartsOptions, rows=part_rows)
def engine_parts(context: Context, options: PartsOptions) -> Outcome:
    """Percent of the time of decoding one text and sixteen texts (bundled model), and of a picture of 64 latents in 4
    steps (8 M, random weights, exact codec); ms: of a step of all texts, and of the picture."""
    text = GenerationOptions(tokens_per_pass=1, max_tokens=options.tokens, max_images=0)
    rows, columns = GRID
    picture = GenerationOptions(
        tokens_per_pass=1,
        force_image=True,
        image_size=(rows * PATCH, columns * PATCH),
        steps=4,
        max_images=1,
        max_tokens=1,
    )
    large = build_omni(context, "8m", 4096).eval()
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "token": (options.tokens, lambda: fresh(context, True).generate(TEXT, text)),
        "tokens_16": (options.tokens, lambda: fresh(context, True).generate_batch([TEXT] * 16, text)),
        "picture_64": (1, lambda: Engine(large, kept_positions=0).generate("draw", picture)),
    }
    measures = []
    for case, (steps, run) in runs.items():
        run()
        with timed(context.model.codec, large.codec) as seconds:
            start = time.perf_counter()
            for _ in range(options.repeats):
                run()
            total = time.perf_counter() - start
        seconds["other"] = total - sum(seconds.values())
        measures += [Measure(f"{case}_{part}", 100 * seconds[part] / total, "%", machine()) for part in PARTS]
        measures.append(Measure(f"{case}_ms", 1e3 * total / steps / options.repeats, "ms", machine()))
    return Outcome(measures)


@contextlib.contextmanager
def timed(*codecs: Any) -> Iterator[Counter[str]]:
    """Seconds inside matrix products, attention and codecs, by part, while the context lasts."""
    seconds: Counter[str] = Counter()
    inside = [False]

    def wrapped(function: Callable, part: str) -> Callable:
        def run(*given: Any, **named: Any) -> Any:
            if inside[0]:
                return function(*given, **named)
            inside[0], start = True, time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                inside[0] = False
                seconds[part] += time.perf_counter() - start

        return run

    places = [(F, "linear", "products"), (F, "scaled_dot_product_attention", "attention")]
    places += [(codec, name, "codec") for codec in codecs for name in ("decode", "encode")]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, wrapped(getattr(owner, name), part))
    try:
        with torch.inference_mode():
            yield seconds
    finally:
        for owner, name, function in saved:
            setattr(owner, name, function)
