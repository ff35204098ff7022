"""Runs one recipe: trains a model or a codec, does a dry run, publishes a checkpoint.

Called by train.__main__ for one recipe and by train.stages for a list. Holds the lock of every output directory that it
writes to. Parses no command line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from omni.nn.precision import fast_bf16
from omni.weights import is_text_path
from train import loop
from train.build import build_run, publish_model, published_dtype
from train.checkpoint import saved_steps
from train.codec import loop as codec_loop
from train.lock import hold
from train.metrics import Tracker
from train.recipe import Recipe
from train.sheet import draw_sheet
from train.signals import EXIT_STOPPED, StopRequest


def train_model(recipe: Recipe, out: Path, resume: bool) -> int:
    """The whole run of a model: build, restore, train, publish. Returns the exit code."""
    torch.set_num_threads(recipe.threads)
    with hold(out):
        if not resume and saved_steps(out / "state"):
            raise ValueError(f"{str(out)!r} holds a run already; continue it with --resume, or choose another --out")
        run = build_run(recipe, out)
        if resume:
            loop.resume(run, lambda line: print(line, file=sys.stderr))
        return _train(run)


def _train(run: loop.Run) -> int:
    """Train a restored or new run to its end, and publish it. Returns the exit code."""
    recipe, out = run.recipe, run.out
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")
    tracker, stop = Tracker(out, run.progress.step, recipe.report.tensorboard), StopRequest()
    tracker.report(f"{loop.num_parameters(run.model):,} parameters; Muon has {_muon_share(run):.0%} of them; {out}")
    tracker.report(_precision(recipe))
    for change in run.changes:
        tracker.metrics(run.progress.step, {"event": "recipe changed", **asdict(change)})
    try:
        finished = loop.train(run, tracker, stop, _sheets(tracker))
        if finished:
            publish_model(run, out / "model")
            tracker.report(f"done after {run.progress.step} steps: {out / 'model'}")
        else:
            why = stop.received.name if stop.received else "stopped"
            tracker.report(f"{why}: saved at step {run.progress.step}; continue with --resume")
    finally:
        stop.restore()
        tracker.close()
    return 0 if finished else EXIT_STOPPED


def publish_state(recipe: Recipe, out: Path, directory: Path) -> int:
    """Write the averages of the newest checkpoint as a model directory."""
    torch.set_num_threads(recipe.threads)
    if directory.exists():
        raise ValueError(f"{str(directory)!r} exists already; choose another directory to publish to")
    run = build_run(recipe, out)
    loop.resume(run, lambda line: print(line, file=sys.stderr), any_data=True)
    print(publish_model(run, directory))
    return 0


def dry_run(recipe: Recipe, out: Path) -> int:
    """Run two steps, write nothing; print sizes and speed."""
    torch.set_num_threads(recipe.threads)
    run = build_run(recipe, out)
    parameters = loop.num_parameters(run.model)
    loop.train_step(run, run.next())  # fills caches; only the second step is timed
    started = time.perf_counter()
    packed = run.next()
    loaded = time.perf_counter()
    run.waited = 0.0
    metrics = loop.train_step(run, packed)
    ended = time.perf_counter()
    shapes = [f"{tuple(batch.ids.shape)} + {tuple(batch.item.shape)}" for batch in packed.batches]
    used = sum(batch.num_positions for batch in packed.batches)
    made = sum(batch.ids.numel() + batch.item.numel() for batch in packed.batches)
    facts = {
        "parameters": parameters,
        "precision": _precision(recipe),
        "of them with Muon": f"{_muon_share(run):.0%}",
        "model file": _model_file(run, parameters),
        "a batch": f"{len(packed.documents)} documents, {used} positions ({used / made:.0%} of {', '.join(shapes)})",
        "a step": f"{ended - started:.2f} s, of which loading {loaded - started + run.waited:.2f} s",
        "steps in an hour": round(3600 / (ended - started)),
        "loss": {k: round(v, 4) for k, v in metrics.items() if k.startswith("loss")},
    }
    if recipe.max_minutes is not None:
        facts["steps in max_minutes"] = min(recipe.max_steps, round(60 * recipe.max_minutes / (ended - started)))
    for name, value in facts.items():
        print(f"{name}: {value}")
    return 0


def _sheets(tracker: Tracker) -> Callable[[loop.Run], None]:
    """A function that writes a sample sheet; its failure is reported and ends nothing."""

    def sheet(run: loop.Run) -> None:
        try:
            draw_sheet(run, run.out / "sheets" / f"step-{run.progress.step:08d}.png")
        except (ValueError, RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
            tracker.report(f"no sample sheet at step {run.progress.step}: {type(error).__name__}: {error}")

    return sheet


def _model_file(run: loop.Run, parameters: int) -> str:
    """Size and dtype of the published weights."""
    dtype, beside = published_dtype(run), ""
    if run.model.base is not None:
        parameters -= sum(p.numel() for name, p in run.model.named_parameters() if is_text_path(name))
        beside = ", beside the language model"
    return f"{dtype.itemsize * parameters / 1e6:.1f} MB in {'bf16' if dtype == torch.bfloat16 else 'float32'}{beside}"


def _precision(recipe: Recipe) -> str:
    """The precision of the forward pass, with a warning where it is known to be slow."""
    if not recipe.autocasts:
        return f"float32 on {recipe.device}" + ("" if recipe.autocast == "none" else ", which has no fast bfloat16")
    slow = "" if fast_bf16(recipe.device) else "; this device has no fast bfloat16: autocast=auto would be far faster"
    return f"bfloat16 autocast on {recipe.device}{slow}"


def _muon_share(run: loop.Run) -> float:
    """The share of all numbers that Muon updates."""
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    return sum(sizes[name] for name in run.optimiser.members().get("muon", [])) / sum(sizes.values())


def train_codec(recipe: codec_loop.CodecRecipe, out: Path) -> int:
    """The whole run of a codec; continues where `out` has a checkpoint. Returns the exit code."""
    torch.set_num_threads(1)
    with hold(out):
        stop = StopRequest()
        try:
            found = codec_loop.train(recipe, out, stop)
        finally:
            stop.restore()
    if found is None:
        return EXIT_STOPPED
    print(json.dumps(found))
    return 0


def dry_run_codec(recipe: codec_loop.CodecRecipe, out: Path) -> int:
    """Run two steps of a codec, write nothing; print sizes and speed."""
    torch.set_num_threads(1)
    run = codec_loop.CodecRun(recipe, out)
    run.train_step()  # fills caches; only the second step is timed
    started = time.perf_counter()
    metrics = run.train_step()
    seconds = time.perf_counter() - started
    print(f"parameters: {loop.num_parameters(run.module):,}")
    print(f"latents: {run.codec.spec.channels} channels, stride {run.codec.spec.stride}")
    print(f"a step: {seconds:.2f} s, {recipe.last_step} of them {seconds * recipe.last_step / 60:.0f} minutes")
    print(f"loss: {metrics['loss']:.4f}")
    return 0
