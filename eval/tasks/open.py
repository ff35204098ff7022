"""Requests with many right answers: they show whether a sampler samples the distribution or its mean."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_validator

from eval.metrics.emoji_judge import Judge, Reading, picture_distance, slots_of, small_layouts
from eval.requests import (
    RequestOptions,
    atlas_of,
    judge_of,
    kind_filter,
    panel,
    picture_list,
    replies,
    requests,
)
from eval.task import Context, Curve, Measure, Outcome, percentage, task
from omni.config import nearest
from omni.data.emoji_world import CLASSES, SCENE_NAMES, render
from omni.data.emoji_world.scene import single
from omni.document import Document

BIG_SLOT = slots_of(single("cat"))


class OpenOptions(RequestOptions):
    """draws: number of requests for one class, to count its generated members. coverage_class: the class."""

    draws: int = Field(default=500, ge=0)
    coverage_class: str = "animal"

    @field_validator("coverage_class")
    @classmethod
    def _known_class(cls, name: str) -> str:
        if name not in CLASSES:
            way_out = nearest(name, CLASSES) or "; the classes are those of omni/data/emoji_world/classes.py"
            raise ValueError(f"unknown class {name!r}{way_out}")
        return name


def read_open(judge: Judge, picture: torch.Tensor, meta: dict[str, Any]) -> tuple[bool, bool, Reading]:
    """(right and clear, also sharp, the reading) of one picture under a request with many right answers."""
    if meta["kind"] == "anywhere":
        reading = judge.read_any(picture, small_layouts(2), SCENE_NAMES)
        right = reading.scene.names == (meta["class"], meta["class"])
    else:
        reading = judge.read(picture[None], [BIG_SLOT], judge.atlas.names)[0]
        right = len(reading.scene.names) == 1 and reading.scene.names[0] in meta["members"]
    right = right and ("background" in meta["free"] or reading.scene.background == "white")
    return right and reading.clear, right and reading.clear and judge.is_sharp(reading), reading


@task(
    "open",
    OpenOptions,
    rows=("right", "right_and_sharp", "class", "background", "anywhere", "coverage", "evenness"),
)
def open_requests(context: Context, options: OpenOptions) -> Outcome:
    """Any member of a class, on any background, or two anywhere: right and sharp; and how many members occur."""
    documents = requests(context, {"open": 1.0}, options.requests, kind_filter(options))
    answers, note = replies(context, documents, options, max_images=1)
    judge, atlas = judge_of(context), atlas_of(context)
    right, sharp, panels = [], [], []
    for document, reply in zip(documents, answers, strict=True):
        picture = next(iter(picture_list(reply)), None)
        if picture is None:
            right.append(False)
            sharp.append(False)
            panels.append(panel(document, reply, [], "no picture", False))
            continue
        is_right, is_sharp, reading = read_open(judge, picture, dict(document.meta))
        right.append(is_right)
        sharp.append(is_sharp)
        distance = picture_distance(picture, render(reading.scene, atlas))
        verdict = "right, sharp" if is_sharp else "right, not sharp" if is_right else "wrong"
        words = f"{verdict}: {reading.describe()}; {distance:.1f} from the render shown as reference"
        panels.append(panel(document, reply, [render(reading.scene, atlas)], words, is_sharp))
    measures = [Measure("right", percentage(right), "%"), Measure("right_and_sharp", percentage(sharp), "%")]
    for kind in ("class", "background", "anywhere"):
        flags = [flag for flag, document in zip(sharp, documents, strict=True) if document.meta["kind"] == kind]
        if flags:
            measures.append(Measure(kind, percentage(flags), "%"))
    if not options.draws:
        return Outcome(measures, panels, notes=[note])
    more, curve, words = _coverage(context, options, judge)
    return Outcome([*measures, *more], panels, [curve], [note, *words])


def _coverage(context: Context, options: OpenOptions, judge: Judge) -> tuple[list[Measure], Curve, list[str]]:
    """Request one class many times (held-out phrasings) and count its members among the sharp pictures."""
    wanted = options.coverage_class

    def accept(meta: Any) -> bool:
        return meta["kind"] == "class" and meta["class"] == wanted

    forms = requests(context, {"open": 1.0}, 20, accept)
    documents: list[Document] = [forms[i % len(forms)] for i in range(options.draws)]
    answers, note = replies(context, documents, options, max_images=1)
    members = tuple(documents[0].meta["members"])
    counts = dict.fromkeys(members, 0)
    seen: list[tuple[float, float]] = [(0.0, 0.0)]
    for number, (document, reply) in enumerate(zip(documents, answers, strict=True)):
        picture = next(iter(picture_list(reply)), None)
        if picture is not None:
            _, is_sharp, reading = read_open(judge, picture, dict(document.meta))
            if is_sharp:
                counts[reading.scene.names[0]] += 1
        seen.append((number + 1.0, sum(count > 0 for count in counts.values()) / len(members) * 100))
    total = sum(counts.values())
    shares = torch.tensor([count / max(total, 1) for count in counts.values()], dtype=torch.float64)
    entropy = float(-(shares * shares.clamp_min(1e-12).log()).sum()) / float(torch.tensor(float(len(members))).log())
    curve = Curve(f"members of {wanted!r} seen", "draws", "%", {"members seen": seen})
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    words = [f"coverage of {wanted!r}: {note}", f"right and sharp {total} of {options.draws}: {listed}"]
    return [Measure("coverage", seen[-1][1], "%"), Measure("evenness", entropy, "of 1")], curve, words
