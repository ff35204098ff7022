"""Histories: a chat turn after many pictures, forks, equal results alone and among neighbours, and cancellations."""

from __future__ import annotations

import gc
import itertools
import resource
import time
from typing import Any

import torch
from pydantic import Field

from eval.metrics.timing import alternate, medians
from eval.task import Context, Measure, Outcome, TaskOptions, task
from eval.tasks.engine.together import PICTURE, STORY, TEXT, fresh
from eval.tasks.speed.comparison import machine
from omni.document import Document, Image, Role, Text
from omni.generation.context import append_of, run_context
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.generation.reply import Reply
from omni.nn.cache import History
from omni.sequence.layout import TokenSpan


class TurnOptions(TaskOptions):
    """pictures: in the conversation before the last turn."""

    pictures: int = Field(default=64, ge=1)
    repeats: int = Field(default=5, ge=1)


@task("engine_turns", TurnOptions, rows=("turn", "turn_read_again", "fork", "milliseconds_turn"))
def engine_turns(context: Context, options: TurnOptions) -> Outcome:
    """turn: a chat turn after the pictures, over the first turn and the attention over the history. turn_read_again:
    the same turn where the history is read again. fork: of the history, in percent of a pass of one token."""
    model = context.model
    model.config = model.config.model_copy(update={"max_context": 1 << 15})
    pixels = context.key("pictures").fold("pixels")
    history: list[Any] = []
    for n in range(options.pictures):
        noise = (pixels.fold(n).uniform((64, 64, 3)) * 255).to(torch.uint8)
        history += [Text(f"{n}: what is this?"), Image(noise), Text("It is a picture.", Role.ASSISTANT)]
    number = itertools.count()
    ask = GenerationOptions(tokens_per_pass=1, max_tokens=4, max_images=0)
    engine = Engine(model, kept_positions=1 << 15)
    engine.generate(Document((*history, Text("and this?"))), ask)

    def later() -> Reply:  # another last turn each time: only the history is found
        return engine.generate(Document((*history, Text(f"thank you, {next(number)}"))), ask)

    def again() -> Reply:
        engine.prefixes.clear()
        return later()

    runs = {
        "first": lambda: Engine(model, kept_positions=0).generate("thank you, 99", ask),
        "later": later,
        "again": again,
    }
    found = medians(alternate(runs, options.repeats))
    attention, fork, one_pass = _costs(context, len(history))
    more = 4 * attention
    note = f"{options.pictures} pictures; {machine()}"
    return Outcome([
        Measure("turn", found["later"] / (found["first"] + more), "x", note),
        Measure("turn_read_again", found["again"] / found["first"], "x", note),
        Measure("fork", 100 * fork / one_pass, "%", note),
        Measure("milliseconds_turn", 1e3 * found["later"], "ms", note),
    ])  # fmt: skip


def _costs(context: Context, segments: int) -> tuple[float, float, float]:
    """Seconds: of the attention of one token over a history of that size beyond an empty one, of a fork, of a pass."""
    model, num = context.model, 20 * segments
    with torch.inference_mode():
        pool = model.transformer.new_pool()
        seconds = []
        for length in (16, num):
            history = History(pool)
            run_context(model, [append_of(history, [TokenSpan([1] * length, [False] * length)], 0)])
            run_context(model, [append_of(history, [TokenSpan([1], [False])], 0)])
            start = time.perf_counter()
            for _ in range(8):
                run_context(model, [append_of(history, [TokenSpan([1], [False])], 0)])
            seconds.append((time.perf_counter() - start) / 8)
        start = time.perf_counter()
        for _ in range(100):
            history.fork().release()
        return max(seconds[1] - seconds[0], 0.0), (time.perf_counter() - start) / 100, seconds[0]


class EqualOptions(TaskOptions):
    """requests: compared alone and among `neighbours` random ones, in float32 and a tenth of them in float64."""

    requests: int = Field(default=200, ge=1)
    neighbours: int = Field(default=31, ge=1)


