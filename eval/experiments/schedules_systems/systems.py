"""Published orders of generation at equal parameters and training budget, on clips of moving emoji.

    schedules_systems   the systems of a table (eval/suites/schedules_systems.toml), each a recipe of
                        train/recipes/examples/schedules, with several seeds

Report rows, means over seeds. S is a number of steps:

    NAME_loss              the flow objective on held-out clips, without adaptive weights. Each system has its own times
                           and context: compare a loss only with the first that was measured, NAME_loss_start
    NAME_energy_S          energy distance between samples and all clips (clips.energy_distance); 0 is the data
    NAME_energy_S_spread   its standard deviation over seeds
    NAME_coherent_S        percentage of samples whose frames are all of one clip (clips.coherent)
    NAME_passes_S          refine passes of one clip
    NAME_seconds_S         the time of one clip alone
    NAME_parameters        numbers in the weights
    NAME_training          processor seconds of training
    NAME_fall_A_S          energy after the most steps over that after A steps; above 1: more steps are worse

`data_energy` is the distance of clips sampled from the data themselves, `mean_energy` that of their mean,
`independent_energy` that of clips whose frames are each from another clip; `independent_coherent` likewise. Training
runs stay in the folder `keep`: one that has ended is not repeated.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator

import omni
from eval.experiments.schedules_systems.clips import (
    ClipData,
    Sampled,
    clip_data,
    coherent,
    energy_distance,
    flat,
    mean_and_spread,
    measured,
    shuffled_blocks,
)  # fmt: skip
from eval.plots import log_charts
from eval.task import Context, Curve, Measure, Outcome, Panel, TaskOptions, task
from omni.config import Frozen, load_json, nearest
from omni.generation.options import check_defaults
from omni.rng import Key
from train.charts import require_matplotlib
from train.metrics import read_metrics
from train.recipe import Recipe, load_recipe
from train.runs import train_model

if TYPE_CHECKING:
    from PIL import Image

RECIPES = Path(__file__).parents[3] / "train" / "recipes" / "examples" / "schedules"


class System(Frozen):
    """One line of the comparison. recipe: the name of a file in train/recipes/examples/schedules. weights_of: the
    system whose weights it samples with, in place of training. generation: options, beside the recipe's. steps: numbers
    of steps, fewest first. delay_of_steps: delay = steps times this, for orders whose delay grows with the steps."""

    recipe: str = ""
    weights_of: str | None = None
    generation: dict[str, Any] = Field(default_factory=dict)
    steps: tuple[int, ...] = Field(default=(8,), min_length=1)
    delay_of_steps: float | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> System:
        if bool(self.recipe) == (self.weights_of is not None):
            raise ValueError("give a recipe, or weights_of another system")
        check_defaults(self.generation, "generation")
        return self

    def options(self, steps: int) -> dict[str, Any]:
        """The options of a request."""
        delay = {} if self.delay_of_steps is None else {"delay": self.delay_of_steps * steps}
        return {**self.generation, **delay, "steps": steps}


class SystemsOptions(TaskOptions):
    """systems: the table, by name; only: names of those to run, none is all. changes: key=value for every recipe.
    samples: clips for each number of steps. repeats: of each time. keep: folder of the training runs. folder: of the
    output picture."""

    systems: dict[str, System] = Field(default_factory=dict)
    only: tuple[str, ...] = ()
    seeds: int = Field(default=3, ge=1)
    changes: tuple[str, ...] = ()
    samples: int = Field(default=192, ge=2)
    repeats: int = Field(default=5, ge=1)
    keep: str = "runs/eval/schedules_systems"
    folder: str = "runs/eval"

    @model_validator(mode="before")
    @classmethod
    def _bars_of_chosen(cls, data: Any) -> Any:
        """With `only`, bars of other systems do not count. A row is of the longest name that it begins with."""
        if not isinstance(data, dict) or not data.get("only") or not isinstance(data.get("bars"), Mapping):
            return data
        names = sorted(data.get("systems", {}), key=len, reverse=True)
        owner = {row: next((name for name in names if row.startswith(f"{name}_")), None) for row in data["bars"]}
        kept = {row: bar for row, bar in data["bars"].items() if owner[row] is None or owner[row] in data["only"]}
        return {**data, "bars": kept}

    @model_validator(mode="after")
    def _check(self) -> SystemsOptions:
        links = [system.weights_of for system in self.systems.values() if system.weights_of]
        for name in (*self.only, *links):
            if name not in self.systems:
                raise ValueError(f"there is no system {name!r}{nearest(name, self.systems)}")
        return self

    @property
    def chosen(self) -> dict[str, System]:
        """The systems to run, by name."""
        return {name: one for name, one in self.systems.items() if not self.only or name in self.only}

    def recipe_of(self, name: str, seed: int = 0) -> Recipe:
        """The recipe that trains the weights of a system."""
        system = self.systems[name]
        path = RECIPES / f"{self.systems[system.weights_of].recipe if system.weights_of else system.recipe}.toml"
        return load_recipe(path, [f"seed={seed}", *self.changes])


OF_CLIPS = ("data_energy", "mean_energy", "independent_energy", "independent_coherent")
OF_WEIGHTS = ("loss", "loss_start", "parameters", "training")
OF_STEPS = ("energy", "coherent", "passes", "seconds")


def systems_rows(options: SystemsOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    rows: list[str] = [*OF_CLIPS]
    for name, system in options.chosen.items():
        rows += [f"{name}_{what}" for what in OF_WEIGHTS if system.weights_of is None]
        rows += [f"{name}_{what}_{steps}" for steps in system.steps for what in OF_STEPS]
        rows += [f"{name}_energy_{steps}_spread" for steps in system.steps]
        rows += [f"{name}_fall_{steps}_{system.steps[-1]}" for steps in system.steps[:-1]]
    return rows


@dataclass(frozen=True, eq=False)
class Trained:
    """A model of one seed. losses: on held-out clips, from the first to the last time they were measured."""

    model: omni.Omni
    losses: Sequence[float]
    seconds: float


@dataclass(frozen=True, eq=False)
class Result:
    """A system of one seed: its samples by number of steps."""

    trained: Trained
    sampled: Mapping[int, Sampled]
    energy: Mapping[int, float] = field(default_factory=dict)
    coherent: Mapping[int, float] = field(default_factory=dict)


@task("schedules_systems", SystemsOptions, rows=systems_rows)
def schedules_systems(context: Context, options: SystemsOptions) -> Outcome:
    """Orders of generation at one budget: held-out loss, quality, passes, seconds."""
    require_matplotlib()
    if not options.chosen:
        raise ValueError("schedules_systems needs a table of systems; run eval/suites/schedules_systems.toml")
    data = clip_data(options.recipe_of(next(iter(options.chosen))))
    results: dict[str, list[Result]] = {name: [] for name in options.chosen}
    for seed in range(options.seeds):
        trained: dict[str, Trained] = {}
        for name, system in options.chosen.items():
            source = system.weights_of or name
            if source not in trained:
                trained[source] = train_once(options, source, seed)
            found = sample_system(trained[source], system, data, options)
            results[name].append(found)
            context.report(f"  seed {seed} {name}  " + "  ".join(f"{n}: {e:.3f}" for n, e in found.energy.items()))
    measures = [*of_data(data, options.samples, context.key("schedules_systems"))]
    for name, system in options.chosen.items():
        measures += of_system(name, system, results[name])
    recipe = options.recipe_of(next(iter(options.chosen)))
    notes = [
        f"{options.seeds} seeds; {recipe.max_steps} training steps each; {options.samples} samples for each number of "
        f"steps, compared with {len(data.frames)} clips, held-out ones too"
    ]
    return Outcome(measures, panels(results, data), curves(results, options), notes)


# ---- running ---------------------------------------------------------------------------------------------------------


def train_once(options: SystemsOptions, name: str, seed: int) -> Trained:
    """The weights of a system, trained in `keep` unless they are there. ValueError for those of another recipe."""
    recipe, out = options.recipe_of(name, seed), Path(options.keep) / f"{name}-{seed}"
    if not (out / "model").is_dir():
        train_model(recipe, out, resume=(out / "state").is_dir())
    if load_json(out / "recipe.json", Recipe) != recipe:
        raise ValueError(f"{str(out)!r} has a run of another recipe; remove it, or give another keep")
    flow = next(one for one in recipe.objectives if one.name != "next_token")
    losses = [held_out_loss(row, flow.name) for row in read_metrics(out / "metrics.jsonl") if "validation/loss" in row]
    seconds = sum(row.get("seconds", 0.0) for row in read_metrics(out / "metrics.jsonl"))
    return Trained(omni.from_pretrained(out / "model"), losses, seconds)


def held_out_loss(row: Mapping[str, Any], objective: str) -> float:
    """The flow objective's loss in a row of metrics, without adaptive weights where it has them."""
    name = "".join(word.title() for word in objective.split("_"))
    return row.get(f"validation/unweighted/{name}", row[f"validation/loss/{name}"])


