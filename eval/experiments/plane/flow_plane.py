"""Every flow-map objective on 2-D data at one budget: quality against the number of function evaluations.

    flow_plane   the methods of a table (eval/suites/flow_maps.toml), each trained on each data set with several seeds

All methods have the same network, batch and budget of evaluations with a graph; only the options, rates and samplers in
the table differ. The report row `DATA_METHOD_N` is the mean over seeds of the sliced Wasserstein distance to fresh data
after N evaluations; `_spread` its standard deviation at the fewest; `_seconds` the processor time of one training run.
`DATA_floor` is the distance between two independent clouds of the data.
"""

from __future__ import annotations

import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from eval.experiments.plane.data import DATA_SETS, sliced_wasserstein
from eval.experiments.plane.run import Method, Run, RunOptions, run_methods
from eval.jobs import run_jobs
from eval.plots import cloud, grid, log_charts
from eval.task import Context, Curve, Measure, Outcome, Panel, TaskOptions, task
from omni.config import nearest
from omni.media import save_png
from omni.rng import Key
from train.charts import require_matplotlib

SUITES = Path(__file__).parents[2] / "suites"
Results = Mapping[tuple[str, str], Sequence[Run]]  # (data set, method) -> one run per seed


class PlaneOptions(TaskOptions):
    """methods: the table, by name; `methods_of`: the suite of eval/suites whose table it extends. only: names of those
    to run; none is all. workers: processes that share the runs.

    The row `objectives_within` counts the methods whose distance at the fewest evaluations is at most `within` times
    that of `reference` at the most. `many` and `few`: the methods whose numbers of particles are compared.
    folder: of the two output pictures.
    """

    run: RunOptions = RunOptions()
    methods: dict[str, Method] = Field(default_factory=dict)
    methods_of: str | None = None
    only: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ("mixture", "checkerboard")
    seeds: int = Field(default=3, ge=1)
    workers: int = Field(default=1, ge=1)
    reference: str = "flow_matching"
    within: float = Field(default=1.5, gt=0)
    many: str = "moment_matching"
    few: str = "moment_matching_1"
    folder: str = "runs/eval"

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        """The table of `methods_of`, with the methods given here in place of its own."""
        if not isinstance(data, dict) or not data.get("methods_of"):
            return data
        path = SUITES / f"{data['methods_of']}.toml"
        if not path.is_file():
            raise ValueError(f"there is no suite {str(path)!r} to take methods from")
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("flow_plane", {}).get("methods", {})
        return {**data, "methods": table | data.get("methods", {})}

    @model_validator(mode="after")
    def _check(self) -> PlaneOptions:
        if not self.methods:
            return self
        links = [m.trained_as for m in self.methods.values() if m.trained_as]
        for name in (*self.only, *links):
            if name not in self.methods:
                raise ValueError(f"there is no method {name!r}{nearest(name, self.methods)}")
        for name, method in self.methods.items():
            if (method.trained_as is None) == (not method.objective):
                raise ValueError(f"method {name!r}: give an objective, or trained_as another method")
        return self

    @property
    def chosen(self) -> dict[str, Method]:
        """The methods to run, by name."""
        return {name: m for name, m in self.methods.items() if not self.only or name in self.only}

    @property
    def fewest(self) -> int:
        """The smallest number of evaluations."""
        return min(self.run.evaluations)


