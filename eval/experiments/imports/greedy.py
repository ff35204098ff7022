"""Greedy text of an imported model against transformers, token for token.

    python -m eval.experiments.imports.greedy GGUF WORK      imports GGUF to WORK and answers 20 questions

The prompts go through each side's own chat template and tokenizer; ids of prompts and of replies are compared, and the
text that the engine gives.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import omni
from eval.peers import greedy_replies
from omni.document import Document, Role, Text
from omni.generation.context import append_of, run_context
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


def compare(gguf: Path, work: Path, num_tokens: int = 48) -> Agreement:
    """Import the file to work/model and answer every prompt on both sides, in float32."""
    model = omni.from_pretrained(import_decoder(gguf, work / "model"))
    theirs = greedy_replies(gguf, PROMPTS, num_tokens)
    counts = [0] * 5
    for prompt, (prompt_ids, reply_ids, reply) in zip(PROMPTS, theirs, strict=True):
        ids = _prompt_ids(model, prompt)
        ours = greedy_ids(model, prompt_ids, num_tokens)
        same = next((n for n, (a, b) in enumerate(zip(ours, reply_ids, strict=False)) if a != b), len(reply_ids))
        text = model.generate(prompt, max_tokens=num_tokens, temperature=0.0).text
        for place, value in enumerate((ids == prompt_ids, ours == reply_ids, text == reply, len(reply_ids), same)):
            counts[place] += int(value)
    return Agreement(len(PROMPTS), *counts)


def _prompt_ids(model: Omni, prompt: str) -> list[int]:
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
    print(compare(Path(sys.argv[1]), Path(sys.argv[2])))
