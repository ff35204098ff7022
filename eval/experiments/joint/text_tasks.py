"""Joint-token heads on real text, and speculative decoding of a model's own text.

    joint_text    the heads of a table, each trained at one budget on one frozen backbone, byte by byte
    text_blocks   a model's replies to the emoji world's held-out requests: speculative and autoregressive decoding

Report rows of joint_text, by head: `_nll`, nats per byte of held-out text (the notes list which are exact and which are
bounds); `_coupled`, `_greedy`, `_rejection`, `_block`, accepted drafted tokens per draft under that verification;
`_coupled_gain` and `_rejection_gain`, their ratios to the product head; `_tokens_per_second` with the fastest lossless
verification; `_free_N`, nats per byte, under autoregressive decoding, of unverified blocks from N passes (`plain_free`:
of autoregressive samples). `dependence` is the mutual information of the bytes of a block in nats, estimated as the
product head's loss minus autoregressive decoding's, summed over a block.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator

from eval.experiments.joint.heads_on_text import (
    PlainResult,
    Text,
    TextLine,
    TextOptions,
    TextResult,
    measure_plain,
    train_and_measure,
    train_backbone,
)
from eval.jobs import run_jobs
from eval.requests import atlas_of, requests
from eval.task import Context, Curve, Measure, Outcome, TaskOptions, percentage, task
from omni.config import nearest
from omni.data.emoji_world import EmojiWorld
from omni.data.emoji_world.documents import prompt_of
from omni.document import Document
from omni.document import Text as TextSegment
from omni.generation.context import append_of, run_context
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStart, BlockStep, Drafted, Stop, TextDelta
from omni.heads.joint import build_head
from omni.nn.cache import History
from omni.text.compose import header_length

# Kinds of requests of text_blocks; weights of the tasks whose words joint_text reads.
KINDS = ("draw", "name", "scene", "edit", "open", "story", "text", "chat")
MIXTURE = {"draw": 0.1, "name": 0.1, "story": 0.3, "text": 0.4, "chat": 0.1}
# Verifications that need the probabilities of a draft.
NEED_LOG_Q = ("rejection", "block")


class JointTextOptions(TaskOptions):
    """train_text, test_text: UTF-8 files; without them, the emoji world's words (`documents` of each split). heads: the
    table, by name. only: names of those to run; none is all. workers: processes that share the heads."""

    run: TextOptions = TextOptions()
    train_text: str | None = None
    test_text: str | None = None
    documents: int = Field(default=2000, ge=10)
    heads: dict[str, TextLine] = Field(default_factory=dict)
    only: tuple[str, ...] = ()
    workers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> JointTextOptions:
        if (self.train_text is None) != (self.test_text is None):
            raise ValueError("give both train_text and test_text, or neither for the emoji world's words")
        for name in self.only:
            if name not in self.heads:
                raise ValueError(f"there is no head {name!r} in the table{nearest(name, self.heads)}")
        for line in self.heads.values():
            for options in (line.options, line.log_q_options or line.options):
                build_head(line.head, options, self.run.length, 257, self.run.width)
        return self

    @property
    def chosen(self) -> dict[str, TextLine]:
        """The heads to run, by name."""
        return {name: line for name, line in self.heads.items() if not self.only or name in self.only}


def text_rows(options: JointTextOptions) -> list[str]:
    """All possible rows; a head without probabilities has no rows of the verifications that need them."""
    rows = ["plain_nll", "plain_free", "plain_tokens_per_second", "dependence"]
    for name, line in options.chosen.items():
        ends = [
            "nll",
            "coupled",
            "greedy",
            *NEED_LOG_Q,
            "coupled_gain",
            "rejection_gain",
            "tokens_per_second",
            "seconds",
        ]
        rows += [f"{name}_{end}" for end in (*ends, *(f"free_{n}" for n in sorted({1, *line.passes})))]
    return rows


@task("joint_text", JointTextOptions, rows=text_rows)
def joint_text(context: Context, options: JointTextOptions) -> Outcome:
    """Heads on real text: accepted tokens and speed of speculative decoding."""
    text, key = _text(context, options), context.key("joint_text")
    backbone = train_backbone(text, options.run, key)
    plain = measure_plain(backbone, text, options.run, key)
    context.report(f"  autoregressive decoding: {plain.scores.mean:.3f} nats per byte")
    lines, found = options.chosen, {}
    jobs = [(backbone, line, text, options.run, key) for line in lines.values()]
    for number, result in run_jobs(train_and_measure, jobs, options.workers):
        name = list(lines)[number]
        found[name] = result
        accepted = "  ".join(f"{kind} {rounds.accepted:.2f}" for kind, rounds in result.rounds.items())
        context.report(f"  {len(found)}/{len(jobs)} {name}  kept of {options.run.length}: {accepted}")
    results = {name: found[name] for name in lines}  # in the order of the table
    measures = [*plain_measures(plain, results), *(m for n in results for m in head_measures(n, results))]
    notes = [_conditions(text, options), table_of(plain, results)]
    return Outcome(measures, curves=list(curves(plain, results)), notes=notes)


def _text(context: Context, options: JointTextOptions) -> Text:
    """The training and the test text."""
    if options.train_text is not None and options.test_text is not None:
        return Text.read(options.train_text, options.test_text)
    train, test = (_words(context, split, options.documents) for split in ("train", "heldout"))
    known = set(train.splitlines(keepends=True))  # names, translations and small talk are in both splits
    return Text.of(train, "".join(line for line in test.splitlines(keepends=True) if line not in known))


def _words(context: Context, split: str, documents: int) -> str:
    """The text of documents, a line per segment, with the role's name."""
    world = EmojiWorld(atlas_of(context), seed=context.seed, split=split, mixture=MIXTURE)
    lines = []
    for index in range(documents):
        for segment in world.document(index).segments:
            if isinstance(segment, TextSegment):
                lines.append(f"{segment.role.name.lower()}: {segment.text}\n")
    return "".join(lines)


