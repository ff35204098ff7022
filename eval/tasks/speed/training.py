"""Training steps against transfusion-pytorch: the same samples, parameters, dtype, optimiser and threads.

The tokens of a step are the data's text ids and latents, each once, all supervised. Control ids of a library do not
count, nor a second computation of a latent. Omni computes some twice: a picture before other segments is in the context
stream (clean) and in the refine stream (noisy). transfusion-pytorch has one stream, in which later segments attend to
the noisy picture. The report rows `positions` count the computed positions of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from eval.peers import (
    Sample,
    autocast,
    compile_transfusion,
    inputs_of,
    num_parameters,
    transfusion_loss,
    transfusion_of_size,
)
from eval.task import Context, Measure, Outcome, task
from eval.tasks.speed.comparison import (
    CHANNELS,
    DTYPES,
    GRID,
    MODES,
    SIZES,
    SpeedOptions,
    Times,
    build_omni,
    first_run,
    machine,
    notes_of,
)
from omni.model import Omni
from omni.nn.compiled import compile_blocks
from omni.objectives import build_objective
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.sequence.layout import Batch, LatentSpan, Shape, Span, TokenSpan, lay_out, pack
from train.optim.optimiser import Optimiser

# The last picture of a document is not in the context stream, since nothing attends to it there (layout.lay_out): all
# pictures of text_image, none of interleaved.
LAYOUTS = {"text_image": ("text", "image"), "interleaved": ("text", "image", "text", "image", "text")}
LIBRARIES = ("omni", "transfusion")


def _rows() -> list[str]:
    """All report rows; suites set bars on these names."""
    rows = [f"parameters_{library}" for library in LIBRARIES]
    for layout in LAYOUTS:
        rows += [f"positions_{library}_{layout}" for library in LIBRARIES]
        for dtype in DTYPES:
            rows += [f"{name}_{layout}_{dtype}_{mode}" for mode in MODES for name in ("ratio", *LIBRARIES)]
    return rows


class TrainingOptions(SpeedOptions):
    """Each of `batch` samples has `text` ids per text of its layout, and 64 latents per picture."""

    batch: int = Field(default=8, ge=1)
    text: int = Field(default=32, ge=1)


@task("speed_training", TrainingOptions, rows=_rows())
def speed_training(context: Context, options: TrainingOptions) -> Outcome:
    """Training tokens/s on text-image and interleaved samples, against transfusion-pytorch of equal parameters."""
    conditions = machine("transfusion_pytorch")
    size = "tiny" if options.quick else "8m"
    models = build_models(context, size, options)
    measures = [Measure(f"parameters_{name}", num_parameters(models[name, "eager"]), "") for name in LIBRARIES]
    notes = notes_of(
        options,
        conditions,
        f"batch {options.batch}; forward, backward, clipping and AdamW, ours with packing; equal dtype: float32, or "
        "bfloat16 autocast; compiled: ours as the recipes with compile=true, theirs by torch.compile of its layers",
    )
    for layout in LAYOUTS:
        samples = samples_of(context, layout, options)
        measures += [
            Measure(f"positions_omni_{layout}", pack_samples(models["omni", "eager"], samples).num_positions, ""),
            Measure(
                f"positions_transfusion_{layout}", transfusion_positions(models["transfusion", "eager"], samples), ""
            ),
        ]
        tokens = sum(map(num_data_tokens, samples))
        notes.append(f"{'-'.join(LAYOUTS[layout])}: {tokens} tokens a step")
        for dtype in DTYPES:
            steps = training_steps(context, models, samples, dtype) if dtype in options.dtypes else {}
            for name in [name for name in steps if name.endswith("compiled")]:
                if why := first_run(steps[name]):
                    notes.append(f"{name} of {layout} in {dtype} is not measured: {why}")
                    del steps[name]
            times = Times.of(steps, options.runs, conditions, warmup=2)
            for mode in MODES:
                end = f"{layout}_{dtype}_{mode}"
                theirs, ours = f"transfusion {mode}", f"omni {mode}"
                measures.append(times.ratio(f"ratio_{end}", [theirs], ours))
                measures += [times.rate(f"omni_{end}", ours, tokens), times.rate(f"transfusion_{end}", theirs, tokens)]
    return Outcome(measures, notes=notes)


def build_models(context: Context, size: str, options: SpeedOptions) -> dict[tuple[str, str], nn.Module]:
    """A model of each library and mode; those of one library differ in the mode alone."""
    models: dict[tuple[str, str], nn.Module] = {}
    for mode in options.modes:
        ours = build_omni(context, size, options.vocab_size)
        sizes = {"vocab_size": options.vocab_size, "channels": CHANNELS, "grid": GRID}
        theirs = transfusion_of_size(num_parameters(ours), SIZES[size].depth, **sizes)
        if mode == "compiled":
            compile_blocks(ours.transformer)
            compile_transfusion(theirs)
        models |= {("omni", mode): ours, ("transfusion", mode): theirs}
    return models


def training_steps(
    context: Context, models: dict[tuple[str, str], nn.Module], samples: list[Sample], dtype: str
) -> dict[str, Callable[[], None]]:
    """A step of each model on the samples, by "library mode"."""
    steps = {}
    for (library, mode), model in models.items():
        if library == "omni":
            assert isinstance(model, Omni)
            # As in the trainer, no cache of casts: a target network's casts would cut the graph.
            step = training_step(model, omni_loss(model, samples, context), dtype, keep_casts=False)
        else:
            step = training_step(model, transfusion_loss(model, samples), dtype)
        steps[f"{library} {mode}"] = step
    return steps


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], dtype: str, keep_casts: bool = True
) -> Callable[[], None]:
    """Forward under autocast (or in float32), backward, clipping and AdamW: the same for both libraries."""
    optimiser = Optimiser({"adamw": torch.optim.AdamW(model.parameters(), lr=1e-4)})

    def step() -> None:
        with autocast(DTYPES[dtype], keep_casts):
            value = loss()
        value.backward()
        optimiser.clip()
        optimiser.step(1.0)
        optimiser.zero_grad()

    return step


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples_of(context: Context, layout: str, options: TrainingOptions) -> list[Sample]:
    """Random ids (n,) and latents (rows, columns, C), in the order of the layout."""
    key = context.key("speed", "samples")

    def part(kind: str, key: Key) -> Tensor:
        return key.normal((*GRID, CHANNELS)) if kind == "image" else (key.uniform((options.text,)) * 256).long()

    return [[part(kind, key.fold(i, j)) for j, kind in enumerate(LAYOUTS[layout])] for i in range(options.batch)]


def num_data_tokens(sample: Sample) -> int:
    """Text ids and latents of a sample."""
    return sum(part.shape[:-1].numel() if part.is_floating_point() else len(part) for part in sample)


def spans_of(sample: Sample, model: Omni) -> list[Span]:
    """A sample as supervised spans, with the picture's header as `compose` writes it."""
    assert model.tokenizer is not None
    control = model.tokenizer.control
    spans: list[Span] = []
    for part in sample:
        if part.is_floating_point():
            rows, columns, channels = part.shape
            header = [control.image, control.size(rows), control.size(columns)]
            spans.append(TokenSpan(header, [True] * 3))
            spans.append(LatentSpan(part.reshape(-1, channels), (1, rows, columns), supervise=True))
            spans.append(TokenSpan([control.media_end], [False]))
        else:
            spans.append(TokenSpan(part.tolist(), [True] * len(part)))
    return [TokenSpan([control.begin], [False]), *spans, TokenSpan([control.end], [True])]


