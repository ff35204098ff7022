"""Load a saved tokenizer of any backend. A new backend is a file that registers itself, imported in `load_backend`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from omni.text.tokenizer import Read, Tokenizer, backends, from_disk, read_config


def load_tokenizer(directory: str | Path, read: Read | None = None) -> Tokenizer:
    """Load the tokenizer in `directory`, of any backend. ValueError if it is missing or damaged. `read`: see
    Tokenizer.load."""
    directory, read = Path(directory), cache(read or from_disk(Path(directory)))
    return load_backend(str(read_config(directory, read)["backend"])).load(directory, read)


def load_backend(name: str) -> type[Tokenizer]:
    """The tokenizer class of a backend name: bpe or sentencepiece. ValueError with the nearest name otherwise."""
    from omni.text import bpe, sentencepiece  # noqa: F401  (importing a backend registers it)

    return backends.get(name)
