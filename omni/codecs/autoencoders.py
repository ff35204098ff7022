"""Picture autoencoders: one adapter for diffusers AutoencoderKL, AutoencoderTiny and AutoencoderDC.

Their encoders name one thing differently (latent_dist, latents, latent) and scale it differently; here all give
normalised latents. Shapes: pictures (B, 3, H, W) in [-1, 1], raw latents (B, C, h, w); outside, channels last.
Does not train (train/codec_loop.py does) and downloads nothing: weights come from a directory.
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
from torch import Tensor, nn

from omni.codecs.codec import CONFIG_FILE, Codec, CodecSpec, codecs, to_bytes
from omni.config import Frozen, build, nearest
from omni.rng import Key

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
DECODE_BATCH = 64  # pictures that are decoded in one pass
ENCODE_PIXELS = 64 * 64 * 64  # of one encoding pass on an accelerator


class AutoencoderConfig(Frozen):
    """A diffusers class by name and its arguments. Normalised latent = (raw - mean) / deviation, per channel.

    Empty `mean` and `deviation` stand for the shift and scaling factors of the diffusers configuration.
    """

    kind: str = "autoencoder"
    class_name: Literal["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"]
    model: dict[str, Any]
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()


@codecs.register("autoencoder")
class AutoencoderCodec(Codec):
    """A convolutional autoencoder as a codec.

    `precision` "bfloat16" runs the network under autocast (several times faster on CPUs with bf16 matrix
    instructions); "float32" is the default.
    """

    configuration_type: ClassVar[type[AutoencoderConfig]] = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, module: nn.Module) -> None:
        self.configuration = config
        self.module = module.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision: Literal["float32", "bfloat16"] = "float32"
        stride = spatial_stride(module)
        self.spec = CodecSpec(name=config.kind, channels=self._num_channels(), stride=(1, stride, stride))
        mean, deviation = config.mean, config.deviation
        if not mean and not deviation:
            mean, deviation = self._default_statistics()
        if not len(mean) == len(deviation) == self.spec.channels:
            raise ValueError(
                f"mean and deviation have {len(mean)} and {len(deviation)} values for {self.spec.channels} channels; "
                "give one of each per channel, or neither"
            )
        self.mean, self.deviation = torch.tensor(mean), torch.tensor(deviation)

    def _num_channels(self) -> int:
        return int(self.module.config["latent_channels"])  # type: ignore[index]

    def _default_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel from the scaling and shift factors of the diffusers configuration."""
        config: Any = self.module.config
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        return (float(shift),) * self.spec.channels, (1.0 / float(scale),) * self.spec.channels

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
        name = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8")).get("_class_name")
        if name not in CLASSES:
            raise ValueError(f"{str(path)!r} is of class {name!r}; known autoencoders: {', '.join(CLASSES)}")
        module = diffusers_class(name).from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
        use_fused_norms(module)
        known = inspect.signature(type(module).__init__).parameters
        arguments = {name: value for name, value in module.config.items() if name in known}
        config = AutoencoderConfig(class_name=name, model=json.loads(json.dumps(arguments)))
        return AutoencoderCodec(config, module)

    def autoencoder(self) -> nn.Module:
        """The diffusers module."""
        return self.module

    def adopt(self, source: AutoencoderCodec) -> None:
        """Take the weights and normalisation of a codec of the same family, or only the autoencoder of another's."""
        if type(source) is type(self):
            self.module.load_state_dict(source.module.state_dict())
            self.mean, self.deviation = source.mean, source.deviation
        else:
            self.autoencoder().load_state_dict(source.autoencoder().state_dict())

    def encoder_parts(self) -> list[nn.Module]:
        """The modules that latents depend on: with these fixed, latents do not change."""
        children = self.autoencoder().named_children()
        return [part for name, part in children if name not in ("decoder", "post_quant_conv")]

    # -------------------------------------------------------------------------------------------- network

    def autocast(self) -> torch.autocast:
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> raw latents float32 (B, C, h, w); differentiable."""
        with self.autocast():
            return encoded_latents(self.module, pictures)

    def transmit(self, latents: Tensor) -> Tensor:
        """What the decoder receives of raw latents: here, themselves. A quantiser overrides this."""
        return latents

    def received(self, latents: Tensor) -> Tensor:
        """What the decoder is given of raw latents that a model drew: here, themselves; of a quantiser, its codes."""
        return latents

    def decode_pictures(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> float32 (B, 3, H, W), about [-1, 1]; differentiable."""
        with self.autocast():
            return decoded_pictures(self.module, latents)

    def normalised(self, raw: Tensor) -> Tensor:
        """(B, C, h, w) -> normalised (B, h, w, C)."""
        return (raw.permute(0, 2, 3, 1) - self.mean) / self.deviation

    def denormalised(self, latents: Tensor) -> Tensor:
        """Inverse of `normalised`."""
        return (latents * self.deviation + self.mean).permute(0, 3, 1, 2)

    def _encode(self, pixels: Tensor) -> Tensor:
        """In passes of one shape for each size of picture: kernels differ from shape to shape, and so do last bits."""
        here = self.mean.device  # media come from anywhere, and latents go back there
        count = pictures_per_pass(here.type, *pixels.shape[1:3])
        parts = []
        for part in pixels.split(count):
            filled = torch.cat([part, part.new_zeros(count - len(part), *part.shape[1:])])
            parts.append(self.transmit(self.encode_pictures(to_pictures(filled.to(here))))[: len(part)])
        return self.normalised(torch.cat(parts)).to(pixels.device)

    def _decode(self, latents: Tensor) -> Tensor:
        raw = self.denormalised(latents.to(self.mean.device))
        parts = [to_pixels(self.decode_pictures(self.received(part))) for part in raw.split(DECODE_BATCH)]
        return torch.cat(parts).to(latents.device)

    @torch.no_grad()
    def normalise_over(self, batches: Iterable[Tensor]) -> None:
        """Set mean and deviation per channel to those of these uint8 pictures (B, H, W, 3)."""
        total = torch.zeros(self.spec.channels, dtype=torch.float64)
        square, count = total.clone(), 0
        for pixels in batches:
            raw = self.transmit(self.encode_pictures(to_pictures(pixels))).double().transpose(0, 1).flatten(1)
            total, square, count = total + raw.sum(1), square + raw.square().sum(1), count + raw.shape[1]
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(1e-12).sqrt()
        self.mean, self.deviation = mean.float(), deviation.float()

    # ---------------------------------------------------------------------------------------------- files

    def config(self) -> dict[str, Any]:
        statistics = {"mean": _rounded(self.mean), "deviation": _rounded(self.deviation)}
        return self.configuration.model_copy(update=statistics).model_dump(mode="json")

    def weights(self) -> dict[str, Tensor]:
        return {name: value.to(torch.bfloat16) for name, value in self.module.state_dict().items()}

    def load_weights(self, tensors: Mapping[str, Tensor], source: str) -> None:
        expected = self.module.state_dict()
        wrong = sorted(expected.keys() ^ tensors.keys())
        wrong += sorted(n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape)
        if wrong:
            raise ValueError(
                f"{source}: {len(wrong)} tensors do not belong to the configuration, the first is {wrong[0]!r}; "
                "take weights and config.json from one codec"
            )
        self.module.load_state_dict(dict(tensors))

    def to(self, device: torch.device | str) -> Self:
        self.module.to(device)
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        return self


