"""Checkpoints of a run: everything that exact resume needs, in atomically published directories.

    state/step-00000123/   model.safetensors  ema.safetensors  optimiser.safetensors  state.json  manifest.json
                           target.safetensors, where an objective has a target network (see train.optim.target)
                           critic.safetensors, where one has a teacher and a critic (see train.optim.critic)

All tensors keep their dtype; the scalars are JSON; nothing is pickled. Noise, order and times are keyed, so no
generator state exists. A half-written directory has no manifest and is ignored. A damaged one is skipped with a
message.
"""

from __future__ import annotations

import json
import re
import reprlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni import checkpoint
from omni.config import Frozen, parse_json
from omni.errors import DamagedError
from train.data.batch import PIECES
from train.optim.critic import Critic
from train.optim.ema import Ema
from train.optim.optimiser import Optimiser
from train.optim.target import Target
from train.recipe import CHANGEABLE, Recipe, without_retired

_STEP = re.compile(r"step-(\d{8})")
# Names of files in a checkpoint: never change them.
WEIGHTS, AVERAGES, OPTIMISER, SCALARS = "model.safetensors", "ema.safetensors", "optimiser.safetensors", "state.json"
TARGET, CRITIC = "target.safetensors", "critic.safetensors"
KIND = "training state"  # in the manifest: never change it


@dataclass(frozen=True)
class Change:
    """A key of the recipe whose value differs between the checkpoint and the resume."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r}, now {self.now!r}"


@dataclass
class Progress:
    """Where a run is: `step` steps done, the next document `cursor` (with data-loading workers: one cursor of each in
    `cursors`), wall-clock seconds over all resumes. Stored as JSON by field name: a new field needs a default, a
    renamed one a line in `load`."""

    step: int = 0
    cursor: int = 0
    seconds: float = 0.0
    num_nonfinite: int = 0
    num_nonfinite_in_row: int = 0
    documents: dict[str, int] = field(default_factory=dict)
    cursors: list[int] = field(default_factory=list)

    def advance(self, cursor: int, worker: int | None) -> None:
        """Count one step; the next document is `cursor`."""
        self.step += 1
        if worker is None:
            self.cursor = cursor
        else:
            self.cursors[worker] = cursor

    def use_workers(self, number: int) -> bool:
        """Continue with another number of data-loading workers (0: none) from the first document that no worker has
        reached. No document is trained on twice; some that slower workers had not reached are left out. Returns
        whether the order of the documents changed."""
        if number == len(self.cursors) or not self.step:
            return False
        start = max(cursor % PIECES + (cursor >= PIECES) for cursor in self.cursors or [self.cursor])
        was_one = max(number, len(self.cursors)) == 1
        if was_one:  # one worker reads the same documents as none, in the same order
            start = max(self.cursors or [self.cursor])
        self.cursor, self.cursors = (0, [start + worker for worker in range(number)]) if number else (start, [])
        return not was_one


def save(
    folder: Path,
    progress: Progress,
    model: nn.Module,
    ema: Ema,
    optimiser: Optimiser,
    identity: Mapping[str, Any],
    keep: int,
    target: Target | None = None,
    critic: Critic | None = None,
) -> Path:
    """Publish a checkpoint as folder/step-XXXXXXXX and remove older ones until `keep` are left.

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
            **({} if critic is None else {CRITIC: critic.tensors()}),
        },
        info={"kind": KIND, "step": progress.step, "torch": torch.__version__},
        replace=True,
    )
    remove_older(folder, progress.step, keep)
    return directory


def remove_older(folder: Path, step: int, keep: int) -> None:
    """Remove checkpoints before `step` until `keep` are left with it. A later one is damaged: see `newest`."""
    older = [old for number, old in saved_steps(folder) if number < step]
    for old in older[: max(0, len(older) + 1 - keep)]:
        shutil.rmtree(old, ignore_errors=True)


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint by its name, oldest first; no file is read."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest(folder: Path, report: Callable[[str], None] = print, kind: str = KIND) -> Path:
    """The newest directory that passes the digest check. Prints which fail it. ValueError where there is none, or one
    of another kind of run; DamagedError where all are damaged."""
    saved = saved_steps(folder)
    for _, directory in reversed(saved):
        try:
            found = checkpoint.verify(directory)["info"].get("kind", KIND)
        except ValueError as error:
            report(f"skipping a damaged checkpoint: {error}")
            continue
        if found != kind:
            raise ValueError(f"{directory} is a {found}, not a {kind}, from another kind of run; choose another --out")
        return directory
    if saved:
        raise DamagedError(f"{str(folder)!r} holds no intact checkpoint; begin again in another --out")
    raise ValueError(f"{str(folder)!r} holds no intact checkpoint; start without --resume")


