"""From a source's answers to the shares of its pictures' noise: see omni.coupling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from omni.coupling import Coupling, Share, quiet_directions
from omni.document import Image, Video
from omni.heads.flow import ChoiceEmbedding
from omni.layout import LatentSpan, Span
from train.data.source import Source

Encode = Callable[[Sequence[Image | Video]], list[list[torch.Tensor]]]


def build_coupling(sources: Sequence[Source], encode: Encode, choice: ChoiceEmbedding | None) -> Coupling:
    """An answer is the mean latents of its pictures. A model whose directions are not chosen gets its own here.
    ValueError where no source has answers, two have other ones under one name, or the model has no number for one."""
    families: dict[str, Mapping[str, torch.Tensor]] = {}
    for source in sources:
        for family, groups in source.answers().items():
            found = {
                group: torch.stack(
                    [torch.stack([one[0].flatten(0, 2) for one in encode(same)]).mean(0) for same in answers]
                )
                for group, answers in groups.items()
            }
            if family in families and not _equal(families[family], found):
                raise ValueError(f"two sources have different answers of one family {family!r}; rename one")
            families[family] = found
    if not families:
        raise ValueError("coupling: no source of this recipe says what the right answers are (see Source.answers)")
    if choice is None:
        raise ValueError(f"coupling: name the families in the recipe, heads.flow = {{ choices = {sorted(families)} }}")
    coupling = Coupling(families, choice.names, choice.bits, choice.orders)
    choice.orders = coupling.orders
    if not choice.directions.any():
        answers = [one for groups in families.values() for one in groups.values()]
        choice.directions.copy_(quiet_directions(answers, choice.num, choice.bits).flatten(0, 1))
    return coupling


def with_answers(
    spans: list[Span],
    media: Sequence[Image | Video],
    others: Sequence[Sequence[tuple[Image, torch.Tensor]]],
    coupling: Coupling | None,
) -> list[Span]:
    """The spans of a document, its pictures with the shares of their choices, and with their other right answers.

    media: its pictures and clips, in order. others: of each, other answers with their latents (1, h, w, C).
    """
    if not any(isinstance(s, Image) and (s.choices or s.others) for s in media):
        return spans
    if any(isinstance(s, Video) for s in media):
        raise ValueError("a document with clips and with pictures that have choices; give it one of the two")

    def shares(picture: Image) -> tuple[Share, ...]:
        return () if coupling is None else tuple(coupling.share(choice) for choice in picture.choices)

    waiting, out = iter(zip(media, others, strict=True)), []
    for span in spans:
        if isinstance(span, LatentSpan):
            picture, more = next(waiting)
            assert isinstance(picture, Image)
            grids = [(z.shape[0], z.shape[1], z.shape[2]) for _, z in more]
            as_right = tuple(
                LatentSpan(z.flatten(0, 2), grid, True, shares(one)) for grid, (one, z) in zip(grids, more, strict=True)
            )
            span = replace(span, shares=shares(picture), others=as_right)
        out.append(span)
    return out


def _equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
