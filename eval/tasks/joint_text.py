"""Joint-token heads on real text, and a model's own text in blocks.

    joint_text    the heads of a table, each trained at one budget beside one backbone trained here, byte by byte
    text_blocks   a model's replies to the emoji world's heldout requests: in blocks, and token by token

Rows of joint_text, by head: `_nll`, nats per byte of held-out text (the notes say which are exact and which bounds);
`_coupled`, `_greedy`, `_rejection`, `_block`, drafted tokens that stand per pass of drafting under that verification;
`_coupled_gain` and `_rejection_gain`, those beside the product head's; `_tokens_per_second` with the quickest lossless
verification; `_free_N`, nats per byte under plain decoding of blocks from N passes that nobody verifies (`plain_free`:
of plain decoding's own). `dependence` is what the bytes of a block say about one another in nats: how far the product
head's laws fall short of plain decoding's, summed over a block.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from eval.jobs import work
from eval.joint.text import (
    PlainResult,
    Text,
    TextLine,
    TextOptions,
    TextResult,
    measure_plain,
    run_line,
    train_backbone,
)
from eval.requests import RequestOptions, atlas_of, requests
from eval.task import Context, Curve, Measure, Outcome, TaskOptions, percentage, task
from omni.config import nearest
from omni.document import Document
from omni.document import Text as TextSegment
from omni.emoji_world import EmojiWorld
from omni.emoji_world.documents import prompt_of
from omni.heads.joint import build_head
from omni.reply import GenerationOptions, Reply

MIXTURE = {"draw": 0.1, "name": 0.1, "story": 0.3, "text": 0.4, "chat": 0.1}
LAWS = ("rejection", "block")


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
            for options in (line.options, line.law_options or line.options):
                build_head(line.head, options, self.run.length, 257, self.run.width)
        return self

    @property
    def chosen(self) -> dict[str, TextLine]:
        return {name: line for name, line in self.heads.items() if not self.only or name in self.only}


def text_rows(options: JointTextOptions) -> list[str]:
    """All that may come; a head without laws has no rows of the verifications that need them."""
    rows = ["plain_nll", "plain_free", "plain_tokens_per_second", "dependence"]
    for name, line in options.chosen.items():
        ends = ["nll", "coupled", "greedy", *LAWS, "coupled_gain", "rejection_gain", "tokens_per_second", "seconds"]
        rows += [f"{name}_{end}" for end in (*ends, *(f"free_{n}" for n in sorted({1, *line.passes})))]
    return rows


@task("joint_text", JointTextOptions, rows=text_rows)
def joint_text(context: Context, options: JointTextOptions) -> Outcome:
    """Heads on real text: what a block of theirs is worth to plain decoding."""
    text, key = _text(context, options), context.key("joint_text")
    backbone = train_backbone(text, options.run, key)
    plain = measure_plain(backbone, text, options.run, key)
    context.say(f"  plain decoding: {plain.scores.mean:.3f} nats per byte, {plain.pace.tokens_per_second:.0f} tokens/s")
    lines, found = options.chosen, {}
    jobs = [(backbone, line, text, options.run, key) for line in lines.values()]
    for number, result in work(run_line, jobs, options.workers):
        name = list(lines)[number]
        found[name] = result
        kept = "  ".join(f"{kind} {rounds.kept:.2f}" for kind, rounds in result.rounds.items())
        context.say(f"  {len(found)}/{len(jobs)} {name}  kept of {options.run.length}: {kept}")
    results = {name: found[name] for name in lines}  # in the order of the table, whoever finished first
    measures = [*plain_measures(plain, results), *(m for n in results for m in head_measures(n, results))]
    notes = [_conditions(text, options), table_of(plain, results)]
    return Outcome(measures, curves=list(curves(plain, results)), notes=notes)


def _text(context: Context, options: JointTextOptions) -> Text:
    if options.train_text is not None and options.test_text is not None:
        return Text.read(options.train_text, options.test_text)
    return Text.of(*(_words(context, split, options.documents) for split in ("train", "heldout")))


def _words(context: Context, split: str, documents: int) -> str:
    """The text of documents, a line per segment, with the name of who speaks."""
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
    yield Measure("plain_nll", plain.scores.mean, "nats/byte")
    yield Measure("plain_free", plain.free, "nats/byte")
    yield Measure("plain_tokens_per_second", plain.pace.tokens_per_second, "tokens/s")
    if "product" in results and results["product"].scores.positions:
        yield Measure("dependence", sum(gaps(plain, results["product"])), "nats")


def gaps(plain: PlainResult, result: TextResult) -> list[float]:
    """By position: how far a head's laws fall short of plain decoding's, in nats."""
    assert plain.scores.positions and result.scores.positions
    return [own - theirs for own, theirs in zip(result.scores.positions, plain.scores.positions, strict=True)]


def head_measures(name: str, results: Results) -> Iterator[Measure]:
    result = results[name]
    if result.scores.kind:
        yield Measure(f"{name}_nll", result.scores.mean, "nats/byte")
    for kind, rounds in result.rounds.items():
        yield Measure(f"{name}_{kind}", rounds.kept, "tokens/pass")
    for kind in ("coupled", "rejection"):
        base = results["product"].rounds.get(kind) if "product" in results else None
        if name != "product" and base and kind in result.rounds:
            yield Measure(f"{name}_{kind}_gain", result.rounds[kind].kept / base.kept, "x")
    fastest = max(rounds.tokens_per_second for kind, rounds in result.rounds.items() if kind != "greedy")
    yield Measure(f"{name}_tokens_per_second", fastest, "tokens/s")
    yield Measure(f"{name}_seconds", result.seconds, "s")
    for passes, value in result.free.items():
        yield Measure(f"{name}_free_{passes}", value, "nats/byte")


def table_of(plain: PlainResult, results: Results) -> str:
    head = f"{'':16}{'nats/byte':>18}{'coupled':>9}{'greedy':>9}{'rejection':>11}{'block':>9}{'free':>8}"
    head += f"{'tokens/s':>10}"
    own = f"{plain.free:>8.3f}{plain.pace.tokens_per_second:>10.0f}"
    lines = [head, f"{'plain decoding':16}{plain.scores.mean:>12.3f} exact{'':38}{own}"]
    for name, result in results.items():
        nats = f"{result.scores.mean:.3f} {result.scores.kind}" if result.scores.kind else "-"
        kept = {kind: f"{rounds.kept:.2f}" for kind, rounds in result.rounds.items()}
        speed = max(rounds.tokens_per_second for kind, rounds in result.rounds.items() if kind != "greedy")
        lines.append(
            f"{name:16}{nats:>18}{kept['coupled']:>9}{kept['greedy']:>9}{kept.get('rejection', '-'):>11}"
            f"{kept.get('block', '-'):>9}{result.free[1]:>8.3f}{speed:>10.0f}"
        )
    return "\n".join(lines)


def curves(plain: PlainResult, results: Results) -> Iterator[Curve]:
    """Acceptance by position under each verification; dependence by position; unverified blocks against passes."""
    for kind in ("coupled", *LAWS):
        lines = {
            name: [(float(k + 1), share) for k, share in enumerate(result.rounds[kind].positions)]
            for name, result in results.items()
            if kind in result.rounds
        }
        yield Curve(f"{kind}: share of drafts that stand so far", "token of the draft", "share", lines)
    lines = {
        name: [(float(k + 1), gap) for k, gap in enumerate(gaps(plain, result))]
        for name, result in results.items()
        if result.scores.positions
    }
    yield Curve("what a head does not know of the tokens before", "token of the block", "nats", lines)
    free = {name: [(float(n), value) for n, value in result.free.items()] for name, result in results.items()}
    free["plain decoding"] = [(1.0, plain.free), (float(max(n for line in free.values() for n, _ in line)), plain.free)]
    yield Curve("blocks that nobody verifies", "passes", "nats per byte of plain decoding", free)


def _conditions(text: Text, options: JointTextOptions) -> str:
    run = options.run
    source = "the emoji world's words" if options.train_text is None else f"{options.train_text}, {options.test_text}"
    return (
        f"{source}: {len(text.train):,} bytes to train on, {len(text.test):,} held out; a transformer of {run.depth} "
        f"layers of {run.width}, {run.backbone_steps} steps of {run.rows} windows of {run.window} bytes, then "
        f"{run.head_steps} steps for each head beside it, frozen; blocks of {run.length}; temperature "
        f"{run.temperature:g}, top_p {run.top_p:g}; {run.contexts} contexts continued by {run.num_tokens} bytes; a "
        '"bound" of nats per byte is an upper one'
    )


# ---- a model's own text in blocks ----------------------------------------------------------------------------------


class BlockOptions(RequestOptions):
    """requests: answers of words alone, which are timed; `stories` are told besides, with pictures of one step, for
    what stands of their drafts. repeats: alternating runs of each way, of which the medians count. batch: replies made
    together. tokens_per_pass: None is the model's own."""

    requests: int = Field(default=48, ge=1)
    stories: int = Field(default=12, ge=0)
    batch: int = Field(default=1, ge=1)
    repeats: int = Field(default=5, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=64, ge=2)
    tokens_per_pass: int | None = Field(default=None, ge=2)
    verify: str = "coupled"
    adaptive: bool = False


