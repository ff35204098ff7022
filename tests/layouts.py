"""Random documents, as spans, and small models for the tests of layout, mask, transformer and engine."""

from __future__ import annotations

import torch

from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, Span, TokenSpan, pack

CHANNELS, VOCABULARY, PAD = 4, 320, 256


def random_spans(key: Key, max_segments: int = 5) -> list[Span]:
    """Any number and order of text, image and video segments; about half of the blocks supervised."""
    random = key.python()
    spans: list[Span] = []
    for i in range(1 + random.randrange(max_segments)):
        kind = random.choice(("text", "image", "video"))
        if kind == "text":
            ids = [random.randrange(PAD) for _ in range(1 + random.randrange(4))]
            spans.append(TokenSpan(ids, [random.random() < 0.5 for _ in ids]))
            continue
        grid = (1 if kind == "image" else 2, 1 + random.randrange(2), 1 + random.randrange(3))
        count = grid[0] * grid[1] * grid[2]
        for chunk in range(1 if kind == "image" else 1 + random.randrange(3)):
            latents = key.fold("latents", i, chunk).normal((count, CHANNELS))
            spans.append(LatentSpan(latents, grid, random.random() < 0.5))
    return spans


def random_batch(key: Key, num_documents: int = 4, copies: int = 2, rows: int = 2) -> Batch:
    documents = [random_spans(key.fold(n)) for n in range(num_documents)]
    trim = [key.fold("trim", n).python().random() < 0.5 for n in range(num_documents)]
    shapes = [Shape(rows, 400, 800)]
    [batch], count = pack(documents, shapes, channels=CHANNELS, pad_id=PAD, copies=copies, trim=trim, fixed_shape=False)
    assert count == num_documents
    return batch


def small_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    **transformer: object,
) -> Omni:
    """A model without zero weights: modulation and read-out are not at their zero start."""
    sizes = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "attention": attention}
    config = OmniConfig(
        transformer=TransformerConfig(**{**sizes, **transformer}),  # type: ignore[arg-type]
        flow=FlowHeadConfig(channels=CHANNELS, num_frequencies=4),
        vocab_size=VOCABULARY + 9,
    )
    model = Omni(config, Key(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name or "velocity" in name:
                parameter.copy_(Key(seed).fold("alive", name).normal(tuple(parameter.shape)) * 0.2)
    return model.to(dtype).eval()
