"""Timed replies of equal length: by the engine, with and without drafts, and by transformers.

Every reply has exactly `tokens` tokens: the ids that end a turn are forbidden on both sides. Times are of the tokens
after the first ones, so the pass over the prompt does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni.document import Document
from omni.generation.engine import Engine
from omni.generation.events import Drafted, TextDelta
from omni.generation.options import GenerationOptions
from omni.model import Omni
from omni.sequence.layout import TokenSpan


@dataclass(frozen=True)
class Replies:
    """Of all prompts in turn: their texts, rounds of speculative decoding after the first of each reply, and seconds
    and number of tokens after the first event of each."""

    texts: list[str]
    rounds: list[Drafted]
    seconds: float
    num_tokens: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def per_pass(self) -> float:
        """Emitted tokens per pass over text."""
        return 1 + sum(one.accepted for one in self.rounds) / len(self.rounds)

    def acceptance(self, num: int) -> list[float]:
        """The share of rounds with at least j tokens accepted, j = 1 .. num, among those that drafted j."""
        found = []
        for j in range(1, num + 1):
            drafted = [one for one in self.rounds if one.drafted >= j]
            found.append(sum(one.accepted >= j for one in drafted) / len(drafted) if drafted else 0.0)
        return found


def endless_engine(model: Omni, native: bool) -> Engine:
    """An engine whose replies end at their length alone, and that reads every prompt."""
    engine = Engine(model, native, kept_positions=0)
    control = engine.control
    engine.grammar.allowed["text"][[*engine.tokenizer.ends, control.image, control.video]] = -torch.inf
    return engine


def decode(
    engine: Engine, prompts: Sequence[Document], tokens: int, temperature: float, drafted: int = 0,
    verify: str = "coupled",
) -> Replies:  # fmt: skip
    """Replies of `tokens` tokens, one at a time. drafted: tokens of a draft; 0: autoregressive decoding."""
    how: dict[str, Any] = {"max_tokens": tokens, "temperature": temperature, "tokens_per_pass": 1}
    if drafted:
        how |= {"tokens_per_pass": max(2, drafted), "verify": verify}
    texts, rounds, seconds, number = [], [], 0.0, 0
    for seed, prompt in enumerate(prompts):
        text, own, first, given = "", [], 0.0, 0
        for event in engine.stream(prompt, GenerationOptions(**how), seed=seed):
            if not first and isinstance(event, Drafted | TextDelta):
                first, given = time.perf_counter(), event.accepted + 1 if isinstance(event, Drafted) else 1
            elif isinstance(event, Drafted):
                own.append(event)
            if isinstance(event, TextDelta):
                text += event.text
        seconds += time.perf_counter() - first
        number += tokens - given
        texts.append(text)
        rounds += own
    return Replies(texts, rounds, seconds, number)


def prompt_ids(model: Omni, prompt: Document) -> list[int]:
    """The ids of a prompt, up to the reply."""
    spans = model.spans(prompt, generation_prompt=True)
    return [token for span in spans if isinstance(span, TokenSpan) for token in span.ids]


def transformers_runs(
    model: Any, prompts: Sequence[list[int]], ends: Sequence[int], tokens: int, temperature: float, lookup: int
) -> Mapping[str, Callable[[], float]]:
    """Functions that give the tokens per second of `generate`, without and with prompt-lookup decoding."""
    how: dict[str, Any] = {"do_sample": temperature > 0, "suppress_tokens": list(ends), "pad_token_id": 0}
    if temperature:
        how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config.eos_token_id = None

    def seconds_of(num: int, more: Mapping[str, Any]) -> float:
        total = 0.0
        for ids in prompts:
            given = torch.tensor([ids])
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=num, **how, **more)
            total += time.perf_counter() - start
        return total

    def rate(more: Mapping[str, Any]) -> float:
        return (tokens - 1) * len(prompts) / (seconds_of(tokens, more) - seconds_of(1, {}))

    return {"transformers": lambda: rate({}), "lookup": lambda: rate({"prompt_lookup_num_tokens": lookup})}
