"""Requests for text alone: the adapter keeps out, and without it the model is the language model."""

from __future__ import annotations

from collections.abc import Sequence

from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, greedy, language_model_of, panel, sampled
from eval.tasks.smol.requests import all_requests, evenly
from omni.generation.reply import Reply


@task("smol_plain", SmolOptions, rows=("starts", "equal", "off"))
def smol_plain(context: Context, options: SmolOptions) -> Outcome:
    """starts: a picture begins. equal: text as without the adapter. off: number of replies without the adapter whose
    text is not that of the imported language model. All three answer the same batches."""
    asked = [one.request for one in evenly(all_requests().plain, options.requests)]
    replies = greedy(context, options, asked, max_images=1)
    without = greedy(context, options, asked, max_images=1, lora="none")
    alone = greedy(context, options, asked, language_model_of(context, options), lora="none")
    equal = [is_equal(one, other) for one, other in zip(replies, without, strict=True)]
    same = [is_equal(one, other) for one, other in zip(without, alone, strict=True)]
    measures = [
        Measure("starts", percentage([bool(reply.images) for reply in replies]), "%"),
        Measure("equal", percentage(equal), "%"),
        Measure("off", same.count(False), "replies"),
    ]
    panels = [
        panel(request, reply, verdict(reply, other, fine), fine)
        for request, reply, other, fine in zip(asked, replies, without, equal, strict=True)
    ]
    notes = [f"{conditions(context, options, replies)}; up to {options.max_tokens} tokens", *differing(asked, same)]
    return Outcome(measures, sampled(context, "smol_plain", panels, options.panels), notes=notes)


def is_equal(one: Reply, other: Reply) -> bool:
    """Whether both are the same text, without pictures."""
    return one.text == other.text and not one.images and not other.images


def verdict(reply: Reply, without: Reply, equal: bool) -> str:
    """What differs, in words."""
    if equal:
        return "the text without the adapter"
    return "a picture" if reply.images else f"without the adapter: {without.text.strip()}"


def differing(asked: Sequence[str], same: Sequence[bool]) -> list[str]:
    """The requests whose replies without the adapter differ from those of the language model, as notes."""
    return [f"off: {request}" for request, fine in zip(asked, same, strict=True) if not fine]
