"""Weights that latents have of their own (TransformerConfig.latent_weights) begin as copies of those of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

LATENT, TEXT = ".latent.", ".text."  # in their names


def with_copies(saved: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """`saved`, and for every name of weights of latents, where it has none of these at all, those of text: the same
    network, until the copies are trained."""
    if any(LATENT in name for name in saved):
        return dict(saved)
    sources = {name: name.replace(LATENT, TEXT) for name in names if LATENT in name}
    return {**saved, **{name: saved[source] for name, source in sources.items() if source in saved}}