def pack_samples(model: Omni, samples: list[Sample]) -> Batch:
    """One sample per batch row, as the recipes pack: a last picture is not in the context."""
    assert model.tokenizer is not None
    pad = model.tokenizer.control.pad
    documents = [spans_of(sample, model) for sample in samples]
    trim = [sample[-1].is_floating_point() for sample in samples]
    laid = [lay_out(spans, pad, trim_tail=cut) for spans, cut in zip(documents, trim, strict=True)]
    latents = max(sum(len(span.latents) for _, span, _ in one.blocks) for one in laid)
    shape = Shape(rows=len(documents), budget=max(len(one.ids) for one in laid), refine_budget=latents)
    [batch], used = pack(documents, [shape], channels=CHANNELS, pad_id=pad, trim=trim)
    assert used == len(documents)
    return batch


def omni_loss(model: Omni, samples: list[Sample], context: Context) -> Callable[[], Tensor]:
    """The training loss of the samples, packing included, as one call."""
    model.train()
    objectives = [build_objective("next_token"), build_objective("flow_matching")]
    key = context.key("speed", "noise")

    def mean(terms: Terms) -> Tensor:
        return terms.weight * terms.sum.float() / max(terms.count, 1.0)

    def loss() -> Tensor:
        terms = model(pack_samples(model, samples), objectives, key)
        return torch.stack([mean(one) for one in terms.values()]).sum()

    return loss


@torch.no_grad()
def transfusion_positions(model: nn.Module, samples: list[Sample]) -> int:
    """Number of positions that a step computes, with padding and control ids."""
    with inputs_of(model.transformer) as shapes:  # type: ignore[arg-type]
        transfusion_loss(model, samples)()
    return sum(math.prod(shape[:2]) for shape in shapes)
