"""Chooses the sampler that a trained model is stored with: one whose inputs the recipe's objectives train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omni.config import load_json
from omni.model import OmniConfig
from omni.objectives import Objective
from omni.objectives.base import Trains
from omni.samplers import SAMPLERS
from train.recipe import Recipe

# The first sampler to use, by the values that an objective trains.
USUAL_SAMPLER: dict[Trains, str] = {
    "velocity": "euler",
    "grid_jumps": "flow_map",
    "jumps": "flow_map",
    "data_jumps": "restart",
}


def reads_trained_values(sampler: str, trained: Sequence[Trains]) -> bool:
    """Whether training determines the values of F that the sampler reads. "jumps" are jumps to any time."""
    reads = SAMPLERS.reads[sampler]
    return reads in trained or ("jumps" in trained and reads in ("grid_jumps", "data_jumps"))


def _usual_first(name: str) -> tuple[bool, str]:
    """Sorts the usual samplers before the others, each by name."""
    return name not in USUAL_SAMPLER.values(), name


def choose_sampler(recipe: Recipe, objectives: list[Objective]) -> str:
    """The sampler for config.json: the recipe's `heads.sampler`; else the usual sampler of the flow objective with the
    largest weight (the first of equals); else, where no objective trains the flow head, the sampler of `init_from`.

    A sampler fits where an objective trains its inputs. The sampler of `init_from` fits too; a checkpoint records none,
    and then any fits. ValueError for one in `heads` or `generation` that does not fit; the message lists those that do.
    """
    flow = [objective for objective in objectives if objective.trains]
    before = _sampler_of(recipe.init_from)
    usual = USUAL_SAMPLER[max(flow, key=lambda objective: objective.weight).trains[0]] if flow else before
    trained = list(dict.fromkeys(values for objective in flow for values in objective.trains))
    named = {"heads.sampler": recipe.heads.get("sampler"), "generation.sampler": recipe.generation.get("sampler")}
    for where, name in named.items():
        if name is None:
            continue
        SAMPLERS.get(str(name))
        unknown = recipe.init_from is not None and before is None
        if flow and not unknown and name != before and not reads_trained_values(str(name), trained):
            names = ", ".join(o.name for o in recipe.objectives if o.name != "next_token")
            known = ", ".join(
                sorted((one for one in SAMPLERS.reads if reads_trained_values(one, trained)), key=_usual_first)
            )
            raise ValueError(f"{where} = {name!r} reads what {names} does not train; use {known}")
    return str(named["heads.sampler"] or usual or OmniConfig.model_fields["sampler"].default)


def _sampler_of(directory: Path | None) -> str | None:
    """The sampler of a model directory; None where there is no directory, or for a checkpoint, which records none."""
    path = None if directory is None else directory / "config.json"
    return load_json(path, OmniConfig).sampler if path is not None and path.is_file() else None
