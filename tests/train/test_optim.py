"""Muon against torch's, and the choice of precision."""

from __future__ import annotations

import pytest
import torch

from omni.config import build, load_toml
from omni.nn.precision import fast_bf16
from omni.rng import Key
from train import runs
from train.optim.muon import Muon, orthogonalise
from train.optim.optimiser import OptimiserConfig
from train.recipe import Recipe


def matrices(*parts: str) -> list[torch.Tensor]:
    return [Key(0).fold(*parts, n).normal(shape) for n, shape in enumerate([(64, 48), (64, 48), (24, 96)])]


def test_muon_computes_the_updates_of_torch_muon() -> None:
    """Four steps of both; torch iterates in bfloat16, so they agree to three digits, and in bfloat16 more closely."""
    for dtype, tolerance in ((torch.float32, 2e-2), (torch.bfloat16, 6e-3)):
        start = matrices("weights")
        ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
        a = Muon(ours, lr=1e-2, weight_decay=0.01, momentum=0.95, dtype=dtype)
        b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for step in range(4):
            for x, y, gradient in zip(ours, theirs, matrices("gradients", str(step)), strict=True):
                x.grad, y.grad = gradient.clone(), gradient.clone()
            a.step()
            b.step()
        for x, y, w in zip(ours, theirs, start, strict=True):
            assert float((x - y).detach().norm() / (y - w).detach().norm()) < tolerance


def test_orthogonalise_flattens_the_spectrum_and_keeps_the_directions() -> None:
    stack = torch.stack(matrices("any")[:2])
    for given in (stack, stack.mT):
        found = orthogonalise(given)
        assert found.shape == given.shape
        values = torch.linalg.svdvals(found)
        assert float(values.min()) > 0.6 and float(values.max()) < 1.25
        u, _, vt = torch.linalg.svd(given, full_matrices=False)
        inside = u.mT @ found @ vt.mT
        assert float((inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max()) < 1e-4
    assert torch.equal(orthogonalise(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_muon_raises_for_other_shapes_than_matrices() -> None:
    with pytest.raises(ValueError, match=r"Muon takes matrices only, got a parameter of shape \(3,\)"):
        Muon([torch.zeros(3, requires_grad=True)], lr=0.1)


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_follows_the_device(recipe_file, monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:  # noqa: ANN001
    monkeypatch.setattr("train.recipe.fast_bf16", lambda device: fast)
    monkeypatch.setattr(runs, "fast_bf16", lambda device: fast)

    def recipe(*overrides: str) -> Recipe:
        return load_toml(recipe_file, overrides, Recipe)

    assert recipe().autocasts is fast
    assert recipe("autocast=bf16").autocasts and not recipe("autocast=none").autocasts
    output = runs._precision(recipe("autocast=bf16"))
    assert ("far faster" in output) is not fast
    assert runs._precision(recipe("autocast=none")) == "float32 on cpu"
    assert isinstance(fast_bf16("cpu"), bool)


def test_an_optimiser_takes_its_defaults_and_refuses_what_has_no_effect() -> None:
    """Saved recipes have every default: only other values are refused."""
    for name in ("muon", "adamw"):
        for decay in ("linear", "cosine", "wsd", "none"):
            saved = OptimiserConfig(name=name, decay=decay).model_dump()  # type: ignore[arg-type]
            assert build(saved, OptimiserConfig, "saved").name == name
    assert OptimiserConfig(decay="wsd", decay_fraction=0.5, muon_rate=0.1, momentum=0.9).decay_fraction == 0.5
