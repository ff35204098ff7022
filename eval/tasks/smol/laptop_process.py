"""What one user of the model waits for, in a process of its own.

python -m eval.tasks.smol.laptop_process picture bf16 MODEL 64 3     prints one line of JSON

text       the first request for text, of an eager engine
picture    the first request for a picture, of an eager engine
native     the rate of text of an engine with native code, after a first reply
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from eval.experiments.imports.fresh import peak_bytes

WAYS = ("text", "picture", "native")
PLAIN = "Tell me in a few sentences why the sky is blue at noon and red in the evening."
DRAW = "draw a cat"


@dataclass(frozen=True)
class Waited:
    """Of one process. import_seconds: of torch and the library. load_seconds: of from_pretrained. value: of the way,
    seconds after loading until the first text or the finished picture, or tokens per second; NaN where there is none.
    peak_gigabytes: resident memory, mapped files included, in 10^9 bytes."""

    import_seconds: float
    load_seconds: float
    value: float
    peak_gigabytes: float


def measure(way: str, dtype: str, model: str, tokens: int, repeats: int) -> Waited:
    """Measure in this process. model: a model directory or the name of a shipped one; empty: the bundled one."""
    start = time.perf_counter()
    import torch

    import omni

    load = omni.from_pretrained
    imported = time.perf_counter()
    loaded_model = load(model or None, dtype={"float32": torch.float32, "bf16": torch.bfloat16}[dtype])
    loaded = time.perf_counter()
    engine = omni.Engine(loaded_model, compile=way == "native", kept_positions=0)
    if way == "native":
        text_rate(engine, tokens)
        value = statistics.median(text_rate(engine, tokens) for _ in range(repeats))
    else:
        value = first_of(engine, way, tokens) - loaded
    return Waited(imported - start, loaded - imported, value, peak_bytes() / 1e9)


def first_of(engine: Any, way: str, tokens: int) -> float:
    """The time of the first text or the first finished picture; NaN where the reply has none."""
    from omni.generation.events import BlockDone, TextDelta

    kind = TextDelta if way == "text" else BlockDone
    events = engine.stream(PLAIN if way == "text" else DRAW, temperature=0.0, max_tokens=tokens)
    return next((time.perf_counter() for event in events if isinstance(event, kind)), math.nan)


def text_rate(engine: Any, tokens: int) -> float:
    """Tokens per second behind the first, of a greedy reply; NaN for a reply of fewer than two."""
    from omni.generation.events import TextDelta

    times, text = [], ""
    for event in timed(engine.stream(PLAIN, temperature=0.0, max_tokens=tokens), times.append):
        if isinstance(event, TextDelta):
            text += event.text
        else:
            times.pop()
    num = len(engine.tokenizer.encode(text))
    return (num - 1) / (times[-1] - times[0]) if num > 1 and len(times) > 1 else math.nan


def timed(events: Iterator[Any], keep: Callable[[float], Any]) -> Iterator[Any]:
    """The events, and the time of each to `keep`."""
    for event in events:
        keep(time.perf_counter())
        yield event


def main(arguments: list[str]) -> None:
    """WAY DTYPE MODEL TOKENS REPEATS."""
    way, dtype, model, tokens, repeats = arguments
    print(json.dumps(asdict(measure(way, dtype, model, int(tokens), int(repeats)))))


if __name__ == "__main__":
    main(sys.argv[1:])
