"""One turn: a reply from its prompt to its end, as a generator of work and events (see generation.work).

    outer loop (sequence)    the token head gives the next id: a text token, a picture, the end
    inner loop (refinement)  blocks are refined from noise in `steps` jumps, against the history (`denoise.draw`)

A finished block is appended to the history as clean latents; refinement is not cached. `pending` holds the emitted
spans that the history does not hold yet. They are read before the next id is chosen, so a forced header costs one pass,
and a picture is delivered before it is encoded as context.

A turn reads top to bottom and has no other request in it. The engine runs many, and does the work of all in shared
passes. The noise of a request depends on its seed, not on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from PIL import Image as PILImage

from omni.document import Document, Image, Role, Segment, Text, Video
from omni.generation.context import append_of
from omni.generation.denoise import draw
from omni.generation.events import BlockDone, Event, ImagePart, Stop, VideoPart
from omni.generation.grammar import LEAST_MEDIA
from omni.generation.reply import segments_of
from omni.generation.request import Request
from omni.generation.runtime import Runtime
from omni.generation.speculative import speculative_round
from omni.generation.work import Decode, Read, Scores, Turn
from omni.samplers.token import sample_token
from omni.sequence.context_limit import require_room, warn_if_nearly_full
from omni.sequence.features import Blocks, split_blocks
from omni.sequence.layout import TokenSpan, num_context
from omni.text.compose import compose, feature_span, header_length, prompt_length


def begin(runtime: Runtime, request: Request) -> None:
    """The prompt becomes what is pending. ValueError, before any pass, for what cannot be fulfilled."""
    model, options = runtime.model, request.options
    size = options.picture.image_size
    grid = None if size is None else runtime.grammar.grid_of(size)
    if options.force_image:
        if model.codec is None:
            raise ValueError("force_image: this model has no codec and generates no pictures; leave it out")
        if options.max_images < 1:
            raise ValueError(f"force_image needs max_images of at least 1, got {options.max_images}")
        request.forced = [runtime.control.image]
    request.segments = [model.prepare(segment) for segment in request.given]
    invokes = request.history.invoked
    prompt, request.capacity = Document(tuple(request.segments)), model.config.max_context
    begun = [model.prepare(segment) for segment in segments_of(request.continues)]
    request.length = request.prompt_length = prompt_length(
        prompt, runtime.tokenizer, runtime.num_positions, request.capacity, invokes=invokes
    )
    if request.forced:
        num = request.length + LEAST_MEDIA + (0 if grid is None else math.prod(grid) - 1)
        require_room(num, request.capacity, "the prompt and the picture that is forced have")
    request.warned = warn_if_nearly_full(request.length, request.capacity)
    media = [segment for segment in request.segments if not isinstance(segment, Text)]
    request.latents = dict(zip(media, runtime.latents.encode(media, model.encode_media), strict=True))
    request.pending = compose(prompt, runtime.tokenizer, request.encoded, True, invokes=invokes)
    if begun:
        _go_on(runtime, request, begun)


def _go_on(runtime: Runtime, request: Request, begun: Sequence[Segment]) -> None:
    """Begin in the middle of a reply, after parts that are given. The numbers of tokens and media go on, and with them
    the noise: an unchanged beginning has the continuation that it had."""
    media = [segment for segment in begun if not isinstance(segment, Text)]
    request.latents |= dict(zip(media, runtime.latents.encode(media, runtime.model.encode_media), strict=True))
    request.segments += begun
    request.parts += request.continues
    request.num_media = len(media)
    whole = Document(tuple(request.segments))
    request.adapted = request.history.invoked and any(not isinstance(one, Text) for one in request.segments)
    mode = {"is_open": True, "invokes": request.history.invoked, "reply_invoked": request.adapted}
    request.length = prompt_length(whole, runtime.tokenizer, runtime.num_positions, request.capacity, **mode)
    request.pending = compose(whole, runtime.tokenizer, request.encoded, **mode)
    request.forced = []  # it has begun
    request.num_tokens = sum(
        len(runtime.tokenizer.encode(one.text)) if isinstance(one, Text) else header_length(isinstance(one, Video))
        for one in begun
    )
    if request.num_tokens >= request.options.max_tokens:
        request.phase, request.reason = "done", "length"


def turn(runtime: Runtime, request: Request) -> Turn:
    """Work and events of a request after `begin`, up to its Stop."""
    if request.history.invoked and not request.continues:
        yield from invoke(runtime, request)
    drafts = (request.options.speculative.tokens_per_pass or 1) > 1
    while request.phase != "done":
        if request.phase == "block":
            yield from draw(runtime, request)
            yield from finish_media(runtime, request)
            yield from runtime.grammar.after_block(request)
        elif request.forced:
            request.num_tokens += 1
            yield from accept(runtime, request, request.forced.pop(0))
        elif drafts:
            yield from speculative_round(runtime, request)
        else:
            append = append_of(request.history, request.take_pending(), runtime.control.pad)
            mask = runtime.grammar.mask_of(request, request.phase)
            scores = yield Read([append], mask, request.num_tokens)
            yield from accept(runtime, request, choose(request, scores))
    yield Stop(request.reason)


def invoke(runtime: Runtime, request: Request) -> Turn:
    """The first id of a reply whose LoRA is invoked (nn.lora).

    The text weights read the prompt. Behind it stands the invocation id, where the adapter is active and chooses the
    first id. If that ends the turn at once, the invocation is taken back, and the reply is that of the text weights,
    with the ids, and the noise, that it has without the adapter. Without a picture in the prompt, and with max_images
    = 0, the adapter is not asked.
    """
    has_media = any(not isinstance(segment, Text) for segment in request.segments)
    invocation = TokenSpan([runtime.control.assistant], [False], True)
    if request.forced:
        request.adapted, request.length = True, request.length + 1
        request.pending.append(invocation)
        return
    if not has_media and not request.options.max_images:
        return
    history, pad = request.history, runtime.control.pad
    mask_of = runtime.grammar.mask_of
    own = yield Read([append_of(history, request.take_pending(), pad)], mask_of(request, "text"), 0)
    before = history.length, history.next_position, history.next_block
    token = choose(request, (yield Read([append_of(history, [invocation], pad)], mask_of(request, "text"), 0)))
    if token in runtime.tokenizer.ends:
        history.truncate(*before)
        request.num_tokens = 0
        token = choose(request, own)
    else:
        request.adapted, request.length = True, request.length + 1
    yield from accept(runtime, request, token)


def choose(request: Request, scores: Scores) -> int:
    """The next id: the best, or a sample with the request's own key."""
    options, number = request.options.text, request.num_tokens
    request.num_tokens += 1
    if not options.temperature:
        return scores.best
    assert options.top_p is not None and options.top_k is not None
    key = request.key.fold("token", number)
    return sample_token(scores.values, options.temperature, options.top_p, key, options.top_k)


