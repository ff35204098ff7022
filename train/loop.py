"""The training loop. `train_step` is one step; the code around it counts, saves and reports.

A step: pack -> bf16 autocast -> losses as (sum, count) -> backward -> clip -> guard -> optimiser -> average.
Exit: the loop ends at the length of the run, or when `stop_requested` returns true. It saves a checkpoint then, and
also where it ends with an error between two updates of the weights: unreadable data, too many non-finite steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from omni.document import Document
from omni.losses import ScoreNetworks, critic_losses
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.sequence.layout import Batch
from train import checkpoint as state
from train.context_cache import ContextCache
from train.data.batch import PIECES, Packed
from train.data.loader import Loader
from train.data.workers import WorkerLoader
from train.guard import Guard
from train.metrics import Tracker
from train.optim.critic import Critic
from train.optim.ema import Ema
from train.optim.optimiser import Optimiser, OptimiserConfig, multiplier
from train.optim.target import Target
from train.recipe import Recipe, fraction_of

FIRST_STEPS = 20  # one of them must have a supervised segment


@dataclass
class Run:
    """The parts of a run. A resume compares `identity` (see train.checkpoint.load)."""

    recipe: Recipe
    model: Any  # called with (batch, objectives, key, averages, progress, scores) -> dict of Terms; an nn.Module
    objectives: Sequence[Any]
    loader: Loader
    optimiser: Optimiser
    ema: Ema
    guard: Guard
    out: Path
    identity: Mapping[str, Any]
    progress: state.Progress = field(default_factory=state.Progress)
    contexts: ContextCache | None = None  # called in place of the model
    target: Target | None = None
    critic: Critic | None = None
    validation: Callable[[Run], dict[str, float]] | None = None
    held_out: Sequence[Document] = ()
    # where the recipe has data-loading workers:
    open_workers: Callable[[Sequence[int], int, Mapping[str, int]], WorkerLoader] | None = None
    workers: WorkerLoader | None = None
    waited: float = 0.0  # seconds of waiting for data-loading workers, within steps
    changes: Sequence[state.Change] = ()  # of the recipe, since the checkpoint that was resumed
    has_counted: bool = False  # whether any loss term of any step had a count above 0
    between_updates: bool = True  # weights, optimiser and averages are of the same step and can be saved
    _ahead: Packed | Exception | None = None

    @property
    def networks(self) -> tuple[Any, ScoreNetworks | None]:
        """The target network, and teacher and critic; None without them."""
        return self.target and self.target.model, self.critic and self.critic.networks

    @property
    def key(self) -> Key:
        """The key of training: another one changes all noise of the run."""
        return Key(self.recipe.seed).fold("train")

    def fraction(self) -> float:
        """The completed share of the run, in [0, 1]."""
        return self.recipe.fraction(self.progress.step, self.progress.seconds)

    def next(self) -> Packed:
        """The data of the next step."""
        if self.open_workers is None:
            return self.loader.next(self.progress.cursor)
        packed, self._ahead = self._ahead or self._from_workers(), None
        if isinstance(packed, Exception):
            raise packed
        self.loader.counts.update(packed.counts)
        return packed

    def look_ahead(self) -> None:
        """Encode the next step's pictures while the device computes this step. Only with data-loading workers. An error
        is kept and raised by `next`, so that this step completes."""
        if self.workers is None or self.progress.step + 1 >= self.recipe.max_steps:
            return
        start = time.perf_counter()
        try:
            self._ahead = self._from_workers()
        except Exception as error:
            self._ahead = error
        self.waited += time.perf_counter() - start

    def _from_workers(self) -> Packed:
        """The next step of the data-loading workers; starts them at the first call."""
        if self.workers is None:
            assert self.open_workers is not None
            self.progress.cursors = self.progress.cursors or list(range(self.recipe.workers))
            self.workers = self.open_workers(self.progress.cursors, self.progress.step, self.loader.counts)
        return self.workers.next()


def train_step(run: Run, packed: Packed) -> dict[str, Any]:
    """One optimiser step on one packed batch; returns its metrics. Noise is keyed by document, block and copy.

    Each loss is a sum over all batches of the step divided once by their total count, so neither the packing nor
    the shapes of the rows change the objective.
    """
    recipe, step = run.recipe, run.progress.step
    batches = [batch.to(recipe.device) for batch in packed.batches]
    with autocast(recipe):
        averages, scores = run.networks
        key, progress = run.key.fold("draws"), run.fraction()
        call = run.model if run.contexts is None else run.contexts
        parts = [call(batch, run.objectives, key, averages, progress, scores) for batch in batches]
    means = {name: mean_of([part[name] for part in parts]) for name in parts[0]}
    total = torch.stack([parts[0][name].weight * mean for name, mean in means.items()]).sum()
    total.backward()
    run.look_ahead()
    loss, grad_norm, of_critic = float(total.detach()), float(run.optimiser.clip()), {}
    rate = multiplier(recipe.optimiser, step, run.fraction())
    if run.guard.accepts(step, loss, grad_norm, packed.documents):
        run.between_updates = False
        run.optimiser.step(rate)
        run.ema.update()
        if run.target is not None:
            run.target.update()
        of_critic = train_critic(run, batches, rate, packed.documents)
    run.optimiser.zero_grad()
    run.progress.advance(packed.cursor, packed.worker)
    run.between_updates = True
    values = {f"loss/{name}": float(mean.detach()) for name, mean in means.items()}
    values |= unweighted(parts) | of_critic
    positions = sum(batch.num_positions for batch in batches)
    require_counted_terms(run, parts)
    return {"loss": loss, **values, "grad_norm": grad_norm, "rate": rate, "positions": positions}


def train_critic(run: Run, batches: Sequence[Batch], rate: float, documents: Sequence[int]) -> dict[str, float]:
    """The critic's updates after one of the model, each on new samples of it: the mean loss, by name."""
    if run.critic is None:
        return {}
    losses = []
    for number in range(run.critic.steps):
        key = run.key.fold("draws", "critic", number)
        with autocast(run.recipe):
            args = run.objectives, key, run.fraction()
            parts = [critic_losses(run.model, run.critic.networks.critic, batch, *args) for batch in batches]
        loss = torch.stack([mean_of([part[name] for part in parts]) for name in parts[0]]).sum()
        run.critic.update(loss, rate, run.progress.step, documents)
        losses.append(float(loss.detach()))
    return {"loss/critic": sum(losses) / len(losses)}


