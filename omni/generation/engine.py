"""Interleaved generation: a state machine over requests that yields an ordered stream of events.

    outer loop (sequence)    the token head gives the next id: a text token, a picture, the end (`_choose`)
    inner loop (refinement)  a block is refined from noise in `steps` jumps, against the cache (`denoise.draw`)

A finished block is appended to the cache as clean latents; refinement is not cached. `pending` holds the emitted spans
that the cache does not hold yet. `_flush` appends them before the next read, so a forced header costs one pass, and a
picture is delivered before it is encoded as context. Requests share passes: all decoding requests take one cached step
together; refining requests with blocks of one size share a refinement.
The noise of a request depends on its seed, not on the batch.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from omni.document import Document, Image, Role, Text, Video
from omni.generation.context import append_ids
from omni.generation.denoise import draw, groups
from omni.generation.events import (
    BlockDone,
    Event,
    ImagePart,
    Stop,
    VideoPart,
)
from omni.generation.grammar import LEAST_MEDIA, Grammar
from omni.generation.options import GenerationOptions, check_defaults
from omni.generation.reply import Reply
from omni.generation.row import Row
from omni.generation.runtime import Runtime
from omni.generation.speculative import speculative_round
from omni.model import Omni
from omni.nn.cache import KVCache
from omni.nn.decode_step import TokenStep
from omni.nn.native_step import CompiledStep
from omni.samplers.token import masked_scores, sample_token
from omni.sequence.context_limit import require_room, warn_if_nearly_full
from omni.sequence.layout import LatentSpan, TokenSpan
from omni.text.chat import messages_to_document
from omni.text.compose import compose, prompt_length
from omni.version import VERSION


class Engine:
    """Generation with one model. Stateless between calls.

    compile: run text steps of a single request as native code on the CPU (see nn.native_step). Takes one or two seconds
    and a C++ compiler, and copies the current weights. ValueError where this is impossible.
    allow_paths: whether chat messages may name files of this machine. A server reads untrusted messages and passes
    False; see omni.text.chat.messages_to_document.
    """

    def __init__(self, model: Omni, compile: bool = False, allow_paths: bool = True) -> None:
        if model.tokenizer is None:
            raise ValueError(
                "generation needs a tokenizer; load the model with omni.from_pretrained or set model.tokenizer"
            )
        self.model, self.allow_paths = model, allow_paths
        self.tokenizer, self.control = model.tokenizer, model.tokenizer.control
        spec, device = None if model.codec is None else model.codec.spec, model.token.embedding.weight.device
        self.grammar = Grammar(model.tokenizer, model.config, spec, device)
        self.step = (CompiledStep if compile else TokenStep)(model.transformer, model.token.output_weight)
        self.runtime = Runtime(model, model.tokenizer, self.grammar, self.step)

    # ---- entrances ------------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, options: GenerationOptions | None = None, **changes: Any) -> Reply:
        """The whole reply to a string, chat messages or a Document."""
        return self.generate_batch([prompt], (options or GenerationOptions()).changed(changes))[0]

    def stream(self, prompt: Any, options: GenerationOptions | None = None, **changes: Any) -> Iterator[Event]:
        """The events of one reply, in order, as they happen. The last one is Stop."""
        rows = self._rows([prompt], (options or GenerationOptions()).changed(changes), None)
        for _, event in self._run(rows):
            yield event

    def generate_batch(
        self, prompts: Sequence[Any], options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:  # fmt: skip
        """Replies to many prompts that share passes. One options object for all or one each; `seeds` overrides their
        seeds."""
        rows = self._rows(prompts, options or GenerationOptions(), seeds)
        for _ in self._run(rows):
            pass
        return [Reply(row.parts, row.document, row.reason, tuple(row.drafts), self.record(row.options)) for row in rows]

    def _rows(self, prompts: Sequence[Any], options: Any, seeds: Sequence[int] | None) -> list[Row]:
        if isinstance(prompts, str | bytes | Mapping | Document) or not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a list of prompts, got a {type(prompts).__name__}; put it in a list")
        if isinstance(options, Mapping):
            options = GenerationOptions().changed(options)
        many = [options] * len(prompts) if isinstance(options, GenerationOptions) else list(options)
        if len(many) != len(prompts) or (seeds is not None and len(seeds) != len(prompts)):
            raise ValueError(
                f"{len(prompts)} prompts need as many options and seeds, got {len(many)} and {seeds and len(seeds)}"
            )
        rows = []
        for number, (prompt, one) in enumerate(zip(prompts, many, strict=True)):
            if isinstance(prompt, Document):
                document = prompt
            else:
                document = messages_to_document(prompt, allow_paths=self.allow_paths)
            if not document.segments or all(isinstance(s, Text) and not s.text.strip() for s in document.segments):
                raise ValueError("the prompt is empty; say what you want, for example 'draw a red apple'")
            one = self.resolve(one if seeds is None else one.changed({"seed": seeds[number]}))
            rows.append(Row(number, one, document.segments, self.tokenizer.stream()))
        return rows

    def resolve(self, options: GenerationOptions) -> GenerationOptions:
        """`options` with the model's defaults filled in. ValueError names an impossible value."""
        joint = self.model.config.joint
        length = 1 if joint is None else joint.length
        usual = 1 if isinstance(self.step, CompiledStep) else length  # native steps of one token are the faster way
        own = check_defaults(self.model.defaults)
        out = options.resolved({"sampler": self.model.config.sampler, "tokens_per_pass": usual, **own})
        num = out.speculative.tokens_per_pass or 1
        if num > length:
            why = "this model has no joint-token head" if joint is None else f"its joint-token head drafts {length}"
            raise ValueError(f"tokens_per_pass = {num} is too many: {why}; take at most {length}")
        return out

    def record(self, options: GenerationOptions) -> dict[str, Any]:
        """Options, model and versions of a reply, as JSON values. Equal requests have equal records."""
        return {
            "options": options.flat("json"),
            "model": dict(self.model.origin),
            "versions": {"omni": VERSION, "torch": torch.__version__},
        }

    # ---- outer loop -----------------------------------------------------------------------------------------------

    def _begin(self, row: Row) -> None:
        """The prompt becomes what is pending. ValueError, before any pass, for what cannot be fulfilled."""
        size = row.options.picture.image_size
        grid = None if size is None else self.grammar.grid_of(size)
        if row.options.force_image:
            if self.model.codec is None:
                raise ValueError("force_image: this model has no codec and generates no pictures; leave it out")
            if row.options.max_images < 1:
                raise ValueError(f"force_image needs max_images of at least 1, got {row.options.max_images}")
            row.forced = [self.control.image]
        row.segments = [self.model.prepare(segment) for segment in row.given]
        prompt, row.capacity = Document(tuple(row.segments)), self.model.config.max_context
        row.length = prompt_length(prompt, self.tokenizer, self._num_latents, row.capacity)
        if row.forced:
            num = row.length + LEAST_MEDIA + (0 if grid is None else math.prod(grid) - 1)
            require_room(num, row.capacity, "the prompt and the picture that is forced have")
        row.warned = warn_if_nearly_full(row.length, row.capacity)
        media = [segment for segment in row.segments if not isinstance(segment, Text)]
        row.latents = dict(zip(media, self.model.encode_media(media) if media else [], strict=True))
        row.pending = compose(prompt, self.tokenizer, row.encoded, True)

    @torch.inference_mode()
    def _run(self, rows: list[Row]) -> Iterator[tuple[int, Event]]:
        for row in rows:
            self._begin(row)
        cache = self.model.transformer.new_cache(len(rows), 256)
        logits = torch.empty(0)
        while any(row.phase != "done" for row in rows):
            waiting = [r for r in rows if r.phase == "block"]
            decoding = [r for r in rows if r.phase not in ("block", "done")]
            forced = [r for r in decoding if r.forced]
            if forced:
                for row in forced:
                    row.num_tokens += 1
                    yield from self._accept(row, row.forced.pop(0))
                continue
            together = [r for r in decoding if (r.options.speculative.tokens_per_pass or 1) > 1]
            if together:
                yield from speculative_round(
                    self.runtime, [r for r in together if r.drafting == together[0].drafting], rows, cache
                )
                continue
            logits = self._flush(rows, cache, logits)
            if decoding:
                for row, token in zip(decoding, self._choose(decoding, logits), strict=True):
                    yield from self._accept(row, token)
                continue
            for group in groups(self.grammar, waiting):
                yield from draw(self.runtime, group, rows, cache)
                for row in group:
                    yield from self._finish_block(row)
        for row in rows:
            yield row.number, Stop(row.reason)

    # ---- text -----------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[Row], logits: Tensor) -> list[int]:
        """One id per request: the argmax, or a sample with the request's own key."""
        masks = [self.grammar.mask_of(r, r.phase) for r in rows]
        mine = logits if len(rows) == len(logits) else logits[[r.number for r in rows]]
        mask = masks[0] if len(masks) == 1 else torch.stack(masks)
        scores, best_ids = masked_scores(mine, mask, [row.num_tokens for row in rows])
        greedy = best_ids.tolist()
        chosen = []
        for row, best, score in zip(rows, greedy, scores, strict=True):
            if not row.options.text.temperature:
                chosen.append(best)
            else:
                chosen.append(
                    sample_token(
                        score,
                        row.options.text.temperature,
                        row.options.text.top_p,
                        row.key.fold("token", row.num_tokens),
                    )
                )
            row.num_tokens += 1
        return chosen

    def _accept(self, row: Row, token: int) -> Iterator[tuple[int, Event]]:
        """Emit one id of a request."""
        row.pending.append(TokenSpan([token], [False]))
        for event in self.grammar.advance(row, token):
            yield row.number, event

    # ---- inner loop -----------------------------------------------------------------------------------------------

    def _num_latents(self, segment: Image | Video) -> int:
        """Number of latents of a medium of the prompt, before it is encoded."""
        pixels = segment.pixels if isinstance(segment, Image) else segment.frames
        return 0 if self.model.codec is None else self.model.codec.num_latents(pixels.shape)

    def _finish_block(self, row: Row) -> Iterator[tuple[int, Event]]:
        """Make the block clean context; the last block of a picture or clip closes it."""
        media, codec = row.media, self.model.codec
        assert media is not None and codec is not None
        grid = self.grammar.grid(media)
        row.pending.append(LatentSpan(media.finished[-1], grid))
        row.length += len(media.finished[-1])
        if len(media.finished) < media.chunks:
            return  # the next round refines the next chunk of the clip
        row.pending.append(TokenSpan([self.control.media_end], [False]))
        row.length += 1
        blocks = [z.reshape(*grid, -1) for z in media.finished]
        o, seed = row.options.picture, row.options.seed
        assert o.steps is not None and seed is not None
        part: ImagePart | VideoPart
        if media.kind == "image":
            pixels = codec.decode(blocks[0])[0].cpu()
            segment: Image | Video = Image(pixels, Role.ASSISTANT)
            picture = PILImage.fromarray(pixels.numpy(), "RGB")
            part = ImagePart(picture, picture.height, picture.width, o.steps, seed, media.index, media.evaluations)
        else:
            frames = codec.decode_video(blocks).cpu()
            segment = Video(frames, o.fps or media.rate, Role.ASSISTANT)
            part = VideoPart(frames, segment.fps, o.steps, seed, media.index, media.evaluations)
        row.segments.append(segment)
        row.latents[segment] = blocks
        row.parts.append(part)
        row.num_media += 1
        row.phase, row.media = "text", None
        yield row.number, BlockDone(part.index, part)

    # ---- the cache ------------------------------------------------------------------------------------------------

    def _flush(self, rows: list[Row], cache: KVCache, logits: Tensor) -> Tensor:
        """Append the pending spans. Returns logits (R, V) after the last position of each request; a request without
        pending spans keeps its entry of `logits`."""
        spans = [row.pending if row.phase != "done" else [] for row in rows]
        new = [r for r, one in enumerate(spans) if one]
        if not new:
            return logits
        for row in rows:
            row.pending = []
        ids = [
            one[0].ids[0] for one in spans if len(one) == 1 and isinstance(one[0], TokenSpan) and len(one[0].ids) == 1
        ]
        if len(ids) == len(rows):  # the hot path of text decoding
            return self.model.token.cap(self.step.read(append_ids(self.model, cache, ids, self.step)))
        after = self.runtime.append(cache, spans)
        if len(new) == len(rows) or not len(logits):
            return after
        merged = logits.clone()
        merged[new] = after[new]
        return merged
