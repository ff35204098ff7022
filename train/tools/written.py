"""What tools that let a model write JSON rows share: the engine, and a file of finished parts to resume from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from omni.generation.engine import Engine
from omni.pretrained import from_pretrained


def engine_of(model: Path, compile: bool) -> Engine:
    """An engine in bfloat16; in float32 where the CPU is slow in bfloat16 and the code is not native."""
    from omni.nn.precision import fast_bf16

    dtype = torch.bfloat16 if compile or fast_bf16() else torch.float32
    return Engine(from_pretrained(model, dtype=dtype), compile)


class Parts:
    """The rows of finished parts, by their first number, in .OUT.parts beside OUT. settings: JSON values that the rows
    depend on. ValueError for a file of other settings."""

    def __init__(self, out: Path, settings: Sequence[Any]) -> None:
        self.out, self.path = out, out.with_name(f".{out.name}.parts")
        self.parts: dict[int, list[Any]] = {}
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(list(settings)) + "\n", encoding="utf-8")
            return
        kept, *lines = self.path.read_text(encoding="utf-8").splitlines()
        if json.loads(kept) != list(settings):
            raise ValueError(
                f"{self.path} was begun with {kept}; delete it to begin anew with {json.dumps(list(settings))}"
            )
        for line in lines:
            first, rows = json.loads(line)
            self.parts[first] = rows

    def has(self, first: int) -> bool:
        """Whether a part is finished."""
        return first in self.parts

    def add(self, first: int, rows: list[Any]) -> None:
        """A finished part, which is kept at once."""
        self.parts[first] = json.loads(json.dumps(rows))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([first, rows]) + "\n")

    def rows(self) -> list[Any]:
        """All rows, in order."""
        return [row for _, rows in sorted(self.parts.items()) for row in rows]

    def write(self, rows: Sequence[Any]) -> None:
        """OUT, a line for a row."""
        unfinished = self.out.with_name(f".{self.out.name}.tmp")
        unfinished.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
        os.replace(unfinished, self.out)
