"""Reports of a run: metrics.jsonl (always), one progress line, and optional TensorBoard scalars (omni[track]).

A resume first drops the metrics of steps that it runs again, so the file has every step once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch


class Tracker:
    """Writes one JSON object per line to out/metrics.jsonl: {"step": n, ...}; events carry "event"."""

    def __init__(self, out: Path, first_step: int, tensorboard: bool = False, stream: TextIO | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        drop_from(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _open_board(out) if tensorboard else None

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl; its numbers also go to TensorBoard."""
        self._file.write(json_row({"step": step, **values}))
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def progress(self, line: str, important: bool) -> None:
        """Print a line. On a terminal the next line replaces it; elsewhere only `important` ones are printed."""
        if self._live:
            self._stream.write(f"\r\x1b[2K{line}")
        elif important:
            self._stream.write(line + "\n")
        self._stream.flush()

    def report(self, line: str) -> None:
        """Print a line that stays."""
        self._stream.write(("\r\x1b[2K" if self._live else "") + line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the files."""
        if self._live:
            self._stream.write("\n")
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without events; an incomplete last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row and "event" not in row:
            rows.append(row)
    return rows


def json_row(values: Mapping[str, Any]) -> str:
    """One line of a metrics.jsonl. Non-finite values are text: JSON has no NaN."""
    return json.dumps({name: _json_value(value) for name, value in values.items()}) + "\n"


def _json_value(value: Any) -> Any:
    """Tensors as numbers, values that are not finite as text."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        return repr(value)
    return value


def drop_from(path: Path, step: int) -> None:
    """Remove the rows of `step` and later: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _open_board(out: Path) -> Any:
    """A TensorBoard writer. ValueError names the extra where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard = true needs tensorboard: pip install 'omni-flow[track]'") from None
    return SummaryWriter(str(out / "tensorboard"))
