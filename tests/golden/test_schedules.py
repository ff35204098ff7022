"""A sample of every order of generation, on a small model in float64, equals the stored one.

After a change that is meant to change samples, `RECORD=1 pytest tests/golden/test_schedules.py` stores the present
ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import follow, living
from torch import Tensor

from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Role, Video
from omni.generation.engine import Engine
from omni.generation.events import BlockStep
from omni.generation.options import GenerationOptions
from omni.model import Omni
from omni.sequence.block_context import BlockContext
from omni.sequence.layout import TokenSpan

STORED = Path(__file__).parent / "schedules.json"
CLIP = Video(torch.zeros(6, 8, 12, 3, dtype=torch.uint8), 8.0, Role.ASSISTANT, supervise=True)  # three blocks

# Name -> what noisy blocks read, options of the request, options of a model's flow head.
SYSTEMS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "full sequence": ({"reads": "all"}, {"delay": 0}, {}),
    "block-autoregressive": ({}, {}, {}),
    "masked latents, transformer": ({"unit": "latent"}, {"rounds": 4}, {}),
    "masked latents, head of two blocks": ({"unit": "latent"}, {"rounds": 4}, {"head_depth": 2}),
    "Diffusion Forcing": ({"reads": "before", "finished": "refine", "context_time": 0.02}, {"delay": 1}, {}),
    "Diffusion Forcing, noise in context": (
        {"reads": "before", "finished": "refine", "context_time": 0.1, "context_noise": True}, {"delay": 1}, {}
    ),
    "AR-Diffusion": ({"reads": "before"}, {"delay": 2}, {}),
    "Rolling Diffusion": ({"reads": "all"}, {"delay": 1.5, "steps": 3}, {}),
    "Rolling Forcing": ({"reads": "before"}, {"delay": 1, "sampler": "flow_map"}, {}),
    "level by level": (
        {"reads": "all", "finished": "refine"}, {"blocks": "level_major", "sampler": "flow_map", "steps": 2}, {}
    ),
    "level by level, fresh noise": (
        {"reads": "all", "finished": "refine"}, {"blocks": "level_major", "sampler": "restart", "steps": 2}, {}
    ),
    "one shot": ({"reads": "all"}, {"delay": 0, "steps": 1, "sampler": "flow_map"}, {}),
    "a matrix": (
        {"reads": "all", "finished": "refine"},
        {"blocks": [[2, 2, 2], [2, 0, 1], [1, 0, 1], [0, 0, 0]], "steps": 2}, {},
    ),
}  # fmt: skip


def sample(plain: Omni, blocks: dict[str, Any], options: dict[str, Any], flow: dict[str, Any]) -> list[float]:
    """Four numbers of each block: mean, deviation, first, last."""
    model, config = plain, plain.config
    if flow:
        model = Omni(config.model_copy(update={"flow": config.flow.model_copy(update=flow)})).eval()
        weights = plain.state_dict()
        model.load_state_dict({**model.state_dict(), **weights})
        model.tokenizer, model.codec = plain.tokenizer, plain.codec
    model = model.double()
    model.config = model.config.model_copy(update={"blocks": BlockContext(**blocks)})
    engine, ended = Engine(model), dict[int, Tensor]()
    [ids] = [span.ids for span in model.spans(Document((CLIP,)))[:1] if isinstance(span, TokenSpan)]
    script = ids[ids.index(engine.control.video) :]
    follow(engine, lambda request: script)
    for event in engine.stream("move", GenerationOptions(**{"steps": 4, "max_images": 1, "max_tokens": 8, **options})):
        if isinstance(event, BlockStep):
            ended[event.block] = event.latents
    plain.config = config
    numbers = [[x.mean(), x.std(), x[0, 0], x[-1, -1]] for _, x in sorted(ended.items())]
    return [float(number) for block in numbers for number in block]


@pytest.fixture(scope="module")
def plain(tiny_model) -> Omni:  # noqa: ANN001
    model = living(tiny_model)
    model.codec = PixelCodec(PixelConfig(patch=4, frames_per_chunk=2))
    return model


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_sample_of_every_order(plain: Omni, name: str) -> None:
    found = sample(plain, *SYSTEMS[name])
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    if os.environ.get("RECORD"):
        STORED.write_text(json.dumps(stored | {name: [round(x, 5) for x in found]}, indent=1, sort_keys=True) + "\n")
        return
    assert len(found) == 12 and found == pytest.approx(stored[name], abs=2e-5)


def test_the_stored_samples_differ() -> None:
    """No two orders give the same sample."""
    stored = json.loads(STORED.read_text())
    assert sorted(stored) == sorted(SYSTEMS)
    assert len({tuple(numbers) for numbers in stored.values()}) == len(stored)
