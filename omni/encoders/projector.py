"""The projector: features of an encoder to inputs of the context stream. Trained with the model.

Legend: F positions of features, E features of a position, W width of the model.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from omni.config import Frozen
from omni.nn.declare import EMBEDDING, Declared, of_linear


class EncoderBlockConfig(Frozen):
    """What the context holds of a picture in place of its clean latents, or beside them.

    width: features of the encoder. pictures: "features" alone, or "both", the latents' block first. Supervised pictures
    have latents to refine in either case; clips always keep their latents alone.
    projector: "linear"; "mlp", two layers with GELU (LLaVA-1.5, arXiv 2310.03744); "none" where the features have the
    model's width. activation: of the mlp. table: rows and columns of a table of positions that is added after the
    projector (BAGEL: 70); None: no table.
    """

    width: int = Field(ge=1, le=1 << 20)
    pictures: Literal["features", "both"] = "both"
    projector: Literal["linear", "mlp", "none"] = "mlp"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    table: int | None = Field(default=None, ge=1, le=1024)


class FeatureProjector(nn.Module):
    """Features (F, E) and their places in the grid -> inputs (F, W). ValueError for "none" with E other than W."""

    def __init__(self, config: EncoderBlockConfig, width: int) -> None:
        super().__init__()
        self.c = config
        if config.projector == "none" and config.width != width:
            raise ValueError(
                f'encoder.projector = "none" needs features of the model\'s width {width}, the encoder has '
                f'{config.width}; take "linear" or "mlp"'
            )
        self.first = None if config.projector == "none" else nn.Linear(config.width, width)
        self.second = nn.Linear(width, width) if config.projector == "mlp" else None
        self.table = None if config.table is None else nn.Embedding(config.table**2, width)

    def declare(self) -> dict[str, Declared]:
        found: dict[str, Declared] = {}
        for name, layer in (("first", self.first), ("second", self.second)):
            found |= {} if layer is None else of_linear(name, layer)
        return found | ({} if self.table is None else {"table.weight": EMBEDDING})

    def forward(self, features: Tensor, place: Tensor) -> Tensor:
        """features (F, E), place (F, 2) int64 (row, column) -> (F, W). ValueError for a place outside the table."""
        h = features
        if self.first is not None:
            h = self.first(h.to(self.first.weight.dtype))
        if self.second is not None:
            tanh = "tanh" if self.c.activation == "gelu_tanh" else "none"
            h = self.second(F.gelu(h, approximate=tanh))
        if self.table is None or self.c.table is None:
            return h
        if len(place) and int(place.max()) >= self.c.table:
            raise ValueError(
                f"a picture has feature row or column {int(place.max()) + 1}, and the table of positions has "
                f"{self.c.table}; give the encoder smaller sizes"
            )
        return h + self.table(place[:, 0] * self.c.table + place[:, 1]).to(h.dtype)
