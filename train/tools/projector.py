"""First weights of a projector: a picture in the context begins as the embeddings of the words of its caption.

    python -m train.tools.projector RECIPE OUT [key=value ...] [--caption KEY] [--documents N] [--steps N]

The k-th position of a picture learns the input embedding of the k-th token of the caption by squared error (regression
onto word embeddings: DeViSE, Frome et al., NIPS 2013); a caption ends with ".", which fills further positions. A
projector knows no positions: patches have to differ, as those of one thing in the middle of a picture do. Only
`flow.clean_first` and `flow.clean` are trained, without a pass through the language model. Documents are those of the
recipe's sources that have one picture. The caption is what their `meta` has under KEY, or without --caption the
assistant's first text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from omni.cli.arguments import exit_code
from omni.config import Frozen, build
from omni.data.source import CorruptRecord
from omni.document import Document, Image, Role, Text, Video
from omni.errors import check_place
from omni.media.preparation import prepare
from omni.model import Omni
from omni.rng import Key
from train.build import build_run, publish_model
from train.loop import Run
from train.optim.ema import Ema
from train.recipe import Recipe, load_recipe

PART = 64  # pictures that are encoded together
NOISE = 0.1  # deviation of what is added to the latents, which have deviation 1
HELD_OUT = 10  # every tenth picture measures
LONGEST = 20  # documents that are looked at for each one wanted


class ProjectorConfig(Frozen):
    """caption: key of a document's `meta`; None: the assistant's first text. documents: captioned pictures."""

    caption: str | None = None
    documents: int = Field(default=6000, ge=2 * HELD_OUT)
    steps: int = Field(default=3000, ge=1)
    batch: int = Field(default=256, ge=1)
    rate: float = Field(default=3e-3, gt=0)


def readable(run: Run, most: int) -> Iterator[Document]:
    """The first documents of a run's sources, without corrupt ones."""
    for index in range(most):
        with suppress(CorruptRecord):
            yield run.loader.document(index)


def captioned(documents: Iterator[Document], caption: str | None) -> Iterator[tuple[Image, str]]:
    """The pictures of documents with one picture, each with its caption."""
    for one in documents:
        media = [part for part in one.segments if isinstance(part, Image | Video)]
        if len(media) != 1 or not isinstance(media[0], Image):
            continue
        texts = [part.text for part in one.segments if isinstance(part, Text) and part.role is Role.ASSISTANT]
        text = one.meta.get(caption) if caption is not None else next(iter(texts), None)
        if isinstance(text, str) and text.strip():
            yield media[0], text.strip().removesuffix(".")


@torch.no_grad()
def pairs(model: Omni, found: Sequence[tuple[Image, str]]) -> tuple[Tensor, Tensor, list[str]]:
    """Latents (M, N, C) of pictures of one size, embeddings (M, N, W) of their captions' first N tokens, the captions.
    ValueError where sizes differ."""
    assert model.tokenizer is not None and model.codec is not None
    latents: list[Tensor] = []
    for first in range(0, len(found), PART):
        pictures = [prepare(picture, model.preparation, model.limits) for picture, _ in found[first : first + PART]]
        latents += [blocks[0].flatten(0, 2) for blocks in model.codec.encode_media(pictures)]
    if len({one.shape for one in latents}) != 1:
        raise ValueError("the pictures have different numbers of positions; give a preparation with one size")
    device, num = model.transformer.norm.weight.device, len(latents[0])
    ids = []
    for _, text in found:
        tokens = model.tokenizer.encode(f" {text}.")
        ids.append((tokens + tokens[-1:] * num)[:num])
    embeddings = model.token.embed(torch.tensor(ids, device=device)).float()
    return torch.stack(latents).to(device), embeddings, [text for _, text in found]


def train_projector(model: Omni, latents: Tensor, wanted: Tensor, config: ProjectorConfig, key: Key) -> None:
    """AdamW on the projector alone, at a rate that falls to 0. latents (M, N, C), wanted (M, N, W)."""
    assert model.flow is not None
    weights = [p for name, p in model.flow.named_parameters() if name.startswith("clean")]
    for one in weights:
        one.requires_grad_(True)
    optimiser, scale = torch.optim.AdamW(weights, lr=config.rate, weight_decay=0.0), wanted.std()
    for step in range(config.steps):
        own = key.fold(step)
        rows = (own.fold("rows").uniform((config.batch,)) * len(latents)).long().to(latents.device)
        noise = own.fold("noise").normal((config.batch, *latents.shape[1:])).to(latents)
        error = model.flow.embed_clean(latents[rows] + NOISE * noise) - wanted[rows]
        optimiser.param_groups[0]["lr"] = config.rate * (1 - step / config.steps)
        optimiser.zero_grad()
        (error / scale).square().mean().backward()
        optimiser.step()


@torch.no_grad()
def share_nearest(model: Omni, latents: Tensor, wanted: Tensor, captions: Sequence[str]) -> float:
    """The share of held-out pictures whose nearest caption of all is their own. latents (M, N, C), wanted (M, N, W)."""
    assert model.flow is not None
    different = dict(zip(captions, wanted, strict=True))
    given = model.flow.embed_clean(latents[::HELD_OUT]).flatten(1)
    nearest = torch.cdist(given, torch.stack([*different.values()]).flatten(1)).argmin(1).tolist()
    names, own = list(different), captions[::HELD_OUT]
    return sum(names[index] == text for index, text in zip(nearest, own, strict=True)) / len(own)


def begin(run: Run, config: ProjectorConfig) -> float:
    """Train the projector of a run's model in place; the share of held-out pictures with the right nearest caption.
    ValueError where there are too few captioned pictures."""
    most = LONGEST * config.documents
    found = list(islice(captioned(readable(run, most), config.caption), config.documents))
    if len(found) < 2 * HELD_OUT:
        where = f" under {config.caption!r} of their meta" if config.caption else ""
        raise ValueError(
            f"{len(found)} of {most} documents have one picture and a caption{where}; choose other sources, or another "
            "caption"
        )
    latents, wanted, captions = pairs(run.model, found)
    train_rows = torch.arange(len(found), device=latents.device) % HELD_OUT != 0
    train_projector(run.model, latents[train_rows], wanted[train_rows], config, run.key.fold("projector"))
    return share_nearest(run.model, latents, wanted, captions)


def make_projector(recipe: Recipe, out: Path, config: ProjectorConfig) -> None:
    """Write the model directory of a recipe with a trained projector. ValueError as `begin`."""
    run = build_run(recipe, out)
    torch.set_num_threads(recipe.threads)
    share = begin(run, config)
    print(f"{share:.1%} of held-out pictures are nearest to their own caption", file=sys.stderr)
    run.ema = Ema(run.model, recipe.ema_decay)  # what is published
    publish_model(run, out)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.tools.projector", description="See the head of the file.")
    parser.add_argument("recipe", type=Path, help="whose model, sources, tokenizer and codec")
    parser.add_argument("out", type=Path, help="the model directory to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one value of the recipe")
    parser.add_argument("--caption", metavar="KEY", help="of a document's meta")
    parser.add_argument("--documents", type=int, default=ProjectorConfig().documents, help="captioned pictures")
    parser.add_argument("--steps", type=int, default=ProjectorConfig().steps)
    given = parser.parse_intermixed_args(arguments)

    def work() -> None:
        check_place(given.out, "OUT", is_folder=True)
        options = {"caption": given.caption, "documents": given.documents, "steps": given.steps}
        config = build(options, ProjectorConfig, "command line")
        make_projector(load_recipe(given.recipe, given.overrides), given.out, config)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
