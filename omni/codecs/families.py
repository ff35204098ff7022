"""What the autoencoder classes of diffusers differ in, as data: names of arguments, stride, clips, causality.

A new class is one entry of FAMILIES, its file in upstream.MODULES and its name in AutoencoderConfig.class_name.
Legend: T frames, t latent frames. All clips here have T = 1 + stride (t - 1): the first latent frame is of one frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One class, or classes that differ in nothing that a codec must know.

    arguments: those that fix the spec. channels: the argument with the number of raw latent channels.
    takes_clips: media and latents have a time axis, (B, C, T, H, W). causal: the latents of a clip do not depend on
    later frames; a group norm over time breaks this. posterior: `encode` gives a distribution.
    whole_layers: the class of the few layers that look at a whole picture, of a class without group norms (tiles.py).
    odd: a clip decodes only from an odd number of latent frames. batches: the class computes more than one at a time
    (the attention mask of HunyuanVideo 1.5 fits a batch of one alone).
    """

    arguments: tuple[str, ...]
    channels: str = "latent_channels"
    takes_clips: bool = False
    causal: bool = True
    posterior: bool = True
    whole_layers: str = ""
    odd: bool = False
    batches: bool = True


_PICTURES = Family(("latent_channels", "block_out_channels"))
_TINY = Family(("latent_channels", "encoder_block_out_channels"), posterior=False)
_WAN = ("z_dim", "dim_mult", "temperal_downsample")
_RATIOS = ("latent_channels", "spatial_compression_ratio", "temporal_compression_ratio")

FAMILIES: dict[str, Family] = {
    "AutoencoderKL": _PICTURES,
    "AutoencoderKLFlux2": Family((*_PICTURES.arguments, "patch_size")),
    "AutoencoderTiny": _TINY,
    "AutoencoderDC": Family(_TINY.arguments, posterior=False, whole_layers="SanaMultiscaleLinearAttention"),
    "AutoencoderKLWan": Family((*_WAN, "patch_size"), "z_dim", takes_clips=True, whole_layers="WanAttentionBlock"),
    "AutoencoderKLQwenImage": Family(_WAN, "z_dim", takes_clips=True, whole_layers="QwenImageAttentionBlock"),
    "AutoencoderKLCogVideoX": Family(
        (*_PICTURES.arguments, "temporal_compression_ratio"), takes_clips=True, causal=False, odd=True
    ),
    "AutoencoderKLHunyuanVideo": Family(_RATIOS, takes_clips=True, causal=False),
    "AutoencoderKLHunyuanVideo15": Family(
        _RATIOS, takes_clips=True, whole_layers="HunyuanVideo15AttnBlock", batches=False
    ),
}
STAGE_LISTS = {"encoder_block_out_channels", "block_out_channels", "dim_mult"}  # one entry per stage of the network


def stride_of(name: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels of media per raw latent along (time, rows); columns are as rows. `settings`: arguments of the class.

    ValueError for arguments that the class itself cannot compute with.
    """
    check_colours(name, settings)
    if "dim_mult" in settings:
        return _wan_stride(name, settings)
    if "spatial_compression_ratio" in settings:
        time, rows = settings["temporal_compression_ratio"], settings["spatial_compression_ratio"]
        return _power_of_two("temporal_compression_ratio", time), _power_of_two("spatial_compression_ratio", rows)
    stages = settings.get("encoder_block_out_channels") or settings["block_out_channels"]
    time = settings.get("temporal_compression_ratio", 1)
    return _power_of_two("temporal_compression_ratio", time), 2 ** (len(stages) - 1)


def _wan_stride(name: str, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Of a class that reads clips in fours, whatever its arguments: so its stride in time must be four."""
    stages, in_time = len(settings["dim_mult"]) - 1, settings["temperal_downsample"]
    if len(in_time) != stages or 2 ** sum(map(bool, in_time)) != 4:
        raise ValueError(
            f"temperal_downsample = {in_time!r:.200} must have {stages} entries, two of them true: {name} reads clips "
            "in groups of four frames"
        )
    return 4, 2**stages * int(settings.get("patch_size") or 1)


def _power_of_two(name: str, value: Any) -> int:
    """A ratio as a whole number. ValueError unless it is 1, 2, 4, ... 64."""
    if value not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"{name} = {value!r:.80} must be a power of two, from 1 to 64")
    return int(value)


def check_colours(name: str, settings: Mapping[str, Any]) -> None:
    """ValueError for a network of other pictures than those of three colours."""
    right = 3 * int(settings.get("patch_size") or 1) ** 2 if name == "AutoencoderKLWan" else 3
    for argument in ("in_channels", "out_channels", "input_channels"):
        if settings.get(argument, right) != right:
            raise ValueError(f"{argument} = {settings[argument]!r:.80} must be {right}: pictures have three colours")


def patch_of(name: str, settings: Mapping[str, Any], patch: int | None) -> int:
    """Raw latents per position along each side: `patch`, or by default that of the class.

    AutoencoderKLFlux2 normalises latents in patches, so it has no other. ValueError for another one.
    """
    if name != "AutoencoderKLFlux2":
        return patch or 1
    sides = settings.get("patch_size", (2, 2))
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and sides[0] == sides[1] and sides[0] in range(1, 9)):
        raise ValueError(f"patch_size = {sides!r:.80} must be two equal numbers from 1 to 8")
    if patch not in (None, sides[0]):
        raise ValueError(f"patch = {patch} must be {sides[0]}: {name} has its mean and deviation per such patch")
    return int(sides[0])
