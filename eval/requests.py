"""Requests from the emoji world's held-out split, the model's replies, and functions that several tasks use on both.

A request is a held-out document cut before its last assistant turn; its `meta` contains the expected answer. Pictures
are uint8 (64, 64, 3) tensors; a reply without a usable picture gives None.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from eval.metrics.emoji_judge import Judge, Reading, calibrate
from eval.task import Context, Panel, TaskOptions
from omni.config import Frozen, with_new_names
from omni.data.emoji_world import SIDE, Atlas, EmojiWorld, Scene
from omni.data.emoji_world.documents import prompt_of
from omni.document import Document, Text
from omni.generation.options import RENAMED, GenerationOptions
from omni.generation.reply import Reply
from omni.samplers import SamplerName

MAX_DOCUMENTS_PER_REQUEST = 1000


class PictureChoices(Frozen):
    """How pictures are drawn, beside the number of steps. None is the model's own."""

    sampler: SamplerName | None = None
    guidance: float | None = None
    guidance_embedding: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _new_names(cls, data: Any) -> Any:
        return with_new_names(data, RENAMED) if isinstance(data, Mapping) else data

    @property
    def choices(self) -> dict[str, Any]:
        """As options of a request."""
        return {name: getattr(self, name) for name in PictureChoices.model_fields}


class RequestOptions(TaskOptions, PictureChoices):
    """How many requests, and how they are answered. kinds: only documents of these kinds (empty: all).

    steps: jumps per picture, with guidance two evaluations each. batch: replies made together.
    """

    requests: int = Field(default=300, ge=1)
    steps: int = Field(default=8, ge=1)
    batch: int = Field(default=32, ge=1)
    kinds: tuple[str, ...] = ()


def atlas_of(context: Context) -> Atlas:
    """The suite's atlas, built once."""
    return context.once("atlas", lambda: Atlas(context.font))


def judge_of(context: Context) -> Judge:
    """The judge, with its sharpness calibrated on the model's own codec."""

    def build() -> Judge:
        codec, atlas = context.model.codec, atlas_of(context)
        sharp = calibrate(lambda x: codec.decode(codec.encode(x)), atlas, context.key("judge"))
        return Judge(atlas, sharp)

    return context.once("judge", build)


def requests(
    context: Context,
    mixture: Mapping[str, float],
    number: int,
    accept: Callable[[Mapping[str, Any]], bool] = lambda meta: True,
) -> list[Document]:
    """The first `number` held-out documents of the mixture whose meta is accepted, in the order of their index."""
    world = EmojiWorld(atlas_of(context), seed=context.seed, split="heldout", mixture=mixture)
    found: list[Document] = []
    for index in range(number * MAX_DOCUMENTS_PER_REQUEST):
        document = world.document(index)
        if accept(document.meta):
            found.append(document)
            if len(found) == number:
                return found
    raise ValueError(f"found {len(found)} of {number} requests of {dict(mixture)}; relax the task's `kinds`")


def kind_filter(options: RequestOptions) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a document (by its meta) is of one of the kinds in the options."""
    return lambda meta: not options.kinds or meta["kind"] in options.kinds


def replies(
    context: Context, documents: Sequence[Document], options: RequestOptions, **generation: Any
) -> tuple[list[Reply], str]:
    """A reply to each document without its last assistant turn, seeded by its number; and a note on the time."""
    settings = GenerationOptions(steps=options.steps, **options.choices, **generation)
    prompts = [prompt_of(document) for document in documents]
    seeds = [reply_seed(context, number) for number in range(len(prompts))]
    start, answers = time.perf_counter(), []
    for first in range(0, len(prompts), options.batch):
        part = slice(first, first + options.batch)
        answers += context.model.generate_batch(prompts[part], settings, seeds[part])
    seconds = time.perf_counter() - start
    note = f"{len(prompts)} requests, {options.steps} steps per picture, {seconds:.1f} s for the replies"
    return answers, note


def reply_seed(context: Context, number: int) -> int:
    """The seed of the reply to the `number`-th request of a task."""
    return context.key("reply", number).integer() % 2**31


def picture_list(reply: Reply) -> list[torch.Tensor | None]:
    """The reply's pictures in order; None for one of another size than the emoji world's."""
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))) for image in reply.images]
    return [p if p.shape == (SIDE, SIDE, 3) else None for p in pixels]


def shape_of(reply: Reply) -> str:
    """The kinds of the parts in order, e.g. "text image text image"."""
    return " ".join(type(part).__name__.removesuffix("Part").lower() for part in reply.parts)


def expected_scenes(document: Document) -> list[Scene]:
    """The pictures of the document's last assistant turn, as scenes."""
    turns = list(document.turns())
    number = sum(not isinstance(segment, Text) for segment in turns[-1][1])
    scenes = [Scene.from_json(data) for data in document.meta["scenes"]]
    return scenes[len(scenes) - number :]


def scene_before(document: Document) -> Scene | None:
    """The picture that the last answer starts from: the previous reply's, else the user's."""
    drawn = document.meta["scenes"][: -len(expected_scenes(document))]
    earlier = [*document.meta["given"], *drawn]
    return Scene.from_json(earlier[-1]) if earlier else None


def spoken_request(document: Document) -> str:
    """The text of the prompt, with a mark for each of its pictures."""
    parts = [s.text if isinstance(s, Text) else "[picture]" for s in prompt_of(document).segments]
    return " | ".join(parts)


def read_pictures(
    judge: Judge,
    pictures: Sequence[torch.Tensor | None],
    scenes: Sequence[Scene],
    before: Sequence[Scene | None] | None = None,
) -> list[Reading | None]:
    """`Judge.shows` where there is a picture, None elsewhere. before: the scenes that edits start from."""
    rows = [i for i, picture in enumerate(pictures) if picture is not None]
    out: list[Reading | None] = [None] * len(pictures)
    if rows:
        stacked = torch.stack([p for p in pictures if p is not None])
        earlier = [before[i] for i in rows] if before else None
        for i, reading in zip(rows, judge.shows(stacked, [scenes[i] for i in rows], earlier), strict=True):
            out[i] = reading
    return out


def panel(document: Document, reply: Reply, reference: Sequence[torch.Tensor], note: str, right: bool) -> Panel:
    """One example for the report."""
    answers = [picture for picture in picture_list(reply) if picture is not None]
    words = f"reply: {reply.text.strip()}" if reply.text.strip() else ""
    lines = "\n".join(line for line in (note, words) if line)
    given = [segment.pixels for segment in prompt_of(document).images()]
    return Panel(spoken_request(document), reference, answers, lines, right, given)