# ---- what is read off ----------------------------------------------------------------------------------------------

Results = Mapping[str, TextResult]


def plain_measures(plain: PlainResult, results: Results) -> Iterator[Measure]:
    """Report rows of the backbone."""
    yield Measure("plain_nll", plain.scores.mean, "nats/byte")
    yield Measure("plain_free", plain.free, "nats/byte")
    yield Measure("plain_tokens_per_second", plain_pace(results), "tokens/s")
    if "product" in results and results["product"].scores.positions:
        yield Measure("dependence", sum(gaps(plain, results["product"])), "nats")


def plain_pace(results: Results) -> float:
    """Tokens per second of autoregressive decoding: the median over the measurements next to every head's rounds."""
    return statistics.median(result.plain_pace for result in results.values())


def gaps(plain: PlainResult, result: TextResult) -> list[float]:
    """By position: the head's loss minus autoregressive decoding's, in nats."""
    assert plain.scores.positions and result.scores.positions
    return [own - theirs for own, theirs in zip(result.scores.positions, plain.scores.positions, strict=True)]


def head_measures(name: str, results: Results) -> Iterator[Measure]:
    """Report rows of a head."""
    result = results[name]
    if result.scores.kind:
        yield Measure(f"{name}_nll", result.scores.mean, "nats/byte")
    for kind, rounds in result.rounds.items():
        yield Measure(f"{name}_{kind}", rounds.accepted, "tokens/pass")
    for kind in ("coupled", "rejection"):
        base = results["product"].rounds.get(kind) if "product" in results else None
        if name != "product" and base and kind in result.rounds:
            yield Measure(f"{name}_{kind}_gain", result.rounds[kind].accepted / base.accepted, "x")
    fastest = max(rounds.tokens_per_second for kind, rounds in result.rounds.items() if kind != "greedy")
    yield Measure(f"{name}_tokens_per_second", fastest, "tokens/s")
    yield Measure(f"{name}_seconds", result.seconds, "s")
    for passes, value in result.free.items():
        yield Measure(f"{name}_free_{passes}", value, "nats/byte")


