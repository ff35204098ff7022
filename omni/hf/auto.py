"""Omni models through transformers' AutoModel. Needs omni-flow[hf].

    import omni.hf                                     # registers the two classes
    from transformers import AutoModel
    model = AutoModel.from_pretrained("model-directory-or-hub-name")
    reply = model.generate("draw a red apple")         # of our engine: text and pictures

The files are those of Omni.save_pretrained: one directory serves both. Loading is Omni's own: every byte is checked, a
missing weight is an error, nothing of a repository is executed. `forward` computes logits of text. Not here: sharding
over devices by `device_map`, quantisers, and GenerationMixin, whose loop cannot return pictures.

Legend: R batch rows, T positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni.importers.places import fetch
from omni.model import Omni, OmniConfig
from omni.pretrained import from_pretrained
from omni.sequence.layout import Stream

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput
except ImportError as error:
    raise ImportError("omni.hf needs transformers: pip install 'omni-flow[hf]'") from error

# Arguments of `from_pretrained` that choose the files of a hub, and those that may be given with these values alone.
HUB = ("revision", "cache_dir", "local_files_only", "token", "force_download")
IGNORED: dict[str, tuple[Any, ...] | None] = {
    "trust_remote_code": (None, False), "use_safetensors": (None, True), "low_cpu_mem_usage": (None, True, False),
    "_from_auto": None, "_commit_hash": None, "adapter_kwargs": None,  # of AutoModel itself: any value
}  # fmt: skip


class OmniHubConfig(PretrainedConfig):
    """The config.json of a model directory, for AutoConfig. `omni`: the same as an OmniConfig."""

    model_type = "omni"

    def __init__(self, **fields: Any) -> None:
        own = {name: fields.pop(name) for name in OmniConfig.model_fields if name in fields and name != "model_type"}
        super().__init__(**fields)
        self.fields = own or {"vocab_size": 1}  # transformers also makes a configuration without fields

    @property
    def omni(self) -> OmniConfig:
        return OmniConfig.model_validate(self.fields)


class OmniModel(PreTrainedModel):
    """An Omni as a PreTrainedModel; `omni` is the model itself."""

    config_class = OmniHubConfig
    base_model_prefix = "omni"

    def __init__(self, config: OmniHubConfig, omni: Omni | None = None) -> None:
        super().__init__(config)
        self.omni = omni or Omni(config.omni)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Weights are initialised by Omni itself."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> OmniModel:  # type: ignore[override]
        """A model directory, or a repository of the hub. dtype (or torch_dtype): default float32. device_map: the name
        of one device. ValueError for an argument that has no meaning here."""
        kwargs.pop("config", None)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
        device = kwargs.pop("device_map", None) or "cpu"
        hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
        for key in [key for key in kwargs if key in IGNORED]:
            allowed = IGNORED[key]
            if allowed is not None and kwargs[key] not in allowed:
                raise ValueError(f"{key} = {kwargs[key]!r} is not possible for an Omni model; leave it out")
            kwargs.pop(key)
        if args or kwargs:
            raise ValueError(f"{next(iter(kwargs), args)!r} has no meaning for an Omni model; leave it out")
        if not isinstance(device, str | torch.device) or str(device) == "auto":
            raise ValueError(f"device_map = {device!r}: an Omni model is on one device; give its name, such as 'cuda'")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        dtype = torch.float32 if dtype == "auto" else dtype
        folder = Path(name) if Path(name).is_dir() else fetch(str(name), **hub)
        omni = from_pretrained(folder, device=str(device), dtype=dtype)
        return cls(OmniHubConfig(**omni.config.model_dump(mode="json")), omni).eval()

    def save_pretrained(self, directory: Any, **options: Any) -> None:  # type: ignore[override]
        """`Omni.save_pretrained`, in the dtype of the weights."""
        self.omni.save_pretrained(directory, dtype=self.omni.token.embedding.weight.dtype, **options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **other: Any) -> CausalLMOutput:
        """Logits (R, T, V) of text. attention_mask (R, T): 0 where there is padding, on either side."""
        if given := [key for key, value in other.items() if value not in (None, False, True)]:
            raise ValueError(f"{given[0]} is not supported; use model.omni")
        padding = torch.zeros_like(input_ids) if attention_mask is None else (attention_mask == 0).long()
        order = padding.argsort(dim=1, stable=True)  # padding last
        ids, document = input_ids.gather(1, order), -padding.gather(1, order)
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        stream = Stream(document, index, torch.zeros_like(ids), index[..., None].expand(*ids.shape, 3))
        is_latent = torch.zeros_like(ids, dtype=torch.bool)
        hidden, _ = self.omni.transformer.context(self.omni.token.embed(ids), stream, is_latent)
        logits = self.omni.token.read(hidden)
        back = order.argsort(dim=1)[..., None].expand_as(logits)
        return CausalLMOutput(logits=logits.gather(1, back))  # type: ignore[arg-type]

    def generate(self, prompt: Any, **options: Any) -> Any:
        """A Reply of text and pictures, see Omni.generate."""
        return self.omni.generate(prompt, **options)


AutoConfig.register("omni", OmniHubConfig, exist_ok=True)
AutoModel.register(OmniHubConfig, OmniModel, exist_ok=True)
