"""Document to spans: the ids and latents of one packed sequence, assembled segment by segment, never as one string.

    begin  { role  segments...  end }*  [assistant]
    image  ->  image size(h) size(w)  LatentSpan (1, h, w)  [FeatureSpan of an encoder]  media_end
    video  ->  video size(chunks) size(rate) size(h) size(w) LatentSpan (t, h, w) for each chunk  media_end

rate: frames per second, rounded.
Legend: t, h, w latents in time, rows, columns; C latent channels; N = t*h*w.
Control tokens enter by id only. omni.sequence.layout does layout, packing and masks.
Models are trained on this order of ids: never change it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from omni.document import Document, Image, Role, Segment, Text, Video
from omni.sequence.context_limit import require_room
from omni.sequence.features import Blocks, FeatureBlock, FeatureSpan, split_blocks
from omni.sequence.layout import LatentSpan, Span, TokenSpan
from omni.text.conversation import Invocation, Item, lay_out_turns
from omni.text.published import PublishedTokenizer
from omni.text.tokenizer import MAX_SIZE, ControlTokens, Tokenizer

EncodeMedia = Callable[[list[Image | Video]], list[Blocks]]
NumLatents = Callable[[Image | Video], int]
MAX_UNCOUNTED = 200_000  # characters; longer text is bounded by its length before it is encoded


def compose(
    document: Document,
    tokenizer: Tokenizer,
    encode_media: EncodeMedia,
    generation_prompt: bool = False,
    is_open: bool = False,
    invokes: bool = False,
    reply_invoked: bool = False,
) -> list[Span]:
    """The spans of `document`, in order; neighbouring ids share one TokenSpan.

    `encode_media` returns the latents of each image or video of a list: float32 (t, h, w, C) tensors, one with t = 1
    for an image, one per chunk for a video; behind those of an image, its FeatureBlock, if the model has an encoder. It
    is called once with all media, and not called without media. With `generation_prompt` the spans end with the id that
    opens an assistant turn; with `is_open` without the end of the last turn, which goes on. A published tokenizer's
    template writes turns instead (see conversation.py); with `invokes` its assistant's turns with media or supervised
    segments, with `reply_invoked` the open one too, begin with the invocation id, the control id `assistant`, and are
    adapted up to their end.
    Supervised ids: supervised text; the header of supervised media; the `end` of a turn with any supervised segment.
    Raises ValueError for media with a side (or a chunk count, or a frame rate) that has no size token, 1 to 64.
    """
    media = [s for s in document.segments if not isinstance(s, Text)]
    encoded = encode_media(media) if media else []
    if len(encoded) != len(media):
        raise ValueError(f"encode_media gave {len(encoded)} results for {len(media)} segments; give one for each")
    latents_of = iter(encoded)
    writer = _SpanWriter(invokes)
    for item in _items(document, tokenizer, generation_prompt, is_open, invokes, reply_invoked):
        if isinstance(item, TokenSpan):
            writer.write(item, tokenizer.ends)
        elif isinstance(item, Invocation):
            writer.invoke(tokenizer.control.assistant)
        else:
            _write_media(writer, tokenizer, item, next(latents_of))
    return writer.finish()


def _items(
    document: Document, tokenizer: Tokenizer, generation_prompt: bool, is_open: bool, invokes: bool = False,
    reply_invoked: bool = False,
) -> Iterator[Item]:  # fmt: skip
    """Ids and media in order; ids of media are not among them."""
    if generation_prompt and is_open:
        raise ValueError("a turn that goes on has no generation prompt: give one of generation_prompt and is_open")
    if isinstance(tokenizer, PublishedTokenizer):
        yield from lay_out_turns(document, tokenizer, generation_prompt, is_open, invokes, reply_invoked)
        return
    control, turns = tokenizer.control, list(document.turns())
    yield _span([control.begin], False)
    for number, (role, segments) in enumerate(turns, 1):
        yield _span([control.role(role)], False)
        for segment in segments:
            yield _span(tokenizer.encode(segment.text), segment.supervise) if isinstance(segment, Text) else segment
        if number < len(turns) or not is_open:
            yield _span([control.end], any(s.supervise for s in segments))
    if generation_prompt:
        yield _span([control.role(Role.ASSISTANT)], False)


def _span(ids: list[int], supervise: bool) -> TokenSpan:
    return TokenSpan(ids, [supervise] * len(ids))


def prompt_length(
    document: Document, tokenizer: Tokenizer, num_latents: NumLatents, max_context: int, is_open: bool = False,
    invokes: bool = False, reply_invoked: bool = False,
) -> int:  # fmt: skip
    """The number of context positions of a prompt, without encoding its media. ValueError if they leave no room for a
    reply in `max_context`, or a frame rate has no size token. num_latents: of one image or video with all its chunks.
    is_open: whether the last turn goes on; else an assistant's turn follows. invokes, reply_invoked: as of `compose`.

    Text whose number of characters already exceeds the limit is not encoded.
    """
    texts = [s.text for s in document.segments if isinstance(s, Text)]
    media = [s for s in document.segments if not isinstance(s, Text)]
    around = 0
    for segment in media:
        if isinstance(segment, Video):
            frame_rate(segment.fps)  # raises before the clip is encoded
        around += header_length(isinstance(segment, Video)) + num_latents(segment) + 1
    if sum(map(len, texts)) > MAX_UNCOUNTED:
        fewest = sum(math.ceil(len(text) / tokenizer.longest_id) for text in texts)
        if tokenizer.own_turns:  # begin, assistant; role and end of each turn
            fewest += (0 if is_open else 2) + 2 * sum(1 for _ in document.turns())
        require_room(around + fewest, max_context, "the prompt has at least")
    items = _items(document, tokenizer, not is_open, is_open, invokes, reply_invoked)
    for item in items:
        around += len(item.ids) if isinstance(item, TokenSpan) else isinstance(item, Invocation)
    num = around
    require_room(num, max_context)
    return num


def frame_rate(fps: float) -> int:
    """The frames per second in a clip's header: `fps` rounded, 1 to 64. ValueError outside this range."""
    if not 0.5 <= fps < MAX_SIZE + 0.5:
        raise ValueError(
            f"a clip of {fps:g} frames per second has no rate token (0.5 to {MAX_SIZE}); give it another fps, or fewer "
            "frames"
        )
    return math.floor(fps + 0.5)


