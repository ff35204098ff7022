"""The tasks of a generated corpus and their weights."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping


def check_mixture(mixture: Mapping[str, float], tasks: Collection[str], of: str) -> None:
    """ValueError, naming the corpus `of`, for an unknown task, a negative weight, or weights that are all zero."""
    for task, weight in mixture.items():
        if task not in tasks:
            near = difflib.get_close_matches(task, tasks, n=1) or list(tasks)
            raise ValueError(f"unknown task {task!r} in {of}'s mixture; did you mean {near[0]!r}?")
        if weight < 0:
            raise ValueError(f"the weight of task {task!r} is {weight}; use zero or more")
    if not sum(mixture.values()) > 0:
        raise ValueError(f"{of}'s mixture {dict(mixture)} has no positive weight; give some task one")
