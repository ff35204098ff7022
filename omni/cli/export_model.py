"""`omni export`: a model directory as a folder for the Hugging Face hub, whole or its text path."""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

import torch

from omni.cli.terminal import Printer
from omni.errors import check_place
from omni.importers.base import BASE_FILE
from omni.storage.shards import SafetensorsFolder


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds all weights of a model directory; float32 where a language model of its own precision is
    beside it. ValueError where there is none."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ValueError(
            f"no model directory at {str(folder)!r}; give a directory that holds config.json and {path.name}"
        )
    if (folder / BASE_FILE).is_file():
        return torch.float32
    found = {stored.dtype for stored in SafetensorsFolder(folder).tensors.values() if stored.dtype is not None}
    return reduce(torch.promote_types, found)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from omni.hf.export import export_model, export_text
    from omni.pretrained import from_pretrained, model_folder

    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"{str(out)!r} already exists; remove it or choose another name")
    check_place(out, "the folder")
    folder = model_folder(arguments.model)
    model = from_pretrained(folder, dtype=stored_dtype(folder))
    export = export_text if arguments.text else export_model
    export(model, out, arguments.name, arguments.license)
    loader = (
        "transformers' AutoModelForCausalLM" if arguments.text else "omni.from_pretrained and, with omni.hf, AutoModel"
    )
    Printer().line(f"wrote {out}, for {loader}; hf upload NAME {out} puts it on the hub")
    return 0
