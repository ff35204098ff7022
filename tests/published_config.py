"""The config.json of a published checkpoint, with other keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def changed(folder: Path, without: tuple[str, ...] = (), **keys: Any) -> None:
    """Change keys of config.json, and remove those of `without`."""
    data = json.loads((folder / "config.json").read_text())
    data = {name: value for name, value in {**data, **keys}.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(data))
