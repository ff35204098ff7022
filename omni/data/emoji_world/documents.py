"""EmojiWorld: an unbounded corpus of chat documents about emoji; `document(index)` is a pure function.

`meta` of a document has the fields for evaluation: "task", "kind", "split", "phrasing" (ids of its templates), "given"
and "scenes" (the user's and the assistant's pictures as Scene JSON), "answer" (the assistant's text), and for open
requests the class, its members and what is free. Nothing is downloaded; pictures are uint8 (64, 64, 3).
Random calls of a task are in a fixed order, and so are TASKS: a change of either changes every document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from omni.data.emoji_world.atlas import Atlas
from omni.data.emoji_world.classes import CLASSES, FAMILY
from omni.data.emoji_world.document_builder import DocumentBuilder
from omni.data.emoji_world.edits import Edit, caption, draw_edit, request_for, spoken
from omni.data.emoji_world.objects import ROW_NAMES, SCENE_NAMES
from omni.data.emoji_world.scene import (
    APART,
    BACKGROUNDS,
    CENTRE,
    PAIR_SLOTS,
    PLACES,
    SPLITS,
    Placement,
    Scene,
    counted,
    draw_background,
    draw_names,
    render,
    row,
    single,
    small_objects,
    tones_of,
)
from omni.data.emoji_world.stories import write_story
from omni.data.emoji_world.words import LANGUAGE_NAMES, NUMBERS, article_for, is_countable, plural, with_article
from omni.data.mixtures import check_mixture
from omni.document import Document, Role, Video
from omni.rng import Key

COUNTABLE = tuple(name for name in SCENE_NAMES if is_countable(name))
LANGUAGES = tuple(LANGUAGE_NAMES)
Extra = dict[str, Any]  # further values of a document's `meta`


def draw_one(builder: DocumentBuilder) -> Extra:
    """ "draw a red apple": one big emoji; sometimes small, on a colour, or with a skin tone."""
    rng, chance = builder.rng, builder.rng.random()
    background = "white"
    if chance < 0.05:
        kind, name = "small", rng.choice(SCENE_NAMES)
        while f"small {name}" in builder.atlas.names:  # "small airplane" is the name of an emoji
            name = rng.choice(SCENE_NAMES)
        words = with_article(name, "small")
    elif chance < 0.12:
        kind, name = "tone", rng.choice(tones_of(builder.atlas.tones, builder.split))
        words = with_article(spoken(name))
    else:
        kind, name = "plain", rng.choice(builder.atlas.names)
        words = with_article(name)
    request = builder.phrase("draw", a=words)
    if chance > 0.85:
        kind, background = "background", rng.choice(list(BACKGROUNDS)[1:])
        mark = request[-1] if request[-1] == "?" else ""
        request = (
            builder.phrase("background", request=request.removesuffix("?"), c=background, on=article_for(background))
            + mark
        )
    builder.ask(request)
    if request.endswith("?"):  # a question gets text and picture, an order only the picture
        builder.answer(f"Here is {words}." if is_countable(name) else f"Here you are: {words}.")
    builder.show(single(name, background, CENTRE if kind == "small" else None))
    return {"kind": kind, "name": name}


def name_one(builder: DocumentBuilder) -> Extra:
    """A picture and "what is this?": the answer is the name."""
    rng, chance = builder.rng, builder.rng.random()
    language, kind = "en", "plain"
    if chance < 0.7:
        name, request = rng.choice(builder.atlas.names), builder.phrase("name")
    elif chance < 0.75:
        kind, name, request = "tone", rng.choice(tones_of(builder.atlas.tones, builder.split)), builder.phrase("name")
    else:
        kind, name, language = "language", rng.choice(SCENE_NAMES), rng.choice(LANGUAGES)
        english = rng.random() < 0.4
        words = {"language": LANGUAGE_NAMES[language]}
        request = builder.phrase("name.language", **words) if english else builder.phrase(f"name.{language}")
    scene = single(name, draw_background(rng, 0.8))
    if rng.random() < 0.5:
        builder.give(scene)
        builder.ask(request)
    else:
        builder.ask(request)
        builder.give(scene)
    builder.answer(builder.atlas.name_in(name, language))
    return {"kind": kind, "name": name, "language": language}


def draw_scene(builder: DocumentBuilder) -> Extra:
    """Two objects in a relation, a row of three, or a count; sometimes on a colour."""
    rng = builder.rng
    background = draw_background(rng, 0.75)
    kind = rng.choices(("left", "right", "above", "below", "row", "count"), (3, 3, 3, 3, 2, 3))[0]
    if kind == "count":
        name, number = rng.choice(COUNTABLE), rng.choice((2, 3, 4))
        words = builder.phrase("scene.count", n=NUMBERS[number], many=plural(name))
        scene = counted(name, number, background)
    elif kind == "row":
        names = draw_names(rng, 3, builder.split, ROW_NAMES)
        rng.shuffle(names)
        words = builder.phrase("scene.row", **dict(zip("abd", map(with_article, names), strict=True)))
        scene = row(names, background)
    else:
        names = draw_names(rng, 2, builder.split)
        words = builder.phrase(f"scene.{kind}", a=with_article(names[0]), b=with_article(names[1]))
        order = names if kind in ("left", "above") else names[::-1]
        scene = small_objects(order, PAIR_SLOTS[kind in ("above", "below")], background)
    request = builder.phrase("scene", scene=words)
    if background != "white":
        mark = "?" if request.endswith("?") else ""
        request = (
            builder.phrase("background", request=request.removesuffix("?"), c=background, on=article_for(background))
            + mark
        )
    builder.ask(request)
    builder.show(scene)
    return {"kind": kind}


def edit_one(builder: DocumentBuilder) -> Extra:
    """A user picture and an instruction; the answer is `answer_edit`."""
    kind, edit = draw_edit(builder)
    builder.give(edit.before)
    builder.ask(edit.instruction)
    answer_edit(builder, edit)
    return {"kind": kind, **edit.extra}


def answer_edit(builder: DocumentBuilder, edit: Edit) -> None:
    """The caption before, the caption after, then the picture after. Each step depends on the previous one; three small
    steps (describe, rewrite, generate) are easier to learn than one direct edit."""
    builder.answer(f"I see {caption(edit.before)}. Here you are: {caption(edit.after)}.")
    builder.show(edit.after)


# Kind of edit -> its weight in `rewrite`. The order decides the samples: never reorder.
REWRITE_WEIGHTS = {"swap": 4.0, "exchange": 2.0, "add": 3.0, "remove": 3.0, "recolour": 2.0}


def rewrite(builder: DocumentBuilder) -> Extra:
    """An edit of captions: the caption before and an instruction; the answer is the caption after. It trains the second
    caption of an edit with a quarter of the positions."""
    kind, edit = draw_edit(builder, REWRITE_WEIGHTS)
    builder.ask(builder.phrase("text.rewrite", a=caption(edit.before), edit=edit.instruction))
    builder.answer(f"{caption(edit.after)}.")
    return {"kind": kind, "before": edit.before.to_json(), "after": edit.after.to_json()}


def describe(builder: DocumentBuilder) -> Extra:
    """A picture of one or two objects and "describe this": the answer has objects, places and background."""
    rng = builder.rng
    kind = rng.choices(("pair", "small", "big"), (6, 3, 1))[0]
    background = draw_background(rng, 0.6)
    if kind == "pair":
        scene = small_objects(draw_names(rng, 2, builder.split), rng.choice(PAIR_SLOTS), background)
    else:
        place = rng.choice(list(PLACES.values())) if kind == "small" else None
        scene = single(rng.choice(SCENE_NAMES), background, place)
    builder.give(scene)
    builder.ask(builder.phrase("describe"))
    builder.answer(f"{caption(scene)}.")
    return {"kind": kind}


def draw_open(builder: DocumentBuilder) -> Extra:
    """A request with many valid answers: any member of a class, on any background, or at any places."""
    rng, chance = builder.rng, builder.rng.random()
    if chance < 0.2:
        return two_anywhere(builder)
    noun = rng.choice(list(CLASSES))
    request, background = builder.phrase("open", x=noun), "white"
    kind, free = "class", ["member"]
    if chance < 0.4:
        kind, free, background = "background", ["member", "background"], rng.choice(list(BACKGROUNDS))
        mark = "?" if request.endswith("?") else ""
        request = builder.phrase("open.background", request=request.removesuffix("?")) + mark
    builder.ask(request)
    builder.show(single(rng.choice(CLASSES[noun]), background))
    return {"kind": kind, "class": noun, "members": list(CLASSES[noun]), "free": free}


def two_anywhere(builder: DocumentBuilder) -> Extra:
    """Two equal objects at any two places without overlap: the open request with the most valid answers."""
    name, slots = builder.rng.choice(COUNTABLE), builder.rng.choice(APART)
    builder.ask(builder.phrase("open.anywhere", many=plural(name)))
    builder.show(small_objects((name, name), slots))
    return {"kind": "anywhere", "class": name, "members": [name], "free": ["places"]}


def ask_for_story(builder: DocumentBuilder) -> Extra:
    """A request for a story, and the story."""
    return {"kind": "story", **write_story(builder)}


SMALL_TALK = {
    "text.hello": "Hello! What shall I draw?",
    "text.who": "I am Omni. I draw emoji.",
    "text.can": "I can draw, name and change emoji, and tell stories in pictures.",
    "text.thanks": "You are welcome!",
    "text.bye": "Goodbye!",
}


def ask_without_picture(builder: DocumentBuilder) -> Extra:
    """Questions without pictures: classes, other languages, small talk."""
    rng = builder.rng
    kind = rng.choices(("is", "translate", "english", "member", "talk"), (3, 3, 2, 2, 2))[0]
    if kind == "talk":
        kind = rng.choice(list(SMALL_TALK))
        builder.ask(builder.phrase(kind))
        builder.answer(SMALL_TALK[kind])
        return {"kind": kind}
    if kind == "is":
        return {"kind": kind, **_ask_class(builder)}
    if kind == "member":
        noun = rng.choice(list(CLASSES))
        builder.ask(builder.phrase("text.member", b=with_article(noun)))
        builder.answer(rng.choice(CLASSES[noun]))
        return {"kind": kind, "class": noun, "members": list(CLASSES[noun])}
    name, language = rng.choice(SCENE_NAMES), rng.choice(LANGUAGES)
    foreign = builder.atlas.name_in(name, language)
    if kind == "translate":
        builder.ask(builder.phrase("text.translate", x=name, language=LANGUAGE_NAMES[language]))
        builder.answer(foreign)
    else:
        builder.ask(builder.phrase("text.english", x=foreign))
        builder.answer(name)
    return {"kind": kind, "name": name, "language": language}


def _ask_class(builder: DocumentBuilder) -> Extra:
    """ "is a red apple a fruit?" with an indisputable yes or no."""
    rng = builder.rng
    noun, yes = rng.choice(list(CLASSES)), rng.random() < 0.5
    clear = [n for n in CLASSES if n != noun and (n not in FAMILY or FAMILY[n] != FAMILY.get(noun))]
    source = noun if yes else rng.choice(clear)
    name = rng.choice([m for m in CLASSES[source] if is_countable(m) and (yes or m not in CLASSES[noun])])
    builder.ask(builder.phrase("text.is", a=with_article(name), b=with_article(noun)))
    builder.answer(f"Yes, it is {with_article(noun)}." if yes else f"No, it is not {with_article(noun)}.")
    return {"name": name, "class": noun}


def converse(builder: DocumentBuilder) -> Extra:
    """Several turns or pictures: a picture and its edit, two pictures in one answer, or small talk and a picture."""
    kind = builder.rng.choices(("edit", "series", "talk"), (5, 3, 2))[0]
    if kind == "edit":
        _, edit = draw_edit(builder)
        builder.ask(request_for(builder, edit.before))
        builder.show(edit.before)
        builder.ask(edit.instruction)
        answer_edit(builder, edit)
    elif kind == "series":
        names = builder.rng.sample(SCENE_NAMES, 2)
        builder.ask(builder.phrase("series", a=with_article(names[0]), b=with_article(names[1])))
        for name in names:
            builder.answer(f"Here is {with_article(name)}." if is_countable(name) else f"Here you are: {name}.")
            builder.show(single(name))
    else:
        ask_without_picture(builder)
        draw_one(builder)
    return {"kind": kind}


# Task -> (weight, function). The order decides the samples: never reorder; add at the end, with weight 0.
TASKS: dict[str, tuple[float, Callable[[DocumentBuilder], Extra]]] = {
    "draw": (0.32, draw_one),
    "name": (0.12, name_one),
    "scene": (0.17, draw_scene),
    "edit": (0.13, edit_one),
    "open": (0.07, draw_open),
    "describe": (0.04, describe),
    "story": (0.05, ask_for_story),
    "text": (0.06, ask_without_picture),
    "rewrite": (0.0, rewrite),  # weight 0: only for mixtures that name these tasks
    "anywhere": (0.0, two_anywhere),
    "chat": (0.04, converse),
}
DIRECTIONS = {"to the right": (1, 0), "to the left": (-1, 0), "down": (0, 1), "up": (0, -1)}
# By index of the clip: never reorder.
MOVERS = ("cat", "red apple", "automobile")


class EmojiWorld:
    """The corpus. atlas: its names and pictures. mixture: weight of each task (default: TASKS); any positive sum.

    split: "train", or "heldout", whose phrasings, object pairs and (base, skin tone) combinations are not in "train".
    foreign: the share of phrasings with a foreign word (see foreign.py).
    Raises ValueError on an unknown split or task, or on weights that are negative or all zero.
    """

    def __init__(
        self,
        atlas: Atlas,
        seed: int = 0,
        split: str = "train",
        mixture: Mapping[str, float] | None = None,
        foreign: float = 0.0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
        weights = {task: weight for task, (weight, _) in TASKS.items()} if mixture is None else dict(mixture)
        check_mixture(weights, TASKS, "the emoji world")
        self.atlas, self.seed, self.split, self.foreign = atlas, seed, split, foreign
        self._tasks, self._weights = list(weights), list(weights.values())

    def document(self, index: int) -> Document:
        """The document of an index >= 0; a pure function of (seed, split, mixture, index)."""
        rng = Key(self.seed).fold("emoji_world", self.split, index).python()
        task = rng.choices(self._tasks, self._weights)[0]
        builder = DocumentBuilder(rng, self.atlas, self.split, self.foreign)
        return builder.finish(task, TASKS[task][1](builder))

    def moving_emoji(self, index: int, num_frames: int = 8, side: int = 32) -> Document:
        """One of twelve clips (three emoji, four directions), as a Video of uint8 (num_frames, side, side, 3)."""
        index %= len(MOVERS) * len(DIRECTIONS)
        name, direction = MOVERS[index // len(DIRECTIONS)], list(DIRECTIONS)[index % len(DIRECTIONS)]
        step_x, step_y = DIRECTIONS[direction]
        size = side // 2
        builder = DocumentBuilder(Key(self.seed).fold("moving_emoji", index).python(), self.atlas, self.split)
        builder.ask(builder.phrase("video", a=with_article(name), direction=direction))
        scenes = []
        for frame in range(num_frames):
            travelled = round((side - size) * frame / max(1, num_frames - 1))
            start_x, start_y = [size // 2 if s == 0 else (side - size if s < 0 else 0) for s in (step_x, step_y)]
            place = Placement(name, start_x + step_x * travelled, start_y + step_y * travelled, size)
            scenes.append(Scene("white", (place,)))
        frames = torch.stack([render(scene, self.atlas, side) for scene in scenes])
        builder.segments.append(Video(frames, 8.0, Role.ASSISTANT, supervise=True))
        builder.scenes = scenes
        return builder.finish("video", {"kind": "moving", "name": name, "direction": direction})


def prompt_of(document: Document) -> Document:
    """The document up to its last user turn, as a prompt; `meta` stays."""
    segments = list(document.segments)
    while segments and segments[-1].role == Role.ASSISTANT:
        segments.pop()
    return Document(tuple(segments), document.meta)
