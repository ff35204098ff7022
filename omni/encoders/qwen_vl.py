"""The vision towers of Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (2511.21631), by transformers' classes.

A picture is patches of `temporal_patch_size` equal frames, in the order of the merger: positions of features row by
row, and the merge x merge patches of each together. Features are what the merger makes of them.

Legend: p pixels of a patch, m patches merged along a side, h, w rows and columns of features, F frames of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor

from omni.encoders.encoder import EncoderSpec, encoders
from omni.encoders.tower import Activation, Layers, Length, Tower, TowerConfig, TowerEncoder
from omni.media.preparation import EncoderSizes

Frames = Annotated[int, Field(ge=1, le=16)]
Merge = Annotated[int, Field(ge=1, le=16)]
Indices = Annotated[tuple[Annotated[int, Field(ge=0, le=255)], ...], Field(max_length=256)]
ROPE = {"rope_type": "axial", "rope_theta": 10000.0}  # the only rotary scheme of the towers


class QwenTower(Tower):
    depth: Layers
    hidden_size: Length
    hidden_act: Activation
    intermediate_size: Length
    num_heads: Length
    in_channels: Literal[3] = 3
    patch_size: Length
    spatial_merge_size: Merge = 2
    temporal_patch_size: Frames = 2
    out_hidden_size: Length

    @model_validator(mode="after")
    def _has_heads(self) -> QwenTower:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 times num_heads {self.num_heads}: heads have "
                "rotary pairs of rows and columns"
            )
        return self


class Qwen2Tower(QwenTower):
    """Of Qwen2.5-VL. window_size: pixels of the windows of all layers but those in fullatt_block_indexes."""

    hidden_act: Activation = "silu"
    window_size: Length = 112
    fullatt_block_indexes: Indices = (7, 15, 23, 31)

    @model_validator(mode="after")
    def _has_windows(self) -> Qwen2Tower:
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise ValueError(f"window_size = {self.window_size} is smaller than one position of features")
        return self


class Qwen3Tower(QwenTower):
    """Of Qwen3-VL. num_position_embeddings: of a square table, interpolated to the picture."""

    hidden_act: Activation = "gelu_pytorch_tanh"
    num_position_embeddings: Annotated[int, Field(ge=1, le=1 << 20)] = 2304
    deepstack_visual_indexes: Indices = (8, 16, 24)

    @model_validator(mode="after")
    def _layers_exist(self) -> Qwen3Tower:
        beyond = [n for n in self.deepstack_visual_indexes if n >= self.depth]
        if beyond or len(set(self.deepstack_visual_indexes)) < len(self.deepstack_visual_indexes):
            raise ValueError(
                f"deepstack_visual_indexes = {list(self.deepstack_visual_indexes)} must name different layers of "
                f"{self.depth}"
            )
        return self


class Qwen2VLConfig(TowerConfig):
    kind: Literal["qwen2_5_vl"] = "qwen2_5_vl"
    tower: Qwen2Tower


class Qwen3VLConfig(TowerConfig):
    """deepstack: "leave" takes the main merger's features alone; "concatenate" puts those of the layers in
    deepstack_visual_indexes behind them, along the features: the projector reads all of them. (Qwen3-VL itself adds
    them to the hidden states of its first decoder layers, which this model has no place for.)"""

    kind: Literal["qwen3_vl"] = "qwen3_vl"
    tower: Qwen3Tower
    deepstack: Literal["leave", "concatenate"] = "leave"


class QwenEncoder(TowerEncoder):
    """What both towers share."""

    prefixes = ("model.visual.", "visual.", "")
    depth = "depth"
    without_effect = frozenset({"tokens_per_second", "initializer_range", "rope_parameters"})  # of clips; of training

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        t = config.tower
        step = t.patch_size * t.spatial_merge_size
        sizes = EncoderSizes(
            multiple=step, min_pixels=config.min_pixels, max_pixels=config.max_pixels, resample=config.resample
        )
        self.spec = EncoderSpec(
            name=config.kind, width=self._width(config), patch=t.patch_size, merge=t.spatial_merge_size, sizes=sizes
        )

    def _width(self, config: Any) -> int:
        return config.tower.out_hidden_size

    @classmethod
    def check_settings(cls, given: Mapping[str, Any], source: str) -> None:
        rope = given.get("rope_parameters")
        if rope is not None and {**ROPE, **rope} != ROPE:
            raise ValueError(f"{source}: rope_parameters = {rope} of the tower are not served; known: {ROPE}")

    def features(self, values: Tensor) -> Tensor:
        t = self.configuration.tower
        p, m = t.patch_size, t.spatial_merge_size
        patches = rearrange(values[0], "c (h i p) (w j q) -> (h w i j) c p q", i=m, j=m, p=p, q=p)
        patches = patches[:, :, None].expand(-1, -1, t.temporal_patch_size, -1, -1).flatten(1)
        grid = torch.tensor([[1, values.shape[2] // p, values.shape[3] // p]], device=values.device)
        return self.of_output(self.module(patches, grid_thw=grid))

    def of_output(self, output: Any) -> Tensor:
        """The rows of features, of what the tower returns."""
        return getattr(output, "pooler_output", output)  # the tower returned them alone before transformers 5


@encoders.register("qwen2_5_vl")
class Qwen2VLEncoder(QwenEncoder):
    """Qwen2.5-VL: (H / 28, W / 28, out_hidden_size) at the published sizes."""

    configuration_type = Qwen2VLConfig
    tower_type = Qwen2Tower
    parts = ("patch_embed", "blocks", "merger")
    fixed_settings: ClassVar[Mapping[str, Any]] = {}


@encoders.register("qwen3_vl")
class Qwen3VLEncoder(QwenEncoder):
    """Qwen3-VL: (H / 32, W / 32, out_hidden_size) at the published sizes; wider with deepstack = "concatenate"."""

    configuration_type = Qwen3VLConfig
    tower_type = Qwen3Tower
    parts = ("patch_embed", "blocks", "merger", "pos_embed", "deepstack_merger_list")

    def _width(self, config: Qwen3VLConfig) -> int:
        more = len(config.tower.deepstack_visual_indexes) if config.deepstack == "concatenate" else 0
        return config.tower.out_hidden_size * (1 + more)

    def shallow(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**settings, "depth": 1, "deepstack_visual_indexes": []}

    def of_output(self, output: Any) -> Tensor:
        main, deep = (output.pooler_output, output.deepstack_features) if hasattr(output, "pooler_output") else output
        return torch.cat([main, *deep], -1) if self.configuration.deepstack == "concatenate" else main
