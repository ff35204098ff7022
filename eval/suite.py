"""Run an evaluation suite:  python -m eval SUITE.toml [key=value ...] [--json FILE] [--html FILE]

    python -m eval eval/suites/emoji_world.toml
    python -m eval eval/suites/emoji_world.toml tasks=draw draw.requests=32 --json draw.json
    python -m eval poker                    the suite of that name in eval/suites
    python -m eval --list

A suite names tasks and has one table of options per task, with the bars of its report rows. Every row is {name, value,
unit, bar, holds, command}, and a note where the task has one; `holds` is true where there is no bar. Exit code: 0 where
every bar holds, 1 where one does not, 2 for bad usage, 3 where a task crashed. JSON and HTML are written whole at the
end, or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, create_model, field_validator

from eval.report import html_report
from eval.results import Row, TaskResult
from eval.task import TASKS, Bar, Context, Measure, TaskOptions
from omni.cli.arguments import Parser, exit_code, fail
from omni.config import Frozen, load_toml, nearest
from omni.errors import check_place
from omni.nn.precision import require_device

COLUMNS = ("name", "value", "unit", "bar", "holds", "command")
DEFAULT_HTML_FOLDER = Path("runs/eval")
SUITES = Path(__file__).parent / "suites"


class SuiteBase(Frozen):
    """The keys of every suite; the full schema adds one table per registered task."""

    title: str
    tasks: tuple[str, ...] = Field(min_length=1)
    model: str | None = None  # a model directory; none is the bundled model
    font: str | None = None  # a colour-emoji font file; none finds the installed one
    seed: int = 0
    threads: int = Field(default=1, ge=1, le=1024)
    device: str = "cpu"  # of the model; comparisons of speed run on the CPU

    @field_validator("device")
    @classmethod
    def _is_there(cls, name: str) -> str:
        return require_device(name)

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        """A str is a list of names between commas."""
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def suite_schema() -> type[SuiteBase]:
    """SuiteBase plus one table of options per registered task."""
    tables: dict[str, Any] = {name: _table(name) for name in TASKS.names()}
    return create_model("Suite", __base__=SuiteBase, **tables)


def _table(name: str) -> tuple[Any, Any]:
    """The type and default of a task's table. Of a plug-in that cannot be imported: any; the error comes if it runs."""
    try:
        options = TASKS.get(name).options
    except ValueError:
        return dict[str, Any], {}
    return options, options()


def load_suite(path: str | Path, overrides: Sequence[str]) -> SuiteBase:
    """Read and validate a suite. Raises ValueError naming the source and the nearest right key, task or row."""
    suite = load_toml(path, overrides, suite_schema())
    for name in suite.tasks:
        task = TASKS.get(name)
        options: TaskOptions = getattr(suite, name)
        known = task.rows_of(options)
        for row in options.bars:
            if row not in known:
                hint = nearest(row, known) or f"; its rows: {', '.join(known)}"
                raise ValueError(f"{path}: task {name!r} has no row {row!r} to set a bar on{hint}")
    return suite


def suite_path(given: str) -> Path:
    """A suite file, or the name of one that comes with this package: `poker` is eval/suites/poker.toml."""
    named = SUITES / f"{given}.toml"
    return named if named.is_file() and not Path(given).is_file() else Path(given)


def row_command(path: str | Path, overrides: Sequence[str], task_name: str) -> str:
    """The command that reproduces a row: the same suite, its task alone, and the overrides that apply to it."""
    others = {"tasks", *TASKS.names()} - {task_name}
    kept = [o for o in overrides if o.partition("=")[0].partition(".")[0].strip() not in others]
    return shlex.join(["python", "-m", "eval", str(path), f"tasks={task_name}", *kept])


def run_suite(suite: SuiteBase, path: str | Path, overrides: Sequence[str], context: Context) -> Iterator[TaskResult]:
    """Run the tasks in order; yield each result."""
    for name in suite.tasks:
        task = TASKS.get(name)
        options: TaskOptions = getattr(suite, name)
        start = time.perf_counter()
        outcome = task.run(context, options)
        seconds = time.perf_counter() - start
        given = tuple(m.name for m in outcome.measures)
        known = task.rows_of(options)
        assert set(given) <= set(known) and len(given) == len(set(given)), (name, given, known)
        absent = [Measure(row, math.nan, "") for row in options.bars if row not in given]  # such a bar does not hold
        command = row_command(path, overrides, name)
        measures = [*outcome.measures, *absent]
        rows = [_row(name, m, options.bars.get(m.name), command) for m in measures]
        yield TaskResult(name, rows, outcome, seconds)


