"""Results of a suite: report rows, and the outcome of each task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eval.task import Outcome


@dataclass(frozen=True)
class Row:
    """One report row: a line of the table and a JSON object. `value` is None where it was not a finite number."""

    name: str
    value: float | None
    unit: str
    bar: str | None
    holds: bool
    command: str
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """The row without an empty note. Readers know these keys: never rename them."""
        return {name: value for name, value in asdict(self).items() if name != "note" or value}


@dataclass(frozen=True)
class TaskResult:
    """All rows of one task, its outcome and its wall time."""

    name: str
    rows: list[Row]
    outcome: Outcome
    seconds: float
