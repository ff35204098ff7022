"""Upcycling: separate latent weights (TransformerConfig.latent_weights) start as copies of the text weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LATENT, TEXT = ".latent.", ".text."  # in the names of weights


def with_latent_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`saved`; where it has no latent weights, each latent weight of `own` is a copy of the text weight, if that has
    its shape. Without an expert of other sizes the network computes the same function until the copies are trained."""
    if any(LATENT in name for name in saved):
        return dict(saved)
    sources = {name: name.replace(LATENT, TEXT) for name in own if LATENT in name}
    there = {name: saved[source] for name, source in sources.items() if source in saved}
    return {**saved, **{name: value for name, value in there.items() if value.shape == own[name].shape}}