def block_header(control: ControlTokens, rows: int, columns: int, clip: tuple[int, int] | None = None) -> list[int]:
    """Ids before the latents of a picture, or of a clip of (chunks, frames per second). ValueError beyond 1 to 64."""
    sides = [control.size(rows), control.size(columns)]
    if clip is None:
        return [control.image, *sides]
    return [control.video, *(control.size(n) for n in clip), *sides]


def header_length(is_clip: bool) -> int:
    """The number of ids of `block_header`."""
    return 5 if is_clip else 3


def media_header(tokenizer: Tokenizer, segment: Segment, latents: Sequence[torch.Tensor]) -> list[int]:
    """Ids before the latents of one image or video: its kind and its size. ValueError for sizes beyond 1 to 64."""
    t, h, w, _ = _check_latents(segment, latents)
    clip = (len(latents), frame_rate(segment.fps)) if isinstance(segment, Video) else None
    try:
        return block_header(tokenizer.control, h, w, clip)
    except ValueError as error:
        kind = "picture" if isinstance(segment, Image) else f"video of {len(latents)} chunks of {t} frames"
        raise ValueError(f"a {kind} of {h} x {w} latents is too large: {error}") from None


def _write_media(writer: _SpanWriter, tokenizer: Tokenizer, segment: Image | Video, blocks: Blocks) -> None:
    """Write the header, the blocks and media_end of one picture or clip."""
    latents, features = split_blocks(blocks)
    if features is not None and not latents:  # a model without a codec
        header = block_header(tokenizer.control, *features.sides)
    else:
        header = media_header(tokenizer, segment, latents)
    writer.media(header, segment.supervise)
    alone = features is not None and features.alone
    for block in latents:
        t, h, w, channels = block.shape
        if segment.supervise or not alone:
            flat = block.reshape(t * h * w, channels)
            writer.block(LatentSpan(flat, (t, h, w), segment.supervise, in_context=not alone))
    if features is not None:
        writer.block(feature_span(features))
    writer.media([tokenizer.control.media_end], False)


def feature_span(features: FeatureBlock) -> FeatureSpan:
    """The span of a picture's features."""
    _, h, w, width = features.values.shape
    return FeatureSpan(features.values.reshape(h * w, width), (1, h, w), features.pixels)


def _check_latents(segment: Segment, latents: Sequence[torch.Tensor]) -> tuple[int, int, int, int]:
    """(t, h, w, C) of the blocks. ValueError unless they are those of the segment."""
    shapes = [tuple(block.shape) for block in latents]
    good = bool(shapes) and all(len(shape) == 4 and shape[1:] == shapes[0][1:] for shape in shapes)
    if not good or (isinstance(segment, Image) and (len(shapes) != 1 or shapes[0][0] != 1)):
        what = "one (1, h, w, C) block" if isinstance(segment, Image) else "(t, h, w, C) blocks of equal h, w, C"
        raise ValueError(f"encode_media gave {shapes} for {type(segment).__name__}; give {what}")
    t, h, w, channels = shapes[0]
    return t, h, w, channels


class _SpanWriter:
    """Collects ids in a TokenSpan; blocks, a change of `adapted` and `finish` close it."""

    def __init__(self, invokes: bool) -> None:
        self._invokes = invokes
        self._spans: list[Span] = []
        self._ids: list[int] = []
        self._supervise: list[bool] = []
        self._adapted = False  # of the open span
        self._in_reply = False  # whether a reply that began with an invocation goes on

    def invoke(self, token: int) -> None:
        """Begin an adapted reply with the invocation id."""
        self._in_reply = True
        self._add([token], [False], True)

    def media(self, ids: Sequence[int], supervise: bool) -> None:
        """Append ids around media, with one supervise flag; an invoked LoRA is active there."""
        self._add(ids, [supervise] * len(ids), self._invokes)

    def write(self, span: TokenSpan, ends: Sequence[int]) -> None:
        """Append ids with their flags. A reply goes on up to one of `ends`."""
        start = 0
        for number, token in enumerate(span.ids if self._in_reply else ()):
            if token in ends:
                start = number + 1
                self._add(span.ids[:start], span.supervise[:start], True)
                self._in_reply = False
                break
        self._add(span.ids[start:], span.supervise[start:], self._in_reply)

    def block(self, span: LatentSpan | FeatureSpan) -> None:
        """Append a block."""
        self._close()
        self._spans.append(span)

    def finish(self) -> list[Span]:
        """All spans."""
        self._close()
        return self._spans

    def _add(self, ids: Sequence[int], supervise: Sequence[bool], adapted: bool) -> None:
        if not ids:
            return
        if adapted != self._adapted:
            self._close()
            self._adapted = adapted
        self._ids += ids
        self._supervise += supervise

    def _close(self) -> None:
        """End the present TokenSpan, if it has ids."""
        if self._ids:
            self._spans.append(TokenSpan(self._ids, self._supervise, self._adapted))
            self._ids, self._supervise = [], []
