"""Which sampler a trained model is stored with: one that reads what the recipe's objectives train."""

from __future__ import annotations

from pathlib import Path

from omni.config import load_json
from omni.model import OmniConfig
from omni.objectives import FlowObjective, Objective
from omni.samplers import SAMPLERS
from train.recipe import Recipe


def choose_sampler(recipe: Recipe, objectives: list[Objective]) -> str:
    """What config.json is to name: the recipe's `heads.sampler`, else the first sampler of the flow objective with the
    largest weight (of the first such one), else, where no objective trains the flow head, what `init_from` has.

    A sampler fits when one of the objectives trains what it reads; so does the one of `init_from`, whose training it
    read (of a saved state, which does not record one, any). ValueError for one that does not fit, in `heads` or in
    `generation`, with those that do.
    """
    flow = [objective for objective in objectives if isinstance(objective, FlowObjective)]
    before = _sampler_of(recipe.init_from)
    usual = max(flow, key=lambda objective: objective.weight).samplers[0] if flow else before
    fitting = list(dict.fromkeys(name for objective in flow for name in objective.samplers))
    named = {"heads.sampler": recipe.heads.get("sampler"), "generation.sampler": recipe.generation.get("sampler")}
    for where, name in named.items():
        if name is None:
            continue
        SAMPLERS.get(str(name))
        unknown = recipe.init_from is not None and before is None
        if flow and not unknown and name not in (*fitting, before):
            trained = ", ".join(o.name for o in recipe.objectives if o.name != "next_token")
            raise ValueError(f"{where} = {name!r} reads what {trained} does not train; use {', '.join(fitting)}")
    return str(named["heads.sampler"] or usual or OmniConfig.model_fields["sampler"].default)


def _sampler_of(directory: Path | None) -> str | None:
    """Of a model directory; None where there is none, or a saved state, which does not record it."""
    path = None if directory is None else directory / "config.json"
    return load_json(path, OmniConfig).sampler if path is not None and path.is_file() else None
