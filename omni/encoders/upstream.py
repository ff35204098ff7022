"""The vision towers of transformers: the only file of omni.encoders that imports it, when a tower is built."""

from __future__ import annotations

import importlib
from typing import Any

# Kind of encoder -> (module of transformers.models, class of the configuration, class of the tower).
TOWERS = {
    "siglip": ("siglip", "SiglipVisionConfig", "SiglipVisionModel"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
}


def tower_classes(kind: str) -> tuple[Any, Any]:
    """(configuration, tower) of a kind of TOWERS. ImportError names the extra that brings them."""
    folder, configuration, tower = TOWERS[kind]
    base = f"transformers.models.{folder}"
    try:
        settings = importlib.import_module(f"{base}.configuration_{folder}")
        modelling = importlib.import_module(f"{base}.modeling_{folder}")
        return getattr(settings, configuration), getattr(modelling, tower)
    except (ImportError, AttributeError) as error:
        message = f"encoder {kind!r} needs transformers with {tower}: pip install 'omni-flow[hf]'"
        raise ImportError(f"{message} ({error})") from None


def settings_of(kind: str) -> set[str]:
    """The names of the settings of a tower that its own configuration class adds to those of every model."""
    configuration, _ = tower_classes(kind)
    from transformers import PretrainedConfig

    return set(configuration().to_dict()) - set(PretrainedConfig().to_dict())
