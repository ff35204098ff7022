"""Folders for the Hugging Face hub: a whole model, and the text path as the published class it was imported from.

    export_model(model, "folder")     the model directory and a model card; omni.from_pretrained and AutoModel read it
    export_text(model, "folder")      config.json, model.safetensors and tokenizer files of the published class

`export_text` is the inverse of `omni import`: a text path that was not trained gives the published tensors back, bit
for bit, in the dtype of the weights. Control ids and weights of latents are left out. A LoRA is merged first, or stays
in a folder of its own (importers.peft). Both folders have the form that `huggingface_hub.upload_folder` takes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from omni.config import build, parse_json, table_of
from omni.hf.card import model_card
from omni.importers.families import FAMILIES, Decoder
from omni.importers.layout import Part, layout_of
from omni.importers.writing import Written, write_tensors
from omni.model import Omni
from omni.storage.pieces import Sink

CARD = "README.md"
CONFIG = "config.json"


def export_model(
    model: Omni, folder: str | Path, name: str | None = None, license: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:  # fmt: skip
    """Write a model directory with a card, and return its path. name, license: on the card. dtype: of the stored
    weights; None: theirs. ValueError if the folder exists."""
    folder = Path(folder)
    model.save_pretrained(folder, dtype=dtype or model.token.embedding.weight.dtype)
    # The card is not in the manifest: people edit it on the hub.
    (folder / CARD).write_text(model_card(model, name or folder.name, license), encoding="utf-8")
    return folder


def export_text(model: Omni, folder: str | Path, name: str | None = None, license: str | None = None) -> Path:
    """Write the text path as a folder of its published class, and return its path. ValueError for a model that was not
    imported, or a folder that exists."""
    folder = Path(folder)
    if CONFIG not in model.published:
        raise ValueError(
            "this model was not imported from a published language model, so it has no published class; export the "
            "whole model"
        )
    if folder.exists():
        raise ValueError(f"{str(folder)!r} already exists; remove it or choose another name")
    table = table_of(parse_json(model.published[CONFIG], CONFIG), CONFIG)
    family = FAMILIES[table["model_type"]]
    keys = build({key: value for key, value in table.items() if key in family.model_fields}, family, CONFIG)
    tensors = list(published_tensors(model, keys))
    dtype = model.token.embedding.weight.dtype
    table |= {"dtype": str(dtype).removeprefix("torch.")}
    table.pop("torch_dtype", None)
    card = model_card(model, name or folder.name, license, text_only=True)
    files = {**model.published, CONFIG: (json.dumps(table, indent=2) + "\n").encode(), CARD: card.encode()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tmp-") as temporary:
        made = Path(temporary) / "made"  # it appears whole, or not at all
        made.mkdir()
        for file, content in files.items():
            (made / file).write_bytes(content)
        with (made / "model.safetensors").open("wb") as stream:
            sink = Sink(stream)
            write_tensors(sink, tensors)
            sink.finish()
        made.rename(folder)
    return folder


def published_tensors(model: Omni, keys: Decoder) -> Iterator[Written]:
    """The published tensors of the text path: rows of our weights, in their places and their order."""
    rotary = model.config.transformer.rotary
    own, rows = model.state_dict(), {}
    offset = keys.norm_offset - model.config.transformer.norm_offset  # a GGUF file stores norms with their offset
    for weight in layout_of(keys, 2 * rotary.num_turning(keys.heads[2]), "model."):
        at, value = 0, own[weight.name].detach().cpu()
        value = value - offset if offset and "norm" in weight.name else value
        for part in weight.parts:
            num = part.stop - part.start
            rows.setdefault(part.name, []).append((part, value[at : at + num]))
            at += num
    for published, parts in rows.items():
        yield _whole(published, parts)


def _whole(name: str, parts: list[tuple[Part, Tensor]]) -> Written:
    """A published tensor of its parts."""
    shape, dtype = parts[0][0].shape, parts[0][1].dtype

    def pieces() -> Iterator[Tensor]:
        made = torch.empty(shape, dtype=dtype)
        for part, value in parts:
            where = slice(part.start, part.stop) if part.order is None else part.order
            made[where] = value
        yield made

    return Written(name, tuple(shape), dtype, pieces)