def table_of(plain: PlainResult, results: Results) -> str:
    """One line per head, as text."""
    head = f"{'':16}{'nats/byte':>18}{'coupled':>9}{'greedy':>9}{'rejection':>11}{'block':>9}{'free':>8}"
    head += f"{'tokens/s':>10}"
    own = f"{plain.free:>8.3f}{plain_pace(results):>10.0f}"
    lines = [head, f"{'autoregressive':16}{plain.scores.mean:>12.3f} exact{'':38}{own}"]
    for name, result in results.items():
        nats = f"{result.scores.mean:.3f} {result.scores.kind}" if result.scores.kind else "-"
        accepted = {kind: f"{rounds.accepted:.2f}" for kind, rounds in result.rounds.items()}
        speed = max(rounds.tokens_per_second for kind, rounds in result.rounds.items() if kind != "greedy")
        lines.append(
            f"{name:16}{nats:>18}{accepted['coupled']:>9}{accepted['greedy']:>9}{accepted.get('rejection', '-'):>11}"
            f"{accepted.get('block', '-'):>9}{result.free[1]:>8.3f}{speed:>10.0f}"
        )
    return "\n".join(lines)


def curves(plain: PlainResult, results: Results) -> Iterator[Curve]:
    """Acceptance by position under each verification; dependence by position; unverified blocks against passes."""
    for kind in ("coupled", *NEED_LOG_Q):
        lines = {
            name: [(float(k + 1), share) for k, share in enumerate(result.rounds[kind].positions)]
            for name, result in results.items()
            if kind in result.rounds
        }
        yield Curve(f"{kind}: share of drafts accepted up to here", "token of the draft", "share", lines)
    lines = {
        name: [(float(k + 1), gap) for k, gap in enumerate(gaps(plain, result))]
        for name, result in results.items()
        if result.scores.positions
    }
    yield Curve("loss above autoregressive decoding", "token of the block", "nats", lines)
    free = {name: [(float(n), value) for n, value in result.free.items()] for name, result in results.items()}
    free["autoregressive decoding"] = [
        (1.0, plain.free),
        (float(max(n for line in free.values() for n, _ in line)), plain.free),
    ]
    yield Curve("unverified blocks", "passes", "nats per byte of autoregressive decoding", free)


def _conditions(text: Text, options: JointTextOptions) -> str:
    """Sizes and steps, for the notes."""
    run = options.run
    source = "the emoji world's words" if options.train_text is None else f"{options.train_text}, {options.test_text}"
    return (
        f"{source}: {len(text.train):,} bytes to train on, {len(text.test):,} held out; a transformer of {run.depth} "
        f"layers of {run.width}, {run.backbone_steps} steps of {run.rows} windows of {run.window} bytes, then "
        f"{run.head_steps} steps for each head, the backbone frozen; blocks of {run.length}; temperature "
        f"{run.temperature:g}, top_p {run.top_p:g}; {run.contexts} contexts continued by {run.num_tokens} bytes; a "
        '"bound": an upper bound of nats per byte'
    )


# ---- speculative decoding of a model's own text --------------------------------------------------------------------


