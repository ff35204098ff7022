"""The default way of decoding text of a model, measured before it is published:

    python -m train.tools.decoding MODEL --prompts FILE [--write]

Compares numbers of drafted tokens per pass under verification "coupled": all give the ids of autoregressive decoding.
For each it prints the accepted tokens per round (a property of model and prompts), the milliseconds per token on this
machine, eager and in native code, and with --write stores the fastest eager one in the model's generation.json. A
request never measures: the stored number is the default everywhere, and native code takes one token per pass.

FILE: one prompt per line, such as those of held-out documents.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omni.cli.arguments import exit_code
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.model import Omni
from omni.pretrained import from_pretrained

REPEATS = 5
MARGIN = 0.95  # drafts must save a twentieth


@dataclass(frozen=True)
class Mode:
    """One number of tokens per pass. accepted: tokens per round of speculative decoding; nan without drafts.
    milliseconds: per emitted token, the fastest of some runs."""

    tokens_per_pass: int
    accepted: float
    milliseconds: float


def measure(model: Omni, prompts: Sequence[str], compile: bool = False) -> list[Mode]:
    """Every power of two up to the length of the model's joint-token head, and 1. ValueError where ids differ."""
    most = 1 if model.config.joint is None else model.config.joint.length
    numbers = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]
    texts: dict[int, list[str]] = {}
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    accepted: dict[int, list[int]] = {}
    for number in REPEATS * numbers:  # in turn, so that disturbances of the machine affect all alike
        engine = Engine(model, compile, kept_positions=0)
        options = GenerationOptions(tokens_per_pass=number, temperature=1.0, max_tokens=64, steps=1)
        start = time.perf_counter()
        replies = [engine.generate(prompt, options, seed=seed) for seed, prompt in enumerate(prompts)]
        seconds[number].append(time.perf_counter() - start)
        accepted[number] = [draft.accepted for reply in replies for draft in reply.drafts]
        texts[number] = [reply.text for reply in replies]
    if any(texts[number] != texts[1] for number in numbers):
        raise ValueError("drafts gave other texts than autoregressive decoding; check the model with `omni verify`")
    assert model.tokenizer is not None
    tokens = sum(len(model.tokenizer.encode(text)) + 1 for text in texts[1])
    means = {number: statistics.fmean(found) if found else math.nan for number, found in accepted.items()}
    return [Mode(number, means[number], 1e3 * min(seconds[number]) / tokens) for number in numbers]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.tools.decoding", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a model directory")
    parser.add_argument("--prompts", required=True, type=Path, help="one prompt per line")
    parser.add_argument("--write", action="store_true", help="store the fastest in generation.json")
    given = parser.parse_args(arguments)

    def work() -> None:
        prompts = [line for line in given.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{given.prompts} has no prompts; give one per line")
        model = from_pretrained(given.model)
        for compile in (False, True):
            modes = measure(model, prompts, compile)
            for mode in modes:
                name = "native" if compile else "eager"
                print(f"{name}, tokens_per_pass = {mode.tokens_per_pass}: {mode.milliseconds:.2f} ms per token, "
                      f"{mode.accepted:.2f} accepted per round")  # fmt: skip
            if not compile and given.write:
                fastest = min(modes, key=lambda mode: mode.milliseconds)
                best = fastest.tokens_per_pass if fastest.milliseconds < MARGIN * modes[0].milliseconds else 1
                model.defaults = {**model.defaults, "tokens_per_pass": best}
                model.save_pretrained(given.model, replace=True)
                print(f"{given.model}/generation.json: tokens_per_pass = {best}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
