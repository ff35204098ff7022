"""The state machine of a turn: which ids may come next, and what an id changes. This file runs no network.

    phase     text -> (image) rows -> columns -> block -> text ... -> done
              text -> (video) chunks -> rate -> rows -> columns -> block (chunks of them) -> text

`mask_of` gives the allowed ids of a phase, `following` the phase after an id as far as the id alone decides it;
`advance` moves a request by one id and yields the events.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from omni.codecs import CodecSpec
from omni.document import Role, Text
from omni.encoders import EncoderSpec
from omni.generation.events import BlockStart, Event, StopReason, TextDelta, TextPart
from omni.generation.request import Media, Phase, Request
from omni.model import OmniConfig
from omni.sequence.context_limit import warn_if_nearly_full
from omni.text.compose import frame_rate, header_length
from omni.text.tokenizer import MAX_SIZE, Tokenizer

LEAST_MEDIA = header_length(False) + 2  # positions of the smallest picture: its header, one latent, media_end


class Grammar:
    """The grammar of one model: its tokenizer, the bounds of its config, and its codec (None: no pictures). encoder:
    whose features the context holds of a picture."""

    def __init__(
        self, tokenizer: Tokenizer, config: OmniConfig, codec: CodecSpec | None, device: torch.device | str,
        encoder: EncoderSpec | None = None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.control, self.config, self.codec = tokenizer, tokenizer.control, config, codec
        self.encoder = encoder
        self.device = device
        self.allowed = {phase: self._allowed(phase) for phase in ("text", "chunks", "rate", "rows", "columns")}

    @property
    def draws(self) -> bool:
        """Whether the model can generate pictures."""
        return self.codec is not None and self.config.flow is not None

    # ---- what may come ---------------------------------------------------------------------------------------------

    def _allowed(self, phase: str) -> Tensor:
        """(V,) additive mask of the allowed ids of a phase. It makes every header well formed."""
        c, config = self.control, self.config
        mask = torch.full((config.vocab_size,), -torch.inf, device=self.device)
        if phase == "text":
            mask[torch.tensor(self.tokenizer.text_ids, device=self.device)] = 0
            mask[list(self.tokenizer.ends)] = 0
            if self.draws:
                mask[[c.image, c.video]] = 0
        else:
            largest = {"chunks": config.max_chunks, "rate": MAX_SIZE}.get(phase, config.max_grid)
            mask[[c.size(n) for n in range(1, largest + 1)]] = 0
        return mask

    def mask_of(self, request: Request, phase: Phase) -> Tensor:
        """(V,) additive: which ids may come next in a phase of this request."""
        mask, fps = self.allowed[phase], request.options.picture.fps
        if phase != "rate" or fps is None:
            return mask
        only = torch.full_like(mask, -torch.inf)
        only[self.control.size(frame_rate(fps))] = 0
        return only

    def may_draw(self, request: Request) -> bool:
        return self.draws and request.num_media < request.options.max_images

    def following(self, request: Request, phase: Phase, token: int) -> Phase:
        """The phase after an id, as far as the id alone decides it; "block" also where the options force a size."""
        c = self.control
        if phase == "text" and token in (c.image, c.video):
            if not self.may_draw(request):
                return "done"
            forced = token == c.image and request.options.picture.image_size is not None
            return "block" if forced else "rows" if token == c.image else "chunks"
        if phase == "text":
            return "done" if token in self.tokenizer.ends else "text"
        after: dict[Phase, Phase] = {"chunks": "rate", "rate": "rows", "rows": "columns", "columns": "block"}
        return after.get(phase, phase)

    def grid(self, media: Media) -> tuple[int, int, int]:
        """(t, h, w) in latents of each block of a picture or clip whose header is complete."""
        assert self.codec is not None
        t = 1 if media.kind == "image" else self.codec.frames_per_chunk
        return (t, media.rows, media.columns)

    def holds_latents(self, media: Media) -> bool:
        """Whether the context holds the latents of a finished picture or clip, not its features alone."""
        encoder = self.config.encoder
        return media.kind == "video" or encoder is None or encoder.pictures == "both"

    def num_positions(self, media: Media) -> int:
        """Context positions of the blocks of a picture or clip whose header is complete."""
        num = media.chunks * math.prod(self.grid(media)) if self.holds_latents(media) else 0
        if media.kind == "video" or self.config.encoder is None or self.encoder is None:
            return num
        assert self.codec is not None
        _, rows, columns = self.codec.stride
        return num + self.encoder.num_features(media.rows * rows, media.columns * columns)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) in latents of pictures of (height, width) pixels. ValueError for a size that the model cannot make."""
        if self.codec is None:
            raise ValueError("this model generates no pictures: it has no codec")
        _, rows, columns = self.codec.stride
        largest = self.config.max_grid
        grid = size[0] // rows, size[1] // columns
        if size[0] % rows or size[1] % columns or max(grid) > largest:
            raise ValueError(
                f"image_size = {size[0]} x {size[1]} does not fit this model: it must be a multiple of "
                f"{rows} x {columns} pixels, and at most {largest * rows} x {largest * columns}"
            )
        return grid

    # ---- what an id does -------------------------------------------------------------------------------------------

    def advance(self, request: Request, token: int) -> Iterator[Event]:
        """Move the request's state machine by one id."""
        request.length += 1
        if request.phase != "text":
            yield from self._advance_header(request, token)
        elif self.tokenizer.is_text(token):
            request.text += request.stream.push(token)
            yield from self._emit(request)
            full = request.num_tokens >= request.options.max_tokens or request.length >= request.capacity
            if full and request.phase != "done":
                yield from self._finish(request, "length")
        elif token in self.tokenizer.ends:
            yield from self._finish(request, "end")
        elif not self.may_draw(request):
            yield from self._finish(request, "images")
        elif not request.has_room(LEAST_MEDIA - 1):
            yield from self._finish(request, "length")
        else:
            yield from self._close_text(request)
            is_image = token == self.control.image
            request.media = Media("image" if is_image else "video", request.num_media)
            request.phase = "rows" if is_image else "chunks"
            if is_image and request.options.picture.image_size is not None:
                request.forced += [self.control.size(n) for n in self.grid_of(request.options.picture.image_size)]

    def after_block(self, request: Request) -> Iterator[Event]:
        """End a reply that may have no further id, before a pass encodes its last picture."""
        if request.phase == "text" and request.num_tokens >= request.options.max_tokens:
            yield from self._finish(request, "length")

    def _advance_header(self, request: Request, token: int) -> Iterator[Event]:
        """Like `advance`, for one size of a header. A picture or clip without room in the context is not started."""
        media, size = request.media, self.control.size_of(token)
        assert media is not None and size is not None
        if request.phase == "chunks":
            media.chunks, request.phase = size, "rate"
        elif request.phase == "rate":
            media.rate, request.phase = size, "rows"
        elif request.phase == "rows":
            media.rows, request.phase = size, "columns"
        else:
            media.columns, request.phase = size, "block"
            grid = self.grid(media)
            if request.has_room(self.num_positions(media) + 1):
                yield BlockStart(media.kind, media.index, grid)
            else:
                yield from self._finish(request, "length")

    def _emit(self, request: Request) -> Iterator[Event]:
        """Emit the text that cannot be the beginning of a stop string. A stop string ends the reply."""
        for stop in request.options.stop:
            at = request.text.find(stop)
            if at >= 0:
                request.text = request.text[:at]
                yield from self._finish(request, "stop")
                return
        hold = max((len(s) for s in request.options.stop), default=1) - 1
        end = len(request.text) - hold
        if end > request.emitted:
            yield TextDelta(request.text[request.emitted : end])
            request.emitted = end

    def _close_text(self, request: Request) -> Iterator[Event]:
        request.text += request.stream.flush() if request.reason != "stop" else ""
        if len(request.text) > request.emitted:
            yield TextDelta(request.text[request.emitted :])
        if request.text:
            request.segments.append(Text(request.text, Role.ASSISTANT))
            request.parts.append(TextPart(request.text))
        request.text, request.emitted, request.stream = "", 0, self.tokenizer.stream()

    def _finish(self, request: Request, reason: StopReason) -> Iterator[Event]:
        request.reason = reason
        yield from self._close_text(request)
        request.phase = "done"
        request.warned = request.warned or warn_if_nearly_full(request.length, request.capacity)
