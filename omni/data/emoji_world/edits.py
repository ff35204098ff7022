"""Edits of a picture: the skin tone, a swapped, moved, added or removed object, the colour of the background.

Each function samples an Edit: the picture before, the instruction, the picture after. In the heldout split the pair of
objects in the result (or in the source, if an object is removed) is held out, and so is the new skin tone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omni.data.emoji_world.document_builder import DocumentBuilder
from omni.data.emoji_world.names import tone_name
from omni.data.emoji_world.objects import SCENE_NAMES
from omni.data.emoji_world.scene import (
    BACKGROUNDS,
    BIG,
    LEFT,
    PAIR_SLOTS,
    PLACES,
    RIGHT,
    TOP,
    Scene,
    draw_background,
    draw_names,
    single,
    small_objects,
    tone_is_heldout,
    tones_of,
)
from omni.data.emoji_world.words import article_for, with_article

# Side -> the words for it in an instruction.
SIDES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Edit:
    """The scene before, the scene after and the instruction; `extra` goes into the document's meta."""

    before: Scene
    after: Scene
    instruction: str
    extra: dict[str, Any] = field(default_factory=dict)


def edit_tone(builder: DocumentBuilder) -> Edit:
    """Change the skin tone of a person or hand, from yellow or from another skin tone."""
    target = builder.rng.choice(tones_of(builder.atlas.tones, builder.split))
    base, tone = target.removesuffix(" skin tone").split(": ")
    sources = [base] + [
        name
        for name in builder.atlas.tones
        if name.startswith(f"{base}:") and name != target and not tone_is_heldout(name)
    ]
    source = base if builder.rng.random() < 0.6 else builder.rng.choice(sources)
    background = draw_background(builder.rng, 0.7)
    assert tone_name(base, tone) == target, target
    return Edit(
        single(source, background),
        single(target, background),
        builder.phrase("edit.tone", tone=tone),
        {"base": base, "tone": tone},
    )


def edit_swap(builder: DocumentBuilder) -> Edit:
    """Replace one of two objects by a third."""
    kept, new, old = draw_names(builder.rng, 3, builder.split)
    slots, background = builder.rng.choice(PAIR_SLOTS), draw_background(builder.rng, 0.6)
    order = builder.rng.random() < 0.5
    before, after = ((kept, old), (kept, new)) if order else ((old, kept), (new, kept))
    return Edit(
        small_objects(before, slots, background),
        small_objects(after, slots, background),
        builder.phrase("edit.swap", x=old, b=with_article(new)),
    )


def edit_move(builder: DocumentBuilder) -> Edit:
    """Move one small object to another side or to the centre."""
    name, background = builder.rng.choice(SCENE_NAMES), draw_background(builder.rng, 0.6)
    start, goal = builder.rng.sample(list(PLACES), 2)
    instruction = builder.phrase("edit.move", x=name, place=goal)
    return Edit(single(name, background, PLACES[start]), single(name, background, PLACES[goal]), instruction)


def edit_exchange(builder: DocumentBuilder) -> Edit:
    """Exchange the places of two objects."""
    first, second = draw_names(builder.rng, 2, builder.split)
    slots, background = builder.rng.choice(PAIR_SLOTS), draw_background(builder.rng, 0.6)
    return Edit(
        small_objects((first, second), slots, background),
        small_objects((second, first), slots, background),
        builder.phrase("edit.exchange", x=first, y=second),
    )


def edit_add(builder: DocumentBuilder) -> Edit:
    """Add a second object on the named side of the first."""
    old, new = draw_names(builder.rng, 2, builder.split)
    background = draw_background(builder.rng, 0.6)
    side = builder.rng.choice(list(SIDES))
    slots = PAIR_SLOTS[0] if side in ("left", "right") else PAIR_SLOTS[1]
    names = (new, old) if side in ("left", "above") else (old, new)
    place = slots[names.index(old)]
    return Edit(
        single(old, background, place),
        small_objects(names, slots, background),
        builder.phrase("edit.add", x=old, b=with_article(new), side=builder.rng.choice(SIDES[side])),
    )


