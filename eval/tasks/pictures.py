"""Tasks whose answer is one determined picture: draw, scenes, counts, edits, edits in a conversation.

Right means, for draw, that the nearest of all vocabulary names is the requested one; for the others, that the judge
reads exactly the expected scene: names, places, background, nothing else, and no ambiguous slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from eval.requests import (
    RequestOptions,
    atlas_of,
    expected_scenes,
    judge_of,
    kind_filter,
    panel,
    picture_list,
    read_pictures,
    replies,
    requests,
    scene_before,
)
from eval.task import Context, Measure, Outcome, percentage, task
from omni.data.emoji_world import render

DRAW_ROWS = ("right", "clear", "sharp", "background")


class DrawOptions(RequestOptions):
    """kinds: those of "draw" whose emoji has no skin tone."""

    kinds: tuple[str, ...] = ("plain", "background", "small")


@task("draw", DrawOptions, rows=DRAW_ROWS)
def draw(context: Context, options: DrawOptions) -> Outcome:
    """One emoji on request: nearest neighbour among all vocabulary names, at the requested size and background."""
    documents = requests(context, {"draw": 1.0}, options.requests, kind_filter(options))
    answers, note = replies(context, documents, options, max_images=1)
    judge, scenes = judge_of(context), [expected_scenes(document)[-1] for document in documents]
    first = [next(iter(picture_list(reply)), None) for reply in answers]
    drawn = [i for i, picture in enumerate(first) if picture is not None]
    flags = {name: [False] * len(documents) for name in DRAW_ROWS}
    notes = ["no picture"] * len(documents)
    if drawn:
        pictures = torch.stack([picture for picture in first if picture is not None])
        found = judge.name_single(pictures, [scenes[i] for i in drawn])
        grounds = judge.backgrounds(pictures)
        readings = judge.shows(pictures, [scenes[i] for i in drawn])
        for i, f, ground, reading in zip(drawn, found, grounds, readings, strict=True):
            right = f.name == scenes[i].names[0]
            flags["right"][i] = right
            flags["clear"][i] = right and reading.clear
            flags["sharp"][i] = right and f.distance <= judge.sharp[scenes[i].placements[0].size]
            flags["background"][i] = ground == scenes[i].background
            notes[i] = f"{f.name} ({f.distance:.0f}) on {ground}"
    atlas = atlas_of(context)
    panels = [
        panel(d, r, [render(s, atlas)], n, right)
        for d, r, s, n, right in zip(documents, answers, scenes, notes, flags["right"], strict=True)
    ]
    sharp = ", ".join(f"{value:.1f} at {size} px" for size, value in judge.sharp.items())
    notes = [note, f"{len(atlas.names)} names; sharp: root mean square at most {sharp}, calibrated on the codec"]
    return Outcome([Measure(name, percentage(flag), "%") for name, flag in flags.items()], panels, notes=notes)


def exact_scenes(
    context: Context, options: RequestOptions, mixture: Mapping[str, float], rows: Sequence[str]
) -> Outcome:
    """The share of replies whose last picture is read as exactly the expected scene; of its objects alone; by kind."""
    documents = requests(context, mixture, options.requests, kind_filter(options))
    scenes = [expected_scenes(document)[-1] for document in documents]
    answers, note = replies(context, documents, options, max_images=2)
    last = [picture_list(reply)[-1] if reply.images else None for reply in answers]
    before = [scene_before(document) for document in documents]
    readings = read_pictures(judge_of(context), last, scenes, before)
    right = [r is not None and r.clear and r.scene == s for r, s in zip(readings, scenes, strict=True)]
    objects = [r is not None and r.scene.placements == s.placements for r, s in zip(readings, scenes, strict=True)]
    measures = [Measure("right", percentage(right), "%"), Measure("objects", percentage(objects), "%")]
    kinds = [document.meta["kind"] for document in documents]
    for kind in rows:
        flags = [flag for flag, k in zip(right, kinds, strict=True) if k == kind]
        if flags:
            measures.append(Measure(kind, percentage(flags), "%"))
    atlas = atlas_of(context)
    panels = [
        panel(d, reply, [render(s, atlas)], reading.describe() if reading else "no picture", flag)
        for d, reply, s, reading, flag in zip(documents, answers, scenes, readings, right, strict=True)
    ]
    return Outcome(measures, panels, notes=[note])


EDIT_KINDS = ("tone", "swap", "move", "exchange", "add", "remove", "recolour")


class SceneOptions(RequestOptions):
    """kinds: relations of two objects."""

    kinds: tuple[str, ...] = ("left", "right", "above", "below")


class CountOptions(RequestOptions):
    """kinds: rows of three and counted objects."""

    requests: int = 100
    kinds: tuple[str, ...] = ("row", "count")


class ChatEditOptions(RequestOptions):
    """kinds: conversations with an edit."""

    requests: int = 100
    kinds: tuple[str, ...] = ("edit",)


@task("scenes", SceneOptions, rows=("right", "objects"))
def scenes(context: Context, options: SceneOptions) -> Outcome:
    """Two objects of a held-out pair in a relation: both objects, their places, the background, and nothing else."""
    return exact_scenes(context, options, {"scene": 1.0}, ())


@task("counts", CountOptions, rows=("right", "objects", "row", "count"))
def counts(context: Context, options: CountOptions) -> Outcome:
    """Rows of three objects and counted objects, read in the same way."""
    return exact_scenes(context, options, {"scene": 1.0}, ("row", "count"))


@task("edits", RequestOptions, rows=("right", "objects", *EDIT_KINDS))
def edits(context: Context, options: RequestOptions) -> Outcome:
    """Edits of a given picture: exactly the expected scene, so neither the input nor another change."""
    return exact_scenes(context, options, {"edit": 1.0}, EDIT_KINDS)


@task("chat_edits", ChatEditOptions, rows=("right", "objects"))
def chat_edits(context: Context, options: ChatEditOptions) -> Outcome:
    """Edits of a picture of an earlier turn."""
    return exact_scenes(context, options, {"chat": 1.0}, ())
