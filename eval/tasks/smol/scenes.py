"""Everyday requests for two things beside or above one another."""

from __future__ import annotations

from eval.metrics.emoji_judge import Judge
from eval.task import Context, Measure, Outcome, percentage, task
from eval.tasks.smol.answers import SmolOptions, conditions, first_picture, greedy, judge_of, panel, sampled
from eval.tasks.smol.reading import see_pair
from eval.tasks.smol.requests import SceneRequest, all_requests, evenly
from omni.generation.reply import Reply


@task("smol_scenes", SmolOptions, rows=("right", "sharp"))
def smol_scenes(context: Context, options: SmolOptions) -> Outcome:
    """right: both places are accepted. sharp: and both are sharp, by the threshold of the emoji world's common names;
    the codec alone keeps rarer ones less sharp than that."""
    asked = evenly(all_requests().scenes, options.requests)
    replies = greedy(context, options, [one.request for one in asked], max_images=1)
    judge = judge_of(context, options)
    judged = [judge_scene(judge, one, reply) for one, reply in zip(asked, replies, strict=True)]
    measures = [
        Measure("right", percentage([right for right, _, _ in judged]), "%"),
        Measure("sharp", percentage([sharp for _, sharp, _ in judged]), "%"),
    ]
    panels = [
        panel(one.request, reply, words, right)
        for one, reply, (right, _, words) in zip(asked, replies, judged, strict=True)
    ]
    notes = [conditions(context, options, replies)]
    return Outcome(measures, sampled(context, "smol_scenes", panels, options.panels), notes=notes)


def judge_scene(judge: Judge, request: SceneRequest, reply: Reply) -> tuple[bool, bool, str]:
    """(right, also sharp, what it shows)."""
    picture = first_picture(reply)
    if picture is None:
        return False, False, "no picture"
    both = see_pair(judge, picture, request.accept)
    right = all(one.is_accepted for one in both)
    return right, right and all(one.is_sharp for one in both), ", ".join(map(str, both))
