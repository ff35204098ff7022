"""Speed beside two other libraries in the same run: equal sizes, alternating runs, ratio of medians.

    speed_training   a training step on text-image (and text-image-text) samples, against transfusion-pytorch
    speed_text       cached greedy text decoding, against transformers' LlamaForCausalLM.generate
    speed_image      one image block after a text prompt, against transfusion-pytorch

Weights are random, with values that bfloat16 holds, as published ones have: speed depends on nothing else in them. A
ratio above 1 means that Omni is faster. Tokens of a training step are the data's (text ids and latents, each once),
whatever else a library computes for them. Rows in bfloat16 are not measured (nan) on a machine that computes it slowly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from eval.metrics.timing import alternate, medians
from eval.peers import (
    EULER,
    MIDPOINT,
    build_llama,
    count_calls,
    llama_decode,
    num_parameters,
    require,
    transfusion_draw,
    transfusion_of_size,
    transfusion_train_step,
)
from eval.task import Context, Measure, Outcome, TaskOptions, task
from omni.codecs import PixelCodec, PixelConfig
from omni.engine import Engine
from omni.heads import FlowHeadConfig
from omni.layout import LatentSpan, Shape, Span, TokenSpan, lay_out, pack
from omni.model import Omni, OmniConfig
from omni.nn.compiled import compile_blocks
from omni.nn.precision import fast_bf16
from omni.nn.transformer import TransformerConfig
from omni.objectives import build_objective
from omni.reply import BlockDone, GenerationOptions, Stop, TextDelta
from omni.rng import Key
from omni.text.bpe import BPETokenizer

SIZES = {"8m": (256, 8, 4, 704), "90m": (768, 12, 12, 2048)}  # width, depth, heads, width of the MLP
PATCH = 4
CHANNELS = PATCH * PATCH * 3
GRID = (8, 8)
SLOW_BF16 = "this machine computes bfloat16 slowly: rows in it are not measured (nan), and their bars cannot hold here"


class SpeedOptions(TaskOptions):
    """repeats: alternating runs of each library, of which the median counts."""

    repeats: int = Field(default=7, ge=1)
    vocab_size: int = Field(default=4096, ge=512)


class TrainingOptions(SpeedOptions):
    """Each of `batch` samples is `text` ids and an image of 64 latents; interleaved: and `text` ids again."""

    batch: int = Field(default=8, ge=1)
    text: int = Field(default=32, ge=1)


class TextOptions(SpeedOptions):
    """new_tokens: how many follow a prompt of 16 ids. sizes: of {8m, 90m}."""

    repeats: int = Field(default=5, ge=1)
    new_tokens: dict[str, int] = {"8m": 96, "90m": 32}
    sizes: tuple[str, ...] = ("8m", "90m")


class ImageOptions(SpeedOptions):
    """steps: solver steps per picture."""

    steps: int = Field(default=8, ge=1)


def build_omni(context: Context, size: str, vocab_size: int, pictures: bool = True) -> Omni:
    """A model of a size in SIZES with random weights, a byte tokenizer and the exact codec (64 latents for 32x32)."""
    width, depth, heads, hidden = SIZES[size]
    transformer = TransformerConfig(
        width=width, depth=depth, num_heads=heads, num_kv_heads=heads, head_dim=64, mlp_width=hidden
    )
    config = OmniConfig(transformer=transformer, flow=FlowHeadConfig(channels=CHANNELS), vocab_size=vocab_size)
    model = Omni(config, context.key("speed", size)).to(torch.bfloat16).to(torch.float32)
    model.tokenizer = BPETokenizer.train(["speed"], 256)
    model.codec = PixelCodec(PixelConfig(patch=PATCH)) if pictures else None
    return model


def conditions(context: Context, *packages: str) -> str:
    versions = ", ".join(f"{package} {require(package)}" for package in ("torch", *packages))
    return f"{versions}; {torch.get_num_threads()} thread(s), CPU; medians of alternating runs"


def spread(seconds: dict[str, list[float]]) -> str:
    return "; ".join(
        f"{name} {m * 1e3:.1f} ms ({min(seconds[name]) * 1e3:.1f}-{max(seconds[name]) * 1e3:.1f})"
        for name, m in medians(seconds).items()
    )


# ---- training --------------------------------------------------------------------------------------------------------


def omni_train_step(model: Omni, samples: list[list[Tensor]], precision: str, context: Context) -> Callable[[], None]:
    """Packing, forward, backward, clip and AdamW on the same samples. The caller compiles the model, or not."""
    model.train()
    objectives = [build_objective("next_token"), build_objective("flow_matching")]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    assert model.tokenizer is not None
    control, key = model.tokenizer.control, context.key("speed", "noise")
    documents = [spans_of(sample, model) for sample in samples]
    # As in the recipes: a last picture is not in the context, since nothing reads it there (see layout.lay_out).
    trim = [bool(sample[-1].is_floating_point()) for sample in samples]
    laid = [lay_out(spans, control.pad, trim_tail=cut) for spans, cut in zip(documents, trim, strict=True)]
    shape = Shape(rows=len(documents), budget=max(len(one.ids) for one in laid), refine_budget=GRID[0] * GRID[1])

    def step() -> None:
        [batch], used = pack(documents, [shape], channels=CHANNELS, pad_id=control.pad, trim=trim)
        assert used == len(documents)
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            terms = model.loss(batch, objectives, key)
        total = torch.stack([t.weight * t.sum.float() / max(t.count, 1.0) for t in terms.values()]).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def spans_of(sample: list[Tensor], model: Omni) -> list[Span]:
    """A sample as spans, all of it supervised, with the picture's header as the composer writes it."""
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