@task("engine_equal", EqualOptions, rows=("equal_float32", "equal_float64", "found_prefix"))
def engine_equal(context: Context, options: EqualOptions) -> Outcome:
    """Requests with equal ids and pictures within 1/255 alone and among neighbours, in percent; and ids after a prefix
    that is found equal to those after one that is read again."""
    measures = []
    for dtype, num in (("float32", options.requests), ("float64", max(1, options.requests // 10))):
        model = context.model.to(getattr(torch, dtype))
        equal = 0
        for first in range(0, num, options.neighbours + 1):
            many = [_random_request(context, n) for n in range(first, first + options.neighbours + 1)]
            batch = fresh(context).generate_batch([prompt for prompt, _ in many], [one for _, one in many])
            for n, ((prompt, one), reply) in enumerate(zip(many, batch, strict=True), first):
                equal += n < num and _same(fresh(context).generate(prompt, one), reply)
        measures.append(Measure(f"equal_{dtype}", 100 * equal / num, "%", f"{num} requests; {machine()}"))
    engine, same, tries = Engine(model), 0, max(1, options.requests // 10)
    for n in range(tries):
        prompt, one = _random_request(context, n)
        document = engine.generate(prompt, one).document
        more = Document((*document.segments, Text("and again, please")))
        found = engine.generate(more, one)
        engine.prefixes.clear()
        same += _same(found, engine.generate(more, one))
    measures.append(Measure("found_prefix", 100 * same / tries, "%", f"{tries} turns, float64; {machine()}"))
    context.model.float()
    return Outcome(measures)


def _random_request(context: Context, number: int) -> tuple[str, GenerationOptions]:
    random = context.key("request", number).python()
    prompt = random.choice([TEXT, PICTURE, STORY, "draw a dog", "hello", "what is a banana?", "draw two red apples"])
    changes: dict[str, Any] = {"seed": number, "max_tokens": random.choice([8, 24]), "steps": random.choice([1, 2, 4])}
    changes["max_images"] = random.choice([0, 1, 3])
    if random.random() < 0.5:
        changes["temperature"] = 1.0
    if random.random() < 0.3:
        changes["guidance"] = 2.0
    if random.random() < 0.5:
        changes["tokens_per_pass"] = 1
    return prompt, GenerationOptions(**changes)


def _same(a: Reply, b: Reply) -> bool:
    if a.text != b.text or a.stop_reason != b.stop_reason or len(a.images) != len(b.images):
        return False
    pairs = [
        pair for x, y in zip(a.images, b.images, strict=True) for pair in zip(x.tobytes(), y.tobytes(), strict=True)
    ]
    return all(abs(x - y) <= 1 for x, y in pairs)


class LeakOptions(TaskOptions):
    """requests: in all, of which `cancelled` are cancelled at random steps; `running` at once."""

    requests: int = Field(default=2000, ge=2)
    cancelled: int = Field(default=500, ge=1)
    running: int = Field(default=16, ge=1)


@task("engine_leaks", LeakOptions, rows=("pages", "memory", "requests_per_second"))
def engine_leaks(context: Context, options: LeakOptions) -> Outcome:
    """pages: in use after the last request. memory: growth of the process from half of the requests to the end, in
    percent."""
    engine, random = Engine(context.model), context.key("leaks").python()
    doomed = set(random.sample(range(options.requests), options.cancelled))
    alive: set[int] = set()
    added, begin, before = 0, time.perf_counter(), 0
    while added < options.requests or not engine.is_idle:
        while added < options.requests and len(alive) < options.running:
            prompt = random.choice([PICTURE, "hello", "draw a dog", "what is a banana?"])
            number = engine.add(prompt, seed=added, max_tokens=6, max_images=1, steps=1)
            alive.add(number)
            added += 1
            if added == options.requests // 2:
                before = _memory()
        engine.step()
        for number in [n for n in alive if n in doomed and random.random() < 0.2]:
            engine.cancel(number)
        alive = {number for number in alive if engine.is_known(number)}
    seconds = time.perf_counter() - begin
    engine.forget()
    growth = 100 * (_memory() - before) / max(before, 1)
    note = f"{options.requests} requests, {options.cancelled} cancelled; {machine()}"
    return Outcome([
        Measure("pages", engine.pages_in_use, "", note),
        Measure("memory", growth, "%", note),
        Measure("requests_per_second", options.requests / seconds, "1/s", note),
    ])  # fmt: skip


def _memory() -> int:
    """Resident bytes of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
