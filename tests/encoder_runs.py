"""A small training run of a model with a picture encoder, on three documents with two pictures each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from omni.config import load_toml
from omni.document import Document, Image, Role, Text
from omni.rng import Key
from omni.sequence.layout import Batch
from train.build import build_run
from train.loop import Run
from train.recipe import Recipe

RECIPE = """
max_steps = 4
codec = {{ kind = "pixels", patch = 8, frames_per_chunk = 2 }}
encoder = "{encoder}"

[model]
width = 32
depth = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16

[heads.encoder]
pictures = "{pictures}"

[batch]
shapes = [{{ rows = 2, budget = 160, refine_budget = 64 }}]

[[data]]
name = "jsonl"
options = {{ path = "{data}" }}

[[objectives]]
name = "next_token"

[[objectives]]
name = "shortcut"
options = {{ guidance_scale = 2.0 }}

[report]
save_steps = 1000
"""


def picture(seed: int) -> torch.Tensor:
    return (Key(seed).fold("picture").uniform((16, 24, 3)) * 255).byte()


def recipe(folder: Path, encoder: Path, pictures: str, *changes: str) -> Recipe:
    documents = [
        Document(
            (
                Image(picture(n), Role.USER),
                Text(f"{n}", Role.USER),
                Text("as", Role.ASSISTANT, True),
                Image(picture(n + 3), Role.ASSISTANT, True),
            )
        )
        for n in range(3)
    ]
    (folder / "d.jsonl").write_text("\n".join(document.to_json() for document in documents) + "\n")
    text = RECIPE.format(encoder=encoder, pictures=pictures, data=folder / "d.jsonl")
    (folder / "recipe.toml").write_text(text)
    return load_toml(folder / "recipe.toml", changes, Recipe)


def make(folder: Path, encoder: Path, pictures: str = "both", *changes: str) -> Run:
    return build_run(recipe(folder, encoder, pictures, *changes), folder / "run")


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    yield from (batch.ids, batch.latents, batch.is_latent, batch.target, batch.refine_latents, batch.item)
    if batch.features is not None:
        yield from (batch.features.values, batch.features.place, batch.features.at)
    if batch.null is not None:
        yield from tensors(batch.null)