TRAINING_ROWS = (
    *("ratio", "ratio_eager", "ratio_float32", "omni_bf16_compiled", "omni_bf16", "omni_float32"),
    "transfusion_float32",
)
LAYOUTS = {"": ("text", "image"), "_interleaved": ("text", "image", "text")}


@task("speed_training", TrainingOptions, rows=[f"{row}{end}" for end in LAYOUTS for row in TRAINING_ROWS])
def speed_training(context: Context, options: TrainingOptions) -> Outcome:
    """Training tokens/s on text-image samples, beside transfusion-pytorch of equal parameters."""
    version = conditions(context, "transfusion_pytorch")
    ours, compiled = (build_omni(context, "8m", options.vocab_size) for _ in range(2))
    compile_blocks(compiled.transformer)
    theirs = transfusion_of_size(
        num_parameters(ours), SIZES["8m"][1], vocab_size=options.vocab_size, channels=CHANNELS, grid=GRID
    )
    notes = [
        version,
        f"{num_parameters(ours):,} and {num_parameters(theirs):,} parameters; batch {options.batch}; AdamW; ours in "
        "bf16 autocast (ratio: with compiled layers, as the recipe of the bundled model; ratio_eager: without) and in "
        "float32 (eager), theirs in float32 and eager, as it trains",
    ]
    if not fast_bf16():
        notes.append(SLOW_BF16)
    measures: list[Measure] = []
    key = context.key("speed", "samples")
    for end, layout in LAYOUTS.items():
        samples = [[sample_part(kind, options.text, key.fold(i, j)) for j, kind in enumerate(layout)]
                   for i in range(options.batch)]  # fmt: skip
        runs = {
            "omni_bf16_compiled": omni_train_step(compiled, samples, "bf16", context),
            "omni_bf16": omni_train_step(ours, samples, "bf16", context),
            "omni_float32": omni_train_step(ours, samples, "float32", context),
            "transfusion_float32": transfusion_train_step(theirs, samples),
        }
        measured = {name: run for name, run in runs.items() if fast_bf16() or "bf16" not in name}
        seconds = alternate(measured, options.repeats, warmup=2)
        median = dict.fromkeys(runs, math.nan) | medians(seconds)
        tokens = sum(part.shape[0] * (part.shape[1] if part.ndim == 3 else 1) for sample in samples for part in sample)
        base = median["transfusion_float32"]
        measures.append(Measure(f"ratio{end}", base / median["omni_bf16_compiled"], "x"))
        measures.append(Measure(f"ratio_eager{end}", base / median["omni_bf16"], "x"))
        measures.append(Measure(f"ratio_float32{end}", base / median["omni_float32"], "x"))
        measures += [Measure(f"{name}{end}", tokens / median[name], "tokens/s") for name in runs]
        notes.append(f"{'-'.join(layout)}, {tokens} tokens a step: {spread(seconds)}")
    return Outcome(measures, notes=notes)


