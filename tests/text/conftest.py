"""Tiny tokenizers of both backends, trained in a fraction of a second."""

from __future__ import annotations

import pytest

from omni.text.bpe import BPETokenizer
from omni.text.sentencepiece import SentencePieceTokenizer
from omni.text.tokenizer import Tokenizer

WORDS = [*("a", "red", "apple", "green", "cat", "dog", "draw", "the", "what", "is", "this", "left", "of", "above")]
WORDS += [*("two", "three", "für", "été", "猫", "рисуй")]
CORPUS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) + f".\nNow {i}?" for i in range(300)]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


PHRASES = [" red apple", "red apple", " apple", " what is this", "<|image|>", " für été", "猫"]


@pytest.fixture(scope="session", params=["bpe", "sentencepiece", "bpe with phrases", "sentencepiece with phrases"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = BPETokenizer if request.param.startswith("bpe") else SentencePieceTokenizer
    if request.param.endswith("phrases"):
        return backend.train(CORPUS, 340 - len(PHRASES)).with_phrases(PHRASES)
    return backend.train(CORPUS, 340)
