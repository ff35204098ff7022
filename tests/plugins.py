"""Packages that look as if pip had installed them: modules, metadata and entry points in a folder on sys.path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(folder: Path, name: str, points: Mapping[str, Mapping[str, str]], files: Mapping[str, str]) -> None:
    """A distribution `name`. points: of each group, the module of each name; files: the text of each module."""
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = []
    for group, modules in points.items():
        lines += [f"[{group}]", *(f"{key} = {module}" for key, module in modules.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for module, text in files.items():
        (folder / f"{module}.py").write_text(text)