class BlockOptions(TaskOptions):
    """requests: number, over all kinds of documents. repeats: alternating runs of each kind of decoding; the medians
    count. tokens_per_pass: None is the head's full block. compile: steps of autoregressive decoding as native code."""

    requests: int = Field(default=48, ge=1)
    repeats: int = Field(default=3, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    tokens_per_pass: int | None = Field(default=None, ge=2)
    verify: str = "coupled"
    adaptive: bool = False
    recycle: bool = False
    compile: bool = False


@task("text_blocks", BlockOptions, rows=("accepted", "emitted", "identical", "speedup", "speedup_whole", "drafted"))
def text_blocks(context: Context, options: BlockOptions) -> Outcome:
    """Speculative decoding of held-out answers against cached autoregressive decoding of the same replies."""
    if context.model.joint is None:
        raise ValueError("text_blocks needs a model with a joint-token head; see train/recipes/bundled")
    engine = Engine(context.model, compile=options.compile)
    prompts = [prompt_of(document) for document in requests(context, dict.fromkeys(KINDS, 1.0), options.requests)]
    own = {name: getattr(options, name) for name in ("verify", "adaptive", "recycle")}
    own["tokens_per_pass"] = options.tokens_per_pass or context.model.joint.head.length
    ways = {"plain": {"tokens_per_pass": 1}, "blocks": own}
    seconds: dict[str, list[float]] = {name: [] for name in ("prompt", *ways)}
    found: dict[str, list[Measured]] = {}
    for _ in range(options.repeats):
        seconds["prompt"].append(sum(_read_prompt(engine, prompt) for prompt in prompts))
        for name, way in ways.items():
            how = {"temperature": options.temperature, "max_tokens": 96, "steps": 1, **way}
            found[name] = [measured_reply(engine, prompt, seed, how) for seed, prompt in enumerate(prompts)]
            seconds[name].append(sum(reply.seconds for reply in found[name]))
    rounds = [one for reply in found["blocks"] for one in reply.rounds]
    fresh = [one for one in rounds if not one.again]
    number = sum(reply.num_tokens for reply in found["plain"])
    spent = {name: statistics.median(values) for name, values in seconds.items()}
    same = [a.text == b.text for a, b in zip(found["plain"], found["blocks"], strict=True)]
    measures = [
        Measure("accepted", sum(one.accepted for one in fresh) / len(fresh), "tokens/pass"),
        Measure("drafted", sum(one.drafted for one in fresh) / len(fresh), "tokens/pass"),
        Measure("emitted", number / sum(one.passes for one in rounds), "tokens/pass"),
        Measure("identical", percentage(same), "%"),
        Measure("speedup", (spent["plain"] - spent["prompt"]) / (spent["blocks"] - spent["prompt"]), "x"),
        Measure("speedup_whole", spent["plain"] / spent["blocks"], "x"),
    ]
    note = (
        f"{len(prompts)} answers of all kinds, {number} tokens (text, the headers of pictures, ends of turns), "
        f"{len(fresh)} drafts of the head, {sum(one.passes for one in rounds)} passes (emitted: tokens by these); "
        f"{options.verify}, temperature "
        f"{options.temperature:g}; one reply at a time, time between pictures alone; medians of {options.repeats} "
        "alternating runs; speedup excludes the pass over the prompt, speedup_whole includes it"
    )
    return Outcome(measures, notes=[note])


@dataclass(frozen=True)
class Measured:
    """A reply: its words, the shapes of its pictures and its stop reason, as one string; its rounds; its number of
    tokens; its seconds without pictures."""

    text: str
    rounds: list[Drafted]
    num_tokens: int
    seconds: float


def measured_reply(engine: Engine, prompt: Document, seed: int, how: Mapping[str, Any]) -> Measured:
    """Stream one reply and count it, without the time of pictures."""
    rounds: list[Drafted] = []
    text, number, seconds, start = "", 0, 0.0, time.perf_counter()
    for event in engine.stream(prompt, seed=seed, **how):
        now = time.perf_counter()
        if not isinstance(event, (BlockStep, BlockDone)):
            seconds += now - start
        start = now
        match event:
            case TextDelta():
                text += event.text
            case BlockStart():
                text += f"<{event.kind} {event.grid}>"
                number += header_length(event.kind == "video")
            case Drafted():
                rounds.append(event)
            case Stop():
                text += f"<{event.reason}>"
                number += event.reason in ("end", "images")
    words = re.split(r"<(?:image|video)[^>]*>|<(?:end|stop|length|images)>", text)
    number += sum(len(engine.tokenizer.encode(part)) for part in words)
    return Measured(text, rounds, number, seconds)


@torch.inference_mode()
def _read_prompt(engine: Engine, prompt: Document) -> float:
    """Seconds of the pass over a prompt, which both kinds of decoding need."""
    start = time.perf_counter()
    spans = engine.model.spans(prompt, generation_prompt=True)
    append = append_of(History(engine.model.transformer.new_pool()), spans, engine.control.pad)
    [hidden], _ = run_context(engine.model, [append], engine.control.pad)
    engine.model.token.read(hidden[-1:])
    return time.perf_counter() - start
