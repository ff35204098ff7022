"""The model of the suite in the dtype of the options, its greedy replies, and the examples that a report shows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field

from eval.metrics.emoji_judge import Judge, calibrate
from eval.requests import atlas_of, picture_list, reply_seed
from eval.task import Context, Panel, TaskOptions
from eval.tasks.pretrained.smollm2 import real_gguf
from eval.tasks.speed.comparison import DTYPES
from omni.generation.events import ImagePart
from omni.generation.options import GenerationOptions
from omni.generation.reply import Reply
from omni.importers.decoders import import_decoder
from omni.model import Omni
from omni.nn.precision import fast_bf16

T = TypeVar("T")


class SmolOptions(TaskOptions):
    """dtype: of the weights; None: bf16 where the device computes it fast, else float32. requests: how many of the
    list, evenly over it; None: all. steps: jumps per picture; None: the model's own. batch: replies made together.
    panels: examples in the report, by a keyed sample."""

    dtype: Literal["float32", "bf16"] | None = None
    requests: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    max_tokens: int = Field(default=64, ge=1)
    batch: int = Field(default=32, ge=1)
    panels: int = Field(default=20, ge=0)


def dtype_of(context: Context, options: SmolOptions) -> str:
    """The name of the dtype, of DTYPES."""
    return options.dtype or ("bf16" if fast_bf16(context.device) else "float32")


def model_of(context: Context, options: SmolOptions) -> Omni:
    """The model of the suite."""
    import omni

    name = dtype_of(context, options)
    return context.once(
        f"smol {name}",
        lambda: omni.from_pretrained(context.model_path, device=context.device, dtype=DTYPES[name]),
    )


def language_model_of(context: Context, options: SmolOptions) -> Omni:
    """The language model alone, from the same file: what `omni import` makes of it. For a model that was published with
    its language model, SmolLM2's package is read."""
    import omni

    name, base = dtype_of(context, options), model_of(context, options).base

    def build() -> Omni:
        source: Path = real_gguf() if base is None else base.path  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory() as folder:
            imported = import_decoder(source, Path(folder) / "model")
            return omni.from_pretrained(imported, device=context.device, dtype=DTYPES[name])

    return context.once(f"smol language model {name}", build)


def judge_of(context: Context, options: SmolOptions) -> Judge:
    """The judge, with its sharpness calibrated on the model's codec."""

    def build() -> Judge:
        codec, atlas = model_of(context, options).codec, atlas_of(context)
        if codec is None:
            raise ValueError("the model of this suite draws nothing: it has no codec; give another model=DIR")
        return Judge(atlas, calibrate(lambda x: codec.decode(codec.encode(x)), atlas, context.key("judge")))

    return context.once("judge", build)


def greedy(
    context: Context, options: SmolOptions, prompts: Sequence[Any], model: Omni | None = None, **changes: Any
) -> list[Reply]:
    """Greedy replies in batches, seeded by their number, each batch by a fresh engine. model: None is the suite's.
    changes: other options of generation."""
    given = {"temperature": 0.0, "steps": options.steps, "max_tokens": options.max_tokens, **changes}
    settings, found = GenerationOptions(**given), []
    model = model_of(context, options) if model is None else model
    start = time.perf_counter()
    for first in range(0, len(prompts), options.batch):
        part = prompts[first : first + options.batch]
        seeds = [reply_seed(context, number) for number in range(first, first + len(part))]
        found += model.generate_batch(part, settings, seeds)
    context.report(f"  {len(prompts)} replies in {time.perf_counter() - start:.1f} s")
    return found


def conditions(context: Context, options: SmolOptions, replies: Sequence[Reply]) -> str:
    """Dtype, threads, and the jumps and evaluations of the pictures, for a note."""
    spent = {(part.steps, part.evaluations) for part in pictures_of(replies)}
    pictures = ", ".join(f"{steps} step(s) of {evaluations} evaluation(s)" for steps, evaluations in sorted(spent))
    where = f"{dtype_of(context, options)}, {torch.get_num_threads()} thread(s), batches of {options.batch}"
    return f"{len(replies)} replies, {where}; pictures in {pictures or 'no steps: there are none'}"


def pictures_of(replies: Sequence[Reply]) -> list[ImagePart]:
    """The pictures of all replies, with their jumps."""
    return [part for reply in replies for part in reply.parts if isinstance(part, ImagePart)]


def first_picture(reply: Reply) -> torch.Tensor | None:
    """The first picture of a reply, uint8 (64, 64, 3), if there is one of that size."""
    return next(iter(picture_list(reply)), None)


# ---- examples ------------------------------------------------------------------------------------------------------


def sampled(context: Context, task: str, given: Sequence[T], number: int) -> list[T]:
    """`number` of the given, by a sample that depends on the suite's seed and the task alone."""
    chosen = context.key("panels", task).python().sample(range(len(given)), min(number, len(given)))
    return [given[at] for at in sorted(chosen)]


def panel(request: str, reply: Reply, verdict: str, right: bool | None, given: Sequence[torch.Tensor] = ()) -> Panel:
    """The request, the reply's pictures, the verdict and the reply's words."""
    pictures = [picture for picture in picture_list(reply) if picture is not None]
    words = f"reply: {reply.text.strip()}" if reply.text.strip() else ""
    return Panel(request, (), pictures, "\n".join(filter(None, (verdict, words))), right, given)
