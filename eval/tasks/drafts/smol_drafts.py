"""Heads that draft for one frozen language model on held-out text: accepted tokens, tokens per second, and the rest.

A row of each head and temperature: accepted tokens per pass at full length, in the first mode; the K that the measured
costs choose, and tokens per second at this K over those of autoregressive decoding of the same model, dtype and code.
"native" is native code in float32 arithmetic on bfloat16 weights, "bf16" eager code in bfloat16. Batches are predicted
from costs of passes, measured at that batch. Assisted decoding by a second model is not among the rows: it needs a
smaller model with the same tokenizer beside this one.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field

import omni
from eval.peers import load_causal, quiet_transformers
from eval.task import Context, Measure, Outcome, TaskOptions, names_of, percentage, task
from eval.tasks.drafts.costs import Costs, best_round, draft_costs, pass_costs
from eval.tasks.drafts.decoding import (
    Replies,
    decode,
    endless_engine,
    prompt_ids,
    transformers_runs,
)
from eval.tasks.speed.comparison import machine
from omni.data.source import build_source
from omni.document import Document
from omni.hf.export import export_text
from omni.model import Omni
from omni.nn.native_step import CompiledStep

MODES = ("native", "bf16")
HEADS = ("product", "sequential", "masked", "push_forward")
PASSES = (1, 2, 4, 8, 16)


class DraftsOptions(TaskOptions):
    """heads: model directories by the names of rows: one frozen model, each with its own head. only: those that are
    measured, all by default.

    text: a held-out text file; unit, min_words, opening, request: see the source "text". prompts: replies of `tokens`
    tokens each. repeats: alternating runs; the medians count. lookup: prompt_lookup_num_tokens of transformers.
    verify: of heads with probabilities at temperatures above 0; the others take "coupled".
    """

    heads: dict[str, Path] = {}
    only: tuple[str, ...] = ()
    text: Path | None = None
    unit: str = "line"
    min_words: int = 48
    opening: int = 24
    request: str = "Continue this text."
    prompts: int = Field(default=12, ge=1)
    tokens: int = Field(default=96, ge=4)
    repeats: int = Field(default=3, ge=1)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    modes: tuple[str, ...] = MODES
    batches: tuple[int, ...] = (8, 64)
    verify: str = "rejection"
    lookup: int = Field(default=10, ge=1)
    peers: bool = True
    _known = names_of("modes", MODES)

    @property
    def measured(self) -> dict[str, Path]:
        """The heads that this run measures. ValueError names one without a model directory."""
        found = {name: path for name, path in self.heads.items() if not self.only or name in self.only}
        if wrong := [name for name in self.only if name not in self.heads]:
            raise ValueError(f"only has {wrong[0]!r}, which heads does not name; its names: {', '.join(self.heads)}")
        for name, path in found.items():
            if not (path / "config.json").is_file():
                raise ValueError(
                    f"heads.{name} = {str(path)!r} holds no model; train it with train/recipes/smol/drafts.toml, or "
                    f"leave {name} out with only=..."
                )
        if not found:
            raise ValueError("heads names no model directory; give heads.NAME = DIR")
        return found

    @property
    def ends(self) -> list[str]:
        """The ends of the names of rows."""
        return [f"{mode}_t{temperature:g}" for mode in self.modes for temperature in self.temperatures]


def rows_of(options: DraftsOptions) -> list[str]:
    """Names of all rows of the heads that are measured."""
    names = [name for name in options.heads or HEADS if not options.only or name in options.only]
    costs = [f"cost_{mode}_{num}" for mode in options.modes for num in PASSES]
    plain = [f"{way}_{end}" for end in options.ends for way in ("plain", "transformers", "lookup")]
    per_head = ("drafted", "tokens", "speedup", "identical", *(f"batch_{count}" for count in options.batches))
    heads = [f"{name}_{row}_{end}" for name in names for end in options.ends for row in per_head]
    accepted = [f"{name}_{row}_t{t:g}" for name in names for t in options.temperatures for row in ("accepted", "first")]
    return [*costs, *plain, *heads, *accepted, *(f"{name}_draft_{mode}" for name in names for mode in options.modes)]


@task("smol_drafts", DraftsOptions, rows=rows_of)
def smol_drafts(context: Context, options: DraftsOptions) -> Outcome:
    """Joint-token heads beside a frozen language model: accepted tokens and wall time on held-out text."""
    folders, conditions = options.measured, machine("transformers") if options.peers else machine()
    models = {name: omni.from_pretrained(str(path)) for name, path in folders.items()}
    require_one_target(models)
    prompts = prompts_of(options, context)
    measures, table = [], []
    for mode in options.modes:
        context.report(f"{mode}: {len(prompts)} prompts")
        bench = Bench(options, mode, {name: in_mode(model, mode) for name, model in models.items()}, prompts)
        for measure in bench.measures():
            measures.append(measure)
            context.report(f"  {measure.name} = {measure.value:.3g} {measure.unit}")
        table += bench.table
    note = (
        f"{len(prompts)} prompts of {options.opening} words of held-out text, {options.tokens} tokens each; batch 1 is "
        f"measured, medians of {options.repeats} alternating runs; batches of {list(options.batches)} are predicted "
        f"from measured costs of passes and drafts at that batch; {conditions}. There is no smaller model with this "
        "tokenizer here, so transformers' assisted decoding is not measured."
    )
    return Outcome(measures, notes=[note, *table])


def require_one_target(models: dict[str, Omni]) -> None:
    """ValueError where the models differ in more than their joint-token heads."""
    (first, one), *others = models.items()
    own = {name: value for name, value in one.state_dict().items() if not name.startswith("joint.")}
    for name, model in models.items():
        if model.joint is None or not model.joint.head.is_recurrent:
            raise ValueError(f"heads.{name} has no joint-token head that drafts after a hidden state")
    for name, other in others:
        theirs = other.state_dict()
        if any(part not in theirs or not torch.equal(value, theirs[part]) for part, value in own.items()):
            raise ValueError(f"heads.{name} and heads.{first} are of different models; train both on one frozen model")


def prompts_of(options: DraftsOptions, context: Context) -> list[Document]:
    """Prompts of held-out text, in keyed order. ValueError without a text."""
    if options.text is None:
        raise ValueError("smol_drafts needs a held-out text file: smol_drafts.text=FILE")
    names = ("unit", "min_words", "opening", "request")
    given = {"path": str(options.text), **{name: getattr(options, name) for name in names}}
    source = build_source("text", given, context.key("smol_drafts"), "smol_drafts.text")
    return [Document(source.document(number).segments[:1]) for number in range(options.prompts)]


def in_mode(model: Omni, mode: str) -> Omni:
    """The model in the dtype of a mode: the target rounded to bfloat16 in both."""
    model = model.to(torch.bfloat16)
    return model.float() if mode == "native" else model


@dataclass
class Bench:
    """The measurements of one mode."""

    options: DraftsOptions
    mode: str
    models: dict[str, Omni]
    prompts: Sequence[Document]

    def __post_init__(self) -> None:
        self.table: list[str] = []
        self.natives = {
            name: CompiledStep(model.transformer, model.token.output_weight) if self.mode == "native" else None
            for name, model in self.models.items()
        }
        self.engines = {name: endless_engine(model, self.mode == "native") for name, model in self.models.items()}

    def measures(self) -> Iterator[Measure]:
        """All rows of the mode."""
        first = next(iter(self.models))
        costs = pass_costs(self.models[first], self.natives[first], 1, PASSES, 5 * self.options.repeats)
        for num in PASSES:
            yield Measure(f"cost_{self.mode}_{num}", 1e3 * costs(num), "ms")
        for temperature in self.options.temperatures:
            yield from self._at(temperature, costs)

    def _at(self, temperature: float, costs: Costs) -> Iterator[Measure]:
        """The rows of one temperature."""
        o, end, first = self.options, f"{self.mode}_t{temperature:g}", next(iter(self.models))
        full = {name: self._decode(name, temperature, self._length(name)) for name in self.models}
        plain = self._decode(first, temperature)
        per_position = max(0.0, 1 / plain.rate - costs(1))
        rounds, drafts = {}, {}
        for name, replies in full.items():
            shares = replies.acceptance(self._length(name) - 1)
            lengths = [num for num in (1, 2, 3, 5, 7, 11, 15) if num < self._length(name)]
            drafts[name] = draft_costs(self.models[name], self.natives[name], 1, lengths, 3 * o.repeats)
            rounds[name] = best_round(shares, costs, drafts[name], per_position)
            if self.mode == o.modes[0]:
                yield Measure(f"{name}_accepted_t{temperature:g}", sum(shares), "tokens/pass", _shares(shares))
                yield Measure(f"{name}_first_t{temperature:g}", shares[0], "")
            if temperature == o.temperatures[0]:
                yield Measure(f"{name}_draft_{self.mode}", 1e3 * drafts[name](rounds[name].num_drafted), "ms")
        rates = self._alternate(temperature, {name: one.num_drafted for name, one in rounds.items()})
        base = statistics.median(one.rate for one in rates["plain"])
        yield Measure(f"plain_{end}", base, "tokens/s")
        self.table.append(f"{end}: autoregressive decoding {base:.1f} tokens/s")
        for name, one in rounds.items():
            rate = statistics.median(run.rate for run in rates[name])
            same = [a == b for a, b in zip(rates["plain"][0].texts, rates[name][0].texts, strict=True)]
            yield Measure(f"{name}_drafted_{end}", one.num_drafted, "tokens")
            yield Measure(f"{name}_tokens_{end}", rate, "tokens/s")
            yield Measure(f"{name}_speedup_{end}", rate / base, "x", f"predicted {one.rate / base:.2f}")
            if self._verify(name, temperature) == "coupled":
                yield Measure(f"{name}_identical_{end}", percentage(same), "%")
            self.table.append(
                f"{end}: {name:14} K {one.num_drafted}  {rates[name][0].per_pass:.2f} tokens/pass  {rate:6.1f} tokens/s"
                f"  {rate / base:.2f} x"
            )
            yield from self._batches(name, end, full[name], per_position)
        yield from self._peers(temperature, end)

    def _length(self, name: str) -> int:
        joint = self.models[name].joint
        assert joint is not None
        return joint.head.length

    def _verify(self, name: str, temperature: float) -> str:
        joint = self.models[name].joint
        assert joint is not None
        return self.options.verify if temperature and joint.head.conditional else "coupled"

    def _decode(self, name: str, temperature: float, drafted: int = 0) -> Replies:
        """drafted: K drafted tokens, at most length - 1; 0: autoregressive decoding."""
        o = self.options
        verify = self._verify(name, temperature)
        return decode(self.engines[name], self.prompts, o.tokens, temperature, drafted, verify)

    def _alternate(self, temperature: float, drafted: dict[str, int]) -> dict[str, list[Replies]]:
        """Alternating runs of every way of decoding."""
        first, found = next(iter(self.models)), {name: [] for name in ("plain", *drafted)}
        for _ in range(self.options.repeats):
            found["plain"].append(self._decode(first, temperature))
            for name, num in drafted.items():
                found[name].append(self._decode(name, temperature, num))
        return found

    def _batches(self, name: str, end: str, replies: Replies, per_position: float) -> Iterator[Measure]:
        """Predicted speedups of batches, each with the best K of its own costs."""
        length = self._length(name)
        lengths = [num for num in PASSES if num <= length]
        for count in self.options.batches:
            native = self.natives[name]
            passes = pass_costs(self.models[name], native, count, lengths, self.options.repeats)
            drafts = draft_costs(self.models[name], native, count, (1, length - 1), self.options.repeats)
            best = best_round(replies.acceptance(length - 1), passes, drafts, per_position, count)
            plain = count / (passes(1) + per_position * count)
            note = f"predicted, K = {best.num_drafted}"
            yield Measure(f"{name}_batch_{count}_{end}", best.rate / plain, "x", note)

    def _peers(self, temperature: float, end: str) -> Iterator[Measure]:
        """Rates of transformers on the same weights, in float32 beside native code."""
        if not self.options.peers:
            return
        quiet_transformers()
        model = next(iter(self.models.values()))
        with tempfile.TemporaryDirectory() as folder:
            theirs = load_causal(export_text(model, Path(folder) / "model"), model.token.embedding.weight.dtype)
        ids = [prompt_ids(model, prompt) for prompt in self.prompts]
        assert model.tokenizer is not None
        given = theirs, ids, model.tokenizer.ends, self.options.tokens, temperature, self.options.lookup
        for name, run in transformers_runs(*given).items():
            rate = statistics.median(run() for _ in range(self.options.repeats))
            yield Measure(f"{name}_{end}", rate, "tokens/s")
            self.table.append(f"{end}: {name:14} {rate:6.1f} tokens/s")


def _shares(shares: Sequence[float]) -> str:
    return "share of rounds that accept 1, 2, ... tokens: " + ", ".join(f"{share:.2f}" for share in shares)
