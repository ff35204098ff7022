"""python -m train RECIPE.toml [key=value ...] [--out DIR] [--resume] [--dry-run] [--publish DIR]

Trains what the recipe describes and leaves in the output directory (default: runs/ and the recipe's name)

    recipe.json  metrics.jsonl  sheets/  state/step-XXXXXXXX/ (for --resume)  model/ (the finished model)

    --dry-run   build everything, make two steps without saving, print sizes and speed, leave nothing
    --resume    continue from the newest intact state
    --publish   make the model directory DIR from the newest intact state, without training (also of a run in progress)

The run holds a lock on its output directory; a second one there is refused. A resume may change some keys of the recipe
(train.recipe.CHANGEABLE): each change is said, and recorded in metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from omni.cli.arguments import Parser, exit_code, fail
from omni.config import load_toml, parse_toml
from omni.nn.precision import fast_bf16
from train import loop
from train.build import assemble, publish_model
from train.checkpoint import saved_steps
from train.data.batch import TooManyCorrupt
from train.guard import TooManyNonFinite
from train.lock import hold, refuse_many_processes
from train.metrics import Tracker
from train.recipe import Recipe
from train.sheet import draw_sheet
from train.signals import EXIT_STOPPED, StopRequest

EXIT_NOT_FINITE, EXIT_CORRUPT = 3, 4
EXIT_CODES = """exit codes:
  0   done
  1   a bug, with a traceback; what was trained is saved where it can be
  2   a mistake in the command, the recipe or its files, or the output directory is in use
  3   too many non-finite steps; the state is saved
  4   too many unreadable documents (the state is saved), or damaged model files
  75  stopped by SIGTERM or SIGINT, with the state saved: run again with --resume (a codec: run again)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m train",
        description="Train a model or a codec from a recipe.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one value of the recipe")
    parser.add_argument("--out", type=Path, help="output directory (default: runs/ and the recipe's name)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest saved state")
    parser.add_argument("--dry-run", action="store_true", help="build everything and make two steps, save nothing")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="make DIR from the newest saved state and stop")

    def work() -> int:
        options = parser.parse_intermixed_args(arguments)
        return _run(options, options.out or Path("runs") / options.recipe.stem)

    try:
        return exit_code(work)
    except TooManyNonFinite as error:
        return fail(error, EXIT_NOT_FINITE)
    except TooManyCorrupt as error:
        return fail(error, EXIT_CORRUPT)


def _run(options: argparse.Namespace, out: Path) -> int:
    refuse_many_processes()
    if _kind(options.recipe) == "codec":
        return _train_codec(options, out)
    recipe = load_toml(options.recipe, options.overrides, Recipe)
    torch.set_num_threads(recipe.threads)
    if options.publish:
        return publish_state(recipe, out, options.publish)
    return dry_run(recipe, out) if options.dry_run else train_model(recipe, out, options.resume)


def train_model(recipe: Recipe, out: Path, resume: bool) -> int:
    """The whole run: build, restore, train, publish."""
    with hold(out):
        if not resume and saved_steps(out / "state"):
            raise ValueError(f"{str(out)!r} holds a run already; continue it with --resume, or choose another --out")
        run = assemble(recipe, out)
        if resume:
            loop.resume(run, lambda line: print(line, file=sys.stderr))
        return _train(run)


def _train(run: loop.Run) -> int:
    recipe, out = run.recipe, run.out
    (out / "recipe.json").write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")
    tracker, stop = Tracker(out, run.progress.step, recipe.report.tensorboard), StopRequest()
    tracker.say(f"{loop.num_parameters(run.model):,} parameters; Muon has {_muon_share(run):.0%} of them; {out}")
    tracker.say(_precision(recipe))
    for change in run.changes:
        tracker.metrics(run.progress.step, {"event": "recipe changed", **asdict(change)})
    try:
        finished = loop.train(run, tracker, stop, _sheets(tracker))
        if finished:
            publish_model(run, out / "model")
            tracker.say(f"done after {run.progress.step} steps: {out / 'model'}")
        else:
            why = stop.received.name if stop.received else "stopped"
            tracker.say(f"{why}: saved at step {run.progress.step}; continue with --resume")
    finally:
        stop.restore()
        tracker.close()
    return 0 if finished else EXIT_STOPPED


def publish_state(recipe: Recipe, out: Path, directory: Path) -> int:
    """The newest saved averages as a model directory."""
    if directory.exists():
        raise ValueError(f"{str(directory)!r} exists already; choose another directory to publish to")
    run = assemble(recipe, out)
    loop.resume(run, lambda line: print(line, file=sys.stderr), any_data=True)
    print(publish_model(run, directory))
    return 0


def dry_run(recipe: Recipe, out: Path) -> int:
    """Two real steps, nothing written; prints what the run would be."""
    run = assemble(recipe, out)
    parameters = loop.num_parameters(run.model)
    loop.train_step(run, run.next())  # fills caches; the second step is the one that counts
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
        "model file": f"{2 * parameters / 1e6:.1f} MB in bf16",
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
    def sheet(run: loop.Run) -> None:
        try:
            draw_sheet(run, run.out / "sheets" / f"step-{run.progress.step:08d}.png")
        except (ValueError, RuntimeError, OSError, ImportError, AttributeError, TypeError) as error:
            tracker.say(f"no sample sheet at step {run.progress.step}: {type(error).__name__}: {error}")

    return sheet


def _precision(recipe: Recipe) -> str:
    """What the forward pass computes in, and a warning where that is known to be slow."""
    if not recipe.autocasts:
        return f"float32 on {recipe.device}" + ("" if recipe.autocast == "none" else ", which has no fast bfloat16")
    slow = "" if fast_bf16(recipe.device) else "; this device has no fast bfloat16: autocast=auto would be far faster"
    return f"bfloat16 autocast on {recipe.device}{slow}"


def _muon_share(run: loop.Run) -> float:
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    return sum(sizes[name] for name in run.optimiser.members().get("muon", [])) / sum(sizes.values())


def _kind(path: Path) -> str:
    """The recipe's `kind`; "model" when it has none or cannot be read (load_toml then says why)."""
    try:
        return str(parse_toml(path.read_bytes(), str(path)).get("kind", "model"))
    except (OSError, ValueError):
        return "model"


def _train_codec(options: argparse.Namespace, out: Path) -> int:
    from train.codec import loop as codec_loop

    if options.dry_run or options.publish:
        raise ValueError("--dry-run and --publish are for models; try a codec recipe with steps=2 and another --out")
    recipe = load_toml(options.recipe, options.overrides, codec_loop.CodecRecipe)
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


if __name__ == "__main__":
    sys.exit(main())
