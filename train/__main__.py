"""python -m train RECIPE.toml [key=value ...] [--out DIR] [--resume] [--dry-run] [--publish DIR]

Trains from a recipe. Writes to the output directory (default: runs/ and the recipe's name)

    recipe.json  metrics.jsonl  sheets/  state/step-XXXXXXXX/ (for --resume)  model/ (the finished model)

    --dry-run   build everything, run two steps, print sizes and speed, write nothing
    --resume    continue from the newest intact checkpoint
    --publish   write the model directory DIR from the newest intact checkpoint, without training (also during a run)

The run holds a lock on its output directory; a second run there is an error. A resume may change some keys of the
recipe (train.recipe.CHANGEABLE): each change is printed, and recorded in metrics.jsonl. `kind` in the file is "model"
(the default), "codec" (train.codec.loop) or "stages" (train.stages).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from omni.cli.arguments import Parser, exit_code, fail, warnings_in_lines
from omni.config import load_toml, nearest, parse_toml
from train import runs, stages
from train.codec.loop import CodecRecipe
from train.data.batch import TooManyCorrupt
from train.guard import TooManyNonFinite
from train.lock import refuse_many_processes
from train.recipe import load_recipe

KINDS = ("model", "codec", "stages")
EXIT_NOT_FINITE, EXIT_CORRUPT = 3, 4
EXIT_CODES = """exit codes:
  0   done
  1   a bug, with a traceback; a checkpoint is saved where possible
  2   a mistake in the command, the recipe or its files, or the output directory is in use
  3   too many non-finite steps; a checkpoint is saved
  4   too many unreadable documents (a checkpoint is saved), or damaged model files
  75  stopped by SIGTERM or SIGINT after saving a checkpoint: run again with --resume (a codec: run again)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m train",
        description="Train a model or a codec from a recipe, or several in stages.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces one value of the recipe")
    parser.add_argument("--out", type=Path, help="output directory (default: runs/ and the recipe's name)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="build everything and run two steps, save nothing")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="write DIR from the newest checkpoint and stop")

    def work() -> int:
        return _run(parser.parse_intermixed_args(arguments))

    try:
        with warnings_in_lines():
            return exit_code(work)
    except TooManyNonFinite as error:
        return fail(error, EXIT_NOT_FINITE)
    except TooManyCorrupt as error:
        return fail(error, EXIT_CORRUPT)


def _run(options: argparse.Namespace) -> int:
    refuse_many_processes()
    path, overrides, out = options.recipe, options.overrides, options.out or Path("runs") / options.recipe.stem
    kind = _kind(path)
    if options.publish and kind != "model":
        raise ValueError(f"--publish is for models, and {str(path)!r} is of kind {kind!r}")
    if kind == "stages":
        listed = load_toml(path, [re.sub(r"^changes\.", "last.", text) for text in overrides], stages.StagesConfig)
        plan = stages.plan(listed, str(path), options.out or listed.out or out)
        return stages.dry_run(plan) if options.dry_run else stages.run(plan, options.resume)
    if kind == "codec":
        recipe = load_toml(path, overrides, CodecRecipe)
        return runs.dry_run_codec(recipe, out) if options.dry_run else runs.train_codec(recipe, out)
    recipe = load_recipe(path, overrides)
    if options.publish:
        return runs.publish_state(recipe, out, options.publish)
    return runs.dry_run(recipe, out) if options.dry_run else runs.train_model(recipe, out, options.resume)


def _kind(path: Path) -> str:
    """The file's `kind`; "model" where it has none or cannot be read (load_toml then raises the error)."""
    try:
        kind = str(parse_toml(path.read_bytes(), str(path)).get("kind", "model"))
    except (OSError, ValueError):
        return "model"
    if kind not in KINDS:
        raise ValueError(f"{path}: kind = {kind!r}{nearest(kind, KINDS) or f'; known: {KINDS}'}")
    return kind


if __name__ == "__main__":
    sys.exit(main())
