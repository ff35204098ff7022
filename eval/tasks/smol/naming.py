"""Questions about a picture of an emoji, answered with its name."""

from __future__ import annotations

from eval.requests import atlas_of
from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, greedy, panel, sampled
from eval.tasks.smol.requests import all_requests, evenly, mentions, name_of
from omni.data.emoji_world import render
from omni.data.emoji_world.scene import single
from omni.document import Document, Image, Text


@task("smol_naming", SmolOptions, rows=("right", "words"))
def smol_naming(context: Context, options: SmolOptions) -> Outcome:
    """right: an accepted answer, as whole words. words: a reply without a picture."""
    every = all_requests().naming
    asked = evenly([one for one in every if name_of(one.emoji) is not None], options.requests)
    atlas = atlas_of(context)
    pictures = [render(single(name_of(one.emoji) or ""), atlas) for one in asked]
    prompts = [Document((Image(p), Text(one.request))) for one, p in zip(asked, pictures, strict=True)]
    replies = greedy(context, options, prompts, max_images=1)
    right = [mentions(reply.text, one.answers) for one, reply in zip(asked, replies, strict=True)]
    words = [not reply.images for reply in replies]
    measures = [Measure("right", percentage(right), "%"), Measure("words", percentage(words), "%")]
    panels = [
        panel(one.request, reply, f"accepted: {', '.join(one.answers)}", fine, [picture])
        for one, reply, fine, picture in zip(asked, replies, right, pictures, strict=True)
    ]
    lacking = [one.emoji for one in every if name_of(one.emoji) is None]
    notes = [conditions(context, options, replies)]
    notes += [f"left out, for the vocabulary has no such picture: {' '.join(lacking)}"] if lacking else []
    return Outcome(measures, sampled(context, "smol_naming", panels, options.panels), notes=notes)
