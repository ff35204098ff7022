"""Flow-map objectives on CIFAR-10 with classes: Frechet distance against function evaluations, at equal device time.

    cifar10   the methods of a table (eval/suites/cifar10.toml), each trained for `minutes_per_objective`

All methods have the same network, Omni: a short chat names the class, and a picture is one block of pixel patches. The
report row `METHOD_N` is the mean over seeds of the Frechet distance between `num_samples` pictures sampled in N steps
and the training pictures; with several seeds `METHOD_N_spread` is its standard deviation. Features are those of a
classifier that the task trains first (see judge.py); `test_distance` is the distance of the test pictures.
`best_to_REFERENCE_N` is the smallest distance of the other methods over the reference's, both in N steps.

A method that fails, or has too many non-finite steps, does not affect the others: `METHOD_failed` counts its seeds
without a result, with the reason as its unit. Each row is printed at once.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from eval.experiments.cifar.draw import Canvas, draw_pictures, sheet
from eval.experiments.cifar.judge import (
    ClassifierOptions,
    Moments,
    accuracy,
    frechet_distance,
    load_features,
    moments,
    train_classifier,
)  # fmt: skip
from eval.experiments.cifar.learner import REHEARSALS, Learner, Method, Trained, TrainOptions, train
from eval.experiments.cifar.patches import Patches, lay_pictures
from eval.experiments.cifar.pictures import NUM_CLASSES, Pictures, load_pictures
from eval.plots import log_charts
from eval.task import Context, Curve, Measure, Outcome, Panel, TaskOptions, task
from omni.config import nearest
from omni.media import save_png
from omni.nn.precision import require_device
from omni.rng import Key
from omni.sequence.layout import Batch
from train.charts import require_matplotlib

PASS = 500  # pictures sampled at once


class Cifar10Options(TaskOptions):
    """data: the folder with train.parquet and test.parquet. pictures: number of training and of test pictures; None:
    all. workers: processes that decode them. device: None is the suite's.

    methods: the table, by name; only: names of those to run, none is all. reference: the method to compare with.
    evaluations: numbers of sampling steps. minutes_per_objective: device time of every method. inception: a TorchScript
    file of features in place of the classifier's. folder: of the two output pictures.
    """

    data: str | None = None
    device: str | None = None
    pictures: int | None = Field(default=None, ge=NUM_CLASSES)
    workers: int = Field(default=1, ge=1)
    patch: int = Field(default=4, ge=1)
    methods: dict[str, Method] = Field(default_factory=dict)
    only: tuple[str, ...] = ()
    reference: str = "flow_matching"
    minutes_per_objective: float = Field(default=0.4, gt=0)
    seeds: int = Field(default=1, ge=1)
    evaluations: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = Field(default=10_000, ge=NUM_CLASSES)
    train: TrainOptions = TrainOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    inception: str | None = None
    folder: str = "runs/eval"

    @field_validator("device")
    @classmethod
    def _is_there(cls, name: str | None) -> str | None:
        return None if name is None else require_device(name)

    @model_validator(mode="after")
    def _check(self) -> Cifar10Options:
        for name in self.only:
            if name not in self.methods:
                raise ValueError(f"there is no method {name!r}{nearest(name, self.methods)}")
        return self

    @property
    def chosen(self) -> dict[str, Method]:
        """The methods to run, by name."""
        return {name: m for name, m in self.methods.items() if not self.only or name in self.only}

    def numbers(self, method: Method) -> list[int]:
        """Numbers of sampling steps, ascending."""
        return sorted(set(method.evaluations or self.evaluations))


# Ends of the report rows of a method besides its distances.
METHOD_ROWS = ("steps", "images", "minutes", "step_time", "rehearsal", "nonfinite", "failed")


def cifar10_rows(options: Cifar10Options) -> list[str]:
    """All possible report rows; suites set bars on these names."""
    judge = ["floor", *([] if options.inception else ["classifier_accuracy", "classifier_seconds"])]
    rows = [*(f"best_to_{options.reference}_{n}" for n in sorted(set(options.evaluations))), *judge]
    for name, method in options.chosen.items():
        spreads = ("", "_spread") if options.seeds > 1 else ("",)
        rows += [f"{name}_{n}{spread}" for n in options.numbers(method) for spread in spreads]
        rows += [f"{name}_{what}" for what in METHOD_ROWS]
    return rows


@dataclass(frozen=True, eq=False)
class Lab:
    """Shared by all methods: the data, their normalised patches, the judge, and the documents to sample into."""

    options: Cifar10Options
    pictures: Pictures
    patches: Patches
    features: Any  # uint8 (N, P, P, 3) -> (N, D)
    wanted: Moments
    blank: Batch
    labels: Tensor  # (num_samples,) int64: the classes in turn

    def canvas(self, key: Key) -> Canvas:
        """The canvas with the noise of a seed."""
        noise = key.fold("start").normal((len(self.labels), *self.patches.shape)).to(self.labels.device)
        return Canvas(self.blank, self.patches, noise, self.labels)

    def distance(self, pixels: Tensor) -> float:
        """The distance of uint8 pictures (N, P, P, 3) from the training pictures."""
        return frechet_distance(moments(self.features, pixels), self.wanted)


@dataclass(frozen=True)
class Run:
    """One method with one seed: distance by number of steps, the first ten pictures of each, and the training."""

    distances: Mapping[int, float]
    drawn: Mapping[int, Tensor]  # uint8 (10, P, P, 3), CPU
    trained: Trained


@dataclass
class Results:
    """By method: runs in the order of seeds, and the errors of missing runs."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def mean(self, name: str, n: int) -> float:
        """The mean over seeds; NaN without runs."""
        values = [run.distances[n] for run in self.runs.get(name, []) if n in run.distances]
        return statistics.fmean(values) if values else float("nan")


