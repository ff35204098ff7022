"""The requests of the golden file: fifty, as plain data. What they ask and how is fixed; add to the end, change none.

A request is (name, messages, options). A picture of a message is the name of a file in `given/`.
BATCH are requests that share passes; the others are alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Request(NamedTuple):
    name: str
    messages: list[dict[str, Any]]
    options: dict[str, Any]


def ask(name: str, *turns: str | tuple[str, ...], **options: Any) -> Request:
    """Turns of user and assistant in alternation. A tuple is pictures (`given/NAME.png`) and, last, a text."""
    messages = []
    for number, turn in enumerate(turns):
        *media, text = (turn,) if isinstance(turn, str) else turn
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in media]
        content += [{"type": "text", "text": text}] if text else []
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return Request(name, messages, options)


STORY = "tell a story in 3 pictures about a cat"
DRAFTS = "what can you draw?"

ALONE = [
    # pictures
    ask("draw", "draw a red apple"),
    ask("draw, another seed", "draw a red apple", seed=7),
    ask("draw, held-out phrasing", "would you sketch a rocket for me?"),
    ask("open", "draw a fruit", seed=3),
    ask("scene", "draw a cat to the left of a dog"),
    ask("background", "draw a pizza on a blue background"),
    ask("one step", "draw a guitar", steps=1),
    ask("two steps", "draw a guitar", steps=2),
    ask("eight steps", "draw a guitar", steps=8),
    ask("small", "draw a banana", image_size=(32, 32)),
    ask("oblong", "draw a banana", image_size=(32, 64)),
    ask("forced", "a sunflower", force_image=True, max_images=1),
    ask("no pictures", "draw a cat", max_images=0),
    # samplers and guidance
    ask("euler", "draw a dog", sampler="euler", steps=8),
    ask("ddim", "draw a dog", sampler="ddim", steps=8),
    ask("heun", "draw a dog", sampler="heun", steps=4),
    ask("restart", "draw a dog", sampler="restart", steps=4),
    ask("gamma", "draw a dog", sampler="gamma", gamma=0.3, steps=4),
    ask("edm grid", "draw a dog", grid="edm", steps=6),
    ask("given times", "draw a dog", grid=[1.0, 0.58, 0.0]),
    ask("shift", "draw a dog", shift=2.5, start_time=0.9),
    ask("guidance", "draw a train", guidance=2.5, told_guidance=1.0),
    ask("guidance of pictures", ("cat", "make it blue"), guidance=2.0, image_guidance=1.5, told_guidance=1.0),
    ask("guidance below 1", "draw a train", guidance=0.5),
    # text
    ask("hello", "hello"),
    ask("question", "is a red apple a fruit?"),
    ask("plain text", DRAFTS, tokens_per_pass=1),
    ask("drafts, greedy", DRAFTS, verify="greedy"),
    ask("drafts, sampled", "tell me a story about a dog", temperature=1.0, seed=5),
    ask("plain, sampled", "tell me a story about a dog", temperature=1.0, seed=5, tokens_per_pass=1),
    ask("drafts, rejection", DRAFTS, temperature=0.8, top_p=0.9, verify="rejection", seed=2),
    ask("drafts, block", DRAFTS, temperature=0.8, verify="block", seed=2),
    ask("drafts, unverified", DRAFTS, verify="none", tokens_per_pass=4),
    ask("sweeps", DRAFTS, sweeps=2, tokens_per_pass=4),
    ask("recycled, adaptive", DRAFTS, recycle=True, adaptive=True),
    ask("stop text", DRAFTS, stop="name"),
    ask("length", STORY, max_tokens=9),
    # pictures given
    ask("naming", ("cat", "what is this?")),
    ask("naming, oblong", ("wide", "what do you see?")),
    ask("edit", ("cat", "swap the cat for a dog")),
    ask("edit of a drawing", ("apple", "make the background green"), seed=4),
    ask("two pictures", ("cat", "apple", "what is in the picture?")),
    # several turns
    ask("third turn", "draw a cat", ("cat", ""), "make it bigger"),
    ask("stopped story", STORY, max_images=2, temperature=0.7, seed=9),
]  # fmt: skip

BATCH = [
    ask("batch, story", STORY),
    ask("batch, another story", "tell a story in 2 pictures about a dog and a ball", seed=1),
    ask("batch, text", "what can you draw?", tokens_per_pass=1),
    ask("batch, guided", "draw a tulip", guidance=2.0, told_guidance=1.0),
    ask("batch, naming", ("apple", "what is this?"), temperature=0.5, seed=6),
    ask("batch, two steps", "draw a car", steps=2),
]

REQUESTS = [*ALONE, *BATCH]
