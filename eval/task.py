"""What a task is: a registered function from (context, options) to measures, pictures and curves.

A new task is one file in eval/tasks that registers itself; it names its rows beforehand, so that a bar on a row
that does not exist is found before anything runs. Pictures are uint8 (H, W, 3) tensors. This file knows no task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field, field_validator

from omni.config import Frozen
from omni.registry import Registry
from omni.rng import Key

_BAR = re.compile(r"(>=|<=|==|>|<)\s*([-+]?\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?)")


class Bar(Frozen):
    """A bound on a measure, written ">= 95", "<= 1e-5" or "== 0"."""

    relation: str
    bound: float

    @staticmethod
    def parse(text: str) -> Bar:
        """Raises ValueError when `text` is not a relation and a number."""
        match = _BAR.fullmatch(text.strip())
        if match is None:
            raise ValueError(f'a bar is a relation and a number, such as ">= 95" or "<= 1e-5", got {text!r}')
        return Bar(relation=match[1], bound=float(match[2]))

    def holds(self, value: float) -> bool:
        """False for NaN under every relation."""
        match self.relation:
            case ">=":
                return value >= self.bound
            case "<=":
                return value <= self.bound
            case ">":
                return value > self.bound
            case "<":
                return value < self.bound
        return value == self.bound


class TaskOptions(Frozen):
    """Base of every task's options. `bars` maps a row's short name to its bar; a row without one is informative."""

    bars: dict[str, str] = Field(default_factory=dict)

    @field_validator("bars")
    @classmethod
    def _bars_parse(cls, bars: dict[str, str]) -> dict[str, str]:
        for text in bars.values():
            Bar.parse(text)
        return bars


@dataclass(frozen=True)
class Measure:
    """One number of a task: short name (unique in the task), value, unit ("%", "dB", "x", "tokens/s", ...).

    note: what it was measured under, where that belongs to the number; it is written with its row."""

    name: str
    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Panel:
    """One example for the report: what was given, the reference and the answer side by side, and the verdict."""

    request: str
    reference: Sequence[torch.Tensor] = ()
    answer: Sequence[torch.Tensor] = ()
    note: str = ""
    right: bool | None = None
    given: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Curve:
    """Named lines over a common meaning of x, drawn in the report."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Outcome:
    """All that a task hands back. `notes` are sentences for the reader: conditions, versions, what failed."""

    measures: Sequence[Measure]
    panels: Sequence[Panel] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = ()

    def value(self, name: str) -> float:
        """Of the measure of that name."""
        return {measure.name: measure.value for measure in self.measures}[name]


@dataclass(frozen=True)
class Context:
    """What tasks share. `model` loads on first use: suites and tasks that need no model never load one."""

    model_path: str | None = None
    font: str | None = None
    seed: int = 0
    say: Callable[[str], None] = print
    shared: dict[str, Any] = field(default_factory=dict)  # what one task built and another can use: atlas, judge
    device: str = "cpu"

    @cached_property
    def model(self) -> Any:
        """The model of the suite, in evaluation mode (`omni.from_pretrained`)."""
        import omni

        return omni.from_pretrained(self.model_path, device=self.device)

    def key(self, *parts: int | str) -> Key:
        return Key(self.seed).fold("eval", *parts)

    def once(self, name: str, build: Callable[[], Any]) -> Any:
        """The thing called `name`, built by the first task that asks for it."""
        if name not in self.shared:
            self.shared[name] = build()
        return self.shared[name]


OptionsType = TypeVar("OptionsType", bound=TaskOptions)


@dataclass(frozen=True)
class Task(Generic[OptionsType]):
    """A registered task: the schema of its options, the short names of its rows, and the function."""

    options: type[OptionsType]
    rows_of: Callable[[OptionsType], tuple[str, ...]]
    run: Callable[[Context, OptionsType], Outcome]

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows under the default options."""
        return self.rows_of(self.options())


TASKS: Registry[Task[Any]] = Registry("task", "eval.tasks", "eval.experiments", entry_points="omni.tasks")


def task(
    name: str, options: type[OptionsType], rows: Sequence[str] | Callable[[OptionsType], Sequence[str]]
) -> Callable[[Callable[[Context, OptionsType], Outcome]], Callable[[Context, OptionsType], Outcome]]:
    """Decorator that registers a function as the task `name`. A task whose rows follow from its options (one per line
    of a table, say) gives a function of the options."""

    def rows_of(given: OptionsType) -> tuple[str, ...]:
        return tuple(rows(given) if callable(rows) else rows)

    def register(run: Callable[[Context, OptionsType], Outcome]) -> Callable[[Context, OptionsType], Outcome]:
        TASKS.register(name)(Task(options, rows_of, run))
        return run

    return register


def percentage(flags: Sequence[bool]) -> float:
    """Share of true flags in percent; NaN of none."""
    return 100.0 * sum(flags) / len(flags) if flags else float("nan")
