"""From a source's answers to the cells of its pictures' noise: see omni.coupling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field

from omni.config import Frozen
from omni.coupling import Cell, Coupling
from omni.document import Image, Video
from omni.layout import LatentSpan, Span
from omni.rng import Key
from train.data.source import Source

Encode = Callable[[Sequence[Image | Video]], list[list[torch.Tensor]]]


class CouplingConfig(Frozen):
    """dims: directions of a family of answers that its choices are read from; more tell answers apart better, fewer
    are learnt sooner. local: families whose answers differ in where things are, not in what a picture is as a whole."""

    dims: int = Field(12, ge=1)
    local: tuple[str, ...] = ()


def build_coupling(sources: Sequence[Source], encode: Encode, config: CouplingConfig, key: Key) -> Coupling:
    """An answer is the mean latents of its pictures. ValueError where no source has answers, or two have other ones
    under one name."""
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
    if unknown := sorted(set(config.local) - set(families)):
        raise ValueError(f"coupling.local: no family {unknown[0]!r}; the sources have {sorted(families)}")
    return Coupling(families, config.dims, key, config.local)


def with_answers(
    spans: list[Span],
    media: Sequence[Image | Video],
    others: Sequence[Sequence[tuple[Image, torch.Tensor]]],
    coupling: Coupling | None,
) -> list[Span]:
    """The spans of a document, its pictures with the cells of their choices, and with their other right answers.

    media: its pictures and clips, in order. others: of each, other answers with their latents (1, h, w, C).
    """
    if not any(isinstance(s, Image) and (s.choices or s.others) for s in media):
        return spans
    if any(isinstance(s, Video) for s in media):
        raise ValueError("a document with clips and with pictures that have choices; give it one of the two")

    def cells(picture: Image) -> tuple[Cell, ...]:
        return () if coupling is None else tuple(coupling.cell(choice) for choice in picture.choices)

    waiting, out = iter(zip(media, others, strict=True)), []
    for span in spans:
        if isinstance(span, LatentSpan):
            picture, more = next(waiting)
            assert isinstance(picture, Image)
            as_right = tuple(LatentSpan(z.flatten(0, 2), tuple(z.shape[:3]), True, cells(one)) for one, z in more)
            span = replace(span, cells=cells(picture), others=as_right)
        out.append(span)
    return out


def _equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
