"""Requests for pictures of what no emoji shows: declined in words."""

from __future__ import annotations

from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, greedy, panel, sampled
from eval.tasks.smol.requests import all_requests, evenly, mentions
from omni.data.emoji_world.words import head_word
from omni.generation.reply import Reply


@task("smol_unknown", SmolOptions, rows=("declined", "named"))
def smol_unknown(context: Context, options: SmolOptions) -> Outcome:
    """declined: there are words, and no picture. named: the words have the thing's head word."""
    asked = evenly(all_requests().unknown, options.requests)
    replies = greedy(context, options, [one.request for one in asked], max_images=1)
    declined = [is_declined(reply) for reply in replies]
    named = [mentions(reply.text, [head_word(one.thing)]) for one, reply in zip(asked, replies, strict=True)]
    measures = [Measure("declined", percentage(declined), "%"), Measure("named", percentage(named), "%")]
    panels = [
        panel(one.request, reply, "in words" if fine else "a picture, or nothing", fine)
        for one, reply, fine in zip(asked, replies, declined, strict=True)
    ]
    notes = [conditions(context, options, replies)]
    return Outcome(measures, sampled(context, "smol_unknown", panels, options.panels), notes=notes)


def is_declined(reply: Reply) -> bool:
    """Words, and no picture."""
    return bool(reply.text.strip()) and not reply.images
