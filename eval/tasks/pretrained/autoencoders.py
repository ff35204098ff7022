"""Published autoencoder classes as codecs, against the classes themselves: tiny random instances, on the CPU.

Each instance is written by the class's own `save_pretrained` and read by `load_codec`. The statistics in its
configuration are those of its own latents of random pictures, as a published checkpoint's are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.experiments.imports.decoders import largest
from eval.peers import version_of
from eval.task import Context, Measure, Outcome, TaskOptions, names_of, task
from omni.codecs import AutoencoderCodec, AutoencoderConfig, load_codec
from omni.codecs.autoencoders import to_pictures
from omni.codecs.networks import build_autoencoder, decoded_pictures, encoded_latents, initialise
from omni.rng import Key

_KL = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_WAN = {"base_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True], "z_dim": 4}
_WAN_STATISTICS = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}

# Name of the instance: its class, and arguments that are as published but for the sizes.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("AutoencoderKL", {**_KL, "latent_channels": 4, "scaling_factor": 0.18215}),
    "SDXL": (
        "AutoencoderKL",
        {**_KL, "latent_channels": 4, "scaling_factor": 0.5, **_WAN_STATISTICS, "force_upcast": True},
    ),
    "SD3, FLUX": (
        "AutoencoderKL",
        {
            **_KL,
            "latent_channels": 6,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": False,
        },
    ),
    "FLUX.2": ("AutoencoderKLFlux2", {**_KL, "latent_channels": 3, "sample_size": 64}),
    "TAESD": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": [8, 8, 8],
            "decoder_block_out_channels": [8, 8, 8],
            "num_encoder_blocks": [1, 1, 1],
            "num_decoder_blocks": [1, 1, 1],
            "latent_channels": 4,
            "latent_magnitude": 2,
            "latent_shift": 0.4,
        },
    ),
    "DC-AE": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": [8, 8, 8],
            "decoder_block_out_channels": [8, 8, 8],
            "encoder_layers_per_block": [0, 1, 1],
            "decoder_layers_per_block": [0, 1, 1],
            "encoder_qkv_multiscales": [[], [], []],
            "decoder_qkv_multiscales": [[], [], []],
            "scaling_factor": 0.41407,
        },
    ),
    "DC-AE, Sana": (
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
            "decoder_block_types": ["ResBlock", "EfficientViTBlock", "EfficientViTBlock"],
            "encoder_block_out_channels": [4, 8, 8],
            "decoder_block_out_channels": [4, 8, 8],
            "encoder_layers_per_block": [1, 1, 1],
            "decoder_layers_per_block": [1, 1, 1],
            "encoder_qkv_multiscales": [[], [], [3]],
            "decoder_qkv_multiscales": [[], [], [3]],
            "scaling_factor": 0.41407,
        },
    ),
    "Wan 2.1": ("AutoencoderKLWan", {**_WAN, **_WAN_STATISTICS, "scale_factor_spatial": 4}),
    "Wan 2.2": (
        "AutoencoderKLWan",
        {
            **_WAN,
            **_WAN_STATISTICS,
            "decoder_base_dim": 8,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 8,
        },
    ),
    "Qwen-Image": ("AutoencoderKLQwenImage", {**_WAN, **_WAN_STATISTICS}),
    "CogVideoX": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": [4, 4, 4],
            "down_block_types": ["CogVideoXDownBlock3D"] * 3,
            "up_block_types": ["CogVideoXUpBlock3D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "latent_channels": 4,
            "sample_height": 32,
            "sample_width": 32,
        },
    ),
    "HunyuanVideo": (
        "AutoencoderKLHunyuanVideo",
        {
            "block_out_channels": [4, 4, 4],
            "down_block_types": ["HunyuanVideoDownBlock3D"] * 3,
            "up_block_types": ["HunyuanVideoUpBlock3D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "latent_channels": 4,
            "spatial_compression_ratio": 4,
        },
    ),
    "HunyuanVideo 1.5": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": [8, 8, 8], "layers_per_block": 1, "latent_channels": 4, "spatial_compression_ratio": 4},
    ),
}
SIDE, FRAMES = 64, 9


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    """uint8 (..., 3) of random rectangles: noise of 4 x 4 pixels, so that a network's latents differ by place."""
    *batch, rows, columns = shape
    small = (Key(seed).fold("pictures").uniform((*batch, -(-rows // 4), -(-columns // 4), 3)) * 255).byte()
    return small.repeat_interleave(4, -3).repeat_interleave(4, -2)[..., :rows, :columns, :]


def write_published(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random instance of TINY, saved as published checkpoints are, with the statistics of its own latents. Returns
    the module, in float32."""
    class_name, arguments = TINY[name]
    module: Any = build_autoencoder(AutoencoderConfig(class_name=class_name, model=arguments)).eval()  # type: ignore[arg-type]
    initialise(module, Key(seed))
    with torch.no_grad():
        raw = encoded_latents(module, to_pictures(random_pixels(8, SIDE, SIDE, seed=seed + 1)))
        _set_statistics(module, raw)
    torch.nn.Module.to(module, dtype).save_pretrained(str(folder))
    return torch.nn.Module.to(module, torch.float32)


def _set_statistics(module: Any, raw: Tensor) -> None:
    """Write the statistics of raw latents (B, C, h, w) where the class's configuration has a place for them."""
    settings = module.config
    if getattr(module, "bn", None) is not None:
        side = settings["patch_size"][0]
        packed = torch.nn.functional.pixel_unshuffle(raw, side)
        module.bn.running_mean.copy_(packed.mean((0, 2, 3)))
        module.bn.running_var.copy_(packed.var((0, 2, 3), correction=0))
    elif settings.get("latents_mean") is not None:
        factor = settings.get("scaling_factor") or 1.0
        std = raw.std((0, 2, 3), correction=0) * factor
        module.register_to_config(latents_mean=raw.mean((0, 2, 3)).tolist(), latents_std=std.tolist())
    elif settings.get("shift_factor") is not None:
        module.register_to_config(shift_factor=float(raw.mean()), scaling_factor=1 / float(raw.std(correction=0)))
    else:
        module.register_to_config(scaling_factor=1 / float(raw.std(correction=0)))


def measure(names: Sequence[str] = tuple(TINY)) -> list[dict[str, Any]]:
    """One row per named instance of TINY.

    round_trip: largest difference to the class's own decode(encode(x)), float32, pixels in [-1, 1]. mean, deviation:
    largest |mean| and |deviation - 1| of normalised latents of the pictures of the statistics, per channel where the
    class has them per channel, else of all; mean None where the class subtracts none. causal: largest difference of
    the latents of a prefix of a clip, in deviations; None for a class of pictures. tiling: see `tiling`. group_norms:
    whether the class has them; without them causal is zero, and tiling rounding alone.
    """
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            module = write_published(name, Path(folder))
            codec = load_codec(folder)
            assert isinstance(codec, AutoencoderCodec)
            worst = tiling(codec, folder)
        mean, deviation = _unit(codec)
        rows.append(
            {
                "class": f"{TINY[name][0]} ({name})",
                "stride": codec.spec.stride,
                "channels": codec.spec.channels,
                "round_trip": round_trip(codec, module),
                "mean": mean,
                "deviation": deviation,
                "causal": _prefix(codec),
                "tiling": worst,
                "group_norms": any(isinstance(layer, torch.nn.GroupNorm) for layer in module.modules()),
            }
        )
    return rows


@torch.no_grad()
def round_trip(codec: AutoencoderCodec, module: Any) -> float:
    """Largest difference to the class's own reconstruction of a picture, and of a clip where it takes one."""
    media = [to_pictures(random_pixels(1, SIDE, SIDE, seed=5))]
    if codec.family.takes_clips:
        media.append(to_pictures(random_pixels(FRAMES, SIDE // 2, SIDE, seed=6)).transpose(0, 1)[None])
    worst = 0.0
    for x in media:
        ours = codec.decode_pictures(codec.denormalised(codec.normalised(codec.encode_pictures(x))))
        worst = max(worst, float((ours - decoded_pictures(module, encoded_latents(module, x))).abs().max()))
    return worst


def _unit(codec: AutoencoderCodec) -> tuple[float | None, float]:
    latents = codec.encode(random_pixels(8, SIDE, SIDE, seed=1)).flatten(0, 2)
    each = len(set(codec.deviation.tolist())) > 1
    mean, deviation = (
        (latents.mean(0), latents.std(0, correction=0)) if each else (latents.mean(), latents.std(correction=0))
    )
    return float(mean.abs().max()) if codec.mean.any() else None, float((deviation - 1).abs().max())


def _prefix(codec: AutoencoderCodec) -> float | None:
    if not codec.family.takes_clips:
        return None
    frames = random_pixels(FRAMES, SIDE // 2, SIDE, seed=7)
    whole = codec.encode_video(frames)
    prefixes = [codec.encode_video(frames[: codec.spec.media_frames(n)]) for n in range(1, len(whole))]
    return max(float((a - b).abs().max()) for part in prefixes for a, b in zip(part, whole, strict=False))


@torch.no_grad()
def tiling(codec: AutoencoderCodec, folder: str | Path) -> float:
    """Largest difference of the latents of a picture that is computed in tiles, and of what they decode to in
    [-1, 1]. In raw latents: a picture of 16 x 32, tiles of 8 x 8, and 8 around them."""
    side = 8 * codec.spec.stride[1] // codec.patch
    tiled = load_codec(folder, tile=side, overlap=side)
    assert isinstance(tiled, AutoencoderCodec)
    pixels = random_pixels(1, 2 * side, 4 * side, seed=8)
    latents = codec.encode(pixels)
    pictures = [one.decoded(latents) for one in (codec, tiled)]
    return max(float((latents - tiled.encode(pixels)).abs().max()), float((pictures[0] - pictures[1]).abs().max()))


# ---- the task ------------------------------------------------------------------------------------------------------

ROWS = {  # row -> (column of `measure`, of the classes with group norms; None: of all)
    "round_trip": ("round_trip", None),
    "mean": ("mean", None),
    "deviation": ("deviation", None),
    "causal": ("causal", False),
    "causal_group_norms": ("causal", True),
    "tiling": ("tiling", False),
    "tiling_group_norms": ("tiling", True),
}


class AutoencoderOptions(TaskOptions):
    """instances: those of TINY that are measured."""

    instances: tuple[str, ...] = tuple(TINY)

    _known = names_of("instances", TINY)


@task("pretrained_autoencoders", AutoencoderOptions, rows=tuple(ROWS))
def pretrained_autoencoders(context: Context, options: AutoencoderOptions) -> Outcome:
    """Published autoencoder classes behind the codec, the worst of them in each row: see `measure`."""
    version, found = f"diffusers {version_of('diffusers')}", measure(options.instances)
    measures = []
    for row, (column, group_norms) in ROWS.items():
        kept = [one for one in found if one[column] is not None and group_norms in (None, one["group_norms"])]
        note = "; ".join(f"{one['class']} {one[column]:.2g}" for one in kept)
        measures.append(Measure(row, largest(one[column] for one in kept), "", f"{note}; {version}"))
    return Outcome(measures)
