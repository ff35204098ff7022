"""A saved tokenizer, of whatever backend."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from omni.text.tokenizer import Read, Tokenizer, backends, from_disk, read_config


def load_tokenizer(directory: str | Path, read: Read | None = None) -> Tokenizer:
    """Load the tokenizer in `directory`, of any backend. ValueError if it is missing or damaged. `read`: see
    Tokenizer.load."""
    directory, read = Path(directory), cache(read or from_disk(Path(directory)))
    return backends.get(str(read_config(directory, read)["backend"])).load(directory, read)