@task("cifar10", Cifar10Options, rows=cifar10_rows)
def cifar10(context: Context, options: Cifar10Options) -> Outcome:
    """Flow-map objectives on CIFAR-10 at equal device time, by Frechet distance at 1 to 8 evaluations."""
    if options.data is None:
        raise ValueError("cifar10 reads files: give cifar10.data=FOLDER, which holds train.parquet and test.parquet")
    require_matplotlib()
    with float32_products("highest" if options.train.tangents == "central" else "high"):
        lab, judged = prepare(context, options)
        results = run_all(context, lab)
    test_distance = next(measure.value for measure in judged if measure.name == "floor")
    measures = [*ratios(results, options), *judged]
    for name, method in options.chosen.items():
        measures += rows_of_method(name, method, results, options)
    return Outcome(
        measures,
        panels(results, options),
        curves(results, test_distance, options),
        notes(lab, results, lab.labels.device),
    )


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """TF32 outside autocast ("high"); differences in float32 need full precision ("highest")."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- running -------------------------------------------------------------------------------------------------------


def prepare(context: Context, options: Cifar10Options) -> tuple[Lab, list[Measure]]:
    """Read the data and build the judge. Returns its rows too."""
    device, folder, start = options.device or context.device, Path(options.data or ""), time.perf_counter()
    paths = [folder / f"{part}.parquet" for part in ("train", "test")]
    train_set, test_set = load_pictures(paths, options.pictures, options.workers, device)
    context.report(f"  {len(train_set)} + {len(test_set)} pictures in {time.perf_counter() - start:.1f} s")
    measures: list[Measure] = []
    if options.inception is None:
        start = time.perf_counter()
        classifier = train_classifier(train_set, options.classifier, context.key("cifar10", "classifier"))
        measures.append(Measure("classifier_accuracy", accuracy(classifier, test_set), "%"))
        measures.append(Measure("classifier_seconds", time.perf_counter() - start, "s"))
        features: Any = classifier.features
    else:
        features = load_features(options.inception, device)
    wanted, patches = moments(features, train_set.pixels), Patches.of(train_set, options.patch)
    test_distance = frechet_distance(moments(features, test_set.pixels), wanted)
    measures.insert(0, Measure("floor", test_distance, "distance"))
    report_rows(context, measures)
    labels = torch.arange(options.num_samples, device=device) % NUM_CLASSES
    blank = lay_pictures(min(PASS, options.num_samples), patches)
    return Lab(options, train_set, patches, features, wanted, blank, labels), measures


def run_all(context: Context, lab: Lab) -> Results:
    """Run seed by seed, so that every method has a result before any has two. Within a seed all methods start from the
    same weights and get the same pictures in the same order."""
    results, options = Results(), lab.options
    for seed in range(options.seeds):
        key = context.key("cifar10", seed)
        canvas = lab.canvas(key)
        for name, method in options.chosen.items():
            try:
                results.runs.setdefault(name, []).append(run_method(lab, method, canvas, key))
            except Exception as error:  # an error in one method does not stop the others
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                results.failures.setdefault(name, []).append(reason)
                context.report("".join(traceback.format_exception(error)))
            context.report(f"  seed {seed}, {name}")
            report_rows(context, rows_of_method(name, method, results, options))
            release(lab.labels.device)
    return results


def run_method(lab: Lab, method: Method, canvas: Canvas, key: Key) -> Run:
    """Train and sample. Raises ValueError where too many steps were not finite."""
    options = lab.options
    learner = Learner(method, options.train, lab.pictures, lab.patches, key.fold("train"))
    trained = train(learner, 60 * options.minutes_per_objective)
    if learner.guard.too_many:
        raise ValueError(f"stopped after {trained.nonfinite} steps that were not finite, of {trained.steps}")
    distances, drawn = {}, {}
    for n in options.numbers(method):
        pixels = draw_pictures(trained.model, method, n, canvas, key.fold("sample", n))
        distances[n], drawn[n] = lab.distance(pixels), pixels[:NUM_CLASSES].cpu()
    return Run(distances, drawn, trained)


def release(device: torch.device) -> None:
    """Free the memory of the last method, so that the next one's does not depend on it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- what is read off ----------------------------------------------------------------------------------------------


