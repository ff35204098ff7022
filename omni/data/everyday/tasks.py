"""The tasks of everyday requests: free functions over a Builder. The order of random calls decides the documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omni.data.emoji_world.objects import SCENE_NAMES
from omni.data.emoji_world.scene import (
    CENTRE,
    PAIR_SLOTS,
    Scene,
    counted,
    draw_background,
    draw_names,
    row,
    single,
    small_objects,
)
from omni.data.emoji_world.words import NUMBERS, is_countable, plural, with_article
from omni.data.everyday.builder import Builder
from omni.data.everyday.names import names_of
from omni.data.everyday.phrases import replies, unknown_things, wordings
from omni.data.everyday.stories import story

Extra = dict[str, Any]


def any_name(builder: Builder) -> str:
    """The short name of any emoji; in the held-out split of one that has a held-out name."""
    while True:
        name = builder.rng.choice(builder.atlas.names)
        if names_of(name, builder.split):
            return name


def scene_names(builder: Builder, number: int) -> list[str]:
    """Names for one picture: mostly of common things, without a held-out pair."""
    pool = SCENE_NAMES if builder.rng.random() < 0.6 else builder.atlas.names
    return draw_names(builder.rng, number, builder.split, pool)


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw_one(builder: Builder, mostly_plain: bool = False) -> tuple[Scene, Extra]:
    """ "could you draw me a bunny?": the request, and its scene."""
    rng, name, chance = builder.rng, any_name(builder), builder.rng.random()
    called = builder.called(name)
    extra = {"name": name, "called": called}
    if chance < 0.12 and not mostly_plain:
        colour = builder.colour()
        words = builder.words(called)
        builder.ask(builder.phrase("ask.draw_background", **words, c=colour))
        return single(name, colour), {"kind": "background", **extra}
    if chance < 0.17 and not mostly_plain and rng.random() < 0.5:
        builder.ask(builder.phrase("ask.draw_small", **builder.words(called, adjectives=False)))
        return single(name, "white", CENTRE), {"kind": "small", **extra}
    builder.ask(builder.phrase("ask.draw", **builder.words(called)))
    return single(name), {"kind": "plain", **extra}


def draw(builder: Builder) -> Extra:
    """A request and its picture."""
    scene, extra = draw_one(builder)
    builder.show(scene)
    return extra


def scene_request(builder: Builder) -> tuple[Scene, Extra]:
    """A request for several things, and its scene."""
    rng = builder.rng
    background = draw_background(rng, 0.8)
    kind = rng.choices(("left", "above", "row", "count"), (6, 6, 2, 3))[0]
    if kind == "count":
        name = rng.choice([one for one in SCENE_NAMES if is_countable(one)])
        number = rng.choice((2, 3, 4))
        request = builder.phrase("scene.count", n=NUMBERS[number], many=plural(builder.called(name)))
        scene = counted(name, number, background)
    else:
        names = scene_names(builder, 3 if kind == "row" else 2)
        words = dict(zip("abd", (with_article(builder.called(name)) for name in names), strict=False))
        request = builder.phrase(f"scene.{kind}", **words)
        slots = PAIR_SLOTS[kind == "above"]
        scene = row(names, background) if kind == "row" else small_objects(names, slots, background)
    builder.ask(request if background == "white" else builder.on_colour(request, background))
    return scene, {"kind": kind}


def draw_scene(builder: Builder) -> Extra:
    """A request for several things, and the picture."""
    scene, extra = scene_request(builder)
    builder.show(scene)
    return extra


# ---- words ---------------------------------------------------------------------------------------------------------


def picture_to_name(builder: Builder) -> tuple[str, Scene]:
    """An emoji's short name, and its picture on some background."""
    name = any_name(builder)
    return name, single(name, draw_background(builder.rng, 0.75))


def answer_name(builder: Builder, name: str) -> None:
    """What a picture shows, in words."""
    builder.answer(capital(builder.phrase("naming.answer", a=with_article(name))))


