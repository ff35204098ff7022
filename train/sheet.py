"""Sample sheets: pictures that the averaged weights generate, below the documents' own pictures.

A sheet is a PNG grid of pairs of rows: the upper row shows the documents' pictures, prepared; the lower row the
model's. Prompts are held-out documents, or else documents far beyond those of training. Clips show their first frame.
A failure is printed and does not stop the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from omni.data.source import CorruptRecord
from omni.document import Document, Image, Segment, Video
from omni.media import save_png
from train.data.held_out import FIRST_UNSEEN
from train.loop import Run

COLUMNS = 8  # of pictures


def prompts_before_picture(documents: Iterable[Document], count: int) -> list[tuple[Document, torch.Tensor, bool]]:
    """For `count` of the documents: the part before the first supervised picture, that picture (H, W, 3), and whether
    it is a picture (else the first frame of a clip). Only documents whose assistant turn begins with it."""
    found: list[tuple[Document, torch.Tensor, bool]] = []
    for document in documents:
        segments = document.segments
        where = next((i for i, s in enumerate(segments) if isinstance(s, Image | Video) and s.supervise), 0)
        if where and segments[where - 1].role != segments[where].role:
            found.append(
                (Document(segments[:where]), _first_frame(segments[where]), isinstance(segments[where], Image))
            )
        if len(found) == count:
            break
    return found


def _unseen(document: Callable[[int], Document], attempts: int = 400) -> Iterator[Document]:
    """Documents beyond those of training; unreadable ones are left out."""
    for index in range(FIRST_UNSEEN, FIRST_UNSEEN + attempts):
        with suppress(CorruptRecord):
            yield document(index)


def draw_sheet(run: Run, path: Path) -> None:
    """Write the sheet of the run's current averages."""
    report = run.recipe.report
    asked = prompts_before_picture(run.held_out or _unseen(run.loader.document), report.sheet_pictures)
    run.model.eval()
    try:
        with run.ema.applied(), torch.no_grad():
            drawn = _draw(run, [prompt for prompt, _, _ in asked], [still for _, _, still in asked])
    finally:
        run.model.train()
    if asked:
        path.parent.mkdir(parents=True, exist_ok=True)
        references = [run.model.prepare(Image(picture)).pixels for _, picture, _ in asked]
        save_png(grid(references, drawn), path)


def grid(references: list[torch.Tensor], drawn: list[torch.Tensor | None], gap: int = 2) -> torch.Tensor:
    """uint8 (H, W, 3): rows of COLUMNS references, each above its row of generated pictures; grey where none is."""
    side = max(max(p.shape[0], p.shape[1]) for p in references)
    rows = []
    for start in range(0, len(references), COLUMNS):
        for pictures in (references[start : start + COLUMNS], drawn[start : start + COLUMNS]):
            cells = [_cell(picture, side, gap) for picture in pictures]
            cells += [_cell(None, side, gap)] * (min(COLUMNS, len(references)) - len(cells))
            rows.append(torch.cat(cells, 1))
    return torch.cat(rows, 0)


def _draw(run: Run, asked: list[Document], is_picture: list[bool]) -> list[torch.Tensor | None]:
    """One generated picture for each prompt; None where the reply has none."""
    from omni.generation.options import GenerationOptions

    steps = run.recipe.report.sheet_sampling_steps
    options = GenerationOptions(steps=steps, max_images=1, max_tokens=16, force_image=all(is_picture))
    replies = run.model.generate_batch(asked, options, seeds=list(range(len(asked))))
    drawn: list[torch.Tensor | None] = []
    for prompt, reply in zip(asked, replies, strict=True):
        made = [s for s in reply.document.segments[len(prompt.segments) :] if isinstance(s, Image | Video)]
        drawn.append(_first_frame(made[0]) if made else None)
    return drawn


def _first_frame(segment: Segment) -> torch.Tensor:
    """The pixels (H, W, 3) of a picture, or of the first frame of a clip."""
    assert isinstance(segment, Image | Video)
    return segment.pixels if isinstance(segment, Image) else segment.frames[0]


def _cell(picture: torch.Tensor | None, side: int, gap: int) -> torch.Tensor:
    """A grey square of side + gap pixels with the picture in its corner."""
    cell = torch.full((side + gap, side + gap, 3), 128, dtype=torch.uint8)
    if picture is not None:
        height, width = min(side, picture.shape[0]), min(side, picture.shape[1])
        cell[:height, :width] = picture[:height, :width]
    return cell
