"""GGUF checkpoints (llama.cpp): metadata as the keys of a config.json, tensors under the names of the published
classes, dequantised row by row; types that omni.storage.quantised does not read, by the package gguf.

What the format stores otherwise than safetensors files: rows of queries and keys of the llama architecture alternate
between the halves of a head; norms of Gemma are 1 + w; frequencies of Llama 3.1 and Phi-3 are divided by tensors of
factors. Rules without a key follow llama.cpp. A key of the architecture that is not in KEYS is refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.importers.families import FAMILIES
from omni.storage.gguf import GGUFReader, TensorPlace
from omni.storage.quantised import FLOATS, KINDS, SIZES, floats_of
from omni.storage.shards import Stored

ARCHITECTURES = {  # of llama.cpp -> model_type
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text",
    "phi3": "phi3", "olmo2": "olmo2",
}  # fmt: skip
KEYS = {  # below the architecture's name -> key of config.json
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
READ_APART = {
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.finetuned", "attention.causal",
}  # fmt: skip
MODEL = {"token_embd": "embed_tokens", "output_norm": "norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose scores have another scale
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFFile:
    """A Source, and `config`, the keys of a config.json. ValueError for a damaged file, an unknown architecture or an
    unknown key. has_stored_offset: norms are stored as 1 + w."""

    def __init__(self, path: Path) -> None:
        self.path, self._reader = path, GGUFReader(path)
        self.files: dict[Path, set[str] | None] = {path: None}
        self.arch = self._field("general.architecture", "")
        if self.arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: architecture {self.arch!r:.80} is not implemented; implemented: {known}")
        if self._field("split.count", 1) > 1:
            raise ValueError(f"{path} is one file of several (split.count); join them with llama-gguf-split --merge")
        self.has_stored_offset = self.arch in LARGEST_GEMMA
        self._stored = self._reader.tensors
        self.config = self._config()
        self._names = {self._published(name): name for name in self._stored if name not in FACTORS}
        self.tensors = {name: _describe(self._stored[own]) for name, own in self._names.items()}

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows of a tensor, dequantised."""
        order = self._order(name)
        rows = order[index] if order is not None else index
        return self._read(self._names[name], rows if isinstance(rows, slice) else rows.numpy())

    @property
    def licence(self) -> str | None:
        """The identifier in its metadata."""
        found = self._field("general.license")
        return found if isinstance(found, str) else None

    def words(self) -> tuple[list[str], list[str]]:
        """The tokens of the vocabulary by id, and the merges of a byte-pair tokenizer; empty where there are none."""
        return self._field("tokenizer.ggml.tokens", []), self._field("tokenizer.ggml.merges", [])

    def _read(self, own: str, index: Any) -> Tensor:
        place = self._stored[own]
        if (kind := KINDS.get(place.kind)) is None:
            return _by_package(self._reader, place, index)
        numbers, size = SIZES[kind]
        rows, *columns = place.shape
        width = math.prod(columns) // numbers * size
        stored = self._reader.data(place, rows * width).reshape(rows, width)[index]
        return floats_of(stored, kind).view(-1, *columns)

    def _order(self, name: str) -> Tensor | None:
        """The stored row of each published row of queries and keys, where they differ."""
        part = name.rpartition(".")[0].rpartition(".")[2]
        if self.arch != "llama" or part not in ("q_proj", "k_proj"):
            return None
        heads = self.config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"]
        num = self.tensors[name].shape[0]
        if num % (2 * heads):
            return None  # of another shape than the config's: refused elsewhere
        return torch.arange(num).view(heads, num // heads // 2, 2).transpose(1, 2).flatten()

    # ---- names and metadata ----

    def _published(self, own: str) -> str:
        """The published name; its own where there is none."""
        stem, _, kind = own.rpartition(".")
        if own == "output.weight":
            return "lm_head.weight"
        if stem in MODEL:
            return f"model.{MODEL[stem]}.{kind}"
        first, _, rest = stem.partition(".")
        layer, _, part = rest.partition(".")
        found = self._layer_names().get(part)
        return f"model.layers.{layer}.{found}.{kind}" if first == "blk" and layer.isdecimal() and found else own

    def _layer_names(self) -> dict[str, str]:
        """Of the tensors of a layer, for this architecture."""
        norm = "pre_feedforward_layernorm" if self.has_stored_offset else "post_attention_layernorm"
        fused = {"ffn_up": "mlp.gate_up_proj"} if self.arch == "phi3" else {}
        return {**LAYER, "ffn_norm": norm, **fused}

    def _field(self, key: str, default: Any = None) -> Any:
        return self._reader.fields.get(key, default)

    def _own(self, key: str, default: Any = None) -> Any:
        return self._field(f"{self.arch}.{key}", default)

    def _config(self) -> dict[str, Any]:
        """The keys of a config.json. ValueError for a key of the architecture that is not known."""
        prefix, model_type = f"{self.arch}.", ARCHITECTURES[self.arch]
        known = {key for key, name in KEYS.items() if name in FAMILIES[model_type].model_fields} | READ_APART
        for key in self._reader.fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                value = self._field(key)
                raise ValueError(f"{self.path}: key {key} = {value!r:.80} is not implemented; use another file")
        found = {name: self._own(key) for key, name in KEYS.items() if self._own(key) is not None}
        if found.get("sliding_window") == 0:
            found["sliding_window"] = None
        if isinstance(heads := found.get("num_key_value_heads"), list):
            if len(set(heads)) != 1:
                raise ValueError(f"{self.path}: {prefix}attention.head_count_kv differs between layers: {heads!r:.80}")
            found["num_key_value_heads"] = heads[0]
        found |= self._derived(found)
        return {"model_type": model_type, **found}

    def _derived(self, found: dict[str, Any]) -> dict[str, Any]:
        """Keys that the file does not have, and those of rotary positions."""
        try:
            heads = found["num_attention_heads"]
            found.setdefault("num_key_value_heads", heads)
            query = self._stored.get("blk.0.attn_q.weight")
            rows = found["hidden_size"] if query is None else query.shape[0]
            head_dim = found.setdefault("head_dim", rows // heads)
            vocab_size = self._stored["token_embd.weight"].shape[0]
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            raise ValueError(f"{self.path} has no {self.arch}.embedding_length, attention.head_count or token_embd; "
                             "download it again") from None  # fmt: skip
        if self._own("attention.value_length", head_dim) != head_dim or not self._own("attention.causal", True):
            raise ValueError(f"{self.path}: values of another width than keys, or attention that is not causal")
        more: dict[str, Any] = {"vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in self._stored}
        if self.arch in ("llama", "qwen3", "olmo2"):
            more["attention_bias"] = "blk.0.attn_q.bias" in self._stored
        if (deepest := LARGEST_GEMMA.get(self.arch)) is not None:
            largest = found.get("num_hidden_layers") == deepest
            more["query_pre_attn_scalar"] = found["hidden_size"] / heads if largest else head_dim
        return {**more, **self._rope(head_dim)}

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """Keys of rotary positions."""
        rotating = self._own("rope.dimension_count", head_dim)
        if not all(type(size) is int and size > 0 for size in (head_dim, rotating)):
            raise ValueError(f"{self.path}: heads of width {head_dim!r:.40}, of which {rotating!r:.40} rotate; "
                             "download it again")  # fmt: skip
        partial = {} if rotating == head_dim else {"partial_rotary_factor": rotating / head_dim}
        kind, factor = self._own("rope.scaling.type", "none"), self._own("rope.scaling.factor")
        original = self._own("rope.scaling.original_context_length")
        first = {} if original is None else {"original_max_position_embeddings": original}
        if any(name in self._stored for name in FACTORS):
            return partial | self._factors(first)
        if self._own("rope.scaling.attn_factor", 1.0) != 1.0:
            raise ValueError(f"{self.path}: {self.arch}.rope.scaling.attn_factor is not implemented with {kind!r}")
        if kind == "none" or (kind == "linear" and not factor):
            return partial
        scaling = {"rope_type": kind, "factor": factor, **(first if kind == "yarn" else {})}
        return partial | {"rope_scaling": scaling}

    def _factors(self, original: dict[str, int]) -> dict[str, Any]:
        """Frequencies with factors of their own."""
        both = [name if name in self._stored else FACTORS[0] for name in FACTORS[1:]]
        if missing := [name for name in both if name not in self._stored]:
            raise ValueError(f"{self.path} has no tensor {missing[0]}; download it again")
        long, short = ([float(value) for value in self._read(name, slice(None)).flatten()] for name in both)
        magnitude = self._own("rope.scaling.attn_factor", 1.0 if FACTORS[0] in both else None)
        scaling: dict[str, Any] = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        if magnitude is not None:
            scaling["attention_factor"] = magnitude
        if self.arch == "phi3":
            return {"rope_scaling": scaling, **original}
        return {"rope_scaling": scaling | original}


def _describe(place: TensorPlace) -> Stored:
    """Shape and dtype; None for a type that cannot be dequantised."""
    kind = KINDS.get(place.kind)
    if kind is None:
        return _describe_by_package(place)
    numbers = SIZES[kind][0]
    is_whole = bool(place.shape) and (numbers == 1 or (len(place.shape) > 1 and place.shape[-1] % numbers == 0))
    return Stored(place.shape, FLOATS.get(kind, torch.float32) if is_whole else None, kind)


def _package() -> Any:
    """The package gguf. ImportError that names the extra."""
    try:
        import gguf
    except ImportError:
        raise ImportError("this GGUF file has types that need the package gguf: pip install 'omni-flow[hf]'") from None
    return gguf


def _describe_by_package(place: TensorPlace) -> Stored:
    import numpy as np

    gguf = _package()
    try:
        kind = gguf.GGMLQuantizationType(place.kind)
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except (NotImplementedError, ValueError, KeyError):
        return Stored(place.shape, None, f"type {place.kind}")
    is_whole = len(place.shape) > 1 and place.shape[-1] % numbers == 0
    return Stored(place.shape, torch.float32 if is_whole else None, kind.name)


def _by_package(reader: GGUFReader, place: TensorPlace, index: Any) -> Tensor:
    """Rows of a tensor of another type, as float32."""
    import numpy as np

    gguf = _package()
    kind = gguf.GGMLQuantizationType(place.kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    rows, *columns = place.shape
    width = math.prod(columns) // numbers * size
    stored = np.ascontiguousarray(reader.data(place, rows * width).reshape(rows, width)[index])
    return torch.from_numpy(np.array(gguf.dequantize(stored, kind))).float().view(-1, *columns)
