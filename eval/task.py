"""A task: a registered function from (context, options) to measures, pictures and curves.

A new task is one file in eval/tasks that registers itself. It names its report rows in advance, so that a bar on an
unknown row is found before anything runs. Pictures are uint8 (H, W, 3) tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Raises ValueError where `text` is not a relation and a number."""
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
    """Base of every task's options. `bars` maps a report row's short name to its bar; a row without a bar informs."""

    bars: dict[str, str] = Field(default_factory=dict)

    @field_validator("bars")
    @classmethod
    def _bars_parse(cls, bars: dict[str, str]) -> dict[str, str]:
        for text in bars.values():
            Bar.parse(text)
        return bars


def names_of(field_name: str, known: Iterable[str]) -> Any:
    """A validator of options: every name in the field is known."""
    names = list(known)

    def check(given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in names:
                raise ValueError(f"{field_name} has {name!r}; known: {', '.join(names)}")
        return given

    return field_validator(field_name)(check)


@dataclass(frozen=True)
class Measure:
    """One number of a task: short name (unique in the task), value, unit ("%", "dB", "x", "tokens/s", ...).

    note: the conditions of the measurement, where they belong to the number; written with its row."""

    name: str
    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Panel:
    """One example for the report: the request, the reference and the answer side by side, and the verdict."""

    request: str
    reference: Sequence[torch.Tensor] = ()
    answer: Sequence[torch.Tensor] = ()
    note: str = ""
    right: bool | None = None
    given: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class Curve:
    """Named lines over one x axis, plotted in the report."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Outcome:
    """The result of a task. `notes` are sentences for the reader: conditions, versions, failures."""

    measures: Sequence[Measure]
    panels: Sequence[Panel] = ()
    curves: Sequence[Curve] = ()
    notes: Sequence[str] = ()

    def value(self, name: str) -> float:
        """The value of the measure `name`."""
        return {measure.name: measure.value for measure in self.measures}[name]


@dataclass(frozen=True)
class Context:
    """Shared by all tasks. `model` loads on first use: a suite that needs no model loads none."""

    model_path: str | None = None
    font: str | None = None
    seed: int = 0
    report: Callable[[str], None] = print
    shared: dict[str, Any] = field(default_factory=dict)  # objects that several tasks use: atlas, judge
    device: str = "cpu"

    @cached_property
    def model(self) -> Any:
        """The model of the suite, in evaluation mode (`omni.from_pretrained`)."""
        import omni

        return omni.from_pretrained(self.model_path, device=self.device)

    def key(self, *parts: int | str) -> Key:
        """The key of a task: another one changes the documents and pictures that it measures."""
        return Key(self.seed).fold("eval", *parts)

    def once(self, name: str, build: Callable[[], Any]) -> Any:
        """The shared object `name`, built at the first call."""
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
    """Decorator that registers a function as the task `name`. `rows` is a function of the options where the rows depend
    on them (for example one row per method)."""

    def rows_of(given: OptionsType) -> tuple[str, ...]:
        return tuple(rows(given) if callable(rows) else rows)

    def register(run: Callable[[Context, OptionsType], Outcome]) -> Callable[[Context, OptionsType], Outcome]:
        TASKS.register(name)(Task(options, rows_of, run))
        return run

    return register


def percentage(flags: Sequence[bool]) -> float:
    """Share of true flags in percent; NaN for no flags."""
    return 100.0 * sum(flags) / len(flags) if flags else float("nan")