def edit_remove(builder: DocumentBuilder) -> Edit:
    """Remove one of two objects; the other keeps its place."""
    names = draw_names(builder.rng, 2, builder.split)
    background = draw_background(builder.rng, 0.6)
    before = small_objects(names, builder.rng.choice(PAIR_SLOTS), background)
    gone = builder.rng.randrange(2)
    after = replace(before, placements=(before.placements[1 - gone],))
    return Edit(before, after, builder.phrase("edit.remove", x=names[gone]))


def edit_recolour(builder: DocumentBuilder) -> Edit:
    """Change the background of one big object or two small ones."""
    old, new = builder.rng.sample(list(BACKGROUNDS), 2)
    if builder.rng.random() < 0.6:
        before = single(builder.rng.choice(SCENE_NAMES), old)
    else:
        names = draw_names(builder.rng, 2, builder.split)
        before = small_objects(names, builder.rng.choice(PAIR_SLOTS), old)
    return Edit(before, replace(before, background=new), builder.phrase("edit.recolour", c=new, on=article_for(new)))


# Kind -> (weight, function). The order decides the samples: never reorder.
EDITS: dict[str, tuple[float, Callable[[DocumentBuilder], Edit]]] = {
    "tone": (0.22, edit_tone),
    "swap": (0.2, edit_swap),
    "move": (0.14, edit_move),
    "exchange": (0.06, edit_exchange),
    "add": (0.14, edit_add),
    "remove": (0.1, edit_remove),
    "recolour": (0.14, edit_recolour),
}


EDIT_WEIGHTS = {kind: weight for kind, (weight, _) in EDITS.items()}


def draw_edit(builder: DocumentBuilder, weights: Mapping[str, float] = EDIT_WEIGHTS) -> tuple[str, Edit]:
    """Sample a kind of edit, then an edit of that kind; returns both."""
    kind = builder.rng.choices(list(weights), list(weights.values()))[0]
    return kind, EDITS[kind][1](builder)


def request_for(builder: DocumentBuilder, scene: Scene) -> str:
    """A user request for the scene before an edit."""
    if len(scene.names) == 2:
        a, b = map(with_article, scene.names)
        return builder.phrase(
            "scene", scene=builder.phrase(f"scene.{_relation(scene)}", a=a, b=b) + _background_words(scene)
        )
    words = _object_words(scene) + _background_words(scene)
    is_big = scene.placements[0].size == BIG
    return builder.phrase("draw", a=words) if is_big else builder.phrase("scene", scene=words)


def caption(scene: Scene) -> str:
    """A caption that determines a scene of one or two objects: "a cat to the left of a dog on a pink background"."""
    if len(scene.names) == 2:
        a, b = map(with_article, scene.names)
        words = f"{a} to the left of {b}" if _relation(scene) == "left" else f"{a} above {b}"
    else:
        words = _object_words(scene)
    return words + _background_words(scene)


def _relation(scene: Scene) -> str:
    """Of a scene of two objects: "left", the first left of the second, or "above"."""
    return "left" if tuple((p.x, p.y) for p in scene.placements) == (LEFT, RIGHT) else "above"


def _object_words(scene: Scene) -> str:
    """The only object of a scene: "a cat", or "a small cat at the left"."""
    (only,) = scene.placements
    if only.size == BIG:
        return with_article(spoken(only.name))
    place = next(place for place, slot in PLACES.items() if slot == (only.x, only.y))
    return f"{with_article(only.name, 'small')} at the {place}"


def _background_words(scene: Scene) -> str:
    """ "" for white, else " on a pink background"."""
    return "" if scene.background == "white" else f" on {article_for(scene.background)} background"


def spoken(name: str) -> str:
    """A tone name in a sentence: "nose: dark skin tone" -> "nose with dark skin tone"."""
    return name.replace(": ", " with ")


assert PAIR_SLOTS[0] == (LEFT, RIGHT) and PAIR_SLOTS[1][0] == TOP
