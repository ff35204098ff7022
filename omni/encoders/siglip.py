"""SigLIP (arXiv 2303.15343): the vision tower of transformers' SiglipVisionModel, without its pooling head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omni.encoders.encoder import EncoderSpec, encoders
from omni.encoders.tower import Activation, Layers, Length, Tower, TowerConfig, TowerEncoder
from omni.media.preparation import EncoderSizes

Epsilon = Annotated[float, Field(gt=0, le=1e-2)]


class SiglipTower(Tower):
    hidden_size: Length
    intermediate_size: Length
    num_hidden_layers: Layers
    num_attention_heads: Length
    num_channels: Literal[3] = 3
    image_size: Length
    patch_size: Length
    hidden_act: Activation = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6


class SiglipConfig(TowerConfig):
    """select: the layer that features come from, counted from the end: -1 the last, -2 the one before. final_norm:
    whether post_layernorm follows (BAGEL: select = -2 with it; LLaVA: -2 without).

    positions, of the learned table of image_size / patch_size sides:
        fixed        every picture has the tower's own size
        interpolate  of any size; the table is interpolated to it (bicubic, as transformers does)
        corner       of any size up to the tower's own; row and column of a patch are those of the table (BAGEL)
    """

    kind: Literal["siglip"] = "siglip"
    tower: SiglipTower
    select: int = Field(default=-1, le=-1)
    final_norm: bool = True
    positions: Literal["fixed", "interpolate", "corner"] = "fixed"

    @model_validator(mode="after")
    def _is_possible(self) -> SiglipConfig:
        t = self.tower
        if -self.select > t.num_hidden_layers:
            raise ValueError(
                f"select = {self.select} of a tower of {t.num_hidden_layers} layers; give at least 1 layer"
            )
        if t.image_size % t.patch_size or t.hidden_size % t.num_attention_heads:
            raise ValueError(
                f"image_size {t.image_size} must be a multiple of patch_size {t.patch_size}, and hidden_size "
                f"{t.hidden_size} one of num_attention_heads {t.num_attention_heads}"
            )
        if self.positions == "corner" and self.max_pixels > t.image_size**2:
            raise ValueError(
                f"max_pixels = {self.max_pixels} with positions = 'corner' exceeds the table: give at most "
                f"{t.image_size} squared"
            )
        return self


@encoders.register("siglip")
class SiglipEncoder(TowerEncoder):
    """Features are hidden states of the patches, (H / patch, W / patch, hidden_size)."""

    configuration_type = SiglipConfig
    tower_type = SiglipTower
    prefixes = ("vision_model.", "model.vision_model.", "")
    parts = ("embeddings", "encoder", "post_layernorm")
    depth = "num_hidden_layers"
    without_effect = frozenset({"attention_dropout", "vision_use_head"})  # of training; of the head
    fixed_settings: ClassVar[Mapping[str, Any]] = {"vision_use_head": False}

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__(config)
        t = config.tower
        side = t.image_size // t.patch_size * t.patch_size
        bounds: dict[str, Any] = {"fixed": (side, side)}
        if config.positions != "fixed":
            bounds = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
        sizes = EncoderSizes(multiple=t.patch_size, resample=config.resample, **bounds)
        self.spec = EncoderSpec(name="siglip", width=t.hidden_size, patch=t.patch_size, sizes=sizes)

    def used(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without the layers after `select`. The table of positions may be stored as a buffer of numbers, too."""
        first_unused = self.num_layers
        left = {f"encoder.layers.{n}." for n in range(first_unused, self.configuration.tower.num_hidden_layers)}
        return {
            name: value
            for name, value in tensors.items()
            if not name.startswith(tuple(left)) and name != "embeddings.position_ids"
        }

    @property
    def num_layers(self) -> int:
        """Layers that features depend on; only these are kept."""
        return self.configuration.tower.num_hidden_layers + 1 + self.configuration.select

    def built(self, settings: Mapping[str, Any]) -> Any:
        layers = min(settings["num_hidden_layers"], self.num_layers)
        return super().built({**settings, "num_hidden_layers": layers})

    def features(self, values: Tensor) -> Tensor:
        tower = getattr(self.module, "vision_model", self.module)  # one module deeper before transformers 5
        if self.configuration.positions == "corner":
            h = tower.embeddings.patch_embedding(values).flatten(2).transpose(1, 2)
            h = h + self._corner_positions(tower.embeddings.position_embedding, *values.shape[2:])
        else:
            h = tower.embeddings(values, interpolate_pos_encoding=self.configuration.positions == "interpolate")
        h = tower.encoder(inputs_embeds=h).last_hidden_state
        return tower.post_layernorm(h) if self.configuration.final_norm else h

    def _corner_positions(self, table: Any, height: int, width: int) -> Tensor:
        """(h w, E): rows of the table at the top left. ValueError for a side longer than the tower's own."""
        t = self.configuration.tower
        side, rows, columns = t.image_size // t.patch_size, height // t.patch_size, width // t.patch_size
        if max(rows, columns) > side:
            raise ValueError(
                f"a picture of {height} x {width} pixels has {max(rows, columns)} patches along a side, the table of "
                f"positions has {side}; lower max_pixels or prepare smaller pictures"
            )
        at = torch.arange(rows)[:, None] * side + torch.arange(columns)
        return table(at.flatten().to(table.weight.device))