def ratios(results: Results, options: Cifar10Options) -> Iterator[Measure]:
    """Ratios to the reference, where it and another method have a result."""
    others = [name for name in options.chosen if name != options.reference]
    for n in sorted(set(options.evaluations)):
        own = results.mean(options.reference, n)
        found = [value for value in (results.mean(name, n) for name in others) if value == value]
        if found and own == own:
            yield Measure(f"best_to_{options.reference}_{n}", min(found) / own, "x")


def rows_of_method(name: str, method: Method, results: Results, options: Cifar10Options) -> list[Measure]:
    """The report rows of a method so far; NaN without a result."""
    runs, failures, measures = results.runs.get(name, []), results.failures.get(name, []), []
    for n in options.numbers(method):
        measures.append(Measure(f"{name}_{n}", results.mean(name, n), "distance"))
        if options.seeds > 1:
            values = [run.distances[n] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            measures.append(Measure(f"{name}_{n}_spread", spread, "distance"))
    trained = [run.trained for run in runs]
    whole = {
        "steps": ([t.steps for t in trained], "steps"),
        "images": ([t.steps * t.num_items for t in trained], "noisy pictures"),
        "minutes": ([t.seconds / 60 for t in trained], "min"),
        "step_time": ([1e3 * t.seconds / max(t.steps, 1) for t in trained], "ms"),
        "rehearsal": ([t.rehearsal for t in trained], "s"),
        "nonfinite": ([t.nonfinite for t in trained], "steps"),
    }
    for what, (numbers, unit) in whole.items():
        measures.append(Measure(f"{name}_{what}", statistics.fmean(numbers) if numbers else float("nan"), unit))
    reason = f" ({failures[-1]})" if failures else ""
    measures.append(Measure(f"{name}_failed", len(failures), f"of {len(runs) + len(failures)} seeds{reason}"))
    return measures


def report_rows(context: Context, measures: list[Measure]) -> None:
    """Print rows at once."""
    for measure in measures:
        context.report(f"    {measure.name} = {measure.value:.5g} {measure.unit}")


def notes(lab: Lab, results: Results, device: torch.device) -> list[str]:
    """Machine, sizes, time, and the errors of failed methods."""
    options, own = lab.options, lab.options.train
    on_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} CPU thread(s)"
    sizes = [sum(p.numel() for p in run.trained.model.parameters()) for runs in results.runs.values() for run in runs]
    return [
        f"{machine}, torch {torch.__version__}; {options.seeds} seed(s); Omni of {own.depth} layers of {own.width}"
        f"{f', {max(sizes) / 1e6:.1f} M parameters' if sizes else ''}, {own.batch} noisy pictures a step, patches of "
        f"{options.patch} pixels, {'bfloat16' if on_cuda else 'float32'}"
        f"{', compiled' if own.compile else ''}, tangents {own.tangents}; {options.num_samples} pictures drawn",
        f"{60 * options.minutes_per_objective:.1f} s of device time for each method; the clock starts after "
        f"{REHEARSALS} steps on the same shapes, which compile everything and are then undone (rehearsal)",
        *(f"{name} failed: {reason}" for name, reasons in results.failures.items() for reason in reasons),
    ]


def curves(results: Results, test_distance: float, options: Cifar10Options) -> list[Curve]:
    """The curves of distance, also as the file `cifar10.png`."""
    lines = {
        name: [(float(n), results.mean(name, n)) for n in options.numbers(options.methods[name])]
        for name in options.chosen
        if results.runs.get(name)
    }
    if not lines:
        return []
    title = f"CIFAR-10 (test pictures: {test_distance:.3g})"
    picture = log_charts({title: lines}, "evaluations of the network", "Frechet distance")
    save_png(picture, output_path(options, "cifar10.png"))
    return [Curve(title, "evaluations", "Frechet distance", lines)]


def panels(results: Results, options: Cifar10Options) -> list[Panel]:
    """One picture of each class by method and number of steps, first seed; also as the file `cifar10_samples.png`."""
    rows = {
        f"{name}, {n}": pictures
        for name in options.chosen
        for run in results.runs.get(name, [])[:1]
        for n, pictures in run.drawn.items()
    }
    if rows:
        save_png(sheet(rows), output_path(options, "cifar10_samples.png"))
    return [Panel(name, answer=tuple(pictures)) for name, pictures in rows.items()]


def output_path(options: Cifar10Options, name: str) -> Path:
    """A path in the output folder, which is made."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
