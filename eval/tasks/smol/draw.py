"""Everyday requests for a picture of one thing: whether a picture comes, what it shows, and in how many evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import Field

from eval.metrics.emoji_judge import Judge
from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import (
    SmolOptions,
    conditions,
    first_picture,
    greedy,
    judge_of,
    panel,
    pictures_of,
    sampled,
)
from eval.tasks.smol.reading import Seen, see_one
from eval.tasks.smol.requests import DrawRequest, all_requests, evenly, name_of
from omni.data.emoji_world import SIDE
from omni.generation.reply import Reply
from omni.media import save_png

COLUMNS, SCALE = 5, 2  # of the sheet
PICTURE = "smol_draw.png"


class SmolDrawOptions(SmolOptions):
    """few, many: jumps of the two runs that are compared; compare=false omits them. folder: of the sheet of
    examples."""

    compare: bool = True
    few: int = Field(default=1, ge=1)
    many: int = Field(default=32, ge=1)
    folder: str = "runs/eval"


@task("smol_draw", SmolDrawOptions, rows=("right", "starts", "held_out", "sharp", "one_over_many"))
def smol_draw(context: Context, options: SmolDrawOptions) -> Outcome:
    """Right: the nearest of all names is accepted, and sharp; of names in training and (held_out) of others. starts:
    there is a picture. one_over_many: right in one jump over right in many."""
    asked = evenly(all_requests().draw, options.requests)
    replies = draws(context, options, asked, options.steps)
    judge = judge_of(context, options)
    seen = [seen_of(judge, one, reply) for one, reply in zip(asked, replies, strict=True)]
    measures = [
        Measure("right", percentage(rights(asked, seen, False)), "%"),
        Measure("starts", percentage([bool(reply.images) for reply in replies]), "%"),
        Measure("held_out", percentage(rights(asked, seen, True)), "%"),
        Measure("sharp", percentage([one is not None and one.is_sharp for one in seen]), "%"),
    ]
    notes = [conditions(context, options, replies), note_of(asked)]
    if options.compare:
        shares, words = {}, []
        for steps in (options.few, options.many):
            is_done = {part.steps for part in pictures_of(replies)} == {steps}
            more = replies if is_done else draws(context, options, asked, steps)
            found = [seen_of(judge, one, reply) for one, reply in zip(asked, more, strict=True)]
            shares[steps] = percentage(rights(asked, found, False))
            words.append(f"{conditions(context, options, more)}: {shares[steps]:.1f} % right")
        few, many = shares[options.few], shares[options.many]
        measures.append(Measure("one_over_many", 100 * few / many if many else math.nan, "%", "; ".join(words)))
        notes += words
    examples = sampled(context, "smol_draw", list(zip(asked, replies, seen, strict=True)), options.panels)
    if examples:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
        save_png(sheet([first_picture(reply) for _, reply, _ in examples]), Path(options.folder) / PICTURE)
        notes.append(f"{PICTURE}: " + "; ".join(one.request for one, _, _ in examples))
    panels = [panel(one.request, reply, str(got or "no picture"), is_right(got)) for one, reply, got in examples]
    return Outcome(measures, panels, notes=notes)


def draws(context: Context, options: SmolDrawOptions, asked: Sequence[DrawRequest], steps: int | None) -> list[Reply]:
    """The replies in a number of jumps. The requests alone decide whether a picture comes."""
    return greedy(context, options, [one.request for one in asked], steps=steps, max_images=1)


def seen_of(judge: Judge, request: DrawRequest, reply: Reply) -> Seen | None:
    """What the reply's picture shows; None without a picture."""
    picture = first_picture(reply)
    return None if picture is None else see_one(judge, picture, request.accept)


def is_right(seen: Seen | None) -> bool:
    """Accepted, and sharp."""
    return seen is not None and seen.is_accepted and seen.is_sharp


def rights(asked: Sequence[DrawRequest], seen: Sequence[Seen | None], held_out: bool) -> list[bool]:
    """Of the requests whose names are held out, or are not: whether each picture is right."""
    return [is_right(got) for one, got in zip(asked, seen, strict=True) if one.is_held_out == held_out]


def note_of(asked: Sequence[DrawRequest]) -> str:
    """How many names are held out, and which requests no emoji of the vocabulary answers."""
    held_out = [one.name for one in asked if one.is_held_out]
    lacking = [one.name for one in asked if not any(map(name_of, one.accept))]
    note = f"{len(asked)} requests; names that no training document has: {', '.join(held_out) or 'none'}"
    return note + (f"; cannot be right, the vocabulary has no such emoji: {', '.join(lacking)}" if lacking else "")


def sheet(pictures: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Pictures row by row, uint8 (rows SIDE SCALE, COLUMNS SIDE SCALE, 3); gray where there is none."""
    gray = torch.full((SIDE, SIDE, 3), 128, dtype=torch.uint8)
    num = -(-len(pictures) // COLUMNS) * COLUMNS
    cells = [gray if picture is None else picture for picture in (*pictures, *[None] * (num - len(pictures)))]
    rows = [torch.cat(cells[first : first + COLUMNS], 1) for first in range(0, num, COLUMNS)]
    return torch.cat(rows, 0).repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1)
