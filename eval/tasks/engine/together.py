"""Requests of different kinds in shared steps: against one after another, against batches of one kind, and the latency
of one request beside others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from eval.metrics.timing import alternate, medians
from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.speed.comparison import machine
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, Stop
from omni.generation.options import GenerationOptions

Request = tuple[str, GenerationOptions]
TEXT, PICTURE, STORY = "Say something about animals, please.", "draw a cat", "tell me a story with three pictures"


class TogetherOptions(TaskOptions):
    """tokens: of the requests of text alone. answer: of the long text beside which a picture is drawn."""

    tokens: int = Field(default=40, ge=1)
    answer: int = Field(default=256, ge=2)
    repeats: int = Field(default=3, ge=1)


def requests(num: int, tokens: int) -> list[Request]:
    """Text alone, one picture, three pictures, in turn; text has exactly `tokens` tokens (see `fresh`)."""
    kinds = (
        (TEXT, {"max_images": 0, "max_tokens": tokens, "stop": ()}),
        (PICTURE, {"max_images": 1}),
        (STORY, {"max_images": 3}),
    )
    return [(kinds[n % 3][0], GenerationOptions(seed=n, tokens_per_pass=1, **kinds[n % 3][1])) for n in range(num)]  # type: ignore[arg-type]


def fresh(context: Context, endless: bool = False) -> Engine:
    """An engine without history. endless: text does not end before max_tokens, and no picture is begun."""
    engine = Engine(context.model, kept_positions=0)
    if endless:
        control = engine.control
        engine.grammar.allowed["text"][[*engine.tokenizer.ends, control.image, control.video]] = -float("inf")
    return engine


def together(context: Context, many: Sequence[Request]) -> Engine:
    engine = fresh(context)
    engine.generate_batch([prompt for prompt, _ in many], [options for _, options in many])
    return engine


def one_by_one(context: Context, many: Sequence[Request]) -> None:
    engine = fresh(context)
    for prompt, options in many:
        engine.generate(prompt, options)


@task("engine_together", TogetherOptions, rows=("mixed_16", "kinds_32", "useful", "seconds_16", "seconds_32"))
def engine_together(context: Context, options: TogetherOptions) -> Outcome:
    """mixed_16: 16 requests one after another, over the same in shared steps. kinds_32: 32 in shared steps, over three
    batches of one kind each. useful: positions whose output, keys or values are used, of all that are computed."""
    sixteen, many = requests(16, options.tokens), requests(32, options.tokens)
    runs: dict[str, Callable[[], Any]] = {
        "one by one": lambda: one_by_one(context, sixteen),
        "together": lambda: together(context, sixteen),
        "32": lambda: together(context, many),
        "kinds": lambda: [together(context, many[kind::3]) for kind in range(3)],
    }
    found = medians(alternate(runs, options.repeats))
    engine = together(context, many)
    useful = 1 - engine.steps.wasted / engine.steps.computed
    note = machine()
    return Outcome([
        Measure("mixed_16", found["one by one"] / found["together"], "x", note),
        Measure("kinds_32", found["32"] / found["kinds"], "x", note),
        Measure("useful", 100 * useful, "%", note),
        Measure("seconds_16", found["together"], "s", note),
        Measure("seconds_32", found["32"], "s", note),
    ])  # fmt: skip


@task("engine_latency", TogetherOptions, rows=("picture_beside_text", "text_beside_pictures", "milliseconds_picture"))
def engine_latency(context: Context, options: TogetherOptions) -> Outcome:
    """picture_beside_text: the time to a first picture beside a long text, over the time alone. text_beside_pictures:
    the time of a long text beside seven requests of one picture, over the time alone."""
    long = (TEXT, GenerationOptions(tokens_per_pass=1, max_tokens=options.answer, max_images=0))
    forced = GenerationOptions(tokens_per_pass=1, force_image=True, image_size=(64, 64), max_images=1, max_tokens=1)
    picture = (PICTURE, forced)
    runs: dict[str, Callable[[], float]] = {
        "picture": lambda: _until(fresh(context, True), [picture], BlockDone, 0),
        "picture beside": lambda: _until(fresh(context, True), [long, picture], BlockDone, 1),
        "text": lambda: _until(fresh(context, True), [long], Stop, 0),
        "text beside": lambda: _until(fresh(context, True), [long, *[picture] * 7], Stop, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + options.repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    found = medians({name: values[1:] for name, values in seconds.items()})
    return Outcome([
        Measure("picture_beside_text", found["picture beside"] / found["picture"], "x", machine()),
        Measure("text_beside_pictures", found["text beside"] / found["text"], "x", machine()),
        Measure("milliseconds_picture", 1e3 * found["picture"], "ms", machine()),
    ])  # fmt: skip


def _until(engine: Engine, many: Sequence[Request], kind: type, which: int) -> float:
    """Seconds until the request number `which` has an event of a kind."""
    start = time.perf_counter()
    numbers = [engine.add(prompt, options) for prompt, options in many]
    while True:
        for number, event in engine.step():
            if number == numbers[which] and isinstance(event, kind):
                return time.perf_counter() - start
