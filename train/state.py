"""State of a run on disk: everything that exact resume needs, in atomically published directories.

    state/step-00000123/   model.safetensors  ema.safetensors  optimiser.safetensors  state.json  manifest.json
                           target.safetensors, where an objective has a target network (see train.target)

All tensors keep their dtype; the scalars are JSON; nothing is pickled. Noise, order and times are keyed, so no
generator state exists. A half-written directory has no manifest and is passed over; so is a damaged one, aloud.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni import checkpoint
from train.ema import Ema
from train.optim import Optimiser
from train.recipe import FREE
from train.target import Target

_STEP = re.compile(r"step-(\d{8})")
WEIGHTS, AVERAGES, OPTIMISER, SCALARS = "model.safetensors", "ema.safetensors", "optimiser.safetensors", "state.json"
TARGET = "target.safetensors"


@dataclass
class Progress:
    """Where a run is: `step` steps done, the next document `cursor` (of each of the `lanes`, where several processes
    load), wall-clock seconds over all its lives."""

    step: int = 0
    cursor: int = 0
    seconds: float = 0.0
    num_nonfinite: int = 0
    num_nonfinite_in_row: int = 0
    documents: dict[str, int] = field(default_factory=dict)
    lanes: list[int] = field(default_factory=list)

    def advance(self, cursor: int, lane: int | None) -> None:
        """One step more; the next document is `cursor`."""
        self.step += 1
        if lane is None:
            self.cursor = cursor
        else:
            self.lanes[lane] = cursor


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    ema: Ema,
    optimiser: Optimiser,
    identity: Mapping[str, Any],
    keep: int,
    target: Target | None = None,
) -> Path:
    """Publish the state as folder/step-XXXXXXXX and remove older ones until `keep` are left.

    identity: see `load`.
    """
    scalars = {"progress": asdict(progress), "ema_updates": ema.num_updates, "identity": dict(identity)}
    directory = checkpoint.publish(
        folder / f"step-{progress.step:08d}",
        {
            WEIGHTS: _weights(model),
            AVERAGES: ema.averages,
            OPTIMISER: optimiser.state_tensors(),
            SCALARS: json.dumps(scalars, sort_keys=True, indent=1),
            **({} if target is None else {TARGET: target.tensors()}),
        },
        info={"kind": "training state", "step": progress.step, "torch": torch.__version__},
        replace=True,
    )
    older = [old for step, old in saved_steps(folder) if step < progress.step]  # a later one is damaged: see `newest`
    for old in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(old, ignore_errors=True)
    return directory


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every finished-looking state, oldest first; nothing is read."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest(folder: Path, say: Callable[[str], None] = print) -> Path:
    """The newest directory whose every byte verifies. Says which it refuses; ValueError when none is left."""
    for _, directory in reversed(saved_steps(folder)):
        try:
            checkpoint.verify(directory)
        except ValueError as error:
            say(f"passing over a damaged state: {error}")
            continue
        return directory
    raise ValueError(f"{str(folder)!r} holds no intact training state; start without --resume")


def load(
    directory: Path,
    model: nn.Module,
    ema: Ema,
    optimiser: Optimiser,
    identity: Mapping[str, Any],
    target: Target | None = None,
) -> Progress:
    """Restore model, averages, optimiser and target network in place, bit for bit, and return the progress.

    Raises ValueError when `identity` (JSON of everything that decides the run: recipe, data; a part that is left out is
    not compared) differs from the saved one, naming the first key that does, or when names or shapes of tensors differ.
    """
    scalars = json.loads(checkpoint.read_bytes(directory / SCALARS))
    saved = scalars["identity"]
    if isinstance(saved.get("recipe"), dict):  # what is free now need not have been free when the state was saved
        saved["recipe"] = {"workers": 0} | {k: v for k, v in saved["recipe"].items() if k not in FREE}
    saved = {"draws": 1} | saved  # of states from before either was told
    saved = {name: part for name, part in saved.items() if name in identity}
    different = _first_difference(saved, json.loads(json.dumps(dict(identity))))
    if different:
        raise ValueError(f"{directory} was trained with another recipe or other data: {different}; use a new --out")
    _restore_weights(model, checkpoint.load_tensors(directory / WEIGHTS))
    ema.load(checkpoint.load_tensors(directory / AVERAGES), scalars["ema_updates"])
    optimiser.load_state_tensors(checkpoint.load_tensors(directory / OPTIMISER))
    if target is not None:
        target.load(checkpoint.load_tensors(directory / TARGET))
    return Progress(**scalars["progress"])


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (shared ones once) and persistent buffers."""
    persistent = model.state_dict()
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return named | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


@torch.no_grad()
def _restore_weights(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    own = _weights(model)
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        raise ValueError(f"saved weights and this model differ in {odd[0]!r} ({len(odd)} names in all)")
    for name, value in own.items():
        if value.shape != saved[name].shape:
            raise ValueError(f"saved {name!r} has shape {tuple(saved[name].shape)}, this model {tuple(value.shape)}")
        value.copy_(saved[name])


def _first_difference(saved: Any, own: Any, path: str = "") -> str:
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted(saved.keys() | own.keys(), key=lambda key: (key != "recipe", key)):  # it tells most
            found = _first_difference(saved.get(key), own.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if saved == own else f"{path} was {saved!r}, now {own!r}"
