"""Picture quality against function evaluations of the transformer: models and samplers compared, from one to many.

    few_step   open requests and scenes, coverage of a class, and the wall time of one picture

Where the text determines the picture, one Euler step of flow matching is already exact and shows nothing. So the
requests have many right answers, or ask for scenes. A report row is LINE_STEPS_WHAT, e.g. `few_4_open`. The rows
`few_1_open_share` and `..._coverage_share` are relative to the reference line; `few_1_speedup` is the reference's wall
time per picture over this line's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field, model_validator

from eval.requests import PictureChoices, RequestOptions, judge_of, requests
from eval.task import Context, Curve, Measure, Outcome, Panel, task
from eval.tasks.open import OpenOptions, open_requests
from eval.tasks.pictures import exact_scenes
from omni.data.emoji_world.documents import prompt_of
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStart
from omni.generation.options import GenerationOptions

KINDS = ("left", "right", "above", "below", "row")


class Line(PictureChoices):
    """model: a directory; None is the suite's. steps: jumps per picture, each two evaluations with guidance."""

    model: str | None = None
    steps: tuple[int, ...] = (1, 2, 4, 8, 32)


class FewStepOptions(RequestOptions):
    """requests: open requests; scenes: requests for scenes; draws: pictures of one class, for coverage; 0 omits either.

    reference: the line and number of steps to compare with. timed: pictures timed per row, one at a time, alternating
    over the rows; the median counts.
    """

    requests: int = Field(default=300, ge=1)
    scenes: int = Field(default=100, ge=0)
    draws: int = Field(default=200, ge=0)
    timed: int = Field(default=5, ge=1)
    lines: dict[str, Line] = Field(default_factory=lambda: {"model": Line()})
    reference: tuple[str, int] | None = None

    @model_validator(mode="after")
    def _reference_is_there(self) -> FewStepOptions:
        if self.reference is not None:
            name, steps = self.reference
            if name not in self.lines or steps not in self.lines[name].steps:
                raise ValueError(f"reference {self.reference} is no line of {sorted(self.lines)} at its steps")
        return self


def rows_of(options: FewStepOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    return [
        f"{name}_{n}_{what}" for name, line in options.lines.items() for n in line.steps for what in _row_ends(options)
    ]


def _row_ends(options: FewStepOptions) -> list[str]:
    """Ends of the report rows of a line at a number of steps."""
    found = ["open", *(["coverage"] if options.draws else []), *(["scenes"] if options.scenes else []), "seconds"]
    if options.reference is not None:
        found += ["open_share", *(["coverage_share"] if options.draws else []), "speedup"]
    return found


@task("few_step", FewStepOptions, rows=rows_of)
def few_step(context: Context, options: FewStepOptions) -> Outcome:
    """Every line at every number of steps on the same requests with the same seeds."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    panels: list[Panel] = []
    judge_of(context)  # calibrated once, on the suite's own model; all lines use it
    contexts = {
        name: context if line.model is None else replace(context, model_path=line.model)
        for name, line in options.lines.items()
    }
    for name, line in options.lines.items():
        for n in line.steps:
            values, shown = measure(contexts[name], options, line, n)
            found[name, n] = values
            panels += [replace(panel, note=f"{name}, {n} steps: {panel.note}") for panel in shown]
            context.report(f"  {name} {n}: " + "  ".join(f"{what} {value:.3g}" for what, value in values.items()))
    evaluations: dict[tuple[str, int], int] = {}
    for which, (seconds, spent) in seconds_per_picture(contexts, options).items():
        found[which]["seconds"], evaluations[which] = seconds, spent
    if options.reference is not None:
        base = found[options.reference]
        for values in found.values():
            for what in ("open", "coverage"):
                if what in values:
                    values[f"{what}_share"] = 100 * values[what] / base[what] if base[what] else float("nan")
            values["speedup"] = base["seconds"] / values["seconds"]
    units = {"seconds": "s", "speedup": "x"}
    whats = _row_ends(options)
    measures = [
        Measure(f"{name}_{n}_{what}", values[what], units.get(what, "%"))
        for (name, n), values in found.items()
        for what in whats
    ]
    curves = [
        Curve(f"{what} against {x}", x, "%", {
            name: sorted((float(evaluations[name, n]) if x == "evaluations" else found[name, n]["seconds"],
                          found[name, n][what]) for n in line.steps)
            for name, line in options.lines.items()
        })
        for what in whats if what in ("open", "coverage", "scenes")
        for x in ("evaluations", "seconds a picture")
    ]  # fmt: skip
    return Outcome(measures, panels, curves)


def measure(context: Context, options: FewStepOptions, line: Line, steps: int) -> tuple[dict[str, float], list[Panel]]:
    """The values of one line at one number of steps, without the comparison; and a few pictures."""
    common = {"steps": steps, "batch": options.batch, **line.choices}
    asked = OpenOptions(requests=options.requests, draws=options.draws, **common)
    outcome = open_requests(context, asked)
    rows = {measure.name: measure.value for measure in outcome.measures}
    values = {"open": rows["right_and_sharp"]}
    if options.draws:
        values["coverage"] = rows["coverage"]
    if options.scenes:
        scenes = RequestOptions(requests=options.scenes, kinds=KINDS, **common)
        values["scenes"] = exact_scenes(context, scenes, {"scene": 1.0}, ()).value("right")
    return values, list(outcome.panels[:6])


def seconds_per_picture(
    contexts: Mapping[str, Context], options: FewStepOptions
) -> dict[tuple[str, int], tuple[float, int]]:
    """By line and steps: the median wall time from the start of a picture's block to its pixels, one reply at a time,
    and its evaluations. The lines alternate for each picture, so that disturbances of the machine affect all alike."""
    engines = {name: Engine(context.model) for name, context in contexts.items()}
    asked = requests(next(iter(contexts.values())), {"open": 1.0}, options.timed + 1)
    times: dict[tuple[str, int], list[float]] = {}
    spent: dict[tuple[str, int], int] = {}
    for number, prompt in enumerate(map(prompt_of, asked)):
        for name, line in options.lines.items():
            for n in line.steps:
                settings = GenerationOptions(steps=n, max_images=1, force_image=True, **line.choices)
                begin = end = float("nan")
                for event in engines[name].stream(prompt, settings):
                    if isinstance(event, BlockStart):
                        begin = time.perf_counter()
                    elif isinstance(event, BlockDone):
                        end, spent[name, n] = time.perf_counter(), event.part.evaluations
                if number:  # the first includes one-time costs
                    times.setdefault((name, n), []).append(end - begin)
    return {which: (statistics.median(values), spent[which]) for which, values in times.items()}
