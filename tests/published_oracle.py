"""Published decoders as oracles: tiny checkpoints of transformers' classes, and their logits, also in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


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

    names = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
        "gemma3_text": "Gemma3", "olmo2": "Olmo2", "phi3": "Phi3",
    }  # fmt: skip
    name = names[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    given = {**SMALL, **settings}
    if family in ("olmo2", "phi3"):
        given["head_dim"] = None
        given.pop("head_dim")
    config = config_class(**given)
    config._attn_implementation = "eager"
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in sorted(model.named_parameters()):
            spread = 0.3 if value.ndim > 1 else 0.2
            value.copy_(value.mean() * (value.ndim == 1) + spread * torch.randn(value.shape))
            assert torch.isfinite(value).all(), key
    return model


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


def logits(model: Any, ids: list[int], is_wide: bool = True) -> Tensor:
    """The published logits (n, V) of one sequence, in one pass."""
    with torch.no_grad():
        if not is_wide:
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        with wide(model) as twin:
            return twin(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def changed(folder: Path, without: tuple[str, ...] = (), **keys: Any) -> None:
    """Change keys of config.json, and remove those of `without`."""
    data = json.loads((folder / "config.json").read_text())
    data = {name: value for name, value in {**data, **keys}.items() if name not in without}
    (folder / "config.json").write_text(json.dumps(data))