def sample_system(trained: Trained, system: System, data: ClipData, options: SystemsOptions) -> Result:
    """Samples for each number of steps, and their distances."""
    num, repeats = options.samples, options.repeats
    sampled = {n: measured(trained.model, data.prompt, num, system.options(n), repeats) for n in system.steps}
    clips = flat(data.frames)
    energy = {n: energy_distance(flat(one.frames), clips) for n, one in sampled.items()}
    return Result(trained, sampled, energy, {n: coherent(one.frames, data.frames) for n, one in sampled.items()})


# ---- what is read off ------------------------------------------------------------------------------------------------


def of_data(data: ClipData, num: int, key: Key) -> Iterator[Measure]:
    """What the distances are of the data, of their mean, and of frames that do not depend on one another."""
    clips, frames = flat(data.frames), data.frames
    drawn = (key.fold("data").uniform((num,)) * len(frames)).long()
    yield Measure("data_energy", energy_distance(clips[drawn], clips), "distance")
    yield Measure("mean_energy", energy_distance(clips.mean(0).expand(2, -1), clips), "distance")
    independent = shuffled_blocks(frames, num, key.fold("independent"))
    yield Measure("independent_energy", energy_distance(flat(independent), clips), "distance")
    yield Measure("independent_coherent", coherent(independent, frames), "%")


