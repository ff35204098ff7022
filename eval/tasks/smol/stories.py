"""Illustrated stories on everyday requests: each picture after words of its own, and about the hero."""

from __future__ import annotations

import re

from pydantic import Field

from eval.requests import picture_list
from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, greedy, judge_of, panel, sampled
from eval.tasks.smol.reading import shows_anywhere
from eval.tasks.smol.requests import StoryRequest, all_requests, evenly
from omni.generation.events import TextPart
from omni.generation.reply import Reply

MORE_PICTURES = 3  # than the most that is asked for: a reply beyond ends


class SmolStoriesOptions(SmolOptions):
    """max_tokens: of a whole story."""

    max_tokens: int = Field(default=400, ge=1)


@task("smol_stories", SmolStoriesOptions, rows=("in_place", "hero"))
def smol_stories(context: Context, options: SmolStoriesOptions) -> Outcome:
    """in_place: as many pictures as asked for, each after a sentence of its own, and an end. hero: pictures that show
    the hero, of all pictures."""
    asked = evenly(all_requests().stories, options.requests)
    most = max(one.pictures for one in asked) + MORE_PICTURES
    replies = greedy(context, options, [one.request for one in asked], max_images=most)
    judge = judge_of(context, options)
    in_place = [is_in_place(one, reply) for one, reply in zip(asked, replies, strict=True)]
    hero, panels = [], []
    for one, reply, fine in zip(asked, replies, in_place, strict=True):
        shown = [p is not None and shows_anywhere(judge, p, one.about) for p in picture_list(reply)]
        hero += shown
        words = f"{len(shown)} of {one.pictures} pictures, the hero in {sum(shown)}; ended by {reply.stop_reason}"
        panels.append(panel(one.request, reply, words, fine))
    measures = [Measure("in_place", percentage(in_place), "%"), Measure("hero", percentage(hero), "%")]
    notes = [conditions(context, options, replies)]
    return Outcome(measures, sampled(context, "smol_stories", panels, options.panels), notes=notes)


def is_in_place(request: StoryRequest, reply: Reply) -> bool:
    """Whether there are as many pictures as asked for, each directly after text with a sentence, and the model ended
    the turn. Words after the last picture do not count."""
    pictures = 0
    before: str | None = None
    for part in reply.parts:
        if isinstance(part, TextPart):
            before = (before or "") + part.text
            continue
        if before is None or not has_sentence(before):
            return False
        pictures, before = pictures + 1, None
    return pictures == request.pictures and reply.stop_reason == "end"


def has_sentence(text: str) -> bool:
    """Whether there are two words and a mark behind them that ends a sentence."""
    return re.search(r"\w\W+\w.*[.!?]", text, re.DOTALL) is not None
