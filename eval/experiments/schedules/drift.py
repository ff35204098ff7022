"""Exposure bias: the quality of eight pictures in a row, given the true past and given the model's own.

A small Omni learns flow maps on true pasts (`before`). Then one copy has on-policy training (`after`), and another one
has more of the first (`longer`), for about as long. All are sampled in 1, 2 and 4 jumps, with averaged weights. See
`walk` for the data and the measure.

Legend: D documents, P pictures of one, C channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from eval.experiments.schedules.walk import CircleWalk
from eval.task import Context, Curve, Measure, Outcome, TaskOptions, task
from omni.heads import FlowHeadConfig
from omni.losses import BatchFlowCall, critic_losses
from omni.model import Omni, OmniConfig
from omni.nn.cache import Memory
from omni.nn.transformer import TransformerConfig
from omni.objectives import Objective, build_objective
from omni.objectives.base import Items, RolloutObjective, jump
from omni.rng import Key
from omni.sequence.layout import Batch
from omni.sequence.own_past import own_past
from train.loop import mean_of
from train.optim.critic import Critic
from train.optim.ema import Ema, copy_of
from train.optim.optimiser import OptimiserConfig, build_optimiser, multiplier

MODELS = ("before", "after", "longer")
PASTS = ("true", "own")


class DriftOptions(TaskOptions):
    """pictures: in a row. width, depth: of the model. batch: documents of a step. steps, rate: of flow maps on true
    pasts. on_policy_steps, on_policy_rate: of the model, on documents of on_policy_pictures; each with critic_steps of
    the critic at critic_rate times the rate. longer_steps: further steps on true pasts. sampling: numbers of jumps that
    are measured. measured: documents. seeds: whose mean is reported."""

    pictures: int = Field(default=8, ge=2, le=32)
    width: int = Field(default=32, ge=16)
    depth: int = Field(default=2, ge=1)
    batch: int = Field(default=64, ge=1)
    steps: int = Field(default=500, ge=1)
    rate: float = Field(default=3e-3, gt=0)
    on_policy_steps: int = Field(default=150, ge=1)
    on_policy_pictures: int = Field(default=5, ge=2, le=32)
    on_policy_rate: float = Field(default=2e-4, gt=0)
    critic_steps: int = Field(default=3, ge=1)
    critic_rate: float = Field(default=5.0, gt=0)
    longer_steps: int = Field(default=800, ge=1)
    sampling: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)
    measured: int = Field(default=4096, ge=16)
    seeds: int = Field(default=2, ge=1)


def drift_rows(options: DriftOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    lines = [(model, steps) for model in MODELS for steps in options.sampling]
    numbers = range(2, options.pictures + 1)
    rows = [f"far_{model}_{steps}_{past}_{n}" for model, steps in lines for past in PASTS for n in numbers]
    rows += [f"{kind}_{model}_{steps}_{past}" for kind in ("next", "far") for model, steps in lines for past in PASTS]
    rows += [f"drift_{model}_{steps}" for model, steps in lines]
    rows += [f"kept_{model}_{steps}" for model in MODELS[1:] for steps in options.sampling]
    return [*rows, "exact_next", "exact_far", *(f"seconds_{model}" for model in MODELS)]


@dataclass(frozen=True)
class Laboratory:
    """The data, the options and the key of one seed."""

    walk: CircleWalk
    options: DriftOptions
    key: Key

    def model(self) -> Omni:
        """Untrained."""
        o = self.options
        transformer = TransformerConfig(
            width=o.width, depth=o.depth, num_heads=2, num_kv_heads=2, head_dim=o.width // 2
        )
        flow = FlowHeadConfig(channels=2, num_frequencies=8)
        return Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=2), self.key.fold("model"))

    def train(self, model: Omni, objective: Objective, steps: int, rate: float, key: Key) -> Omni:
        """The averaged weights, after `steps` updates on new documents; with a critic where the objective needs one."""
        config = OptimiserConfig(name="adamw", rate=rate, warmup_steps=20, weight_decay=0.0)
        optimiser, ema = build_optimiser(model.named_parameters(), config), Ema(model, 0.99)
        critic = None
        if isinstance(objective, RolloutObjective):
            critic = Critic(model, copy_of(model), config, steps=objective.critic_steps, rate=objective.critic_rate)
        for step in range(steps):
            pictures = self.walk.sample(key.fold("data", step), self.options.batch)
            batch, progress = self.walk.batch(pictures, step * self.options.batch), step / steps
            terms = model(batch, [objective], key, None, progress, None if critic is None else critic.networks)
            mean_of(list(terms.values())).backward()
            optimiser.clip()
            optimiser.step(multiplier(config, step, progress))
            optimiser.zero_grad()
            ema.update()
            if critic is not None:
                update_critic(critic, model, batch, objective, key.fold("critic"), multiplier(config, step, progress))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(ema.averages[name])
        return model

    def models(self) -> Iterator[tuple[str, Omni, float]]:
        """(name, model, seconds of its training)."""
        o, key, few = self.options, self.key, self.options.on_policy_pictures
        maps = build_objective("improved_mean_flow")
        on_policy = build_objective(
            "distribution_matching", steps=o.sampling, critic_steps=o.critic_steps, critic_rate=o.critic_rate,
            time={"kind": "uniform", "low": 0.02, "high": 0.98}, scope="batch",
        )  # fmt: skip
        plans = {
            "before": (maps, o.steps, o.rate, self.walk),
            "after": (on_policy, o.on_policy_steps, o.on_policy_rate, replace(self.walk, num_pictures=few)),
            "longer": (maps, o.longer_steps, o.rate, self.walk),
        }
        start = self.model()
        for name, (objective, steps, rate, walk) in plans.items():
            begun, model = time.perf_counter(), start if name == "before" else copy_of(start)
            replace(self, walk=walk).train(model, objective, steps, rate, key.fold(name))
            yield name, model, time.perf_counter() - begun

    @torch.no_grad()
    def distances(self, model: Omni, steps: int, past: str) -> Tensor:
        """(2, P - 1): next and far, see `walk`, of pictures sampled in `steps` equal jumps after the true past or the
        model's own."""
        key = self.key.fold("measured")
        true = self.walk.sample(key, self.options.measured)
        batch = self.walk.batch(true)
        memory = model.context(batch)[1]

        def sample(part: Batch, memory: Memory) -> Tensor:
            return jumps(model, part, memory, steps, key)

        if past == "own":
            batch, memory = own_past(batch, memory, sample, lambda one: model.context(one)[1])
        found = sample(batch, memory)
        return torch.stack(self.walk.distances(found, found if past == "own" else true))