def capital(text: str) -> str:
    """With a capital first letter, and a full stop where there is no mark."""
    return text[:1].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def naming(builder: Builder) -> Extra:
    """A picture and a question; the answer is the name."""
    name, scene = picture_to_name(builder)
    question = builder.phrase("naming.ask")
    if builder.rng.random() < 0.6:
        builder.give(scene)
        builder.ask(question)
    else:
        builder.ask(question)
        builder.give(scene)
    answer_name(builder, name)
    return {"kind": "name", "name": name}


def plain(builder: Builder) -> Extra:
    """A request for text alone: the frozen language model answers."""
    builder.ask(builder.rng.choice(wordings()["plain.requests"]))
    builder.hand_over()
    return {"kind": "plain"}


def unknown(builder: Builder) -> Extra:
    """A request to draw what no emoji shows: declined in words."""
    with_its_article, thing = builder.rng.choice(unknown_things())
    words = {"a": with_its_article, "x": thing, "many": with_its_article}
    builder.ask(builder.phrase("ask.draw", **words))
    builder.answer(capital(builder.phrase("unknown.decline", **words)))
    return {"kind": "unknown", "thing": thing}


# ---- conversations -------------------------------------------------------------------------------------------------

ADDED = {"right": (0, False), "left": (0, True), "below": (1, False), "above": (1, True)}  # slots; new one first?


def second_turn(builder: Builder) -> Extra:
    """A picture, and a request that follows it."""
    rng = builder.rng
    kinds = ("other", "background", "again", "add", "name", "thanks", "plain", "scene")
    kind = rng.choices(kinds, (5, 6, 1, 5, 3, 1, 2, 1))[0]
    if kind == "add":
        return _add(builder)
    scene, extra = draw_one(builder, mostly_plain=True)
    name = extra["name"]
    builder.show(scene)
    _follow(builder, kind, scene, name)
    return {**extra, "kind": kind}


def _follow(builder: Builder, kind: str, scene: Scene, name: str) -> None:
    """The second request of a kind, and its answer."""
    if kind == "other":
        other = any_name(builder)
        builder.ask(builder.phrase("second.other", **builder.words(builder.called(other))))
        builder.show(single(other))
    elif kind == "background":
        colour = builder.colour()
        builder.ask(builder.phrase("second.background", c=colour))
        builder.show(Scene(colour, scene.placements))
    elif kind == "again":
        builder.ask(builder.phrase("second.again"))
        builder.show(scene)
    elif kind == "name":
        builder.ask(builder.phrase("second.name"))
        answer_name(builder, name)
    elif kind == "scene":
        draw_scene(builder)
    elif kind == "thanks":
        builder.ask(builder.phrase("second.thanks"))
        builder.hand_over()
    else:
        plain(builder)


def _add(builder: Builder) -> Extra:
    """A picture of one thing, and a second thing beside it."""
    rng = builder.rng
    old, new = scene_names(builder, 2)
    builder.ask(builder.phrase("ask.draw", **builder.words(builder.called(old))))
    builder.show(single(old))
    side = rng.choice(tuple(ADDED))
    slots, is_first = ADDED[side]
    builder.ask(builder.phrase(f"second.add_{side}", **builder.words(builder.called(new))))
    builder.show(small_objects((new, old) if is_first else (old, new), PAIR_SLOTS[slots]))
    return {"kind": "add", "side": side, "name": old, "added": new}


def chat(builder: Builder) -> Extra:
    """A request for text with the frozen language model's own reply, then another request."""
    request, reply = builder.rng.choice(replies())
    builder.ask(request)
    builder.recall(reply)
    follow = {"draw": draw, "scene": draw_scene, "unknown": unknown, "plain": plain, "name": naming}
    kind = builder.rng.choices(tuple(follow), (5, 1, 1, 2, 1))[0]
    return {**follow[kind](builder), "kind": kind}


# Task -> function; sources choose among them by weight.
TASKS: dict[str, Callable[[Builder], Extra]] = {
    "draw": draw,
    "scene": draw_scene,
    "name": naming,
    "plain": plain,
    "unknown": unknown,
    "second": second_turn,
    "story": story,
    "chat": chat,
}