def sample_part(kind: str, num_text: int, key: Key) -> Tensor:
    """Random ids (n,) or latents (rows, columns, C)."""
    return key.normal((*GRID, CHANNELS)) if kind == "image" else (key.uniform((num_text,)) * 256).long()


# ---- text decoding ---------------------------------------------------------------------------------------------------


def omni_decode(model: Omni, prompt: str, num_new: int, compile: bool = False) -> Callable[[], None]:
    """Greedy decoding of exactly `num_new` tokens through the engine, events, text and all."""
    engine = Engine(model, compile)
    engine.allowed["text"][engine.control.end] = -torch.inf  # exactly num_new tokens: the end may not come earlier
    engine.allowed["text only"][engine.control.end] = -torch.inf
    options = GenerationOptions(max_tokens=num_new)

    def run() -> None:
        events = list(engine.stream(prompt, options))
        assert isinstance(events[-1], Stop) and events[-1].reason == "length" and isinstance(events[0], TextDelta)

    return run


TEXT_ROWS = (
    *("ratio", "ratio_eager", "omni_compiled", "omni", "transformers"),
    *("ratio_eager_bf16", "omni_bf16", "transformers_bf16"),
)


@task("speed_text", TextOptions, rows=tuple(f"{row}_{size}" for size in SIZES for row in TEXT_ROWS))
def speed_text(context: Context, options: TextOptions) -> Outcome:
    """Cached greedy text decoding in tokens/s, beside transformers' generate: same width, depth and vocabulary."""
    notes, measures = [conditions(context, "transformers")], []
    notes.append(
        "ratio: Engine(model, compile=True), its one-token step as native code: float32 arithmetic on weights that are "
        "read in bfloat16, which is exact here as for every published checkpoint; ratio_eager: Engine(model); theirs: "
        "generate with its dynamic cache, in float32; _bf16: both computing in bfloat16"
    )
    if not fast_bf16():
        notes.append(SLOW_BF16)
    for size in options.sizes:
        if size not in SIZES:
            raise ValueError(f"speed_text.sizes has {size!r}; known: {', '.join(SIZES)}")
        num_new = options.new_tokens[size]
        width, depth, heads, hidden = SIZES[size]
        ours = build_omni(context, size, options.vocab_size, pictures=False).eval()
        theirs = build_llama(width, depth, heads, hidden, options.vocab_size, positions=512)
        prompt = "sixteen bytes ok"
        ids = torch.arange(len(prompt))
        decoder = num_parameters(ours.transformer.blocks) + num_parameters(ours.token)
        notes.append(f"{size}: decoders of {decoder:,} and {num_parameters(theirs):,} parameters, {num_new} new tokens")
        for dtype, end in ((torch.float32, ""), (torch.bfloat16, "_bf16")):
            ours.to(dtype)
            theirs.to(dtype)
            runs: dict[str, Callable[[], Any]] = {
                f"omni{end}": omni_decode(ours, prompt, num_new),
                f"transformers{end}": llama_decode(theirs, ids, num_new),
            }
            if dtype == torch.float32:
                runs["omni_compiled"] = omni_decode(ours, prompt, num_new, compile=True)
            seconds = alternate(runs if end == "" or fast_bf16() else {}, options.repeats)
            median = dict.fromkeys(runs, math.nan) | medians(seconds)
            base = median[f"transformers{end}"]
            if dtype == torch.float32:
                measures.append(Measure(f"ratio_{size}", base / median["omni_compiled"], "x"))
            measures.append(Measure(f"ratio_eager{end}_{size}", base / median[f"omni{end}"], "x"))
            measures += [Measure(f"{name}_{size}", num_new / median[name], "tokens/s") for name in runs]
            if seconds:
                notes.append(f"{size} {str(dtype).removeprefix('torch.')}: {spread(seconds)}")
    return Outcome(measures, notes=notes)


