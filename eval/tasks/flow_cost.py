"""Cost of objectives with derivatives: a training step of each, relative to a flow-matching step on the same batch.

A step is forward, backward, clip, AdamW and, where the objective has a target network, its update. Documents are some
ids and a picture, everything supervised, with several noisy copies of each picture. Weights are random: cost does not
depend on them. A ratio is the median over rounds of step / flow-matching step of that round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from pydantic import Field

from eval.metrics.timing import alternate, medians
from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.compiled import compile_blocks
from omni.nn.transformer import TransformerConfig
from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, TokenSpan, pack
from train.optim.optimiser import Optimiser
from train.optim.target import build_target

BASE = "flow_matching"
METHODS = {
    BASE: (BASE, {}),
    "mean_flow": ("mean_flow", {}),
    "terminal_velocity": ("terminal_velocity", {}),
    "terminal_velocity_detached": ("terminal_velocity", {"detach_tangent": True}),
}
ROWS = tuple(name for name in METHODS if name != BASE)


class FlowCostOptions(TaskOptions):
    """`documents` of `text` ids and a picture of side * side latents, `rows` to a batch; `copies` of each picture."""

    repeats: int = Field(default=9, ge=1)
    width: int = Field(default=128, ge=64, multiple_of=64)
    depth: int = Field(default=4, ge=1)
    channels: int = Field(default=64, ge=1)
    documents: int = Field(default=32, ge=1)
    rows: int = Field(default=32, ge=1)
    text: int = Field(default=24, ge=1)
    side: int = Field(default=4, ge=1)
    copies: int = Field(default=2, ge=1)
    attention: str | None = Field(default=None, description="backend without tangents; None: the device's default")
    bf16: bool = Field(default=False, description="under bfloat16 autocast")
    compile: bool = Field(default=False, description="compile the layers, all methods alike")


def build_model(options: FlowCostOptions, key: Key) -> Omni:
    """Omni with random weights."""
    heads = options.width // 64
    transformer = TransformerConfig(
        width=options.width,
        depth=options.depth,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        attention=options.attention,
    )
    flow = FlowHeadConfig(channels=options.channels)
    model = Omni(OmniConfig(transformer=transformer, flow=flow, vocab_size=512), key).train()
    if options.compile:
        compile_blocks(model.transformer)
    return model


def build_batch(options: FlowCostOptions, key: Key) -> Batch:
    """ValueError where the documents do not divide evenly into the rows."""
    per_row, rest = divmod(options.documents, options.rows)
    if rest or not per_row:
        raise ValueError(f"flow_cost: documents ({options.documents}) must be a multiple of rows ({options.rows})")
    size, documents = options.side**2, []
    for n in range(options.documents):
        ids = [key.fold(n, i).integer() % 256 for i in range(options.text)]
        latents = key.fold(n, "latents").normal((size, options.channels))
        picture = LatentSpan(latents, (1, options.side, options.side), supervise=True)
        documents.append([TokenSpan(ids, [True] * options.text), picture, TokenSpan([257], [True])])
    shape = Shape(options.rows, per_row * (options.text + size + 1), per_row * size * options.copies)
    [batch], used = pack(documents, [shape], channels=options.channels, pad_id=256, copies=options.copies)
    assert used == options.documents
    return batch


def train_step(
    model: Omni, batch: Batch, name: str, objective_options: dict, key: Key, bf16: bool = False
) -> Callable[[], None]:
    """One training step of an objective on a batch, as a function."""
    device = batch.ids.device
    objective = build_objective(name, **objective_options)
    optimiser = Optimiser({"adamw": torch.optim.AdamW(model.parameters(), lr=1e-4)})
    target = build_target(model, [objective])
    averages = None if target is None else target.model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):  # as in train.loop
            [term] = model(batch, [objective], key, averages).values()
        (term.sum / term.count).backward()
        optimiser.clip()
        optimiser.step(1.0)
        optimiser.zero_grad()
        if target is not None:
            target.update()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


@task("flow_cost", FlowCostOptions, rows=(*ROWS, f"{BASE}_step"))
def flow_cost(context: Context, options: FlowCostOptions) -> Outcome:
    """Cost of a training step relative to flow matching: MeanFlow, terminal velocity matching, with and without the
    gradient through its tangent."""
    key = context.key("flow_cost")
    batch = build_batch(options, key.fold("batch")).to(context.device)
    runs = {
        name: train_step(build_model(options, key).to(context.device), batch, objective, extra, key, options.bf16)
        for name, (objective, extra) in METHODS.items()
    }
    seconds = alternate(runs, options.repeats, warmup=2)
    measures = [
        Measure(name, statistics.median(a / b for a, b in zip(seconds[name], seconds[BASE], strict=True)), "x")
        for name in ROWS
    ]
    median = medians(seconds)
    measures.append(Measure(f"{BASE}_step", median[BASE] * 1e3, "ms"))
    on_gpu = torch.device(context.device).type == "cuda"
    where = torch.cuda.get_device_name(context.device) if on_gpu else f"{torch.get_num_threads()} thread(s), CPU"
    notes = [
        f"{where}, {'bfloat16 autocast' if options.bf16 else 'float32'}, {options.repeats} rounds; {options.documents} "
        f"documents of {options.text} ids and {options.side**2} latents, {options.copies} copies; width "
        f"{options.width}, depth {options.depth}{', compiled' if options.compile else ''}",
        "; ".join(f"{name} {m * 1e3:.0f} ms ({min(seconds[name]) * 1e3:.0f} at best)" for name, m in median.items()),
    ]
    return Outcome(measures, notes=notes)