def autocast(recipe: Recipe) -> torch.autocast:
    """The precision of a forward pass. No cache of casts: a cast made without a graph would cut the graph of later
    uses."""
    return torch.autocast(recipe.device.split(":")[0], torch.bfloat16, enabled=recipe.autocasts, cache_enabled=False)


def require_counted_terms(run: Run, parts: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where no objective counted anything in the first steps."""
    run.has_counted = run.has_counted or any(term.count for part in parts for term in part.values())
    first = min(FIRST_STEPS, run.recipe.max_steps)
    if not run.has_counted and run.progress.step == first:
        raise ValueError(
            f"the first {first} steps had nothing to learn from: no segment of their documents is supervised for any "
            "objective of this recipe; mark the segments to train on (supervise = true)"
        )


def mean_of(terms: Sequence[Any]) -> torch.Tensor:
    """Sum of sums over sum of counts, in float32; 0 where the count is 0."""
    return torch.stack([term.sum.float() for term in terms]).sum() / max(sum(term.count for term in terms), 1.0)


def unweighted(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the losses that have a raw sum (Terms.raw), as `unweighted/NAME`."""
    found = {}
    for name in parts[0]:
        terms = [part[name] for part in parts]
        if any(term.raw is not None for term in terms):
            raws = [Terms(term.raw, term.count) for term in terms if term.raw is not None]
            found[f"unweighted/{name}"] = float(mean_of(raws))
    return found


def train(
    run: Run, tracker: Tracker, stop_requested: Callable[[], bool], sheet: Callable[[Run], None] | None = None
) -> bool:
    """Train to the end of the recipe. Returns False where stopped early; a checkpoint is saved in both cases."""
    report = run.recipe.report
    saved_at = -1
    try:
        while run.fraction() < 1.0 and not stop_requested():
            _step(run, tracker)
            step = run.progress.step
            if step % report.save_steps == 0:
                save(run)
                saved_at = step
            if sheet is not None and report.sheet_steps and step % report.sheet_steps == 0:
                sheet(run)
    except Exception:
        if run.between_updates and saved_at != run.progress.step:
            with suppress(OSError):  # a full disk may have ended the run
                save(run)
                tracker.report(f"saved at step {run.progress.step}; continue with --resume")
        raise
    finally:
        tracker.report(documents_of(run.loader.counts))
    if saved_at != run.progress.step:
        save(run)
    return run.fraction() >= 1.0


def _step(run: Run, tracker: Tracker) -> None:
    """One step, timed and reported."""
    skipped_before, dropped_before = run.guard.num_skipped, run.loader.counts["dropped"]
    started = time.perf_counter()
    packed = run.next()
    loaded = time.perf_counter()
    metrics = train_step(run, packed)
    seconds = time.perf_counter() - started
    run.progress.seconds += seconds
    step = run.progress.step
    waited, run.waited = run.waited, 0.0
    metrics |= {"seconds": seconds, "load_seconds": loaded - started + waited, "cursor": packed.cursor % PIECES}
    plan = run.recipe.validation
    if run.validation is not None and plan is not None and (step % plan.steps == 0 or run.fraction() >= 1.0):
        found = run.validation(run)
        metrics |= {f"validation/{name}": value for name, value in found.items()}
        tracker.report(f"validation at step {step}, averaged weights: {losses_of(found)}")
    tracker.metrics(step - 1, metrics)
    _report_documents(tracker, step - 1, packed, dropped_before)
    if run.guard.num_skipped > skipped_before:
        tracker.report(f"step {step - 1} was not finite and is skipped; its documents are in metrics.jsonl")
        tracker.metrics(step - 1, {"event": "not finite", "documents": packed.documents})
    tracker.progress(_progress_line(run, metrics), important=step % run.recipe.report.log_steps == 0 or step == 1)


def save(run: Run) -> Path:
    """Save a checkpoint of the run; return its directory."""
    progress = run.progress
    in_row = run.guard.num_in_row
    progress.num_nonfinite, progress.num_nonfinite_in_row = run.guard.num_skipped, in_row % run.guard.limit
    progress.documents = dict(run.loader.counts)
    parts = run.model, run.ema, run.optimiser
    more = run.target, run.critic
    return state.save(run.out / "state", progress, *parts, run.identity, run.recipe.report.keep, *more)


def resume(run: Run, report: Callable[[str], None], any_data: bool = False) -> None:
    """Restore the newest intact checkpoint of run.out, bit for bit. Raises ValueError where none fits. Changes of the
    recipe are printed, and kept in run.changes.

    any_data: the data may differ from the checkpoint's: enough to publish it, not to continue training.
    """
    directory = state.newest(run.out / "state", report)
    identity = {name: part for name, part in run.identity.items() if not (any_data and name in ("data", "draws"))}
    run.changes = state.changes(directory, identity)
    run.progress = state.load(directory, run.model, run.ema, run.optimiser, identity, run.target, run.critic)
    run.guard.num_skipped, run.guard.num_in_row = run.progress.num_nonfinite, run.progress.num_nonfinite_in_row
    run.loader.counts.update(run.progress.documents)
    documents = ", ".join(str(cursor % PIECES) for cursor in run.progress.cursors or [run.progress.cursor])
    report(f"resumed {directory} at step {run.progress.step}, document {documents}")
    for change in run.changes:
        report(f"changed: {change}")
    if any(change.key.startswith(("optimiser.", "max_")) for change in run.changes):
        _report_rates(run, state.saved_recipe(directory), report)
    if run.progress.use_workers(run.recipe.workers):
        report("the documents are in another order from here: each data-loading worker has its own share")


def _report_rates(run: Run, saved: Mapping[str, Any], report: Callable[[str], None]) -> None:
    """Print where the next step's learning rate differs from the saved recipe's: a schedule may jump."""
    step, seconds, recipe = run.progress.step, run.progress.seconds, run.recipe
    config = OptimiserConfig.model_validate(saved["optimiser"])
    fraction = fraction_of(saved.get("max_steps", recipe.max_steps), saved.get("max_minutes"), step, seconds)
    was = config.rate * multiplier(config, step, fraction)
    now = recipe.optimiser.rate * multiplier(recipe.optimiser, step, run.fraction())
    if was != now:
        longer = any(change.key.startswith("max_") for change in run.changes)
        hint = "; optimiser.schedule_steps keeps a schedule where the length of the run changes" if longer else ""
        report(f"the learning rate of step {step} is {now:.3g}, by the saved recipe it was {was:.3g}{hint}")


def num_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def documents_of(counts: Mapping[str, int]) -> str:
    """How many documents were trained on, split, dropped, held out and skipped so far, in one line."""
    found = f"{counts.get('documents', 0):,} documents trained on"
    if counts.get("split"):
        found += f", {counts['split']:,} of them split: {counts['pieces']:,} pieces in all"
    if counts.get("dropped"):
        found += f"; {counts['dropped']:,} dropped in part or whole, longer than a row"
    if counts.get("held_out"):
        found += f"; {counts['held_out']:,} held out for validation"
    return found + (f"; {counts['skipped']:,} skipped, unreadable" if counts.get("skipped") else "")


def _report_documents(tracker: Tracker, step: int, packed: Packed, dropped_before: int) -> None:
    """Report skipped and dropped documents: all in metrics.jsonl; on the console the skipped and the first dropped."""
    for index, reason in packed.skipped:
        tracker.report(f"document {index} skipped: {reason}")
        tracker.metrics(step, {"event": "document skipped", "document": index, "reason": reason})
    for index, reason in packed.dropped:
        tracker.metrics(step, {"event": "document dropped", "document": index, "reason": reason})
    if packed.dropped and not dropped_before:
        index, reason = packed.dropped[0]
        tracker.report(f"document {index} dropped, in part or whole: {reason}; others are counted, see metrics.jsonl")


def losses_of(metrics: Mapping[str, Any]) -> str:
    """For the console: each loss, and in brackets its unweighted value, where the two differ."""
    found = []
    for name in (key.removeprefix("loss/") for key in metrics if key.startswith("loss/")):
        loss, raw = metrics[f"loss/{name}"], metrics.get(f"unweighted/{name}")
        found.append(f"{name} {loss:.4f}" + (f" (unweighted {raw:.4f})" if raw not in (None, loss) else ""))
    return "  ".join(found)


def _progress_line(run: Run, metrics: Mapping[str, Any]) -> str:
    """The line of a step on the console."""
    recipe, progress = run.recipe, run.progress
    losses = losses_of(metrics)
    left = progress.seconds / max(run.fraction(), 1e-9) - progress.seconds
    return (
        f"step {progress.step}/{recipe.max_steps} {run.fraction():5.1%}  {losses}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['seconds']:.2f} s  {metrics['positions'] / metrics['seconds']:.0f} positions/s  "
        f"{left / 60:.0f} min left"
    )
