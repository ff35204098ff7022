"""Greedy text of an imported model against transformers, token for token.

    python -m eval.experiments.imports.greedy GGUF WORK      imports GGUF to WORK and answers 20 questions

The prompts go through each side's own chat template and tokenizer; ids of prompts and of replies are compared, and the
texts that the engine gives to all prompts together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import omni
from eval.peers import greedy_replies, load_gguf
from omni.document import Document, Role, Text
from omni.generation.context import append_of, run_context
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.importers.decoders import import_decoder
from omni.model import Omni
from omni.nn.cache import History
from omni.sequence.layout import TokenSpan

PROMPTS = (
    "What is the capital of France?", "Name three colours.", "Write one sentence about the sea.", "What is 7 times 8?",
    "Translate 'good morning' into Spanish.", "Why is the sky blue?", "Who wrote Hamlet?", "List two prime numbers.",
    "Give me a recipe with eggs.", "What does a compiler do?", "Is a whale a fish?", "Tell me a short joke.",
    "What is photosynthesis?", "How many days has a leap year?", "Write a Python function that adds two numbers.",
    "What is the opposite of 'cold'?", "Name a planet with rings.", "Explain gravity to a child.",
    "¿Cuál es la capital de España?", "Write a haiku about autumn 🍂.",
)  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """Counts over prompts and reply tokens."""

    prompts: int
    equal_prompt_ids: int
    equal_reply_ids: int
    equal_texts: int
    tokens: int
    equal_tokens: int  # before the first difference of each reply


def compare(model: Omni, theirs: tuple[Any, Any], prompts: Sequence[str] = PROMPTS, num_tokens: int = 48) -> Agreement:
    """Answer every prompt on both sides. theirs: see `load_gguf`."""
    wanted = greedy_replies(*theirs, prompts, num_tokens)
    options = GenerationOptions(max_tokens=num_tokens, temperature=0.0)
    replies = Engine(model).generate_batch(prompts, [options] * len(prompts))
    counts = [0] * 5
    for prompt, reply, (prompt_ids, reply_ids, text) in zip(prompts, replies, wanted, strict=True):
        ours = greedy_ids(model, prompt_ids, num_tokens)
        pairs = list(zip(ours, reply_ids, strict=False))
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        equal = prompt_ids_of(model, prompt) == prompt_ids, ours == reply_ids, reply.text == text
        for place, value in enumerate((*equal, len(reply_ids), same)):
            counts[place] += int(value)
    return Agreement(len(prompts), *counts)


def prompt_ids_of(model: Omni, prompt: str) -> list[int]:
    """The ids of one question, ready for the answer."""
    spans = model.spans(Document((Text(prompt, Role.USER),)), generation_prompt=True)
    return [token for span in spans if isinstance(span, TokenSpan) for token in span.ids]


@torch.inference_mode()
def greedy_ids(model: Omni, prompt: list[int], num: int) -> list[int]:
    """The likeliest published ids after the prompt, up to `num`, with the first that ends a reply."""
    assert model.tokenizer is not None
    history, ids, new = History(model.transformer.new_pool()), list(prompt), []
    while len(new) < num:
        hidden, _ = run_context(model, [append_of(history, [TokenSpan(ids, [False] * len(ids))], 0)])
        logits = model.token.read(hidden[0][-1])[: model.tokenizer.num_text]
        new.append(int(logits.argmax()))
        if new[-1] in model.tokenizer.ends:
            break
        ids = new[-1:]
    return new


if __name__ == "__main__":
    file, work = map(Path, sys.argv[1:])
    print(compare(omni.from_pretrained(import_decoder(file, work / "model")), load_gguf(file)))