# ---- an image block --------------------------------------------------------------------------------------------------


def omni_draw(model: Omni, prompt: str, steps: int) -> Callable[[], Any]:
    """Text prompt, forced picture of 64 latents, decoded to pixels; ends when it is delivered."""
    engine = Engine(model)
    options = GenerationOptions(
        steps=steps, force_image=True, image_size=(GRID[0] * PATCH, GRID[1] * PATCH), max_images=1, max_tokens=4
    )

    def run() -> None:
        assert any(isinstance(event, BlockDone) for event in engine.stream(prompt, options))

    return run


IMAGE_ROWS = ("ratio_equal_steps", "ratio_equal_evaluations", "omni", "transfusion", "transfusion_euler")


@task("speed_image", ImageOptions, rows=IMAGE_ROWS)
def speed_image(context: Context, options: ImageOptions) -> Outcome:
    """One image block of 64 latents after a text prompt, at equal parameters, in float32: equal steps of each library's
    own solver, and equal evaluations of the network."""
    version = conditions(context, "transfusion_pytorch")
    ours = build_omni(context, "8m", options.vocab_size).eval()
    theirs = transfusion_of_size(
        num_parameters(ours), SIZES["8m"][1], vocab_size=options.vocab_size, channels=CHANNELS, grid=GRID
    )
    prompt = "sixteen bytes ok"
    runs: dict[str, Callable[[], Any]] = {"omni": omni_draw(ours, prompt, options.steps)}
    for name, solver, evaluations in (("euler", EULER, options.steps), ("midpoint", MIDPOINT, 2 * options.steps)):
        samplers = transfusion_draw(theirs, torch.arange(len(prompt)), GRID, options.steps, solver)
        for sampler, run in samplers.items():
            counted = count_calls(theirs.transformer, run, lambda x: x.shape[1] >= GRID[0] * GRID[1])
            assert counted == evaluations, (name, sampler, counted)
            runs[f"{sampler}, {name}"] = run
    seconds = alternate(runs, options.repeats)
    median = medians(seconds)
    euler, midpoint = (min(median[name] for name in runs if name.endswith(end)) for end in ("euler", "midpoint"))
    measures = [
        Measure("ratio_equal_steps", midpoint / median["omni"], "x"),
        Measure("ratio_equal_evaluations", euler / median["omni"], "x"),
        Measure("omni", median["omni"] * 1e3, "ms"),
        Measure("transfusion", midpoint * 1e3, "ms"),
        Measure("transfusion_euler", euler * 1e3, "ms"),
    ]
    notes = [
        version,
        f"{num_parameters(ours):,} and {num_parameters(theirs):,} parameters, float32, no guidance",
        f"equal_steps: {options.steps} steps of each library's default solver: ours Euler, {options.steps} evaluations "
        f"of the network; theirs midpoint, {2 * options.steps} evaluations, of a higher order",
        f"equal_evaluations: {options.steps} Euler steps by both, {options.steps} evaluations each",
        "of its sample_one and sample_many the faster counts; both end with the picture, ours decoded to pixels",
        spread(seconds),
    ]
    return Outcome(measures, notes=notes)