def _row(task_name: str, measure: Measure, bar: str | None, command: str) -> Row:
    """A measure as a report row, with its bar."""
    value = float(measure.value)
    holds = bar is None or Bar.parse(bar).holds(value)
    shown = value if math.isfinite(value) else None
    return Row(f"{task_name}.{measure.name}", shown, measure.unit, bar, holds, command, measure.note)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as an aligned text table with a heading."""
    cells = [COLUMNS] + [(r.name, format_value(r.value), r.unit, r.bar or "", _mark(r), r.command) for r in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    right = {1}
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _mark(row: Row) -> str:
    """Whether the bar holds, in a word; empty without a bar."""
    return "" if row.bar is None else "yes" if row.holds else "NO"


def format_value(value: float | None) -> str:
    """Three or four significant digits at any magnitude."""
    if value is None:
        return "nan"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e6 else f"{value:.3g}"


def write_whole(path: str | Path, text: str) -> None:
    """Write a file atomically. Raises ValueError where the path cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ValueError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another place") from None


def _parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(prog="python -m eval", description="Run an evaluation suite.")
    parser.add_argument("suite", nargs="?", metavar="SUITE.toml", help="suite file, e.g. eval/suites/emoji_world.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. tasks=draw draw.requests=32 model=DIR")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--html", metavar="FILE", help="write the report here (default: runs/eval/SUITE.html)")
    parser.add_argument("--list", action="store_true", help="list the tasks, their rows and options, and stop")
    return parser


def list_tasks() -> str:
    """Name, rows and options of every task, as text."""
    lines = []
    for name in TASKS.names():
        try:
            task = TASKS.get(name)
        except ValueError as error:  # a plug-in that cannot be imported
            lines.append(f"{name}: {error}")
            continue
        options = {k: v.default for k, v in task.options.model_fields.items() if k != "bars"}
        lines.append(f"{name}: {(task.run.__doc__ or '').strip().splitlines()[0]}")
        lines.append(f"    rows     {', '.join(task.rows)}")
        lines.append(f"    options  {', '.join(f'{k}={v}' for k, v in options.items())}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = _parser()
    try:
        args = parser.parse_intermixed_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    except ValueError as error:
        return fail(error)
    if args.list:
        print(list_tasks())
        return 0
    if args.suite is None:
        print("error: no suite given; try `python -m eval eval/suites/emoji_world.toml`", file=sys.stderr)
        return 2
    try:
        return exit_code(lambda: _run(args))
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 3


def _run(args: argparse.Namespace) -> int:
    """Run the suite of parsed arguments; returns the exit code."""
    suite = load_suite(suite_path(args.suite), args.overrides)
    html = args.html or DEFAULT_HTML_FOLDER / f"{Path(args.suite).stem}.html"
    for name, place in (("--json", args.json), ("--html", html)):
        if place:
            check_place(Path(place), name, is_folder=False)
    torch.set_num_threads(suite.threads)
    context = Context(suite.model, suite.font, suite.seed, lambda text: print(text, flush=True), device=suite.device)
    results = []
    for result in run_suite(suite, args.suite, args.overrides, context):
        results.append(result)
        context.report(f"{result.name}: {result.seconds:.1f} s")
        for note in result.outcome.notes:
            context.report(f"  {note}")
        for row in result.rows:
            warning = "" if row.holds else f"  (the bar is {row.bar})"
            context.report(f"  {row.name} = {format_value(row.value)} {row.unit}{warning}")
    rows = [row for result in results for row in result.rows]
    print("\n" + format_table(rows))
    if args.json:
        write_whole(args.json, json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False) + "\n")
    write_whole(html, html_report(suite.title, results, f"seed {suite.seed}, {suite.threads} thread(s)"))
    failing = [row.name for row in rows if not row.holds]
    verdict = f"{len(failing)} bar(s) do not hold: {', '.join(failing)}" if failing else "every bar holds"
    print(f"\n{verdict}; report: {html}")
    return 1 if failing else 0
