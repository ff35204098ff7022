"""Upcycling: separate latent weights (TransformerConfig.latent_weights) start as copies of the text weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

LATENT, TEXT = ".latent.", ".text."  # in the names of weights


def with_latent_weights(saved: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """`saved`; where it has no latent weights, each latent weight of `names` is a copy of the text weight. The network
    computes the same function until the copies are trained."""
    if any(LATENT in name for name in saved):
        return dict(saved)
    sources = {name: name.replace(LATENT, TEXT) for name in names if LATENT in name}
    return {**saved, **{name: saved[source] for name, source in sources.items() if source in saved}}