def load(
    directory: Path,
    model: nn.Module,
    ema: Ema,
    optimiser: Optimiser,
    identity: Mapping[str, Any],
    target: Target | None = None,
    critic: Critic | None = None,
) -> Progress:
    """Restore model, averages, optimiser and the networks of objectives in place, bit for bit, and return the progress.

    Raises ValueError where `identity` differs from the saved one (see `changes`), or names or shapes of tensors do.
    """
    changes(directory, identity)
    scalars = _scalars(directory)
    _restore_weights(model, checkpoint.load_tensors(directory / WEIGHTS))
    ema.load(checkpoint.load_tensors(directory / AVERAGES), scalars["ema_updates"])
    optimiser.load_state_tensors(checkpoint.load_tensors(directory / OPTIMISER))
    if target is not None:
        target.load(checkpoint.load_tensors(directory / TARGET))
    if critic is not None:
        critic.load(checkpoint.load_tensors(directory / CRITIC))
    progress = dict(scalars["progress"])
    if "lanes" in progress:  # the name that `cursors` had in earlier checkpoints
        progress["cursors"] = progress.pop("lanes")
    return Progress(**progress)


def changes(directory: Path, identity: Mapping[str, Any]) -> list[Change]:
    """The changeable keys of the recipe whose values differ between `identity` and the checkpoint.

    identity: JSON of everything that decides the run: recipe, data. A missing part is not compared, nor a key that the
    saved recipe of an earlier version lacks. Raises ValueError naming the first other difference.
    """
    saved, own = _scalars(directory)["identity"], json.loads(json.dumps(dict(identity)))
    saved = {"draws": 1} | saved  # format 1 did not record `draws`
    saved = {name: part for name, part in saved.items() if name in own}
    if isinstance(saved.get("recipe"), dict) and isinstance(own.get("recipe"), dict):
        saved["recipe"] = _with_missing_keys(without_retired(saved["recipe"]), own["recipe"])
    return compare(saved, own, CHANGEABLE, directory)


def compare(
    saved: Mapping[str, Any], own: Mapping[str, Any], changeable: Sequence[str], directory: Path
) -> list[Change]:
    """The keys of `recipe`, matching a pattern of `changeable`, whose values differ between `saved` and `own`.
    ValueError naming the first other difference."""
    found = list(_differences(saved, own))
    for key, was, now in sorted(found, key=lambda one: not one[0].startswith("recipe")):  # the recipe explains most
        name = key.removeprefix("recipe.")
        if name == key or not any(fnmatchcase(name, pattern) for pattern in changeable):
            before, here = (reprlib.repr(value) for value in (was, now))
            raise ValueError(
                f"{directory} was trained with another recipe or other data: {key} was {before}, now {here}; "
                "the saved weights or the order of the documents depend on it: use what it was, or a new --out "
                "(init_from starts from saved weights)"
            )
    return [Change(key.removeprefix("recipe."), was, now) for key, was, now in found]


def saved_recipe(directory: Path) -> Mapping[str, Any]:
    """JSON of the recipe of a checkpoint."""
    return _scalars(directory)["identity"].get("recipe", {})


def _scalars(directory: Path) -> dict[str, Any]:
    """The content of state.json: progress, number of updates, identity."""
    return parse_json(checkpoint.read_bytes(directory / SCALARS), str(directory / SCALARS))


def _with_missing_keys(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The saved recipe, with the own value of each key that it lacks; tables of free keys are left as they are."""
    filled = {**own, **saved}
    for name, info in Recipe.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Frozen) and isinstance(saved.get(name), dict):
            filled[name] = {**(own.get(name) or {}), **saved[name]}
    return filled


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters (shared ones once) and persistent buffers."""
    persistent = model.state_dict()
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return named | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


@torch.no_grad()
def _restore_weights(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Copy saved weights and buffers into the model. ValueError where names or shapes differ."""
    own = _weights(model)
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        raise ValueError(f"saved weights and this model differ in {odd[0]!r} ({len(odd)} names in all)")
    for name, value in own.items():
        if value.shape != saved[name].shape:
            raise ValueError(f"saved {name!r} has shape {tuple(saved[name].shape)}, this model {tuple(value.shape)}")
        value.copy_(saved[name])


def _differences(saved: Any, own: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, own value) of all that differ."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted(saved.keys() | own.keys()):
            yield from _differences(saved.get(key), own.get(key), f"{path}.{key}" if path else key)
    elif saved != own:
        yield path, saved, own