@task("text_blocks", BlockOptions, rows=("accepted", "emitted", "identical", "speedup", "tokens_per_second"))
def text_blocks(context: Context, options: BlockOptions) -> Outcome:
    """Text of heldout answers drafted in blocks, beside plain cached decoding of the same replies in the same run."""
    words = [prompt_of(d) for d in requests(context, {"name": 2, "text": 3, "chat": 1}, options.requests, _wordy)]
    stories = [prompt_of(d) for d in requests(context, {"story": 1}, options.stories)]
    own = {"verify": options.verify, "adaptive": options.adaptive, "tokens_per_pass": options.tokens_per_pass}
    ways = {"prompt": {"tokens_per_pass": 1, "max_tokens": 1}, "plain": {"tokens_per_pass": 1}, "blocks": own}
    common = {"temperature": options.temperature, "max_tokens": options.max_tokens, "steps": 1}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Reply]] = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            found[name], spent = _answer(context, words, options.batch, {**common, "max_images": 0, **way})
            seconds[name].append(spent)
    told = {name: _answer(context, stories, options.batch, {**common, **ways[name]})[0] for name in ("plain", "blocks")}
    plain, blocks = found["plain"] + told["plain"], found["blocks"] + told["blocks"]
    rounds = [one for reply in blocks for one in reply.drafts]
    kept = sum(k for _, k in rounds) / len(rounds)
    number = sum(_num_tokens(context, reply) for reply in found["plain"])
    timed = sum(len(reply.drafts) for reply in found["blocks"])
    spent = {name: statistics.median(values) for name, values in seconds.items()}
    spent = {name: spent[name] - spent["prompt"] for name in ("plain", "blocks")}
    measures = [
        Measure("accepted", kept, "tokens/pass"),
        Measure("emitted", number / timed, "tokens/round"),
        Measure("identical", percentage([a.text == b.text for a, b in zip(plain, blocks, strict=True)]), "%"),
        Measure("speedup", spent["plain"] / spent["blocks"], "x"),
        Measure("tokens_per_second", number / spent["blocks"], "tokens/s"),
    ]
    note = (
        f"{len(words)} answers of {number} tokens are timed, less their prompts and first tokens; medians of "
        f"{options.repeats} alternating runs, batch {options.batch}; {len(rounds)} rounds (one drafting and one "
        f"verifying pass) in these and {len(stories)} stories; {options.verify}, temperature {options.temperature:g}"
    )
    return Outcome(measures, notes=[note])


def _wordy(meta: Mapping[str, Any]) -> bool:
    """Whether the answer is words alone."""
    return bool(meta["answer"]) and not meta["scenes"]


def _num_tokens(context: Context, reply: Reply) -> int:
    """With the one that ends the turn."""
    return len(context.model.tokenizer.encode(reply.text)) + 1


def _answer(
    context: Context, prompts: Sequence[Document], batch: int, how: Mapping[str, Any]
) -> tuple[list[Reply], float]:
    """The replies, and the seconds that they took."""
    found: list[Reply] = []
    start = time.perf_counter()
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        options = GenerationOptions(**how)
        found += context.model.generate_batch(part, options, seeds=range(at, at + len(part)))
    return found, time.perf_counter() - start
