"""Picture autoencoders: one adapter for diffusers AutoencoderKL, AutoencoderTiny and AutoencoderDC.

Their encoders name one thing differently (latent_dist, latents, latent) and scale it differently; here all give
normalised latents. Shapes: pictures (B, 3, H, W) in [-1, 1], raw latents (B, C, h, w); outside, channels last.
Does not train (train/codec/loop.py does) and downloads nothing: weights come from a directory. The network of a saved
codec is built when it is first needed: what a model must know of it is in its configuration.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.codecs.autoencoder_config import (
    AutoencoderConfig,
    checked_statistics,
    shortest_decimals,
    spatial_stride,
    statistics_of,
)
from omni.codecs.codec import CONFIG_FILE, Codec, CodecSpec, codecs, to_bytes
from omni.codecs.upstream import MODULES, diffusers_class, is_installed, whole_class
from omni.config import build, nearest, parse_json, table_of
from omni.errors import DamagedError
from omni.rng import Key
from omni.weights import load_weights, unallocated

DECODE_BATCH = 64  # pictures that are decoded in one pass
ENCODE_PIXELS = 64 * 64 * 64  # of one encoding pass on an accelerator; another number changes last bits of latents


@codecs.register("autoencoder")
class AutoencoderCodec(Codec):
    """A convolutional autoencoder as a codec.

    `precision` "bfloat16" runs the network under autocast (several times faster on CPUs with bf16 matrix
    instructions); "float32" is the default.
    """

    configuration_type: ClassVar[type[AutoencoderConfig]] = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, module: nn.Module | None = None) -> None:
        """`module`: the network; None: it is built from the configuration when it is first needed."""
        self.configuration = config
        self.precision: Literal["float32", "bfloat16"] = "float32"
        self._module: nn.Module | None = None
        self._weights: tuple[Mapping[str, Tensor], str] | None = None
        self._device = torch.device("cpu")
        if module is None and not config.is_self_contained:
            module = self.build_module(config)
        if module is not None:
            self._module = for_evaluation(module)
        settings: Any = config.model if module is None else module.config
        stride = spatial_stride(settings)
        self.spec = CodecSpec(name=config.kind, channels=self._num_channels(settings), stride=(1, stride, stride))
        mean, deviation = config.mean, config.deviation
        if not mean and not deviation:
            mean, deviation = self._default_statistics(settings)
        self.mean, self.deviation = checked_statistics(mean, deviation, self.spec.channels)

    def _num_channels(self, settings: Mapping[str, Any]) -> int:
        """Channels of a latent. A quantiser overrides this."""
        return int(settings["latent_channels"])

    def _default_statistics(self, settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, deviation) where the configuration has none. A quantiser overrides this."""
        return statistics_of(settings, self.spec.channels)

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
    def from_diffusers(cls, directory: str | Path) -> AutoencoderCodec:
        """A diffusers checkpoint directory (config.json and safetensors), by the class's own `from_pretrained`.

        ValueError if the directory is missing or is of another class. Nothing is downloaded and nothing unpickled.
        """
        path = Path(directory)
        if not (path / CONFIG_FILE).is_file():
            raise ValueError(f"{str(path)!r} holds no {CONFIG_FILE}; give a local directory of a diffusers autoencoder")
        source = str(path / CONFIG_FILE)
        name = table_of(parse_json((path / CONFIG_FILE).read_bytes(), source), source).get("_class_name")
        if name not in MODULES:
            raise ValueError(f"{str(path)!r} is of class {name!r}; known autoencoders: {', '.join(MODULES)}")
        module = whole_class(name).from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
        bad = [name for name, value in module.state_dict().items() if not torch.isfinite(value).all()]
        if bad:
            raise DamagedError(f"{str(path)!r}: {bad[0]} has values that are NaN or infinite; download it again")
        use_fused_norms(module)
        known = inspect.signature(type(module).__init__).parameters
        arguments = {name: value for name, value in module.config.items() if name in known}
        config = build({"class_name": name, "model": json.loads(json.dumps(arguments))}, AutoencoderConfig, source)
        return AutoencoderCodec(config, module)

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

    def autocast(self) -> torch.autocast:
        """bfloat16 inside, where `precision` is "bfloat16"."""
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> raw latents float32 (B, C, h, w); differentiable."""
        with self.autocast():
            return encoded_latents(self.module, pictures)

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
        """(B, C, h, w) -> normalised (B, h, w, C)."""
        return (rearrange(raw, "b c h w -> b h w c") - self.mean) / self.deviation

    def denormalised(self, latents: Tensor) -> Tensor:
        """Inverse of `normalised`."""
        return rearrange(latents * self.deviation + self.mean, "b h w c -> b c h w")

    def _encode(self, pixels: Tensor) -> Tensor:
        """In passes of one shape for each size of picture: kernels differ from shape to shape, and so do last bits."""
        here = self.mean.device  # media come from anywhere, and latents go back there
        count = pictures_per_pass(here.type, *pixels.shape[1:3])
        parts = []
        for part in pixels.split(count):
            filled = torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])])
            parts.append(self.quantise(self.encode_pictures(to_pictures(filled.to(here))))[: len(part)])
        return self.normalised(torch.cat(parts)).to(pixels.device)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = self.denormalised(latents.to(self.mean.device))
        parts = [to_pixels(self.decode_pictures(self.snap(part))) for part in raw.split(DECODE_BATCH)]
        return torch.cat(parts).to(latents.device)

    @torch.no_grad()
    def normalise_over(self, batches: Iterable[Tensor]) -> None:
        """Set mean and deviation per channel to those of these uint8 pictures (B, H, W, 3)."""
        total = torch.zeros(self.spec.channels, dtype=torch.float64)
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
        return self.configuration.model_copy(update=statistics).model_dump(mode="json")

    def weights(self) -> dict[str, Tensor]:
        """In their own dtype; in bfloat16 if that holds every float32 value exactly (what was loaded from bfloat16)."""
        kept = self.module.state_dict() if self._weights is None else self._weights[0]
        weights = {name: value.detach().cpu() for name, value in kept.items()}
        halves = {name: v.bfloat16() if v.dtype == torch.float32 else v for name, v in weights.items()}
        exact = all(torch.equal(v.to(weights[name].dtype), weights[name]) for name, v in halves.items())
        return halves if exact else weights

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        if self._module is None:
            self._weights = (tensors, source)
        else:
            load_weights(self._module, tensors, source)

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


# -------------------------------------------------------------------------------------------------- diffusers


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
    """The module in evaluation mode, channels last in memory. By torch's own `to`: diffusers' imports torch._dynamo
    first."""
    return nn.Module.to(module.eval(), device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def encoded_latents(module: Any, pictures: Tensor) -> Tensor:
    """The raw latents, float32, whatever the class calls them; the mode of a KL posterior."""
    output = module.encode(pictures)
    if "latent_dist" in output:
        return output.latent_dist.mode().float()
    return (output.latents if "latents" in output else output.latent).float()


def decoded_pictures(module: Any, latents: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), float32."""
    return module.decode(latents.contiguous(memory_format=torch.channels_last)).sample.float()


def initialise(module: nn.Module, key: Key) -> None:
    """torch's default initialisation of convolutions and linear layers, drawn by the key and the parameter's name.
    Keyed by name: renaming a layer changes its initial weights."""
    with torch.no_grad():
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
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


def pictures_per_pass(device: str, height: int, width: int) -> int:
    """Pictures of one size that are encoded together, the last pass filled up. A CPU takes one; an accelerator is only
    fast with more. Last bits of latents depend on it."""
    return 1 if device == "cpu" else max(1, ENCODE_PIXELS // (height * width))
