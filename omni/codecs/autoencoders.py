"""Autoencoders of diffusers as codecs: pictures, and clips with causal video autoencoders. One adapter for all classes.

What the classes differ in is data (families.py), and so is the normalisation of latents (autoencoder_config.py): here
all give normalised latents. Shapes: pictures (B, 3, H, W) in [-1, 1], raw latents (B, C, h, w); clips and their latents
have a time axis after the channels. Outside, channels last. `patch` p packs p x p raw latents into one position.
Does not train (train/codec/loop.py does) and downloads nothing: weights come from a directory. The network of a saved
codec is built when it is first needed: what a model must know of it is in its configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from omni.codecs.autoencoder_config import (
    AutoencoderConfig,
    checked_statistics,
    shortest_decimals,
    statistics_of,
    stored_table,
)
from omni.codecs.codec import Codec, CodecSpec, codecs, to_bytes
from omni.codecs.families import FAMILIES, patch_of, stride_of
from omni.codecs.networks import (
    ONE_CALL,
    build_autoencoder,
    decoded_pictures,
    encoded_latents,
    for_evaluation,
    initialise,
)
from omni.codecs.published import class_of, read_published
from omni.codecs.tiles import Grid, in_tiles
from omni.codecs.upstream import diffusers_class, is_installed
from omni.config import build
from omni.errors import DamagedError
from omni.rng import Key
from omni.weights import load_weights, unallocated

Precision = Literal["float32", "bfloat16", "float16"]
ENCODE_PIXELS = 64 * 64 * 64  # of one encoding pass on an accelerator; another number changes last bits of latents


@codecs.register("autoencoder")
class AutoencoderCodec(Codec):
    """A convolutional autoencoder as a codec.

    Latents are the mean of the posterior, or with `posterior` "sample" one sample, a function of the seed and of the
    pixels alone: a picture has the same latents whenever it is encoded.
    """

    configuration_type: ClassVar[type[AutoencoderConfig]] = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, module: nn.Module | None = None) -> None:
        """`module`: the network; None: it is built from the configuration when it is first needed."""
        self.configuration = config
        self.family = FAMILIES[config.class_name]
        self._precision: Precision = "float32"
        self._module: nn.Module | None = None
        self._weights: tuple[Mapping[str, Tensor], str] | None = None
        self._dtypes: Mapping[str, torch.dtype] = {}  # of the weights as they were stored
        self._device = torch.device("cpu")
        if module is None and not config.is_self_contained:
            module = self.build_module(config)
        if module is not None:
            self._module = for_evaluation(module)
        self._settings: Any = config.model if module is None else module.config
        time, rows = stride_of(config.class_name, self._settings)
        self.patch = patch_of(config.class_name, self._settings, config.patch)
        self.num_raw = self._num_channels(self._settings)
        self.spec = CodecSpec(
            name=config.kind,
            channels=self.num_raw * self.patch**2,
            stride=(time, rows * self.patch, rows * self.patch),
            frames_per_chunk=config.frames_per_chunk,
            causal=self.family.causal,
            single_first_frame=self.family.takes_clips,
        )
        self._grid, self._rows = _tiles(config, rows), rows
        self._set_statistics()

    def _set_statistics(self) -> None:
        """Mean and deviation of the configuration, or the default."""
        mean, deviation = self.configuration.mean, self.configuration.deviation
        if not mean and not deviation:
            mean, deviation = self._default_statistics(self._settings)
        self.mean, self.deviation = checked_statistics(mean, deviation, self.num_raw, self.spec.channels)

    def _num_channels(self, settings: Mapping[str, Any]) -> int:
        """Channels of a latent. A quantiser overrides this."""
        return int(settings[self.family.channels])

    def _default_statistics(self, settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, deviation) where the configuration has none. A quantiser overrides this."""
        if self._module is not None and isinstance(getattr(self._module, "bn", None), nn.BatchNorm2d):
            return batch_norm_statistics(self._module, self.patch)
        return statistics_of(settings, self.num_raw)

    @property
    def module(self) -> Any:
        """The network. DamagedError if the configuration builds none, or none that the weights belong to."""
        if self._module is None:
            with self.announce("the picture codec"):
                self._module = self._loaded_module()
            self._weights = None
        return self._module

    def _loaded_module(self) -> nn.Module:
        """A new network with the weights that were kept for it. DamagedError if they do not fit."""
        weights, source = self._weights or ({}, "codec")
        try:
            with unallocated():
                module = self.build_module(self.configuration)
        except ValueError as error:
            raise DamagedError(f"{source}: {error}") from None
        load_weights(module, weights, source)
        return for_evaluation(module, self._device)

    # ---------------------------------------------------------------------------------------- construction

    @classmethod
    def build_module(cls, config: AutoencoderConfig) -> nn.Module:
        """The network of a configuration, its weights unset."""
        return build_autoencoder(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        configuration = build(config, cls.configuration_type, source)
        return cls(configuration, cls.build_module(configuration))

    @classmethod
    def restored(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> Self:
        """The network is built when it is first needed; that diffusers is there to build it is checked now."""
        if not is_installed():
            diffusers_class(str(config.get("class_name")))
        codec = cls(build(config, cls.configuration_type, source))
        codec.load_weights(weights, source)
        return codec

    @classmethod
    def initialised(cls, config: Mapping[str, Any], source: str, key: Key) -> Self:
        """A codec with fresh weights, each drawn by the key and its own name."""
        codec = cls.from_config(config, source)
        initialise(codec.module, key)
        return codec

    @classmethod
    def from_diffusers(cls, directory: str | Path, **options: Any) -> AutoencoderCodec:
        """A diffusers checkpoint directory (config.json and safetensors), by the class's own `from_pretrained`.

        options: of AutoencoderConfig, such as patch = 2. The weights keep their dtypes in files, and are float32 in
        memory. ValueError if the directory is missing, is of another class or another layout. Nothing is downloaded and
        nothing unpickled.
        """
        name, source = class_of(Path(directory)), f"{directory}/config.json"
        build({"class_name": name, "model": {}, **options}, AutoencoderConfig, source)  # before the weights are read
        module, arguments, dtypes = read_published(Path(directory), name)
        config = build({"class_name": name, "model": arguments, **options}, AutoencoderConfig, source)
        codec = AutoencoderCodec(config, module)
        codec._dtypes = dtypes
        return codec

    def autoencoder(self) -> nn.Module:
        """The diffusers module."""
        return self.module

    def copy_from(self, source: AutoencoderCodec) -> None:
        """Copy weights and normalisation of a codec of the same family, or only the autoencoder of another."""
        if type(source) is type(self):
            self.module.load_state_dict(source.module.state_dict())
            self.mean, self.deviation = source.mean, source.deviation
        else:
            self.autoencoder().load_state_dict(source.autoencoder().state_dict())

    def encoder_parts(self) -> list[nn.Module]:
        """The modules that latents depend on: with these fixed, latents do not change. Training freezes them by this
        list."""
        children = self.autoencoder().named_children()
        return [part for name, part in children if name not in ("decoder", "post_quant_conv")]

    # -------------------------------------------------------------------------------------------- network

    @property
    def precision(self) -> Precision:
        """The dtype of the network's arithmetic, by autocast: weights stay as they are, norms compute in float32.
        "bfloat16" is several times faster on processors with bf16 matrix instructions. Latents are float32."""
        return self._precision

    @precision.setter
    def precision(self, name: Precision) -> None:
        if name not in get_args(Precision):
            raise ValueError(f"precision = {name!r} must be one of {', '.join(get_args(Precision))}")
        if name == "float16" and self._settings.get("force_upcast"):
            raise ValueError(
                "precision = 'float16' overflows in this autoencoder (force_upcast is true in its configuration); "
                "use 'bfloat16' or 'float32'"
            )
        self._precision = name

    def autocast(self) -> torch.autocast:
        """The dtype of `precision` inside."""
        device, half = next(self.module.parameters()).device.type, self._precision != "float32"
        return torch.autocast(device, getattr(torch, self._precision) if half else torch.bfloat16, enabled=half)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> raw latents float32 (B, C, h, w); clips have a time axis. Differentiable."""
        with self.autocast():
            return encoded_latents(self.module, pictures)

    def encode_moments(self, pictures: Tensor) -> Tensor:
        """Means and logarithms of variances of the posterior, (B, 2 C, h, w), of what `encode_pictures` takes."""
        with self.autocast():
            return encoded_latents(self.autoencoder(), pictures, moments=True)

    def quantise(self, latents: Tensor) -> Tensor:
        """Raw latents as the decoder receives them in training: here unchanged. A quantiser rounds them; gradients
        pass."""
        return latents

    def snap(self, latents: Tensor) -> Tensor:
        """Raw latents of a generative model as the decoder receives them: here unchanged. A quantiser takes the nearest
        codes."""
        return latents

    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> float32 (B, 3, H, W), about [-1, 1]; differentiable."""
        with self.autocast():
            return decoded_pictures(self.module, latents)

    def normalised(self, raw: Tensor) -> Tensor:
        """(B, C, h, w) -> normalised (B, h / p, w / p, p p C); a time axis is kept."""
        packed = rearrange(raw, "b c ... (h p) (w q) -> b ... h w (p q c)", p=self.patch, q=self.patch)
        return (packed - self._per_channel(self.mean)) / self._per_channel(self.deviation)

    def denormalised(self, latents: Tensor) -> Tensor:
        """Inverse of `normalised`."""
        packed = latents * self._per_channel(self.deviation) + self._per_channel(self.mean)
        return rearrange(packed, "b ... h w (p q c) -> b c ... (h p) (w q)", p=self.patch, q=self.patch)

    def _per_channel(self, values: Tensor) -> Tensor:
        """Values of raw channels as those of a packed position."""
        return values if len(values) == self.spec.channels else values.repeat(self.patch**2)

    def _latents(self, media: Tensor, pixels: Tensor) -> Tensor:
        """Raw latents as the decoder receives them. pixels: those of media, per entry of the batch."""
        encode = self.encode_pictures if self.configuration.posterior == "mean" else self.encode_moments
        raw = self._in_tiles(encode, media, "encoder", self._rows)
        if self.configuration.posterior == "sample":
            raw = sampled(raw, Key(self.configuration.posterior_seed), pixels)
        return self.quantise(raw)

    def decoded(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, h, w, C) or (B, t, h, w, C) -> float32 (B, 3, H, W) or (B, 3, T, H, W), about [-1, 1],
        in tiles where they are large."""
        return self._in_tiles(self.decode_pictures, self.snap(self.denormalised(latents)), "decoder", 1)

    def _in_tiles(self, compute: Callable[[Tensor], Tensor], x: Tensor, part: str, unit: int) -> Tensor:
        """compute(x) in the tiles of the configuration. part: of the network. unit: rows of x per raw latent."""
        if self._grid is None:
            return compute(x)
        whole = self.family.whole_layers
        layers = [m for m in getattr(self.autoencoder(), part).modules() if type(m).__name__ == whole]
        with ONE_CALL, self.autocast():
            return in_tiles(compute, x, self._grid, unit, layers)

    def _encode(self, pixels: Tensor) -> Tensor:
        """In passes of one shape for each size of picture: kernels differ from shape to shape, and so do last bits."""
        here = self.mean.device  # media come from anywhere, and latents go back there
        count = pictures_per_pass(here.type, *pixels.shape[1:3])
        parts = []
        for part in pixels.split(count):
            filled = torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])])
            parts.append(self._latents(to_pictures(filled.to(here)), filled)[: len(part)])
        return self.normalised(torch.cat(parts)).to(pixels.device)

    def _decode(self, latents: Tensor) -> Tensor:
        parts = latents.to(self.mean.device).split(self.configuration.decode_batch)
        return torch.cat([to_pixels(self.decoded(part)) for part in parts]).to(latents.device)

    def _encode_clip(self, frames: Tensor) -> Tensor:
        if not self.family.takes_clips:
            return super()._encode_clip(frames)
        clip = rearrange(to_pictures(frames.to(self.mean.device)), "t c h w -> 1 c t h w")
        return self.normalised(self._latents(clip, frames[None]))[0].to(frames.device)

    def _decode_clip(self, chunks: Sequence[Tensor]) -> Tensor:
        if not self.family.takes_clips:
            return super()._decode_clip(chunks)
        latents = torch.cat(list(chunks))
        num_frames = 1 + self.spec.stride[0] * (len(latents) - 1)
        if self.family.odd and len(latents) % 2 == 0:  # the frames of the repeated last latent are dropped
            latents = torch.cat([latents, latents[-1:]])
        clip = self.decoded(latents[None].to(self.mean.device))[0]
        return to_pixels(clip.transpose(0, 1)[:num_frames]).to(latents.device)

    @torch.no_grad()
    def normalise_over(self, batches: Iterable[Tensor]) -> None:
        """Set mean and deviation per channel to those of these uint8 pictures (B, H, W, 3)."""
        total = torch.zeros(self.num_raw, dtype=torch.float64)
        square, count = total.clone(), 0
        for pixels in batches:
            raw = rearrange(self.quantise(self.encode_pictures(to_pictures(pixels))).double(), "b c h w -> c (b h w)")
            total, square, count = total + raw.sum(1), square + raw.square().sum(1), count + raw.shape[1]
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        self.mean, self.deviation = mean.float(), deviation.float()

    # ---------------------------------------------------------------------------------------------- files

    def config(self) -> dict[str, Any]:
        statistics = {"mean": shortest_decimals(self.mean), "deviation": shortest_decimals(self.deviation)}
        return stored_table(self.configuration.model_copy(update=statistics))

    def weights(self) -> dict[str, Tensor]:
        """In the dtypes in which they were stored, if those hold every value exactly. Else in bfloat16 if that does, or
        in their own."""
        kept = self.module.state_dict() if self._weights is None else self._weights[0]
        weights = {name: value.detach().cpu() for name, value in kept.items()}
        stored = {name: v.to(self._dtypes.get(name, v.dtype)) for name, v in weights.items()} if self._dtypes else {}
        halves = {name: v.bfloat16() if v.dtype == torch.float32 else v for name, v in weights.items()}
        return stored if _same(stored, weights) else halves if _same(halves, weights) else weights

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._dtypes = {name: value.dtype for name, value in tensors.items()}
        if self._module is None:
            self._weights = (tensors, source)
            return
        load_weights(self._module, tensors, source)
        self._set_statistics()  # of a batch norm that is among the weights

    def to(self, device: torch.device | str) -> Self:
        self._device = torch.device(device)
        if self._module is not None:
            nn.Module.to(self._module, device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        return self


# -------------------------------------------------------------------------------------------------- pictures


def to_pictures(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return rearrange(pixels.float() / 127.5 - 1, "b h w c -> b c h w")


def to_pixels(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded and clipped. NotFiniteError for NaN and infinity."""
    return rearrange(to_bytes(pictures), "b c h w -> b h w c").contiguous()


def pictures_per_pass(device: str, height: int, width: int) -> int:
    """Pictures of one size that are encoded together, the last pass filled up. A CPU takes one; an accelerator is only
    fast with more. Last bits of latents depend on it."""
    return 1 if device == "cpu" else max(1, ENCODE_PIXELS // (height * width))


# --------------------------------------------------------------------------------------------------- latents


def sampled(moments: Tensor, key: Key, pixels: Tensor) -> Tensor:
    """One sample of each posterior, of moments (B, 2 C, ...) -> (B, C, ...); the noise is keyed by pixels (B, ...)."""
    mean, logarithm = moments.chunk(2, 1)
    names = [hashlib.blake2b(one.cpu().numpy().tobytes(), digest_size=16).hexdigest() for one in pixels]
    noise = torch.stack([key.fold("posterior", name).normal(tuple(mean.shape[1:])) for name in names])
    return mean + (logarithm.clamp(-30, 20) / 2).exp() * noise.to(mean.device)


def batch_norm_statistics(module: Any, patch: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, deviation) of packed positions by the batch norm of AutoencoderKLFlux2, as its pipeline normalises. There
    channels are in the order (raw channel, row, column); here in ours."""
    spread = (module.bn.running_var + module.config["batch_norm_eps"]).sqrt()
    ours = partial(rearrange, pattern="(c p q) -> (p q c)", p=patch, q=patch)
    return shortest_decimals(ours(module.bn.running_mean.float())), shortest_decimals(ours(spread.float()))


def _tiles(config: AutoencoderConfig, rows: int) -> Grid | None:
    """Tile and overlap in raw latents. ValueError unless both are multiples of `rows`, pixels per latent."""
    if config.tile is None:
        return None
    overlap = -(-config.tile // (4 * rows)) * rows if config.overlap is None else config.overlap
    for name, value in (("tile", config.tile), ("overlap", overlap)):
        if value % rows:
            raise ValueError(f"{name} = {value} pixels is no multiple of the autoencoder's stride {rows}")
    return Grid(config.tile // rows, overlap // rows)


def _same(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether the tensors hold exactly the values of all the others, in whatever dtype."""
    return tensors.keys() == others.keys() and all(
        torch.equal(v.to(others[n].dtype), others[n]) for n, v in tensors.items()
    )
