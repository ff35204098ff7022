"""LoRA adapters in the format of the peft library: a folder with adapter_config.json and adapter_model.safetensors.

    name = read_lora(model, "runs/my_adapter")      adds it to the model, under the folder's name
    write_lora(model, name, "runs/copy")            opens in peft with PeftModel.from_pretrained

Keys are `base_model.model.model.layers.INDEX.{self_attn, mlp}.TARGET.lora_{A, B}.weight`, those of Llama-like classes.
What the format can have and this model cannot compute (DoRA, biases, ranks per module, other modules) is refused by
name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from omni.config import nearest, parse_json, table_of
from omni.errors import DamagedError
from omni.model import Omni
from omni.nn.lora import Lora, LoraSpec, Target

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_BYTES = 8 << 30
TARGETS: tuple[str, ...] = get_args(Target)
_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])(?:\.default)?\.weight"
)
# Keys of adapter_config.json that change nothing here, and those that may have these values alone.
WITHOUT_EFFECT = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "lora_dropout", "init_lora_weights"),
    *("peft_version", "auto_mapping", "layers_pattern", "loftq_config", "runtime_config", "megatron_config"),
    *("qalora_group_size", "megatron_core", "eva_config", "corda_config", "ensure_weight_tying", "velora_config"),
}
READ = {"r", "lora_alpha", "target_modules", "use_rslora", "layers_to_transform", "peft_type"}
EMPTY = (None, False, [], {}, "none", "", 0)


def read_lora(model: Omni, folder: str | Path, name: str | None = None) -> str:
    """Add the adapter of a folder to the model, and return its name (None: the folder's). ValueError for a setting or a
    tensor that does not fit, by name; the model is then unchanged."""
    folder = Path(folder)
    name = name or re.sub(r"[^A-Za-z0-9_-]", "_", folder.resolve().name)[:64]
    config = table_of(parse_json(_read(folder / CONFIG), str(folder / CONFIG)), str(folder / CONFIG))
    pairs = _pairs(_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    spec = _spec(config, name, pairs, str(folder / CONFIG))
    if model.config.transformer.rotary.partial < 1 and {"q_proj", "k_proj", "qkv_proj"} & set(spec.targets):
        raise ValueError(
            f"{folder}: an adapter of queries and keys does not fit a model with rotary.partial < 1, whose rows are in "
            "another order; merge it into the published model before importing"
        )
    _check_shapes(model, spec, pairs, str(folder / WEIGHTS))
    lora = model.add_lora(spec)
    with torch.no_grad():
        for (index, target), (down, up) in pairs.items():
            own = lora.layers[str(index)][target]  # type: ignore[index]
            own.down.weight.copy_(down)
            own.up.weight.copy_(up)
    return name


def write_lora(model: Omni, name: str, folder: str | Path, base: str | None = None) -> Path:
    """Write an adapter of the model as a folder of peft. base: name or path of the published model it belongs to.
    ValueError if the folder exists, or the model has no such adapter."""
    folder, lora = Path(folder), model.transformer.lora(name)
    if folder.exists():
        raise ValueError(f"{str(folder)!r} already exists; remove it or choose another name")
    spec, tensors = lora.spec, {}
    for index, targets in lora.layers.items():
        for target, pair in targets.items():  # type: ignore[operator]
            part = "mlp" if target in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
            key = f"base_model.model.model.layers.{index}.{part}.{target}.lora_"
            tensors[f"{key}A.weight"] = pair.down.weight.detach().cpu().contiguous()
            tensors[f"{key}B.weight"] = pair.up.weight.detach().cpu().contiguous()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": spec.rank,
        "lora_alpha": spec.alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": spec.rank_stabilised,
        "target_modules": sorted(spec.targets), "fan_in_fan_out": False, "inference_mode": True,
        "layers_to_transform": None if spec.layers is None else list(spec.layers),
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; give a folder that peft has saved (safetensors)")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} has more than {MAX_BYTES:,} bytes; it is no adapter")
    return path.read_bytes()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load(_read(path))
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a safetensors file ({error}); copy it again") from None
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]:
        raise DamagedError(f"{path}: {bad[0]} has values that are NaN or infinite; train the adapter again")
    return tensors


Pairs = dict[tuple[int, str], tuple[Tensor, Tensor]]


def _pairs(tensors: Mapping[str, Tensor], source: str) -> Pairs:
    """(A, B) of each layer and target. ValueError for any other tensor, and for one of a pair alone."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in TARGETS:
            raise ValueError(f"{source}: {key!r} is not the LoRA of a projection ({', '.join(TARGETS)}) of a layer")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = value
    for (index, target), pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{source}: {target} of layer {index} has only lora_{next(iter(pair))}")
    return {place: (pair["A"], pair["B"]) for place, pair in found.items()}


def _spec(config: Mapping[str, Any], name: str, pairs: Pairs, source: str) -> LoraSpec:
    """The LoraSpec of an adapter_config.json. ValueError for a key with an effect that is not implemented."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{source}: peft_type = {config.get('peft_type')!r} is not implemented; implemented: 'LORA'")
    for key, value in config.items():
        if key not in WITHOUT_EFFECT | READ and value not in EMPTY:
            hint = nearest(key, READ)
            raise ValueError(f"{source}: {key} = {value!r:.80} is not implemented{hint or '; merge it with peft'}")
    targets = {target for _, target in pairs}
    layers = tuple(sorted({index for index, _ in pairs}))
    if any((index, target) not in pairs for index in layers for target in targets):
        raise ValueError(f"{source}: some layers have other targets than others, which is not implemented")
    if not layers:
        raise ValueError(f"{source}: the adapter has no tensors")
    return LoraSpec.model_validate({
        "name": name, "rank": config.get("r"), "alpha": config.get("lora_alpha"), "layers": layers,
        "rank_stabilised": bool(config.get("use_rslora")), "targets": [t for t in TARGETS if t in targets],
    })  # fmt: skip


def _check_shapes(model: Omni, spec: LoraSpec, pairs: Pairs, source: str) -> None:
    """ValueError for a tensor whose shape does not fit the model."""
    with torch.device("meta"):
        wanted = Lora(spec, model.config.transformer)
    for (index, target), (down, up) in pairs.items():
        own = wanted.layers[str(index)][target]  # type: ignore[index]
        for letter, value, right in (("A", down, own.down.weight), ("B", up, own.up.weight)):
            if value.shape != right.shape:
                shapes = f"{tuple(value.shape)}, this model needs {tuple(right.shape)}"
                raise ValueError(f"{source}: lora_{letter} of {target} in layer {index} has shape {shapes}")
