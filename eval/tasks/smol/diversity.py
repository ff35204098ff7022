"""Requests that many emoji answer, each with many seeds: whether the pictures differ, and are no mixtures."""

from __future__ import annotations

import statistics
from collections import Counter

from pydantic import Field

from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, first_picture, greedy, judge_of, panel, sampled
from eval.tasks.smol.reading import see_one

OPEN = ("draw an animal", "draw some fruit", "draw a face", "draw a vehicle", "draw something to eat")
MOST_NAMES = 12  # in a note


class SmolDiversityOptions(SmolOptions):
    """seeds: pictures of each request."""

    seeds: int = Field(default=50, ge=1)


@task("smol_diversity", SmolDiversityOptions, rows=("starts", "distinct", "sharp"))
def smol_diversity(context: Context, options: SmolDiversityOptions) -> Outcome:
    """distinct: names nearest to the pictures of one request, mean over requests. sharp: share of all replies."""
    asked = OPEN[: options.requests]
    prompts = [request for request in asked for _ in range(options.seeds)]
    replies, judge = greedy(context, options, prompts, max_images=1), judge_of(context, options)
    counts: dict[str, Counter[str]] = {request: Counter() for request in asked}
    sharp, panels = [], []
    for request, reply in zip(prompts, replies, strict=True):
        picture = first_picture(reply)
        seen = None if picture is None else see_one(judge, picture, ())
        sharp.append(seen is not None and seen.is_sharp)
        panels.append(panel(request, reply, str(seen or "no picture"), None))
        if seen is not None:
            counts[request][seen.found.name] += 1
    measures = [
        Measure("starts", percentage([bool(reply.images) for reply in replies]), "%"),
        Measure("distinct", statistics.fmean(map(len, counts.values())), f"of {options.seeds}"),
        Measure("sharp", percentage(sharp), "%"),
    ]
    notes = [conditions(context, options, replies)]
    for request, found in counts.items():
        listed = ", ".join(f"{name} {count}" for name, count in found.most_common(MOST_NAMES))
        notes.append(f"{request!r}: {len(found)} names in {options.seeds} replies: {listed}")
    return Outcome(measures, sampled(context, "smol_diversity", panels, options.panels), notes=notes)