def plane_rows(options: PlaneOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    rows = [
        f"{data_set}_{name}_{end}"
        for data_set in options.data_sets
        for name, method in options.chosen.items()
        for end in (*method.numbers(options.run), "spread", "seconds")
    ]
    counts = ["objectives_within", *(f"objectives_within_{d}" for d in options.data_sets)]
    return [*counts, "many_worst_seed", "few_to_many", *(f"{d}_floor" for d in options.data_sets), *rows]


@task("flow_plane", PlaneOptions, rows=plane_rows)
def flow_plane(context: Context, options: PlaneOptions) -> Outcome:
    """Every objective on 2-D data at one budget, by sliced Wasserstein distance at 1 to 32 evaluations."""
    require_matplotlib()
    results = run_all(context, options)
    data_distances = {
        data_set: data_distance(data_set, options.run, context.key("floor")) for data_set in options.data_sets
    }
    measures = [*comparisons(results, options)]
    for data_set in options.data_sets:
        measures.append(Measure(f"{data_set}_floor", data_distances[data_set], "distance"))
        for name in options.chosen:
            runs = results[data_set, name]
            measures += [Measure(f"{data_set}_{name}_{n}", mean_at(runs, n), "distance") for n in runs[0].distances]
            measures.append(Measure(f"{data_set}_{name}_spread", spread_at(runs, options.fewest), "distance"))
            seconds = statistics.fmean(run.seconds for run in runs)
            measures.append(Measure(f"{data_set}_{name}_seconds", seconds, "s"))
    notes = [
        f"{options.seeds} seeds; a network of {options.run.depth} layers of {options.run.width}; "
        f"{options.run.budget:,} evaluations with a graph in training; {options.run.num_points:,} points, "
        f"{options.run.num_projections} directions; mean +- standard deviation over seeds",
        "graph, plain: evaluations a point and step, with and without a graph (a derivative counts as two); s: "
        "processor seconds of training on one thread",
        *(table(results, options, data_set) for data_set in options.data_sets),
    ]
    return Outcome(measures, panels(results, options), curves(results, data_distances, options), notes)


# ---- running -------------------------------------------------------------------------------------------------------


def run_all(context: Context, options: PlaneOptions) -> dict[tuple[str, str], list[Run]]:
    """Methods that share weights run in one job. A result does not depend on other jobs or on the worker."""
    groups: dict[str, dict[str, Method]] = {}
    for name, method in options.chosen.items():
        groups.setdefault(method.trained_as or name, {})[name] = method
    jobs = [
        (options.methods[base], members, data_set, options.run, context.key("plane", seed))
        for base, members in groups.items()
        for data_set in options.data_sets
        for seed in range(options.seeds)
    ]
    found: dict[int, dict[str, Run]] = {}
    for number, runs in run_jobs(run_methods, jobs, options.workers):
        found[number] = runs
        for name, run in runs.items():
            distances = "  ".join(f"{n}: {d:.3f}" for n, d in run.distances.items())
            context.report(f"  {len(found)}/{len(jobs)} {jobs[number][2]} {name}  {distances}  ({run.seconds:.1f} s)")
    results: dict[tuple[str, str], list[Run]] = {}
    for number, job in enumerate(jobs):  # in the order of the table
        for name, run in found[number].items():
            results.setdefault((job[2], name), []).append(run)
    return results


def data_distance(data_set: str, options: RunOptions, key: Key) -> float:
    """The mean distance of two independent clouds of the data."""
    draw = DATA_SETS.get(data_set)
    clouds = [draw(key.fold(n), options.num_points) for n in range(6)]
    pairs = zip(clouds[::2], clouds[1::2], strict=True)
    return statistics.fmean(sliced_wasserstein(a, b, key, options.num_projections) for a, b in pairs)


# ---- what is read off ----------------------------------------------------------------------------------------------


def mean_at(runs: Sequence[Run], n: int) -> float:
    """The mean over seeds of the distance after n evaluations."""
    return statistics.fmean(run.distances[n] for run in runs)


def spread_at(runs: Sequence[Run], n: int) -> float:
    """The standard deviation over seeds; 0 for one."""
    return statistics.stdev(run.distances[n] for run in runs) if len(runs) > 1 else 0.0


def comparisons(results: Results, options: PlaneOptions) -> Iterator[Measure]:
    """The counts and ratios that have bars, where their methods were run."""
    data_sets, few = options.data_sets, options.fewest
    if options.reference in options.chosen:
        trained = [name for name, method in options.chosen.items() if method.trained_as is None]
        within: dict[str, set[str]] = {}
        for data_set in data_sets:
            limit = options.within * mean_at(results[data_set, options.reference], max(options.run.evaluations))
            within[data_set] = {name for name in trained if mean_at(results[data_set, name], few) <= limit}
        yield Measure("objectives_within", len(set.intersection(*within.values())), "objectives")
        for data_set, names in within.items():
            yield Measure(f"objectives_within_{data_set}", len(names), "objectives")
    if options.many in options.chosen:
        ratios = []
        for data_set in data_sets:
            values = [run.distances[few] for run in results[data_set, options.many]]
            ratios.append(max(values) / min(values))
        yield Measure("many_worst_seed", max(ratios), "x the best")
        if options.few in options.chosen:
            pairs = ((results[d, options.few], results[d, options.many]) for d in data_sets)
            yield Measure("few_to_many", min(mean_at(a, few) / mean_at(b, few) for a, b in pairs), "x")


def table(results: Results, options: PlaneOptions, data_set: str) -> str:
    """One line per method: its cost, and mean +- spread of the distance by number of evaluations."""
    heading = ["steps", "graph", "plain", "s", *(f"{n} eval." for n in options.run.evaluations)]
    lines = [f"{data_set:28}" + "".join(f"{cell:>{14 if i > 3 else 7}}" for i, cell in enumerate(heading))]
    for name in options.chosen:
        runs = results[data_set, name]
        method, run = options.methods[name], runs[0]
        batch = (options.methods[method.trained_as] if method.trained_as else method).batch * run.steps
        cost = [str(run.steps), f"{run.count.gradient / batch:.1f}", f"{run.count.plain / batch:.1f}"]
        cost.append(f"{statistics.fmean(r.seconds for r in runs):.1f}")
        cells = [f"{mean_at(runs, n):.3f} +- {spread_at(runs, n):.3f}" for n in run.distances]
        lines.append(f"{name:28}" + "".join(f"{c:>7}" for c in cost) + "".join(f"{c:>16}" for c in cells))
    return "\n".join(lines)


def curves(results: Results, data_distances: Mapping[str, float], options: PlaneOptions) -> list[Curve]:
    """The curves of every data set, also as the file `flow_maps_plane.png`."""
    panels = {}
    for d in options.data_sets:
        lines = {
            name: [(float(n), mean_at(results[d, name], n)) for n in method.numbers(options.run)]
            for name, method in options.chosen.items()
        }
        ends = (float(options.fewest), float(max(options.run.evaluations)))
        panels[d] = lines | {"data against data": [(n, data_distances[d]) for n in ends]}
    picture = log_charts(panels, "evaluations of the network", "sliced Wasserstein distance")
    save_png(picture, output_path(options, "flow_maps_plane.png"))
    return [Curve(data_set, "evaluations", "distance", lines) for data_set, lines in panels.items()]


def panels(results: Results, options: PlaneOptions, across: int = 8) -> list[Panel]:
    """Samples of one evaluation, first seed; also as the file `flow_maps_samples.png`."""
    rows: list[list[tuple[str, torch.Tensor]]] = []
    for data_set in options.data_sets:
        cells = [(data_set, cloud(DATA_SETS.get(data_set)(Key(0).fold("picture"), options.run.num_points)))]
        cells += [(name, cloud(results[data_set, name][0].points)) for name in options.chosen]
        rows += [cells[i : i + across] for i in range(0, len(cells), across)]
    save_png(grid(rows), output_path(options, "flow_maps_samples.png"))
    return [Panel(name, answer=(pixels,)) for row in rows for name, pixels in row]


def output_path(options: PlaneOptions, name: str) -> Path:
    """A path in the output folder, which is made."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