# -------------------------------------------------------------------------------------------------- pictures


def to_pictures(pixels: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return (pixels.float() / 127.5 - 1).permute(0, 3, 1, 2)


def to_pixels(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded and clipped. NotFiniteError for NaN and infinity."""
    return to_bytes(pictures).permute(0, 2, 3, 1).contiguous()


# -------------------------------------------------------------------------------------------------- diffusers


def diffusers_class(name: str) -> Any:
    """The diffusers class. ImportError names the extra that brings it."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{name} needs diffusers: pip install 'omni-flow[vae]'") from error
    return getattr(diffusers, name)


def build_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """The diffusers module of a configuration, weights unset. ValueError for an argument that its class lacks."""
    chosen = diffusers_class(config.class_name)
    known = set(inspect.signature(chosen.__init__).parameters) - {"self"}
    for name in config.model:
        if name not in known:
            raise ValueError(f"{config.class_name} has no argument {name!r}{nearest(name, known)}")
    module = chosen(**config.model)
    use_fused_norms(module)
    return module


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
    """torch's default initialisation of convolutions and linear layers, drawn by the key and the parameter's name."""
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
    weight = None if layer.weight is None else layer.weight.to(hidden.dtype)
    normed = F.rms_norm(hidden, (hidden.shape[-1],), weight, layer.eps)
    bias = getattr(layer, "bias", None)
    return normed if bias is None else normed + bias.to(hidden.dtype)


def pictures_per_pass(device: str, height: int, width: int) -> int:
    """Pictures of one size that are encoded together, the last pass filled up. A CPU takes one; an accelerator is only
    fast with more."""
    return 1 if device == "cpu" else max(1, ENCODE_PIXELS // (height * width))


def spatial_stride(module: nn.Module) -> int:
    """Pixels per latent row of a diffusers autoencoder: every stage after the first halves the picture."""
    config: Any = module.config
    stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
    return 2 ** (len(stages) - 1)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(float(v), 6) for v in values)