def update_critic(critic: Critic, model: Omni, batch: Batch, objective: Objective, key: Key, rate: float) -> None:
    """All updates of the critic after one of the model, each on new samples."""
    for number in range(critic.steps):
        found = critic_losses(model, critic.networks.critic, batch, [objective], key.fold(number))
        critic.update(mean_of(list(found.values())), rate, step=0, documents=[])


def jumps(model: Omni, batch: Batch, memory: Memory, steps: int, key: Key) -> Tensor:
    """x (R, S, C): every item from its noise to data in equal jumps."""
    items = Items(batch.refine_latents, batch.item, batch.item_names)
    call = BatchFlowCall(model, batch, memory, torch.ones(len(items)), frozen=True)
    x, one = items.noise(key), torch.ones(len(items))
    for n in range(steps):
        x = jump(call, x, one * (1 - n / steps), one * (1 - (n + 1) / steps), items)
    return x


Results = dict[tuple[str, int, str], Tensor]  # (model, jumps, past) -> (2, P - 1)


@task("schedule_drift", DriftOptions, rows=drift_rows)
def schedule_drift(context: Context, options: DriftOptions) -> Outcome:
    """The quality of each of several pictures in a row, given the true past and the model's own."""
    walk, found, seconds = CircleWalk(options.pictures), [], []
    for seed in range(options.seeds):
        laboratory, each, spent = Laboratory(walk, options, context.key("drift", seed)), {}, {}
        for name, model, spent[name] in laboratory.models():
            measured = [(name, steps, past) for steps in options.sampling for past in PASTS]
            each |= {one: laboratory.distances(model, *one[1:]) for one in measured}
            context.report(f"seed {seed}, {name}: {spent[name]:.0f} s")
        found.append(each)
        seconds.append(spent)
    results: Results = {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}
    exact = walk.sample(context.key("drift", "exact"), options.measured)
    measures = [*picture_measures(results), *mean_measures(options, results)]
    for name, value in zip(("next", "far"), walk.distances(exact, exact), strict=True):
        measures.append(Measure(f"exact_{name}", float(value.mean()), "radii"))
    measures += [Measure(f"seconds_{m}", sum(one[m] for one in seconds) / len(seconds), "s") for m in MODELS]
    notes = [f"mean of {options.seeds} seeds; distances over the radius; exact: exact samples", table(options, results)]
    return Outcome(measures, curves=curves(options, results), notes=notes)


def picture_measures(results: Results) -> Iterator[Measure]:
    """The distance of each picture after all its steps."""
    for (model, steps, past), (_, far) in results.items():
        for n, value in enumerate(far.tolist(), 2):
            yield Measure(f"far_{model}_{steps}_{past}_{n}", value, "radii")


def mean_measures(options: DriftOptions, results: Results) -> Iterator[Measure]:
    """Means over pictures; drift: by how much the own past exceeds the true one; kept: the share of the distance after
    the own past that further training leaves."""
    far = {name: float(value[1].mean()) for name, value in results.items()}
    for (model, steps, past), (near, _) in results.items():
        yield Measure(f"next_{model}_{steps}_{past}", float(near.mean()), "radii")
        yield Measure(f"far_{model}_{steps}_{past}", far[model, steps, past], "radii")
    for model in MODELS:
        for steps in options.sampling:
            yield Measure(f"drift_{model}_{steps}", far[model, steps, "own"] - far[model, steps, "true"], "radii")
    for model in MODELS[1:]:
        for steps in options.sampling:
            kept = far[model, steps, "own"] / far["before", steps, "own"]
            yield Measure(f"kept_{model}_{steps}", kept, "of 1")


def table(options: DriftOptions, results: Results) -> str:
    """One line for each model, number of jumps and past: the distance of each picture after all its steps."""
    lines = [f"{'model, jumps, past':22}" + "".join(f"{n:>8}" for n in range(2, options.pictures + 1))]
    for (model, steps, past), (_, far) in results.items():
        lines.append(f"{f'{model}, {steps}, {past}':22}" + "".join(f"{value:8.4f}" for value in far.tolist()))
    return "\n".join(lines)


def curves(options: DriftOptions, results: Results) -> list[Curve]:
    """Distances over pictures, one plot for each number of jumps."""

    def lines(steps: int) -> dict[str, list[tuple[float, float]]]:
        names = [(model, steps, past) for model in MODELS for past in PASTS]
        return {f"{m}, {past} past": list(enumerate(results[m, s, past][1].tolist(), 2)) for m, s, past in names}

    titles = {steps: f"{steps} jump{'s' * (steps > 1)}" for steps in options.sampling}
    return [Curve(title, "picture", "distance from the truth", lines(steps)) for steps, title in titles.items()]
