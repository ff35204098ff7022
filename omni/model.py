"""Omni: transformer + token head + flow head, with a tokenizer, a codec and a preparation beside them.

`loss` is the training forward: one context pass, and one refine pass (or as many as an objective asks for) that reads
its keys and values. `extend` and `velocity` are what the engine calls: the same modules, with a cache for memory.

Legend: R rows, T context positions, S refine positions, W width, C latent channels, I items (copies), V vocabulary.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from omni.checkpoint import DamagedError, Published, manifest_digest, publish
from omni.config import Frozen, build
from omni.document import Document, Image, Text, Video
from omni.generation.options import check_defaults
from omni.heads import FlowHead, FlowHeadConfig, TokenHead
from omni.heads.joint import JointConfig, JointTokens
from omni.joint import joint_loss
from omni.media.preparation import AnySegment, Limits, Preparation, prepare, read_preparation
from omni.nn.cache import Memory
from omni.nn.precision import require_device
from omni.nn.tangent import Dual, Form, differentiate, lift
from omni.nn.transformer import Transformer, TransformerConfig
from omni.objectives import FlowObjective, Objective, Terms
from omni.objectives.base import Items
from omni.objectives.joint_tokens import JointTokenObjective
from omni.objectives.next_token import NextToken
from omni.rng import Key
from omni.samplers import SamplerName
from omni.sequence.layout import IGNORE, Batch, Span, Stream
from omni.text.compose import compose
from omni.weights import holds, load_weights, unallocated

if TYPE_CHECKING:
    from omni.codecs import Codec
    from omni.generation.reply import Reply
    from omni.text.tokenizer import Tokenizer

CODEC_CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
BUNDLED = Path(__file__).parent / "bundled"


class OmniConfig(Frozen):
    """Everything that fixes the shapes of the weights. `vocab_size` counts text and control ids.

    `sampler` names the sampler that suits the flow head: "euler" after flow matching, "flow_map" after a two-time
    objective. `max_grid` bounds the header the model may write, in latents. `max_context`: positions of a prompt and
    its reply together (see sequence.context_limit). logit_cap: see heads.token. joint: a joint-token head, or None.
    """

    transformer: TransformerConfig = TransformerConfig()
    flow: FlowHeadConfig = FlowHeadConfig()
    vocab_size: int = Field(ge=1, le=1 << 24)
    tied_embeddings: bool = True
    logit_cap: float | None = Field(default=None, gt=0)
    sampler: SamplerName = "euler"
    max_grid: int = Field(default=8, ge=1, le=64)
    max_chunks: int = Field(default=8, ge=1, le=64)
    max_context: int = Field(default=4096, ge=16, le=2**24)
    joint: JointConfig | None = None


@dataclass
class FlowCall:
    """F(x, t, s) of one batch: what an objective sees (see objectives.base.FlowCall). Closes over model and context.

    `frozen`: results have no graph. `averages`: the target network, whose own context pass is made when first asked.
    """

    model: Omni
    batch: Batch
    memory: Memory
    guidance: Tensor  # (I,) beta = 1 / w
    averages: Omni | None = None
    frozen: bool = False

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model.velocity(x, t, s, self.guidance, self.batch.refine, self.batch.item, self.memory)

    def derivative(self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor) -> Tensor:
        with torch.no_grad():
            return self._dual("two_pass", (x, t, s), (dx, dt, ds)).tangent

    def with_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, dx: Tensor, dt: Tensor, ds: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._dual("carried", (x, t, s), (dx, dt, ds))

    def _dual(self, form: Form, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Dual:
        """F and its derivative, as the model takes derivatives."""
        c = self.model.config.transformer
        if c.tangents != "central":
            return differentiate(self, point, direction, form)
        with torch.autocast(point[0].device.type, enabled=False):  # half-precision differences are rounding
            return differentiate(self, point, direction, "central", c.tangent_step)

    @cached_property
    def _target(self) -> FlowCall:
        if self.averages is None:
            return replace(self, memory=self.memory.detach(), frozen=True)
        with torch.no_grad():
            _, memory = self.averages.context(self.batch)
        return FlowCall(self.averages, self.batch, memory, self.guidance, frozen=True)

    def target(self, graph: bool = False) -> FlowCall:
        return replace(self._target, frozen=False) if graph else self._target

    @cached_property
    def _null(self) -> NullCall:
        null = self.batch.null
        if null is None:
            raise ValueError("this batch has no null contexts; load it with null_contexts=True (guidance needs them)")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            _, memory = self.model.context(null)
        return NullCall(replace(self, batch=null, memory=memory, guidance=torch.ones_like(self.guidance)), self.batch)

    def null(self) -> NullCall:
        return self._null

    def guided(self, beta: Tensor) -> FlowCall:
        call = replace(self, guidance=beta)
        if "_null" in self.__dict__:  # contexts do not depend on guidance: those that were made are kept
            call.__dict__["_null"] = self._null
        if "_target" in self.__dict__:
            call.__dict__["_target"] = self._target.guided(beta)
        return call


@dataclass
class NullCall:
    """F without its condition: `call` has the same items in the same order, each in a row behind an empty history."""

    call: FlowCall
    batch: Batch

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        there, here = self.call.batch.item >= 0, self.batch.item >= 0
        moved = x.new_zeros(*there.shape, x.shape[-1])
        moved[there] = x[here]
        found = self.call(moved, t, s)
        out = found.new_zeros(*here.shape, x.shape[-1])
        out[here] = found[there]
        return out


class Omni(nn.Module):
    """One transformer over interleaved text and latent blocks. `tokenizer` and `codec` are attached, not trained."""

    def __init__(self, config: OmniConfig, key: Key | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.transformer.width
        self.transformer = Transformer(config.transformer)
        self.token = TokenHead(config.vocab_size, width, config.tied_embeddings, config.logit_cap)
        self.flow = FlowHead(width, config.flow)
        self.joint = None if config.joint is None else JointTokens(config.joint, config.transformer, config.vocab_size)
        self.tokenizer: Tokenizer | None = None
        self.codec: Codec | None = None
        self.preparation = Preparation()
        self.defaults: Mapping[str, Any] = {}
        self.origin: Mapping[str, str | None] = {"path": None, "digest": None}  # the directory that it is from
        if not self.token.embedding.weight.is_meta:  # else a file's weights are to come (omni.weights)
            initialise(self, key or Key(0))

    # ---- training forward -----------------------------------------------------------------------------------------

    def context(self, batch: Batch) -> tuple[Tensor, Memory]:
        """The context stream of a batch: hidden states (R, T, W), and what the refine stream reads of it."""
        return self.transformer.context(self.embed(batch), batch.context, batch.is_latent)

    def loss(
        self,
        batch: Batch,
        objectives: Sequence[Objective],
        key: Key,
        averages: Omni | None = None,
        progress: float = 1.0,
    ) -> dict[str, Terms]:
        """One context pass, then each objective. Returns named (sum, count) terms; absent modalities give count 0.

        averages: the target network of objectives that want one (see `Objective.target_decay`).
        progress: the share of training that is done, for objectives with schedules.
        """
        hidden, memory = self.context(batch)
        terms: dict[str, Terms] = {}
        for objective in objectives:
            name = type(objective).__name__
            if isinstance(objective, JointTokenObjective):
                found = joint_loss(self, batch, hidden, memory, objective.blocks, key.fold(name), progress)
                terms |= {f"{name}/{n}": replace(t, weight=t.weight * objective.weight) for n, t in found.items()}
            elif isinstance(objective, NextToken):
                where = batch.target != IGNORE
                terms[name] = objective.loss(self.token.read(hidden[where]), batch.target[where])
            elif isinstance(objective, FlowObjective) and batch.num_items:
                is_null = torch.tensor(
                    [uid in batch.dropped for uid, _, _ in batch.item_names], device=batch.ids.device
                )
                items = Items(batch.refine_latents, batch.item, batch.item_names, is_null, progress, objective.pairing)
                beta = torch.ones(batch.num_items, device=batch.ids.device)
                # Where it wants no average, one that is kept for another objective is not its own.
                own = averages if getattr(objective, "target_decay", None) else None
                call = FlowCall(self, batch, memory, beta, own)
                terms[name] = objective.loss(call, objective.draw(items, key.fold(name)))
            elif isinstance(objective, FlowObjective):
                terms[name] = Terms(hidden.new_zeros((), dtype=torch.float32), 0.0, objective.weight)
        return terms

    def embed(self, batch: Batch) -> Tensor:
        """Hidden states (R, T, W) of the context stream's input."""
        return self.embed_context(batch.ids, batch.latents, batch.is_latent)

    def embed_context(self, ids: Tensor, latents: Tensor | None, is_latent: Tensor | None) -> Tensor:
        h = self.token.embed(ids)
        if latents is None or is_latent is None:
            return h
        clean = self.flow.embed_clean(latents.to(self.flow.clean.weight.dtype))
        return torch.where(is_latent.unsqueeze(-1), clean.to(h.dtype), h)

    def velocity(
        self, x: Tensor, t: Tensor, s: Tensor, guidance: Tensor, stream: Stream, item: Tensor | None, memory: Memory
    ) -> Tensor:
        """F(x, t, s): x (R, S, C), t, s, guidance (I,) -> (R, S, C). The same call in training and in sampling.

        Of x, t, s as `Dual`s it is F with its derivative, a Dual (see nn.tangent).
        """
        condition = lift(lambda t, s: self.flow.condition(t, s, guidance), t, s)
        noisy = lift(lambda x, t: self.flow.embed(x, t, item), x, t)
        hidden = self.transformer.refine(noisy, stream, memory, condition, item)
        return lift(lambda h, condition, x, t: self.flow.read(h, condition, item, x, t), hidden, condition, x, t)

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, **options: Any) -> Reply:
        """An interleaved reply to a string, a list of chat messages or a Document. See `options.GenerationOptions`."""
        from omni.generation.engine import Engine

        return Engine(self).generate(prompt, **options)

    def generate_batch(
        self, prompts: Sequence[Any], options: Any = None, seeds: Sequence[int] | None = None
    ) -> list[Reply]:
        """Many replies at once; rows share passes. `seeds` overrides the seed of each row."""
        from omni.generation.engine import Engine

        return Engine(self).generate_batch(prompts, options, seeds)

    # ---- documents ------------------------------------------------------------------------------------------------

    def spans(self, document: Document, generation_prompt: bool = False) -> list[Span]:
        """The document, its media prepared, as token and latent spans, through the attached tokenizer and codec."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; set model.tokenizer or load it with omni.from_pretrained")
        document = Document(tuple(self.prepare(s) for s in document.segments), document.meta)
        return compose(document, self.tokenizer, self.encode_media, generation_prompt)

    def prepare(self, segment: AnySegment) -> AnySegment:
        """The segment with pixels that the codec can encode and frames that fill chunks: see omni.media.preparation."""
        return segment if isinstance(segment, Text) else prepare(segment, self.preparation, self.limits)

    @property
    def limits(self) -> Limits:
        """What the codec and this model can take. ValueError for a model without a codec."""
        if self.codec is None:
            raise ValueError(
                "this model has no codec for pictures; set model.codec or load it with omni.from_pretrained"
            )
        from omni.codecs import MAX_GRID

        spec, config = self.codec.spec, self.config
        most = min(config.max_grid, MAX_GRID), min(config.max_chunks, MAX_GRID)
        return Limits(spec.stride[1:], spec.media_frames_per_chunk, *most)

    def encode_media(self, segments: Sequence[Image | Video]) -> list[list[Tensor]]:
        """Latents (t, h, w, C) of each picture (one block) or clip (one per chunk), of any size: they are prepared."""
        limits = self.limits  # without a codec, an error
        assert self.codec is not None
        return self.codec.encode_media([prepare(segment, self.preparation, limits) for segment in segments])

    # ---- files ----------------------------------------------------------------------------------------------------

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Strict: every weight must be there, with its shape, and no other. DamagedError naming `source` otherwise."""
        load_weights(self, tensors, source)

    def save_pretrained(
        self,
        directory: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        replace: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Publish a directory: config.json, model.safetensors, preparation.json, generation.json, tokenizer/, codec/,
        manifest.json.

        dtype: what the transformer's and the heads' weights are rounded to; bfloat16, the default, halves the file and
        keeps three digits. The codec is not rounded: its weights and its normalisation are stored as they are.
        """
        files: dict[str, Any] = {
            "config.json": self.config.model_dump_json(indent=2) + "\n",
            "preparation.json": self.preparation.model_dump_json(indent=2, exclude_none=True) + "\n",
            "generation.json": json.dumps(dict(self.defaults), indent=2) + "\n",
            "model.safetensors": {
                n: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous()
                for n, v in self.state_dict().items()
            },
        }
        if self.codec is not None:
            files |= {f"codec/{name}": content for name, content in self.codec.files().items()}
        with tempfile.TemporaryDirectory() as folder:
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
                files["tokenizer"] = Path(folder)
            return publish(directory, files, info=info, replace=replace)


def from_pretrained(path: str | Path | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Omni:
    """Load a model directory (the bundled model by default). Every byte is checked against the manifest, and what the
    manifest does not list is not read. A learned codec's network is built when it is first needed.

    Raises ValueError naming the file if it is missing, damaged or not listed, or if a weight is missing, unknown,
    misshapen, of integers or not finite, and for a device that is not here.
    """
    from omni.codecs import read_codec
    from omni.text import load_tokenizer

    folder = BUNDLED if path is None else Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"no model directory at {str(folder)!r}; give a directory that holds config.json and model.safetensors"
        )
    require_device(device)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype} is no floating type; take torch.float32, torch.bfloat16 or torch.float64")
    files = Published(folder)
    config = build(files.table("config.json"), OmniConfig, str(folder / "config.json"))
    with unallocated():
        model = Omni(config)
    model.load_weights(files.tensors("model.safetensors"), str(folder / "model.safetensors"))
    tokenizer, codec = files.folder("tokenizer"), files.folder("codec")
    if TOKENIZER_CONFIG in tokenizer:
        model.tokenizer = load_tokenizer(tokenizer.root, tokenizer.read)
    if CODEC_CONFIG in codec:
        model.codec = read_codec(codec).to(device)
    defaults = files.table("generation.json") if "generation.json" in files else {}
    stored = files.table("preparation.json") if "preparation.json" in files else None
    model.preparation, model.defaults = read_preparation(stored, defaults, str(folder))
    check_defaults(model.defaults, str(folder / "generation.json"))
    model.origin = {"path": "bundled" if path is None else str(path), "digest": manifest_digest(folder)}
    files.read_rest()
    _check_attached(model, str(folder))
    large = [name for name, value in model.state_dict().items() if not holds(dtype, value)]
    if large:
        raise ValueError(f"{folder}: {large[0]} has values that {dtype} cannot hold; take torch.bfloat16")
    return model.to(device, dtype).eval()


def _check_attached(model: Omni, source: str) -> None:
    """ValueError if the tokenizer or the codec is another model's."""
    config = model.config
    if model.tokenizer is not None and model.tokenizer.vocab_size != config.vocab_size:
        theirs = model.tokenizer.vocab_size
        raise DamagedError(f"{source}: the tokenizer has {theirs} ids, vocab_size is {config.vocab_size}")
    if model.codec is not None and model.codec.spec.channels != config.flow.channels:
        theirs = model.codec.spec.channels
        raise DamagedError(f"{source}: the codec has {theirs} channels, flow.channels is {config.flow.channels}")


@torch.no_grad()
def initialise(model: Omni, key: Key) -> None:
    """Weights keyed by parameter name: adding a module or sharding the model changes no other weight.

    Matrices are normal with deviation 1/sqrt(fan in); residual outputs are scaled by 1/sqrt(2 depth); embeddings have
    deviation 0.02; the velocity read-out, biases and modulation start at zero, so that what the flow head reads, its G,
    starts at 0 (see heads.flow).
    """
    depth = model.config.transformer.depth
    if model.joint is not None:
        model.joint.initialise(key)
    for name, parameter in model.named_parameters():
        if name.startswith("joint."):
            continue
        if "norm" in name:
            parameter.fill_(1.0)
        elif parameter.ndim < 2 or "modulation" in name or name.startswith("flow.velocity"):
            parameter.zero_()
        else:
            std = 0.02 if "embedding" in name else 1 / math.sqrt(parameter.shape[1])
            if name.endswith((".out.weight", ".down.weight")) and name.startswith("transformer"):
                std /= math.sqrt(2 * depth)
            draws = key.fold("initialise", name).normal(tuple(parameter.shape)) * std
            parameter.copy_(draws)
