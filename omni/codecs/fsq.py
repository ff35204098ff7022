"""Finite scalar quantisation (arXiv 2309.15505) and the autoencoder codec around it.

Every latent channel is squashed and rounded to a fixed number of levels, so a position is one token out of the
product of the levels; gradients pass the rounding unchanged. The codec is an autoencoder of `autoencoders.py` with a
linear map before the quantiser and one after it: the same positions as without it, so the price of discrete tokens
can be read off. Shapes: (B, L, h, w) inside, L = number of levels' entries; latents outside are channels last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from omni.codecs.autoencoder_config import AutoencoderConfig
from omni.codecs.autoencoders import AutoencoderCodec
from omni.codecs.codec import codecs
from omni.codecs.families import FAMILIES
from omni.codecs.networks import build_autoencoder, decoded_pictures, encoded_latents


class FiniteScalarQuantiser:
    """Quantises channel i (dimension 1) to levels[i] values in [-1, 1]; `tokens` numbers their combinations."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        if not levels or min(levels) < 2:
            raise ValueError(f"levels must be two or more each, got {levels}")
        self.levels = levels
        self.num_codes = math.prod(levels)

    def _column(self, values: list[float], like: Tensor) -> Tensor:
        """One value per channel, broadcast over (B, L, ...), in the dtype and on the device of `like`."""
        return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, *[1] * (like.ndim - 2))

    def quantise(self, raw: Tensor) -> Tensor:
        """Unbounded (B, L, ...) -> codes in [-1, 1]; the gradient is that of the squashing alone."""
        reach = self._column([(n - 1) * 1.001 / 2 for n in self.levels], raw)
        offset = self._column([0.5 if n % 2 == 0 else 0.0 for n in self.levels], raw)
        bounded = (raw + torch.atanh(offset / reach)).tanh() * reach - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._column([n // 2 for n in self.levels], raw)

    def snap(self, codes: Tensor) -> Tensor:
        """The nearest codes of arbitrary numbers (B, L, ...): what a generator drew need not be exact."""
        half = self._column([n // 2 for n in self.levels], codes)
        top = self._column([(n - 1) // 2 for n in self.levels], codes)
        return (codes * half).round().clamp(-half, top) / half

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes (B, L, ...) -> int64 (B, ...) in [0, num_codes), the first channel the fastest. Stored tokens: never
        reorder."""
        half = self._column([n // 2 for n in self.levels], codes)
        places = self._column([math.prod(self.levels[:i]) for i in range(len(self.levels))], codes).long()
        return ((codes * half + half).round().long() * places).sum(1)

    def codes(self, tokens: Tensor) -> Tensor:
        """Inverse of `tokens`. ValueError for a token out of range."""
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.num_codes:
            raise ValueError(f"FSQ tokens must lie in 0 .. {self.num_codes - 1}, got up to {int(tokens.max())}")
        digits, rest = [], tokens
        for n in self.levels:
            digits.append(((rest % n) - n // 2) / (n // 2))
            rest = rest // n
        return torch.stack(digits, dim=1).float()


class FsqConfig(AutoencoderConfig):
    """An autoencoder and the number of levels per quantised channel: (8, 8, 8, 5, 5, 5) gives 64,000 tokens."""

    kind: str = "fsq"
    levels: tuple[Annotated[int, Field(ge=2, le=1 << 16)], ...] = Field(
        default=(8, 8, 8, 5, 5, 5), min_length=1, max_length=64
    )

    @field_validator("levels")
    @classmethod
    def _tokens_are_int64(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(levels) > 1 << 62:
            raise ValueError(f"{levels} give more than 2^62 tokens; use fewer or smaller levels")
        return levels

    @model_validator(mode="after")
    def _is_quantised(self) -> FsqConfig:
        """ValueError for what the quantiser does not serve: clips, packed positions, a posterior's sample."""
        if FAMILIES[self.class_name].takes_clips:
            raise ValueError(f"class_name = {self.class_name!r}: only autoencoders of pictures are quantised")
        if self.patch is not None or self.class_name == "AutoencoderKLFlux2" or self.posterior != "mean":
            raise ValueError("a quantised autoencoder has one position per latent, of the mean: no patch, no sample")
        return self


class QuantisedAutoencoder(nn.Module):
    """A diffusers autoencoder and the two linear maps around the quantiser."""

    def __init__(self, autoencoder: Any, num_levels: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.config = autoencoder.config
        channels = int(self.config["latent_channels"])
        self.down = nn.Conv2d(channels, num_levels, 1)
        self.up = nn.Conv2d(num_levels, channels, 1)


@codecs.register("fsq")
class FsqCodec(AutoencoderCodec):
    """`encode` gives normalised codes (exactly the allowed values), `decode` snaps to the nearest codes first."""

    configuration_type = FsqConfig
    configuration: FsqConfig

    def __init__(self, config: FsqConfig, module: QuantisedAutoencoder | None = None) -> None:
        self.quantiser = FiniteScalarQuantiser(config.levels)
        super().__init__(config, module)

    @classmethod
    def build_module(cls, config: AutoencoderConfig) -> nn.Module:
        assert isinstance(config, FsqConfig)
        return QuantisedAutoencoder(build_autoencoder(config), len(config.levels))

    def _default_statistics(self, settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.0,) * self.spec.channels, (1.0,) * self.spec.channels

    def _num_channels(self, settings: Mapping[str, Any]) -> int:
        return len(self.configuration.levels)

    def autoencoder(self) -> nn.Module:
        return self.module.autoencoder

    def encoder_parts(self) -> list[nn.Module]:
        return [*super().encoder_parts(), self.module.down]

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L, h, w), unbounded, before the quantiser."""
        with self.autocast():
            return self.module.down(encoded_latents(self.module.autoencoder, pictures)).float()

    def quantise(self, latents: Tensor) -> Tensor:
        return self.quantiser.quantise(latents)

    def decode_pictures(self, latents: Tensor) -> Tensor:
        with self.autocast():
            return decoded_pictures(self.module.autoencoder, self.module.up(latents))

    def tokens(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, h, w, L) -> int64 tokens (B, h, w)."""
        return self.quantiser.tokens(self.quantiser.snap(self.denormalised(latents)))

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Inverse of `tokens`: normalised latents."""
        return self.normalised(self.quantiser.codes(tokens))

    def snap(self, latents: Tensor) -> Tensor:
        return self.quantiser.snap(latents)
