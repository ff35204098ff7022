"""Published decoders as oracles: tiny checkpoints of transformers' classes, and their logits, also in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omni.rng import Key

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3", "olmo2": "Olmo2", "phi3": "Phi3",
}  # fmt: skip
FAMILIES = tuple(CLASSES)
WITHOUT_HEAD_DIM = ("olmo2", "phi3")


class Wide(TorchFunctionMode):
    """Casts to float32 become casts to float64, so that a published class computes in float64 throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if one is torch.float32 else one for one in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def published(family: str, **settings: Any) -> Any:
    """A tiny model of transformers' class with random weights, in float32, norms and biases included."""
    import transformers

    name = CLASSES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    given = {**SMALL, **settings}
    if family in WITHOUT_HEAD_DIM:
        given.pop("head_dim")
    config = config_class(**given)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = Key(0).fold(family, key).normal(tuple(value.shape))
            value.copy_(noise * 0.3 if value.ndim > 1 else value.mean() + noise * 0.2)
    return model


def read_gguf(file: Path) -> Any:
    """The model of a GGUF file as transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "dtype": torch.float32, "local_files_only": True}
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options).eval()


@contextmanager
def wide(model: Any) -> Iterator[Any]:
    """A copy of the model in float64, whose frequencies are computed in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            twin = type(model)(model.config).double().eval()
            twin.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
            yield twin
    finally:
        torch.set_default_dtype(before)


def logits(model: Any, ids: Sequence[int], is_wide: bool = True) -> Tensor:
    """The published logits (n, V) of one sequence, in one pass. is_wide: in float64."""
    return logits_of(model, [ids], is_wide)[0]


@torch.no_grad()
def logits_of(model: Any, documents: Sequence[Sequence[int]], is_wide: bool = True) -> list[Tensor]:
    """The published logits (n, V) of each sequence, each in one pass. is_wide: in float64."""
    if not is_wide:
        return [model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0] for ids in documents]
    with wide(model) as twin:
        return logits_of(twin, documents, is_wide=False)
