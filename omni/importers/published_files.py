"""The published model's own files that an import keeps, so that its text path can be exported again (omni.hf.export).

They are kept as they came, in the folder `published` of the model directory: config.json and the tokenizer's files. Of
a GGUF file they are made: the keys of a config.json, and the tokenizer as transformers writes it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Names of files, beside config.json, that transformers' tokenizers and generation read.
FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
MAX_BYTES = 256 << 20
CLASSES = {  # model_type -> the class of the text model
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM",
}  # fmt: skip


def published_files(path: Path, gguf: Path | None, config: Mapping[str, Any], theirs: Any) -> dict[str, bytes]:
    """Name -> content. config: the keys of the text model. theirs: its tokenizer, as transformers has read it; None: no
    files of a tokenizer are kept. ValueError for a file beyond MAX_BYTES."""
    table = {**config, "architectures": [CLASSES[config["model_type"]]]}
    table.pop("_name_or_path", None)
    ids = {} if gguf is None or theirs is None else _special_ids(theirs)
    found = {"config.json": _json(table | ids)}
    if ids:
        found[FILES[0]] = _json(ids)
    if gguf is None:
        return found | _read(path, FILES[:1] if theirs is None else FILES)
    if theirs is None:
        return found
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return found | _read(Path(folder), FILES)


def _special_ids(theirs: Any) -> dict[str, int]:
    """The ids that begin, end and fill a text: without them transformers does not stop generating."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(theirs, name)) is not None}


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2) + "\n").encode()


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    for file in (folder / name for name in names):
        if file.is_file():
            if file.stat().st_size > MAX_BYTES:
                raise ValueError(f"{str(file)!r} has more than {MAX_BYTES:,} bytes; no file of a tokenizer is so large")
            found[file.name] = file.read_bytes()
    return found