def of_system(name: str, system: System, results: Sequence[Result]) -> Iterator[Measure]:
    """The rows of one system."""
    trained = [result.trained for result in results]
    if system.weights_of is None:
        yield Measure(f"{name}_loss", statistics.fmean(one.losses[-1] for one in trained), "loss")
        yield Measure(f"{name}_loss_start", statistics.fmean(one.losses[0] for one in trained), "loss")
        yield Measure(f"{name}_parameters", sum(p.numel() for p in trained[0].model.parameters()), "")
        yield Measure(f"{name}_training", statistics.fmean(one.seconds for one in trained), "s")
    energies: dict[int, float] = {}
    for n in system.steps:
        energies[n], spread = mean_and_spread([result.energy[n] for result in results])
        yield Measure(f"{name}_energy_{n}", energies[n], "distance")
        yield Measure(f"{name}_energy_{n}_spread", spread, "distance")
        yield Measure(f"{name}_coherent_{n}", statistics.fmean(result.coherent[n] for result in results), "%")
        yield Measure(f"{name}_passes_{n}", statistics.fmean(result.sampled[n].passes for result in results), "passes")
        yield Measure(f"{name}_seconds_{n}", statistics.median(r.sampled[n].seconds for r in results), "s")
    most = system.steps[-1]
    for n in system.steps[:-1]:
        yield Measure(f"{name}_fall_{n}_{most}", energies[most] / energies[n], "x")


def curves(results: Mapping[str, Sequence[Result]], options: SystemsOptions) -> list[Curve]:
    """Energy distance against passes and against seconds; the first also as the file `schedules_systems.png`."""
    passes: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    for name, found in results.items():
        for n in options.chosen[name].steps:
            energy = statistics.fmean(result.energy[n] for result in found)
            passes.setdefault(name, []).append((float(found[0].sampled[n].passes), energy))
            seconds.setdefault(name, []).append((statistics.median(r.sampled[n].seconds for r in found), energy))
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    chart(passes).save(folder / "schedules_systems.png", optimize=True)
    return [Curve(x, x, "energy distance", lines) for x, lines in (("passes", passes), ("seconds", seconds))]


def chart(passes: Mapping[str, Sequence[tuple[float, float]]]) -> Image.Image:
    """The picture of energy distance against passes, by system."""
    return log_charts({"clips of four blocks": passes}, "refine passes of one clip", "energy distance")


def panels(results: Mapping[str, Sequence[Result]], data: ClipData, num: int = 6) -> list[Panel]:
    """The first samples of each system with its most steps, a clip a row; the data first."""
    found = [Panel("data", answer=(sheet(data.frames[:num]),))]
    for name, [first, *_] in results.items():
        n, one = max(first.sampled.items())
        found.append(Panel(f"{name}, {n} steps", answer=(sheet(one.frames[:num]),)))
    return found


def sheet(frames: torch.Tensor, scale: int = 3) -> torch.Tensor:
    """uint8 (N, T, H, W, 3) -> (N H scale, T W scale, 3): a clip a row."""
    rows = torch.cat([torch.cat(list(clip), 1) for clip in frames], 0)
    return rows.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
