"""Families of published decoders: the keys of their config.json, with the defaults of the published classes, and the
same model as Omni's configuration.

A family is a class whose fields are its known keys. An unknown key, or a value outside a field's type, is refused by
name: it may change the function. Keys without effect on logits are in WITHOUT_EFFECT. To add a family: a class here,
its model_type in FAMILIES, its weights in `omni.importers.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from omni.config import Frozen
from omni.importers.rope import merged, read_rope
from omni.sequence.positions import RotarySpec

# No effect on the logits of a whole causal pass without dropout.
WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout attn_implementation _attn_implementation _attn_implementation_autoset auto_map "
    "bos_token_id cache_implementation dtype embd_pdrop eos_token_id hidden_dropout initializer_range "
    "is_llama_config _name_or_path name_or_path pad_token_id pretraining_tp resid_pdrop "
    "_sliding_window_pattern torch_dtype transformers_version transformers.js_config unk_token_id unsloth_fixed "
    "unsloth_version use_cache output_attentions output_hidden_states return_dict chunk_size_feed_forward "
    "finetuning_task id2label label2id problem_type task_specific_params tokenizer_class prefix sep_token_id "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id max_length min_length do_sample early_stopping "
    "num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores "
    "return_dict_in_generate remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens use_bfloat16 tf_legacy_loss torchscript pruned_heads".split()
)
Activation = Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh"]
ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}  # published -> ours
Size = Field(ge=1, le=1 << 24)
LAYER_TYPES = ("full_attention", "sliding_attention")


class Decoder(Frozen):
    """Keys that all families share. `context`: see omni.importers.rope."""

    model_config = ConfigDict(strict=True)
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT
    theta: ClassVar[float] = 10000.0
    qk_norm: ClassVar[str] = "none"
    norm_placement: ClassVar[str] = "before"
    norm_offset: ClassVar[float] = 0.0
    has_fused_weights: ClassVar[bool] = False  # qkv_proj and gate_up_proj

    model_type: str
    vocab_size: int = Size
    hidden_size: int = Size
    intermediate_size: int = Size
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_attention_heads: int = Field(ge=1, le=1024)
    num_key_value_heads: int | None = Field(default=None, ge=1, le=1024)
    head_dim: int | None = Field(default=None, ge=2, le=1024)
    hidden_act: Activation = "silu"
    rms_norm_eps: float = Field(default=1e-6, ge=0, le=1)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = Field(ge=1, le=1 << 24)
    rope_theta: float | None = Field(default=None, gt=1, le=1e12)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    is_encoder_decoder: Literal[False] = False
    is_decoder: bool = False
    add_cross_attention: Literal[False] = False
    cross_attention_hidden_size: None = None
    tie_encoder_decoder: Literal[False] = False

    # ---- derived ----

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, head width)."""
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, width

    @property
    def activation(self) -> str:
        return ACTIVATIONS.get(self.hidden_act, self.hidden_act)

    @property
    def biases(self) -> dict[str, bool]:
        """Of the projections before and after attention, and of the MLP."""
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias, "mlp_bias": self.mlp_bias}

    def windows(self) -> dict[str, Any]:
        """The fields of the configuration that name windows."""
        return {}

    def logits(self) -> dict[str, Any]:
        """The fields of OmniConfig beside sizes."""
        return {}

    def scores(self) -> dict[str, Any]:
        """The fields of LayerSpec about the scores of attention."""
        return {}

    def rope(self, source: str, context: int) -> dict[str, Any]:
        """The fields about rotary positions."""
        data = merged(source, self.rope_parameters, self.rope_theta, self.rope_scaling)
        base, rotary = self.read_rope(data, source, context)
        return {"rope_base": base, "rotary": rotary}

    def read_rope(self, data: Mapping[str, Any], source: str, context: int) -> tuple[float, RotarySpec]:
        """omni.importers.rope.read_rope with the values of this config. ValueError for a partial rotation: the
        published classes have none."""
        most = self.max_position_embeddings
        found = read_rope(data, source, theta=self.theta, max_positions=most, original=None, context=context)
        if found[1].partial != 1:
            raise ValueError(f"{source}: partial_rotary_factor = {found[1].partial} is not part of {self.model_type}")
        return found

    def transformer(self, source: str, context: int) -> dict[str, Any]:
        """The fields of TransformerConfig. ValueError naming a key whose value is not implemented."""
        heads, kv_heads, head_dim = self.heads
        return {
            "width": self.hidden_size,
            "depth": self.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp_width": self.intermediate_size,
            "qk_norm": self.qk_norm,
            "norm_placement": self.norm_placement,
            "norm_offset": self.norm_offset,
            "norm_eps": self.rms_norm_eps,
            "activation": self.activation,
            **self.biases,
            **self.scores(),
            **self.windows(),
            **self.rope(source, context),
        }


