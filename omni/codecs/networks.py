"""The networks of autoencoder codecs: building a diffusers class, its initial weights, one call of it.

The classes name one thing differently (latent_dist, latents, latent); here all give raw latents. Shapes: pictures
(B, 3, H, W) in [-1, 1] and raw latents (B, C, h, w), or clips (B, 3, T, H, W) and (B, C, t, h, w).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.codecs.autoencoder_config import AutoencoderConfig
from omni.codecs.families import FAMILIES
from omni.codecs.upstream import diffusers_class
from omni.config import nearest
from omni.rng import Key

ONE_CALL = threading.RLock()  # the classes for clips keep the state of a call in the module: no two calls at a time


def build_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """The diffusers module of a configuration, weights unset. ValueError for an argument that its class lacks, and for
    arguments that it cannot be built of."""
    chosen = diffusers_class(config.class_name)
    known = set(inspect.signature(chosen.__init__).parameters) - {"self"}
    for name in config.model:
        if name not in known:
            raise ValueError(f"{config.class_name} has no argument {name!r}{nearest(name, known)}")
    try:
        module = chosen(**config.model)
    except Exception as error:  # each class checks its arguments in its own way, or not at all
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{config.class_name} cannot be built of these arguments ({reason:.200})") from None
    use_fused_norms(module)
    return module


def for_evaluation(module: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """The module in evaluation mode; of pictures, channels last in memory. By torch's own `to`: diffusers' imports
    torch._dynamo first."""
    if takes_clips(module):
        return nn.Module.to(module.eval(), device=device)
    return nn.Module.to(module.eval(), device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def takes_clips(module: nn.Module) -> bool:
    """Whether media and latents of the module have a time axis."""
    family = FAMILIES.get(type(module).__name__)
    return family is not None and family.takes_clips


def encoded_latents(module: Any, media: Tensor, moments: bool = False) -> Tensor:
    """The raw latents of pictures or clips, float32: the mode of a posterior. moments: means and, after them,
    logarithms of variances, (B, 2 C, ...), of a class that has a posterior."""

    def compute(x: Tensor) -> Tensor:
        output = module.encode(x)
        if "latent_dist" in output:
            return output.latent_dist.parameters if moments else output.latent_dist.mode()
        return output.latents if "latents" in output else output.latent

    return _called(module, compute, media)


def decoded_pictures(module: Any, latents: Tensor) -> Tensor:
    """Pictures or clips of raw latents, float32."""
    if latents.ndim == 4 and not takes_clips(module):
        latents = latents.contiguous(memory_format=torch.channels_last)
    return _called(module, lambda x: module.decode(x).sample, latents)


def _called(module: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x) as float32: a picture becomes a clip of one frame for a class that takes clips."""
    family = FAMILIES.get(type(module).__name__)
    if family is None or not family.takes_clips:
        return compute(x).float()
    clips = x.unsqueeze(2) if x.ndim == 4 else x
    with ONE_CALL:
        parts = clips.split(len(clips) if family.batches else 1)
        result = torch.cat([compute(part) for part in parts]).float()
    return result.squeeze(2) if x.ndim == 4 else result


def initialise(module: nn.Module, key: Key) -> None:
    """torch's default initialisation of convolutions and linear layers, drawn by the key and the parameter's name.
    Keyed by name: renaming a layer changes its initial weights."""
    with torch.no_grad():
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Conv3d | nn.Linear):
                continue
            bound = layer.weight[0].numel() ** -0.5
            for part in ("weight", "bias"):
                value = getattr(layer, part)
                if value is not None:
                    value.copy_((2 * key.fold(name, part).uniform(tuple(value.shape)) - 1) * bound)


def use_fused_norms(module: nn.Module) -> None:
    """Let diffusers' RMSNorm layers compute with torch's fused kernel: the same numbers, a fifth less time per step."""
    for layer in module.modules():
        if type(layer).__name__ == "RMSNorm" and hasattr(layer, "eps") and hasattr(layer, "weight"):
            layer.forward = functools.partial(_rms_norm, layer)


def _rms_norm(layer: Any, hidden: Tensor) -> Tensor:
    """The forward pass of diffusers' RMSNorm by the fused kernel."""
    weight = None if layer.weight is None else layer.weight.to(hidden.dtype)
    normed = F.rms_norm(hidden, (hidden.shape[-1],), weight, layer.eps)
    bias = getattr(layer, "bias", None)
    return normed if bias is None else normed + bias.to(hidden.dtype)
