"""A second request in a conversation whose first reply is the model's own."""

from __future__ import annotations

from typing import Any

from eval.metrics.emoji_judge import Judge
from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, first_picture, greedy, judge_of, panel, sampled
from eval.tasks.smol.reading import see_one, see_pair
from eval.tasks.smol.requests import SecondTurn, all_requests, evenly, mentions
from omni.generation.reply import Reply

KINDS = ("other", "again", "background", "add", "name")


@task("smol_second", SmolOptions, rows=("right", *KINDS))
def smol_second(context: Context, options: SmolOptions) -> Outcome:
    """other, again: accepted and sharp. background: accepted, on the colour. add: both places accepted. name: an
    accepted answer in words."""
    asked = evenly(all_requests().second, options.requests)
    first = greedy(context, options, [one.first for one in asked], max_images=1)
    prompts = [conversation(one, reply) for one, reply in zip(asked, first, strict=True)]
    replies, judge = greedy(context, options, prompts, max_images=1), judge_of(context, options)
    judged = [judge_turn(judge, one, reply) for one, reply in zip(asked, replies, strict=True)]
    measures = [Measure("right", percentage([right for right, _ in judged]), "%")]
    for kind in KINDS:
        flags = [right for one, (right, _) in zip(asked, judged, strict=True) if one.kind == kind]
        if flags:
            measures.append(Measure(kind, percentage(flags), "%", f"{len(flags)} requests"))
    panels = []
    for one, before, reply, (right, words) in zip(asked, first, replies, judged, strict=True):
        given = [picture for picture in [first_picture(before)] if picture is not None]
        panels.append(panel(f"{one.first} | {one.second}", reply, f"{one.kind}: {words}", right, given))
    notes = [conditions(context, options, replies)]
    return Outcome(measures, sampled(context, "smol_second", panels, options.panels), notes=notes)


def conversation(request: SecondTurn, reply: Reply) -> list[dict[str, Any]]:
    """The messages before the second reply."""
    return [{"role": "user", "content": request.first}, reply.message, {"role": "user", "content": request.second}]


def judge_turn(judge: Judge, request: SecondTurn, reply: Reply) -> tuple[bool, str]:
    """Whether the second reply is right, and what it shows."""
    if request.kind == "name":
        assert request.answers is not None
        return mentions(reply.text, request.answers), "in words"
    picture = first_picture(reply)
    if picture is None:
        return False, "no picture"
    if request.kind == "add":
        both = see_pair(judge, picture, request.pair)
        return all(one.is_accepted for one in both), ", ".join(map(str, both))
    seen = see_one(judge, picture, request.single)
    if request.kind == "background":
        return seen.is_accepted and seen.background == request.background, str(seen)
    return seen.is_accepted and seen.is_sharp, str(seen)