def accept(runtime: Runtime, request: Request, token: int) -> Iterator[Event]:
    """Emit one id."""
    request.pending.append(request.ids([token]))
    yield from runtime.grammar.advance(request, token)


def finish_media(runtime: Runtime, request: Request) -> Turn:
    """Close a picture or clip whose blocks are finished, and decode it."""
    media = request.media
    assert media is not None
    grid = runtime.grammar.grid(media)
    blocks: Blocks = [z.reshape(*grid, -1) for z in media.finished]
    o, seed = request.options.picture, request.options.seed
    assert o.steps is not None and seed is not None
    pixels = yield Decode(split_blocks(blocks)[0], media.kind == "video")
    part: ImagePart | VideoPart
    if media.kind == "image":
        segment: Image | Video = Image(pixels, Role.ASSISTANT)
        picture = PILImage.fromarray(pixels.numpy(), "RGB")
        part = ImagePart(picture, picture.height, picture.width, o.steps, seed, media.index, media.evaluations)
    else:
        segment = Video(pixels, o.fps or media.rate, Role.ASSISTANT)
        part = VideoPart(pixels, segment.fps, o.steps, seed, media.index, media.evaluations)
    for features in runtime.model.encode_features(segment):
        blocks.append(features)
        request.pending.append(feature_span(features))
        request.length += num_context(request.pending[-1])
    request.pending.append(TokenSpan([runtime.control.media_end], [False], request.history.invoked))
    request.length += 1
    request.segments.append(segment)
    request.latents[segment] = blocks
    runtime.latents.put(segment, blocks)
    request.parts.append(part)
    request.num_media += 1
    request.phase, request.media = "text", None
    yield BlockDone(part.index, part)
