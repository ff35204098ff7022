"""Omni: transformer, token head and flow head, with an attached tokenizer, codec and media preparation.

`forward` is the training forward: one context pass, and one refine pass (or as many as an objective needs) that
attends to its keys and values. The engine calls `extend` and `velocity`: the same modules, with a cache as memory.

Legend: R batch rows, T context positions, S refine positions, W width, C latent channels, I items (copies), V
vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from omni.checkpoint import publish
from omni.config import Frozen
from omni.document import Document, Image, Text, Video
from omni.encoders.projector import EncoderBlockConfig, FeatureProjector
from omni.heads import FlowHead, FlowHeadConfig, TokenHead
from omni.heads.joint import JointConfig, JointTokens
from omni.losses import ScoreNetworks, batch_losses
from omni.media.preparation import AnySegment, Limits, Preparation, prepare
from omni.nn.cache import Memory
from omni.nn.declare import initialise
from omni.nn.lora import Lora, LoraSpec
from omni.nn.runs import Runs
from omni.nn.tangent import Dual, lift
from omni.nn.transformer import Transformer, TransformerConfig
from omni.objectives import Objective, Terms
from omni.rng import Key
from omni.samplers import SamplerName
from omni.sequence.block_context import BlockContext
from omni.sequence.features import Blocks, FeatureBlock, Features
from omni.sequence.layout import Batch, Span, Stream
from omni.text.compose import compose
from omni.weights import TextBase, load_weights

if TYPE_CHECKING:
    from omni.codecs import Codec
    from omni.encoders import Encoder
    from omni.generation.reply import Reply
    from omni.text.tokenizer import Tokenizer


PUBLISHED = "published"  # the folder of a published model's own files
TOWER = "tower."  # names of an encoder's weights that are trained; checkpoints store them: never rename


class OmniConfig(Frozen):
    """All settings that determine the shapes of the weights. `vocab_size` counts text and control ids.

    flow: None: a model of text alone. embedding_scale, new_rows: see heads.token.
    `sampler`: the default sampler of the flow head: "euler" after flow matching, "flow_map" after a two-time objective.
    `max_grid`: bound of the header that the model may generate, in latents. `max_context`: positions of a prompt and
    its reply together (see sequence.context_limit). logit_cap: see heads.token. joint: a joint-token head, or None.
    blocks: what a noisy block of a clip reads of the others. encoder: features of pictures in the context, or None.
    Stored as config.json: a new field needs a default under which older models compute the same.
    """

    model_type: Literal["omni"] = "omni"  # by which transformers' AutoModel finds omni.hf
    transformer: TransformerConfig = TransformerConfig()
    flow: FlowHeadConfig | None = FlowHeadConfig()
    vocab_size: int = Field(ge=1, le=1 << 24)
    tied_embeddings: bool = True
    embedding_scale: float = Field(default=1.0, gt=0, le=1e6)
    new_rows: int = Field(default=0, ge=0, le=1 << 16)
    logit_cap: float | None = Field(default=None, gt=0)
    sampler: SamplerName = "euler"
    max_grid: int = Field(default=8, ge=1, le=64)
    max_chunks: int = Field(default=8, ge=1, le=64)
    max_context: int = Field(default=4096, ge=16, le=2**24)
    joint: JointConfig | None = None
    blocks: BlockContext = BlockContext()
    encoder: EncoderBlockConfig | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> OmniConfig:
        if self.new_rows >= self.vocab_size:
            raise ValueError(f"new_rows = {self.new_rows} leaves no other id of vocab_size = {self.vocab_size}")
        if self.joint is not None and self.transformer.window is not None:
            raise ValueError("a joint-token head beside layers with a window is not implemented; leave joint out")
        pooled = (self.flow and self.flow.pool_layers) or ()
        if wrong := [n for n in pooled if n not in self.transformer.refining]:
            raise ValueError(
                f"flow.pool_layers names layer {wrong[0]}; give layers that the refine stream passes through"
            )
        if pooled and self.flow is not None and self.flow.head_depth is not None:
            raise ValueError("flow.pool_layers beside flow.head_depth is not implemented; leave one of them out")
        return self

    @property
    def channels(self) -> int:
        """Channels of latents; 0 for a model of text alone."""
        return 0 if self.flow is None else self.flow.channels


class Omni(nn.Module):
    """One transformer over interleaved text and latent blocks. `tokenizer`, `codec` and `encoder` are attached, not
    trained; the encoder is after `tune_encoder`. Names of weights are keys of checkpoints and of initial values: never
    rename them."""

    def __init__(self, config: OmniConfig, key: Key | None = None) -> None:
        super().__init__()
        self.config = config
        width, c = config.transformer.width, config
        self.transformer = Transformer(config.transformer, config.flow is not None)
        new = c.embedding_scale, c.new_rows
        self.token = TokenHead(config.vocab_size, width, config.tied_embeddings, config.logit_cap, *new)
        refine_width = config.transformer.refine_spec.width
        values = config.transformer.num_kv_heads * config.transformer.head_dim
        self.flow = None if config.flow is None else FlowHead(refine_width, config.flow, width, values)
        self.joint = None if config.joint is None else JointTokens(config.joint, config.transformer, config.vocab_size)
        self.features = None if config.encoder is None else FeatureProjector(config.encoder, width)
        self.tokenizer: Tokenizer | None = None
        self.codec: Codec | None = None
        self.encoder: Encoder | None = None
        self.tower: nn.Module | None = None  # the encoder's network, where it is trained
        self.preparation = Preparation()
        self.defaults: Mapping[str, Any] = {}
        self.published: Mapping[str, bytes] = {}  # files of the language model that was imported (omni.hf.export)
        self.base: TextBase | None = None  # the language model that its directory leaves out (importers.base)
        self.origin: Mapping[str, str | None] = {"path": None, "digest": None}  # the source directory
        if not self.token.embedding.weight.is_meta:  # else load_weights fills them (omni.weights)
            self.initialise(key or Key(0))

    def initialise(self, key: Key) -> None:
        """Initialise every weight as its module declares (nn.declare), keyed by name: adding a module changes no other
        weight."""
        initialise(self, key)
        if self.joint is not None:
            self.joint.initialise(key)

    # ---- training forward -----------------------------------------------------------------------------------------

    @property
    def has_latent_head(self) -> bool:
        """Whether each latent has a head of its own (heads.latent)."""
        return self.flow is not None and self.flow.head is not None

    @property
    def block_context(self) -> BlockContext:
        """What a noisy block of a clip reads of the others."""
        return self.config.blocks

    def context(self, batch: Batch) -> tuple[Tensor, Memory]:
        """The context stream of a batch: hidden states (R, T, W), and the memory that the refine stream attends to."""
        return self.transformer.context(self.embed(batch), batch.context, batch.is_latent, batch.adapted)

    def forward(
        self,
        batch: Batch,
        objectives: Sequence[Objective],
        key: Key,
        averages: Omni | None = None,
        progress: float = 1.0,
        scores: ScoreNetworks | None = None,
    ) -> dict[str, Terms]:
        """The losses: one context pass, then each objective. Named (sum, count) terms; absent modalities have count 0.

        averages: the target network of objectives that use one (see `Objective.target_decay`).
        progress: the completed share of training, for objectives with schedules.
        scores: teacher and critic of objectives that need them (see `Objective.needs_critic`).
        """
        return batch_losses(self, batch, objectives, key, averages, progress, scores)

    def embed(self, batch: Batch) -> Tensor:
        """The input (R, T, W) of the context stream."""
        return self.embed_context(batch.ids, batch.latents, batch.is_latent, batch.features)

    def embed_context(
        self, ids: Tensor, latents: Tensor | None, is_latent: Tensor | None, features: Features | None = None
    ) -> Tensor:
        """Inputs (R, T, W): embeddings of ids (R, T), clean latents (R, T, C) where is_latent (R, T), and features of
        an encoder where they stand, which are computed here where pictures stand for them. ValueError for features that
        the model has no projector for."""
        h = self.token.embed(ids)
        if features is not None:
            if self.features is None:
                raise ValueError("features of pictures need a model with `encoder` in its config.json; leave them out")
            values = self._attached_encoder.features_of(features.pictures) if features.pictures else features.values
            projected = self.features(values, features.place).to(h.dtype)
            h = h.flatten(0, 1).index_copy(0, features.at, projected).view_as(h)
        if latents is None or is_latent is None or not latents.shape[-1]:
            return h
        assert self.flow is not None
        scale = self.block_context.context_scale
        latents = latents if scale == 1 else latents * scale
        clean = self.flow.embed_clean(latents.to(self.flow.clean.weight.dtype))
        return torch.where(is_latent.unsqueeze(-1), clean.to(h.dtype), h)

    def velocity(
        self, x: Tensor, t: Tensor, s: Tensor, guidance: Tensor, stream: Stream, item: Tensor | None,
        memory: Memory | Runs,
    ) -> Tensor:  # fmt: skip
        """F(x, t, s): x (R, S, C), t, s, guidance (I,) -> (R, S, C), in training and in sampling.

        If x, t, s are `Dual`s: F with its derivative, a Dual (see nn.tangent).
        """
        assert self.flow is not None
        if self.flow.head is not None:
            value, time = (one.value if isinstance(one, Dual) else one for one in (x, t))
            z = self.known_states(value, time, guidance, stream, item, memory)
            return lift(self.flow.of_latents, z, x, t, s, guidance, item)
        flow = self.flow
        condition = lift(lambda t, s: flow.condition(t, s, guidance), t, s)
        if flow.pool is not None:
            pooled = flow.pool(stream, item, memory, len(guidance))
            condition = lift(lambda c: c + pooled.to(c.dtype), condition)
        noisy = lift(lambda x, t: flow.embed(x, t, item), x, t)
        hidden = self.transformer.refine(noisy, stream, memory, condition, item)
        return lift(lambda h, condition, x, t: flow.read(h, condition, item, x, t), hidden, condition, x, t)

    def known_states(
        self, x: Tensor, t: Tensor, guidance: Tensor, stream: Stream, item: Tensor | None, memory: Memory | Runs
    ) -> Tensor:
        """For a model with a latent head (flow.head_depth): hidden states (R, S, W) of latents, of which those at t
        = 0 are known and the others masked."""
        assert self.flow is not None
        level = (t > 0).to(t.dtype)
        condition, h = self.flow.condition(level, level, guidance), self.flow.embed_known(x, t, item)
        return self.transformer.refine(h, stream, memory, condition, item)

    # ---- generation -----------------------------------------------------------------------------------------------

    def generate(self, prompt: Any, **options: Any) -> Reply:
        """An interleaved reply to a string, a list of chat messages or a Document. See `options.GenerationOptions`."""
        from omni.generation.engine import Engine

        return Engine(self).generate(prompt, **options)

    def generate_batch(
        self, prompts: Sequence[Any], options: Any = None, seeds: Sequence[int] | None = None
    ) -> list[Reply]:
        """Several replies at once; requests share passes. `seeds` overrides the seed of each request."""
        from omni.generation.engine import Engine

        return Engine(self).generate_batch(prompts, options, seeds)

    # ---- adapters of the text weights ---------------------------------------------------------------------------

    def add_lora(self, spec: LoraSpec) -> Lora:
        """A new adapter, which changes nothing until it is trained or filled; requests name it as `lora`. ValueError
        for a name that is taken, or layers that the transformer does not have."""
        self._set_loras((*self.config.transformer.loras, spec))
        weight = self.transformer.norm.weight
        lora = Lora(spec, self.config.transformer).to(weight.device, weight.dtype)
        initialise(lora, Key(0).fold("lora", spec.name))
        self.transformer.loras[spec.name] = lora
        return lora

    def drop_lora(self, name: str) -> None:
        """Remove an adapter. ValueError if there is none of this name."""
        self.transformer.lora(name)
        del self.transformer.loras[name]
        self._set_loras(tuple(spec for spec in self.config.transformer.loras if spec.name != name))
        if self.transformer.active_lora == name:
            self.transformer.active_lora = None

    def merge_lora(self, name: str) -> None:
        """Add an adapter to the text weights, for all requests, and remove it."""
        self.transformer.lora(name).merge_into(self.transformer.blocks)
        self.drop_lora(name)

    def _set_loras(self, loras: tuple[LoraSpec, ...]) -> None:
        old = self.config.transformer
        transformer = TransformerConfig(
            **{**{name: getattr(old, name) for name in type(old).model_fields}, "loras": loras}
        )
        self.config = self.config.model_copy(update={"transformer": transformer})
        self.transformer.c = transformer

    # ---- documents ------------------------------------------------------------------------------------------------

    def spans(self, document: Document, generation_prompt: bool = False) -> list[Span]:
        """The document, its media prepared, as token and latent spans, by the attached tokenizer and codec."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; set model.tokenizer or load it with omni.from_pretrained")
        document = Document(tuple(self.prepare(s) for s in document.segments), document.meta)
        return compose(document, self.tokenizer, self.encode_media, generation_prompt)

    def prepare(self, segment: AnySegment) -> AnySegment:
        """The segment with pixels that the codec can encode and frames that fill chunks: see omni.media.preparation."""
        return segment if isinstance(segment, Text) else prepare(segment, self.preparation, self.limits)

    @property
    def limits(self) -> Limits:
        """The limits of the codec and this model; without a codec, of an encoder. ValueError for a model without
        either."""
        if self.codec is None and self.encoder is not None and self._holds == "features":
            step = self.encoder.spec.patch * self.encoder.spec.merge
            return Limits((step, step), 1, self.config.max_grid, self.config.max_chunks)
        if self.codec is None:
            raise ValueError(
                "this model has no codec for pictures; set model.codec or load it with omni.from_pretrained"
            )
        from omni.codecs import MAX_GRID

        spec, config = self.codec.spec, self.config
        most = min(config.max_grid, MAX_GRID), min(config.max_chunks, MAX_GRID)
        return Limits(spec.stride[1:], spec.media_frames_per_chunk, *most, spec.missing_frames)

    @property
    def _holds(self) -> Literal["latents", "features", "both"]:
        """What the context holds of a picture."""
        return "latents" if self.config.encoder is None else self.config.encoder.pictures

    def encode_media(self, segments: Sequence[Image | Video]) -> list[Blocks]:
        """Latents (t, h, w, C) of each picture (one block) or clip (one per chunk), of any size: `prepare` is applied;
        behind those of a picture, its features, where the model has an encoder."""
        limits = self.limits  # raises without a codec
        prepared = [prepare(segment, self.preparation, limits) for segment in segments]
        features = [self.encode_features(one) for one in prepared]
        if self.codec is None:
            if any(isinstance(one, Video) or one.supervise for one in prepared):
                raise ValueError("this model has no codec: give no clips, and no pictures to generate")
            return [[*one] for one in features]
        latents = self.codec.encode_media(prepared)
        return [[*blocks, *more] for blocks, more in zip(latents, features, strict=True)]

    def encode_features(self, segment: Image | Video, as_pixels: bool = False) -> list[FeatureBlock]:
        """The features of a prepared picture; none of a clip, or in a model without `encoder` in its config.json.
        as_pixels: what the encoder reads in their place; `embed_context` computes them. ValueError where the encoder is
        missing."""
        if self._holds == "latents" or isinstance(segment, Video):
            return []
        encoder, stride, alone = self._attached_encoder, self.limits.stride, self._holds == "features"
        height, width = segment.pixels.shape[:2]
        sides = height // stride[0], width // stride[1]
        if as_pixels:
            prepared, grid = encoder.spec.prepared(segment.pixels), encoder.spec.grid(height, width)
            return [FeatureBlock.of_pixels(prepared, grid, alone, sides)]
        [values] = encoder.encode(segment.pixels[None])
        return [FeatureBlock(values[None], alone, sides)]

    def tune_encoder(self) -> None:
        """Make the weights of the attached encoder weights of this model, `tower`. They keep their values. Checkpoints
        store them; a published model has them in encoder/ alone. ValueError without an encoder that can be trained."""
        self.tower = self._attached_encoder.trainable()

    @property
    def _attached_encoder(self) -> Encoder:
        if self.encoder is None:
            raise ValueError(
                "this model reads features of pictures and has no encoder; set model.encoder or load it with "
                "omni.from_pretrained"
            )
        return self.encoder

    def num_positions(self, shape: Sequence[int]) -> int:
        """Context positions of the blocks of a prepared picture (H, W, 3) or clip (T, H, W, 3). ValueError as
        `encode_media` raises it."""
        is_clip = len(shape) == 4
        latents = 0
        if self._holds != "features" or is_clip:
            latents = 0 if self.codec is None else self.codec.num_latents(shape)
        if self._holds == "latents" or is_clip:
            return latents
        return latents + self._attached_encoder.spec.num_features(*shape[:2])

    # ---- files ----------------------------------------------------------------------------------------------------

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Strict: every weight must be present with its shape, and no other. Else DamagedError naming `source`."""
        load_weights(self, tensors, source)

    def save_pretrained(
        self,
        directory: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        replace: bool = False,
        info: Mapping[str, Any] | None = None,
        base: TextBase | None = None,
    ) -> Path:
        """Publish a directory: config.json, model.safetensors, preparation.json, generation.json, tokenizer/, codec/,
        encoder/, published/, manifest.json.

        dtype: of the stored weights of the transformer and the heads; bfloat16, the default, halves the file and keeps
        three digits. Codec and encoder keep their settings and the dtypes of their own files. base: the language model
        that the text path is; it is left out, and named in base.json (importers.base). ValueError where the text path
        differs from it.
        """
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith(TOWER)}
        weights = weights if base is None else base.without_text_path(weights)
        files: dict[str, Any] = {
            "config.json": self.config.model_dump_json(indent=2) + "\n",
            "preparation.json": self.preparation.model_dump_json(indent=2, exclude_none=True) + "\n",
            "generation.json": json.dumps(dict(self.defaults), indent=2) + "\n",
            "model.safetensors": {
                n: v.detach().to("cpu", dtype if v.is_floating_point() else v.dtype).contiguous()
                for n, v in weights.items()
            },
        }
        files |= {f"{PUBLISHED}/{name}": content for name, content in self.published.items()}
        for part, attached in (("codec", self.codec), ("encoder", self.encoder)):
            if attached is not None:
                files |= {f"{part}/{name}": content for name, content in attached.files().items()}
        with tempfile.TemporaryDirectory() as folder:
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
                files["tokenizer"] = Path(folder)
            files = files if base is None else base.reduced(files)
            return publish(directory, files, info=info, replace=replace)
