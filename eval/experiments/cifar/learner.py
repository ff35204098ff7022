"""One objective trained on CIFAR-10 for a number of seconds of device time.

The network is Omni. Its batch is laid out once; a step replaces classes and latents in it, all on the device. The loop
does not synchronise within a step (objectives do, where they read numbers back), but keeps the host at most one step
ahead of the device, so its clock equals the device's to within a step. Compilation and the first steps are not timed:
the learner rehearses on the same shapes and is then reset.

A step whose gradient is not finite changes nothing (a flag on the device makes the fused optimiser skip it) and is
counted. An objective with more than `nonfinite_steps` of them stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from eval.experiments.cifar.patches import VOCAB_SIZE, Patches, lay_pictures, with_classes, with_latents
from eval.experiments.cifar.pictures import Order, Pictures, flipped
from eval.experiments.plane.run import factor_at
from omni.config import Frozen
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.compiled import compile_blocks
from omni.nn.transformer import TransformerConfig
from omni.objectives import FlowObjective, build_objective
from omni.rng import Key
from omni.samplers import SamplerName
from omni.sequence.layout import Batch
from train.guard import DeviceGuard
from train.optim.ema import AveragedModel
from train.optim.optimiser import Optimiser
from train.optim.target import build_target

REHEARSALS = 3  # steps before the clock starts


class Method(Frozen):
    """One line of the comparison: an objective with its options, its training and its sampling.

    head: options of the flow head that differ (parametrisation, time_scale, ...). copies: noisy copies of each picture;
    a step then has fewer pictures. rate: if not the run's. start_time: of sampling, where it is not 1. guidance: w of
    sampling, with two evaluations a step; guidance_embedding: its w, where the objective trained it. evaluations: if
    not the task's numbers of steps.
    """

    objective: str
    options: dict[str, Any] = Field(default_factory=dict)
    head: dict[str, Any] = Field(default_factory=dict)
    copies: int = Field(default=1, ge=1)
    rate: float | None = Field(default=None, gt=0)
    sampler: SamplerName = "flow_map"
    sampler_options: dict[str, Any] = Field(default_factory=dict)
    start_time: float | None = Field(default=None, gt=0, le=1)
    guidance: float = 1.0
    guidance_embedding: float = Field(default=1.0, gt=0)
    evaluations: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _can_be_built(self) -> Method:
        self.build()
        self.flow_head(1)
        if "channels" in self.head:
            raise ValueError("head takes no channels: they follow from the patches")
        return self

    def flow_head(self, channels: int) -> FlowHeadConfig:
        """The configuration of the flow head."""
        return FlowHeadConfig.model_validate(self.head | {"channels": channels})

    def build(self) -> FlowObjective:
        """ValueError for an unknown objective, a wrong option, or an objective on text."""
        objective = build_objective(self.objective, **self.options)
        if not isinstance(objective, FlowObjective):
            raise ValueError(f"{self.objective!r} is not an objective on latents; pictures have nothing else")
        return objective


class TrainOptions(Frozen):
    """batch: noisy pictures of a step. dropout: share of the documents without a class. decay: of the averaged weights,
    which are sampled. tangents, attention: see TransformerConfig; compile: the layers, which needs a C++ compiler."""

    width: int = Field(default=384, ge=8)
    depth: int = Field(default=8, ge=1)
    head_dim: int = Field(default=64, ge=2)
    batch: int = Field(default=512, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(default=1.0, gt=0)
    decay: float = Field(default=0.995, ge=0, lt=1)
    dropout: float = Field(default=0.1, ge=0, le=1)
    tangents: Literal["forward", "streamed", "triton", "central"] = "forward"
    attention: Literal["math", "sdpa", "flex"] = "sdpa"
    compile: bool = False
    nonfinite_steps: int = Field(default=10, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrainOptions:
        if self.width % self.head_dim:
            raise ValueError(f"width {self.width} is no multiple of head_dim {self.head_dim}")
        return self


@dataclass(frozen=True)
class Trained:
    """Result and cost of training. `model` has the averaged weights. seconds: timed; rehearsal: seconds before."""

    model: Omni
    steps: int
    seconds: float
    rehearsal: float
    nonfinite: int
    num_items: int  # noisy pictures of a step


def build_model(options: TrainOptions, method: Method, channels: int, key: Key) -> Omni:
    """Omni with random weights, keyed by name."""
    heads = options.width // options.head_dim
    transformer = TransformerConfig(
        width=options.width, depth=options.depth, num_heads=heads, num_kv_heads=heads, head_dim=options.head_dim,
        attention=options.attention, tangents=options.tangents,
    )  # fmt: skip
    return Omni(OmniConfig(transformer=transformer, flow=method.flow_head(channels), vocab_size=VOCAB_SIZE), key)


class Learner:
    """The parts of a run. `average`: averaged weights for sampling; `target`: for objectives with a target network."""

    def __init__(self, method: Method, options: TrainOptions, pictures: Pictures, patches: Patches, key: Key) -> None:
        rows, rest = divmod(options.batch, method.copies)
        if rest or not rows:
            raise ValueError(f"a batch of {options.batch} pictures is no multiple of copies = {method.copies}")
        self.options, self.pictures, self.patches, self.key = options, pictures, patches, key
        self.device = pictures.labels.device
        self.objective, self.rate = method.build(), method.rate or options.rate
        self.blank = lay_pictures(rows, patches, method.copies)
        self.order = Order(len(pictures), rows, key, self.device)
        self.model = build_model(options, method, patches.shape[1], key.fold("network")).to(self.device).train()
        self.average = AveragedModel(self.model, options.decay)
        self.target = build_target(self.model, [self.objective])
        if options.compile:  # the average is only drawn from, which keeps the plain code
            compile_blocks(self.model.transformer)
            if self.target is not None:
                compile_blocks(self.target.model.transformer)
        adamw = torch.optim.AdamW(
            self.model.parameters(), lr=self.rate, betas=options.betas, weight_decay=0.0, fused=True
        )
        self.optimiser = Optimiser({"adamw": adamw}, clip=options.clip)
        self.guard = DeviceGuard(options.nonfinite_steps, self.device)

    def batch(self, step: int) -> Batch:
        """The batch of a step: keyed pictures, flips and dropped classes."""
        rows, key = self.order.rows(step), self.key.fold("data", step)
        dropped = key.fold("dropout").uniform((len(rows),)) < self.options.dropout
        latents = self.patches.encode(flipped(self.pictures.pixels[rows], key))
        return with_latents(with_classes(self.blank, self.pictures.labels[rows], dropped), latents)

    def step(self, step: int, fraction: float) -> None:
        """Forward, backward, clip, AdamW, averages; `fraction` of the training is done."""
        batch, draws = self.batch(step), self.key.fold("draws", step)
        averages = None if self.target is None else self.target.model
        with in_half_precision(self.device):
            [term] = self.model(batch, [self.objective], draws, averages, fraction).values()
        (term.weight * term.sum / term.count).backward()
        left_out = self.guard.refuses(self.optimiser.clip())
        self.optimiser.step(factor_at(fraction, self.options.warmup), left_out)
        self.optimiser.zero_grad()
        self.average.update()
        if self.target is not None:
            self.target.update()

    def rehearse(self) -> None:
        """Some steps that leave no trace but what they compiled and allocated."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        kept = [parameter.clone() for parameter in parameters]
        for step in range(REHEARSALS):
            self.step(step, 0.0)
        torch._foreach_copy_(parameters, kept)
        self.average.restart()
        if self.target is not None:
            self.target.restart()
        self.optimiser.forget()
        self.guard.restart()


def in_half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, without a cache of casts: a cast made for a derivative without a graph could cut the graph of
    later uses (pytorch issues 112583, 158232)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def train(learner: Learner, seconds: float) -> Trained:
    """Rehearse, then train for `seconds`, or until too many steps were not finite."""
    clock = _clock(learner.device)
    begin = clock(True)
    learner.rehearse()
    start = now = clock(True)
    step = 0
    while now - start < seconds and not learner.guard.too_many:
        learner.step(step, (now - start) / seconds)
        now = clock(False)
        step += 1
    end = clock(True)
    return Trained(
        learner.average.model.eval(),
        step,
        end - start,
        start - begin,
        int(learner.guard.num_skipped),
        learner.blank.num_items,
    )


def _clock(device: torch.device) -> Callable[[bool], float]:
    """Seconds on the host, after the device finishes all of its work (True), or all work queued before the last reading
    (False)."""
    last: list[Any] = []

    def read(whole: bool) -> float:
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            (event if whole or not last else last[0]).synchronize()
            last[:] = [event]
        return time.perf_counter()

    return read