def layers_with_windows(window: int | None, types: list[str] | None, default: list[bool]) -> dict[str, Any]:
    """window and window_layers, by the types of layers, or by `default`. ValueError for types that do not fit."""
    if types is None:
        have = default
    elif len(types) != len(default) or not set(types) <= set(LAYER_TYPES):
        unknown = sorted(set(types) - set(LAYER_TYPES))
        raise ValueError(
            f"layer_types has {len(types)} entries{f' and {unknown[0]!r:.80}' if unknown else ''}; "
            f"give {len(default)} of {', '.join(LAYER_TYPES)}"
        )
    else:
        have = [kind == "sliding_attention" for kind in types]
    if not any(have):
        return {}
    if window is None:
        raise ValueError("layer_types names sliding_attention, and sliding_window is null; give a window")
    where = tuple(index for index, has in enumerate(have) if has)
    return {"window": window, "window_layers": None if all(have) else where}


class Llama(Decoder):
    """Llama 1 to 3.2, SmolLM, SmolLM2, and others of the class LlamaForCausalLM."""

    max_position_embeddings: int = Field(default=2048, ge=1, le=1 << 24)
    mlp_bias: bool = False  # type: ignore[assignment]
    rope_interleaved: Literal[False] = False


class Mistral(Decoder):
    """All layers have the window, where there is one."""

    max_position_embeddings: int = Field(default=4096 * 32, ge=1, le=1 << 24)
    num_key_value_heads: int | None = Field(default=8, ge=1, le=1024)
    attention_bias: Literal[False] = False  # type: ignore[assignment]
    sliding_window: int | None = Field(default=4096, ge=1, le=1 << 24)
    layer_types: list[str] | None = None

    def windows(self) -> dict[str, Any]:
        has = self.sliding_window is not None
        found = layers_with_windows(self.sliding_window, None, [has] * self.num_hidden_layers)
        if found != layers_with_windows(self.sliding_window, self.layer_types, [has] * self.num_hidden_layers):
            raise ValueError(f"layer_types = {self.layer_types!r:.80} contradicts sliding_window: mistral has one rule")
        return found


class Qwen2(Decoder):
    """Biases of queries, keys and values. The layers from max_window_layers on have a window, if it is used."""

    max_position_embeddings: int = Field(default=32768, ge=1, le=1 << 24)
    num_key_value_heads: int | None = Field(default=32, ge=1, le=1024)
    attention_bias: Literal[True] = True  # type: ignore[assignment]
    use_sliding_window: bool = False
    sliding_window: int | None = Field(default=4096, ge=1, le=1 << 24)
    max_window_layers: int = Field(default=28, ge=0, le=1 << 16)
    layer_types: list[str] | None = None
    use_mrope: Literal[False] = False

    @property
    def biases(self) -> dict[str, bool]:
        return {"qkv_bias": True}

    def windows(self) -> dict[str, Any]:
        window = self.sliding_window if self.use_sliding_window else None
        have = [window is not None and index >= self.max_window_layers for index in range(self.num_hidden_layers)]
        return layers_with_windows(window, self.layer_types, have)


class Qwen3(Qwen2):
    """Queries and keys are normalised per head; biases are optional."""

    qk_norm: ClassVar[str] = "head"
    attention_bias: bool = False  # type: ignore[assignment]
    head_dim: int | None = Field(default=128, ge=2, le=1024)

    @property
    def biases(self) -> dict[str, bool]:
        return {"qkv_bias": self.attention_bias, "out_bias": self.attention_bias}


class Gemma2(Decoder):
    """Norms with 1 + w around attention and MLP, embeddings scaled by sqrt(width), soft caps, a window in every other
    layer."""

    norm_placement: ClassVar[str] = "both"
    norm_offset: ClassVar[float] = 1.0
    without_effect: ClassVar[frozenset[str]] = WITHOUT_EFFECT | {"hidden_act"}  # hidden_activation counts

    num_key_value_heads: int | None = Field(default=4, ge=1, le=1024)
    head_dim: int | None = Field(default=256, ge=2, le=1024)
    max_position_embeddings: int = Field(default=8192, ge=1, le=1 << 24)
    tie_word_embeddings: bool = True
    hidden_activation: Activation | None = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float = Field(default=256, gt=0, le=1e6)
    sliding_window: int | None = Field(default=4096, ge=1, le=1 << 24)
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = Field(default=30.0, gt=0)
    attn_logit_softcapping: float | None = Field(default=50.0, gt=0)
    use_bidirectional_attention: Literal[False] | None = None

    @property
    def activation(self) -> str:
        name = self.hidden_activation or "gelu_pytorch_tanh"
        return ACTIVATIONS.get(name, name)

    def windows(self) -> dict[str, Any]:
        have = [index % 2 == 0 for index in range(self.num_hidden_layers)]
        return layers_with_windows(self.sliding_window, self.layer_types, have)

    def scores(self) -> dict[str, Any]:
        own = self.query_pre_attn_scalar != self.heads[2]
        return {
            "attention_scale": self.query_pre_attn_scalar**-0.5 if own else None,
            "attention_cap": self.attn_logit_softcapping,
        }

    def logits(self) -> dict[str, Any]:
        return {"logit_cap": self.final_logit_softcapping, "embedding_scale": self.hidden_size**0.5}


