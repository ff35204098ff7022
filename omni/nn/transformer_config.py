"""Settings of the transformer: the layer, the number of layers, and the weights of each class of positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from omni.config import Frozen
from omni.nn.attention.backends import Backend
from omni.nn.layer import LayerSpec, refuse_unserved
from omni.nn.lora import LoraSpec


class ExpertSpec(Frozen):
    """Sizes of the latents' own weights where they differ from the text's. width: of their residual stream; None: the
    text's. mlp_width: None: by the rule of LayerSpec, of this width. layers: which layers of the transformer the refine
    stream passes through, ascending; None: all. Heads and their width are the text's: keys of both are compared."""

    width: int | None = Field(default=None, ge=1, le=1 << 16)
    mlp_width: int | None = Field(default=None, ge=1, le=1 << 18)
    layers: tuple[int, ...] | None = None


WEIGHTS_SERVED: dict[str, tuple[Any, ...]] = {
    "block_positions": ("grid",),
    "block_markers": (False,),
    "clean_frames": (False,),
    "guidance_positions": ("own",),
}


class TransformerConfig(LayerSpec):
    """The layer, the number of layers, and the weights of each class of positions.

    latent_weights: see the module docstring. expert: sizes of the latents' own weights in the refine stream.
    window_layers: the layers that have the window (Gemma 2 and 3: some are without); None: all. window_rope_base: the
    rotary base of these layers, without scaling (Gemma 3); None: that of the others.
    loras: low-rank adapters of the text weights (nn.lora); a request or a training run uses one of them, or none.
    block_positions: the rotary coordinates of a block's latents: a "grid", or "one" for all of them (BAGEL).
    block_markers: text ids inside a refined block use the text weights (BAGEL). clean_frames: some latents of a block
    stay clean while the others are refined (Cosmos 3). guidance_positions: a guidance branch counts positions in its
    "own" history, or in the "full" one.
    `attention`: see nn.attention.backends. `tangents`: the derivative of F: "forward" mode with explicit softmax, or
    with "streamed" or "triton" attention (memory linear in the length, nn.attention.jvp), or "central" differences (any
    backend) of step `tangent_step` (nn.tangent). Neither changes the weights.
    """

    depth: int = Field(default=8, ge=1, le=1024)
    latent_weights: Literal["shared", "separate", "refine"] = "shared"
    expert: ExpertSpec | None = None
    window_layers: tuple[int, ...] | None = None
    window_rope_base: float | None = Field(default=None, gt=1, le=1e12)
    loras: tuple[LoraSpec, ...] = ()
    block_positions: Literal["grid", "one"] = "grid"
    block_markers: bool = False
    clean_frames: bool = False
    guidance_positions: Literal["own", "full"] = "own"
    attention: Backend | None = None
    tangents: Literal["forward", "streamed", "triton", "central"] = "forward"
    tangent_step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _weights_are_served(self) -> TransformerConfig:
        refuse_unserved(self, WEIGHTS_SERVED)
        return self

    @model_validator(mode="after")
    def _expert_fits(self) -> TransformerConfig:
        expert = self.expert
        if expert is None:
            return self
        if self.latent_weights != "refine":
            raise ValueError(
                f"expert has no effect with latent_weights = {self.latent_weights!r}: finished blocks would have no "
                "weights of another width; take latent_weights = 'refine', or leave expert out"
            )
        layers = expert.layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers)) or layers[-1] >= self.depth):
            raise ValueError(f"expert.layers = {list(layers)}: give layers of 0 to {self.depth - 1}, ascending")
        return self

    @model_validator(mode="after")
    def _window_has_effect(self) -> TransformerConfig:
        for name in ("window_layers", "window_rope_base"):
            if getattr(self, name) is not None and self.window is None:
                raise ValueError(f"{name} has no effect without window; leave it out, or set window")
        if wrong := [n for n in self.window_layers or () if not 0 <= n < self.depth]:
            raise ValueError(f"window_layers names layer {wrong[0]}; give layers of 0 to {self.depth - 1}")
        if self.tangents in ("streamed", "triton") and (self.window or self.attention_cap):
            name = "window" if self.window else "attention_cap"
            raise ValueError(
                f"tangents = {self.tangents!r} is not implemented for layers with {name}; take 'forward' or 'central'"
            )
        return self

    @model_validator(mode="after")
    def _loras_have_names(self) -> TransformerConfig:
        names = [spec.name for spec in self.loras]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two LoRAs are called {twice[0]!r}; rename one")
        return self

    def window_of(self, index: int) -> int | None:
        """The window of a layer."""
        return self.window if self.window_layers is None or index in self.window_layers else None

    @property
    def refining(self) -> Sequence[int]:
        """The layers that the refine stream passes through."""
        return range(self.depth) if self.expert is None or self.expert.layers is None else self.expert.layers

    @property
    def refine_spec(self) -> LayerSpec:
        """The layer of the refine stream."""
        own = {name: getattr(self, name) for name in LayerSpec.model_fields}
        if self.expert is not None and self.expert.width is not None:
            own |= {"width": self.expert.width, "mlp_width": None}
        if self.expert is not None and self.expert.mlp_width is not None:
            own |= {"mlp_width": self.expert.mlp_width}
        return LayerSpec.model_construct(**own)

    @model_validator(mode="after")
    def _tangent_step_has_effect(self) -> TransformerConfig:
        if self.tangent_step is not None and self.tangents != "central":
            raise ValueError(
                f"tangent_step = {self.tangent_step} has no effect with tangents = {self.tangents!r}; leave it out, or "
                "take tangents = 'central'"
            )
        return self