class Gemma3(Gemma2):
    """Queries and keys normalised per head; local layers with a window and a rope base of their own."""

    theta: ClassVar[float] = 1e6
    qk_norm: ClassVar[str] = "head"

    vocab_size: int = Field(default=262_208, ge=1, le=1 << 24)
    hidden_size: int = Field(default=2304, ge=1, le=1 << 24)
    intermediate_size: int = Field(default=9216, ge=1, le=1 << 24)
    num_hidden_layers: int = Field(default=26, ge=1, le=1024)
    num_attention_heads: int = Field(default=8, ge=1, le=1024)
    max_position_embeddings: int = Field(default=131_072, ge=1, le=1 << 24)
    final_logit_softcapping: float | None = Field(default=None, gt=0)
    attn_logit_softcapping: None = None  # type: ignore[assignment]
    rope_local_base_freq: float | None = Field(default=None, gt=1, le=1e12)
    sliding_window_pattern: int = Field(default=6, ge=1, le=1024)

    def windows(self) -> dict[str, Any]:
        have = [bool((index + 1) % self.sliding_window_pattern) for index in range(self.num_hidden_layers)]
        return layers_with_windows(self.sliding_window, self.layer_types, have)

    def rope(self, source: str, context: int) -> dict[str, Any]:
        new = self.rope_parameters
        if new is not None and not set(new) <= set(LAYER_TYPES):
            unknown = sorted(set(new) - set(LAYER_TYPES))[0]
            raise ValueError(f"{source}: rope_parameters.{unknown} is unknown; give {' and '.join(LAYER_TYPES)}")
        full, local = ((new or {}).get(kind) for kind in LAYER_TYPES)
        whole = merged(source, full, self.rope_theta, self.rope_scaling)
        base, rotary = self.read_rope(whole, f"{source}: full_attention", context)
        own = merged(source, local, self.rope_local_base_freq, None)
        local_base, plain = read_rope(
            own, f"{source}: sliding_attention", theta=10000.0, max_positions=1, original=None, context=1
        )
        if plain != RotarySpec():
            raise ValueError(f"{source}: rope_parameters.sliding_attention = {own!r:.200} is not implemented; "
                             "implemented: rope_theta alone")  # fmt: skip
        window = {"window_rope_base": local_base} if self.windows() else {}
        return {"rope_base": base, "rotary": rotary, **window}


class Olmo2(Decoder):
    """Norms after attention and MLP; queries and keys normalised over all heads together."""

    qk_norm: ClassVar[str] = "width"
    norm_placement: ClassVar[str] = "after"

    max_position_embeddings: int = Field(default=2048, ge=1, le=1 << 24)
    rms_norm_eps: float = Field(default=1e-5, ge=0, le=1)


class Phi3(Decoder):
    """Fused projections, a part of each head that rotates, longrope."""

    has_fused_weights: ClassVar[bool] = True

    max_position_embeddings: int = Field(default=4096, ge=1, le=1 << 24)
    original_max_position_embeddings: int = Field(default=4096, ge=1, le=1 << 24)
    rms_norm_eps: float = Field(default=1e-5, ge=0, le=1)
    attention_bias: Literal[False] = False  # type: ignore[assignment]
    sliding_window: int | None = Field(default=None, ge=1, le=1 << 24)
    partial_rotary_factor: float | None = Field(default=None, gt=0, le=1)

    def windows(self) -> dict[str, Any]:
        return {} if self.sliding_window is None else {"window": self.sliding_window, "window_layers": None}

    def rope(self, source: str, context: int) -> dict[str, Any]:
        data = merged(
            source, self.rope_parameters, self.rope_theta, self.rope_scaling, partial=self.partial_rotary_factor
        )
        base, rotary = read_rope(
            data,
            source,
            theta=self.theta,
            max_positions=self.max_position_embeddings,
            original=self.original_max_position_embeddings,
            context=context,
        )
        if rotary.scaling is not None and rotary.scaling.kind != "longrope":
            raise ValueError(f"{source}: rope_type = {rotary.scaling.kind!r} is not part of phi3; it has longrope")
        if int(self.heads[2] * rotary.partial) % 2:
            raise ValueError(f"{source}: partial_rotary_factor = {rotary.partial} rotates an odd number of dimensions")
        return {"rope_base": base, "rotary": rotary}


FAMILIES: dict[str, type[Decoder]] = {
    "llama": Llama, "mistral": Mistral, "qwen2": Qwen2, "qwen3": Qwen3, "gemma2": Gemma2, "gemma3_text": Gemma3,
    "olmo2": Olmo2, "phi3": Phi3,
}  # fmt: skip
