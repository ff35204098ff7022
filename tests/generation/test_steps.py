"""Steps of many requests: each reply is that of the request alone, whenever it joins, whoever its neighbours are, and
however they end; and nothing of a request is left behind."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scripted import enliven, with_head
from torch import Tensor

from omni.document import Document, Image, Text
from omni.errors import NotFiniteError
from omni.generation import turn
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStep, Drafted, Event, Failed, Stop, TextDelta, VideoPart
from omni.generation.options import GenerationOptions
from omni.generation.request import Request
from omni.generation.work import SHORT, Scores
from omni.model import Omni
from omni.nn.cache import PAGE, PoolFullError

PIXELS = torch.arange(8 * 12 * 3, dtype=torch.uint8).reshape(8, 12, 3)


@pytest.fixture(scope="module")
def model(tiny_model) -> Omni:  # noqa: ANN001
    """No part is at its zero start; a joint-token head drafts four ids."""
    return enliven(with_head(tiny_model, "product"))


@pytest.fixture
def exact(model: Omni) -> Iterator[Omni]:
    """The model in float64, where equal ids need no luck."""
    yield model.double()
    model.float()


@dataclass
class Found:
    """What requests of one engine gave, by their ids."""

    ids: dict[int, list[int]] = field(default_factory=dict)
    events: dict[int, list[Event]] = field(default_factory=dict)

    def last(self, number: int) -> Event:
        return self.events[number][-1]

    def pictures(self, number: int) -> list[Tensor]:
        parts = [event.part for event in self.events[number] if isinstance(event, BlockDone)]
        return [part.frames.int() if isinstance(part, VideoPart) else torch.tensor(list(part.image.tobytes()))
                for part in parts]  # fmt: skip


def watched(engine: Engine) -> Found:
    """What the requests of an engine give from now on; `step` and `ids` fill it."""
    found, advance = Found(), engine.grammar.advance

    def recorded(request: Request, token: int) -> Iterator[Event]:
        found.ids.setdefault(request.number, []).append(token)
        return advance(request, token)

    engine.grammar.advance = recorded  # type: ignore[method-assign]
    return found


def step(engine: Engine, found: Found) -> None:
    for number, event in engine.step():
        found.events.setdefault(number, []).append(event)


def finish(engine: Engine, found: Found) -> Found:
    while not engine.is_idle:
        step(engine, found)
    return found


Ask = tuple[Any, GenerationOptions]


def some_request(number: int, seed: int = 0) -> Ask:
    """Text, drafts, pictures, guidance, pictures in the prompt: of many lengths."""
    pick = random.Random(1000 * seed + number)
    prompt: Any = "".join(pick.choice("abcdefg ?") for _ in range(pick.randint(1, 60))) + "x"
    common = {"seed": number, "max_tokens": pick.randint(3, 24), "max_images": 1, "steps": pick.randint(1, 3)}
    common |= {"temperature": pick.choice((0.0, 1.0)), "tokens_per_pass": 1}
    kind = pick.choice(("text", "text", "drafts", "drafts", "picture", "guided"))
    if kind == "drafts":
        common["tokens_per_pass"] = pick.randint(2, 4)
        common["verify"] = pick.choice(("coupled", "coupled", "rejection", "block", "none"))
        common["recycle"] = common["verify"] == "coupled" and pick.random() < 0.5
        common["temperature"] = 1.0
    if kind in ("picture", "guided"):
        common |= {"force_image": True, "image_size": pick.choice(((8, 8), (8, 12), (16, 4)))}
        common["tokens_per_pass"] = pick.choice((1, 3))
    if kind == "guided":
        common |= {"guidance": 2.0, "image_guidance": pick.choice((1.0, 1.5, 2.0))}
    if pick.random() < 0.4:
        prompt = Document((Text("look: "), Image(PIXELS.roll(number % 5, 0)), Text(prompt)))
    return prompt, GenerationOptions(**common)


def alone(model: Omni, ask: Ask) -> tuple[list[int], list[Event], list[Tensor]]:
    engine = Engine(model)
    found = watched(engine)
    number = engine.add(*ask)
    finish(engine, found)
    return found.ids.get(number, []), found.events[number], found.pictures(number)


def same(model: Omni, ask: Ask, found: Found, number: int) -> bool:
    """The ids, the rounds of drafts and the end are those of the request alone; pictures up to rounding."""
    ids, events, pictures = alone(model, ask)
    mine = found.pictures(number)
    assert found.ids.get(number, []) == ids and found.last(number) == events[-1] and len(pictures) == len(mine)
    assert text_of(found.events[number]) == text_of(events)
    assert [e for e in found.events[number] if isinstance(e, Drafted)] == [e for e in events if isinstance(e, Drafted)]
    assert all(int((a - b).abs().max()) <= 1 for a, b in zip(pictures, mine, strict=True))
    return True


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def left_behind(engine: Engine) -> list[Any]:
    """What should be empty after all requests have ended."""
    mine = engine.pages_in_use
    engine.forget()
    return [n for n in (mine, engine.pages_in_use, engine.pool.pages_in_use, *engine._inboxes, *engine._running) if n]


# ---- equal replies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_requests_join_and_leave_at_any_step(exact: Omni, seed: int) -> None:
    """Twelve requests join one by one, every third is cancelled: the others give what they give alone."""
    pick, engine, asks = random.Random(seed), Engine(exact, budget=64), [some_request(n, seed) for n in range(12)]
    found, numbers, cancelled = watched(engine), [], set()
    for n, ask in enumerate(asks):
        numbers.append(engine.add(*ask))
        for _ in range(pick.randint(0, 4)):
            step(engine, found)
        if n % 3 == 2:
            cancelled.add(number := pick.choice(numbers[-3:]))
            engine.cancel(number)
    finish(engine, found)
    ended = {n for n, events in found.events.items() if isinstance(events[-1], Stop)}
    assert set(numbers) - cancelled <= ended and len(cancelled - ended) > 0
    assert all(same(exact, ask, found, n) for n, ask in zip(numbers, asks, strict=True) if n in ended)
    assert not left_behind(engine)


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8])
def test_a_reply_does_not_depend_on_fifteen_neighbours(exact: Omni, number: int) -> None:
    mine, others = some_request(number, 7), [some_request(100 + n, number) for n in range(15)]
    engine = Engine(exact)
    found = watched(engine)
    numbers = [engine.add(*one) for one in (*others[:8], mine, *others[8:])]
    finish(engine, found)
    assert same(exact, mine, found, numbers[8]) and not left_behind(engine)


def test_neighbours_in_float32(model: Omni) -> None:
    asks = [some_request(n, 3) for n in range(12)]
    engine = Engine(model)
    found = watched(engine)
    numbers = [engine.add(*one) for one in asks]
    finish(engine, found)
    assert all(same(model, ask, found, n) for n, ask in zip(numbers, asks, strict=True))
    kinds = {type(event) for events in found.events.values() for event in events}
    assert {TextDelta, Drafted, BlockDone, Stop} <= kinds


def test_events_of_a_request_are_ordered_and_end_once(model: Omni) -> None:
    engine, found = Engine(model), Found()
    numbers = [engine.add(*some_request(n, 1)) for n in range(10)]
    finish(engine, found)
    assert set(found.events) == set(numbers)
    for events in found.events.values():
        assert [isinstance(event, Stop) for event in events] == [False] * (len(events) - 1) + [True]
    assert engine.step() == []


def test_requests_share_passes(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests take as many passes as the longest of them alone."""
    calls, extend, velocity = [], model.transformer.extend, model.velocity
    monkeypatch.setattr(model.transformer, "extend", lambda *a: calls.append("context") or extend(*a))
    monkeypatch.setattr(model, "velocity", lambda *a: calls.append("refine") or velocity(*a))
    picture = {"force_image": True, "image_size": (8, 8), "max_images": 1, "tokens_per_pass": 1}
    engine = Engine(model)
    engine.grammar.allowed["text"][[engine.control.end, engine.control.image, engine.control.video]] = -torch.inf
    options = [GenerationOptions(max_tokens=10, steps=1 + n % 3, guidance=1.0 + n % 2, **picture) for n in range(8)]
    engine.generate_batch([f"{'a' * n} cat" for n in range(8)], options)
    # One pass for all prompts; the pictures, whose clean latents are read with the text after them, end with a step
    # each; all then read the ids that are left at once.
    assert calls.count("refine") == 3 and calls.count("context") <= 1 + 9 + 2
    assert not left_behind(engine)


# ---- the budget ----------------------------------------------------------------------------------------------------


def text_alone(engine: Engine) -> None:
    control = engine.control
    engine.grammar.allowed["text"][[control.end, control.image, control.video]] = -torch.inf


def test_a_long_prompt_is_read_in_parts_while_text_flows(exact: Omni) -> None:
    budget, long = 2 * SHORT, "a long prompt " * 60
    engine = Engine(exact, budget=budget)
    text_alone(engine)
    found, plain = watched(engine), GenerationOptions(temperature=1.0, tokens_per_pass=1, seed=1)
    first = engine.add("hello", plain, max_tokens=60)
    for _ in range(5):
        step(engine, found)
    assert len(found.ids[first]) == 5
    second, steps = engine.add(long, plain, max_tokens=4), 0
    while second not in found.ids:
        before, ids = engine.steps.computed, len(found.ids[first])
        step(engine, found)
        steps += 1
        assert len(found.ids[first]) == ids + 1  # one id in every step
        assert engine.steps.computed - before <= budget + 1  # and the short read
    assert steps == -(-(len(long) + 4) // budget) > 6
    finish(engine, found)
    for number, prompt, num in ((first, "hello", 60), (second, long, 4)):
        other = Engine(exact)
        text_alone(other)
        wanted = watched(other)
        one = other.add(prompt, plain, max_tokens=num)
        finish(other, wanted)
        assert found.ids[number] == wanted.ids[one]
    assert not left_behind(engine)


def test_short_reads_are_not_delayed_and_no_block_is_cut(exact: Omni) -> None:
    """A budget below everything: each step still reads what is short, and one block of latents at least."""
    asks = [some_request(n, 2) for n in range(4)]
    many = Document((*[Image(PIXELS.roll(n, 0)) for n in range(12)], Text("what is this?")))
    asks.append((many, GenerationOptions(max_tokens=3, max_images=0, tokens_per_pass=1)))
    engine = Engine(exact, budget=1)
    found = watched(engine)
    numbers = [engine.add(*ask) for ask in asks]
    finish(engine, found)
    assert all(same(exact, ask, found, n) for n, ask in zip(numbers, asks, strict=True))
    assert not left_behind(engine)


def test_at_most_max_running_requests_share_passes(model: Omni) -> None:
    """The others wait in their order."""
    engine = Engine(model, max_running=2)
    text_alone(engine)
    found, ended = watched(engine), []
    numbers = [engine.add("x", max_tokens=5, tokens_per_pass=1) for _ in range(5)]
    engine.cancel(numbers[3])  # while it waits
    while not engine.is_idle:
        for number, event in engine.step():
            ended += [number] if isinstance(event, Stop) else []
        assert len(engine._running) <= 2
    assert ended == [n for n in numbers if n != numbers[3]] and numbers[3] not in found.ids
    assert not left_behind(engine)


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_request_that_fails_ends_alone(exact: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own decision, at its third id."""
    asks, choose = [some_request(n, 4) for n in range(6)], turn.choose
    asks[2] = ("I fail", GenerationOptions(max_tokens=9, tokens_per_pass=1))
    engine = Engine(exact)
    text_alone(engine)

    def failing(request: Request, scores: Scores) -> int:
        if request.history.pool is engine.pool and request.number == 2 and request.num_tokens == 2:
            raise RuntimeError("out of luck")
        return choose(request, scores)

    monkeypatch.setattr(turn, "choose", failing)
    found = watched(engine)
    numbers = [engine.add(*ask) for ask in asks]
    finish(engine, found)
    last = found.last(numbers[2])
    assert isinstance(last, Failed) and str(last.error) == "out of luck" and len(found.ids[2]) == 2
    assert all(isinstance(found.last(n), Stop) for n in numbers if n != 2)
    other = Engine(exact)
    text_alone(other)
    wanted = watched(other)
    for n, ask in enumerate(asks):
        if n != 2:
            one = other.add(*ask)
            finish(other, wanted)
            assert wanted.ids[one] == found.ids[n]
    assert not left_behind(engine)


def test_weights_that_only_pictures_reach_fail_only_pictures(model: Omni) -> None:
    parameter = model.get_parameter("flow.velocity.weight")
    kept = parameter.detach().clone()
    asks = [some_request(n, 5) for n in range(8)]
    draws = [bool(options.force_image) for _, options in asks]
    assert 1 < sum(draws) < 7
    engine = Engine(model)
    engine.grammar.allowed["text"][[engine.control.image, engine.control.video]] = -torch.inf
    found = watched(engine)
    try:
        with torch.no_grad():
            parameter[0, 0] = math.nan
        numbers = [engine.add(*ask) for ask in asks]
        finish(engine, found)
    finally:
        with torch.no_grad():
            parameter.copy_(kept)
    for number, draw in zip(numbers, draws, strict=True):
        last = found.last(number)
        assert isinstance(last, Failed if draw else Stop)
        assert not draw or "latents of picture 1" in str(last.error) and isinstance(last.error, NotFiniteError)  # type: ignore[union-attr]
    assert not left_behind(engine)


def test_a_failed_request_leaves_nothing_behind(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its history is not kept for later prompts."""
    engine = Engine(model)
    choose = turn.choose
    monkeypatch.setattr(turn, "choose", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate("hello there", tokens_per_pass=1)
    assert engine.pool.pages_in_use == 0 and engine.is_idle and not engine._inboxes
    monkeypatch.setattr(turn, "choose", choose)
    computed = engine.steps.computed
    assert engine.generate("hello there", tokens_per_pass=1, max_tokens=1, max_images=0).stop_reason
    assert engine.steps.computed - computed == len("hello there") + 4  # the prompt, read anew, with its control ids


def test_a_picture_that_the_codec_refuses_fails_alone(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one size share a call; where it fails, each is decoded alone."""
    codec, sizes = model.codec, []
    assert codec is not None
    decode = codec.decode

    def refusing(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        if any(torch.equal(one, refused[0]) for one in latents) if refused else False:
            raise ValueError("refused")
        refused.extend(latents[:1] if not refused else [])
        if len(latents) > 1:
            raise ValueError("refused")
        return decode(latents)

    refused: list[Tensor] = []
    monkeypatch.setattr(codec, "decode", refusing)
    engine = Engine(model)
    options = GenerationOptions(force_image=True, image_size=(8, 8), steps=1, max_images=1, max_tokens=1)
    numbers = [engine.add("draw", options, seed=seed) for seed in range(3)]
    found = finish(engine, watched(engine))
    assert sizes == [3, 1, 1, 1]
    assert [type(found.last(number)) for number in numbers] == [Failed, Stop, Stop]


def test_a_full_pool_fails_the_request_that_needs_it(exact: Omni) -> None:
    """The others go on, and there is room again afterwards."""
    engine = Engine(exact, max_positions=16 * PAGE)
    text_alone(engine)
    found, plain = watched(engine), GenerationOptions(tokens_per_pass=1, seed=1)
    small = engine.add("hello", plain, max_tokens=30)
    step(engine, found)
    large = engine.add("a" * 500, plain, max_tokens=3)
    finish(engine, found)
    assert isinstance(found.last(small), Stop) and len(found.ids[small]) == 30
    last = found.last(large)
    assert isinstance(last, Failed) and isinstance(last.error, PoolFullError)
    assert "the cache is full" in str(last.error) and not left_behind(engine)
    again = engine.add("hello again", plain, max_tokens=3)
    assert isinstance(finish(engine, found).last(again), Stop)


def test_generate_batch_raises_the_first_failure_and_ends_the_others(
    model: Omni, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = turn.choose

    def failing(request: Request, scores: Scores) -> int:
        return 1 // 0 if request.number == 1 else choose(request, scores)

    monkeypatch.setattr(turn, "choose", failing)
    engine = Engine(model)
    with pytest.raises(ZeroDivisionError):
        engine.generate_batch(["a", "b", "c"], {"max_tokens": 50, "tokens_per_pass": 1, "max_images": 0})
    assert engine.is_idle and not left_behind(engine)
    with pytest.raises(ValueError, match="empty"):
        engine.generate_batch(["a", ""])
    assert engine.is_idle and not left_behind(engine)


# ---- cancellation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 4, 6, 9])
def test_cancelling_frees_pages_at_any_step(model: Omni, number: int) -> None:
    """Text, drafts, a picture in refinement with its branches: at every step."""
    for steps in range(8):
        engine = Engine(model, budget=16)
        one = engine.add(*some_request(number, 6))
        for _ in range(steps):
            engine.step()
        engine.cancel(one)
        engine.cancel(one)  # no error
        assert engine.is_idle and engine.step() == [] and not left_behind(engine)


def test_a_closed_stream_cancels_its_request(model: Omni) -> None:
    engine = Engine(model)
    text_alone(engine)
    events = engine.stream("say", max_tokens=100, tokens_per_pass=1)
    other = engine.add("other", max_tokens=5, tokens_per_pass=1)
    assert isinstance(next(events), TextDelta) and len(engine._running) == 2
    events.close()  # type: ignore[attr-defined]
    found = finish(engine, Found())
    assert set(found.events) == {other} and isinstance(found.last(other), Stop)
    assert not left_behind(engine)


def test_a_stream_that_is_never_read_holds_no_pages_after_it_is_closed(model: Omni) -> None:
    engine = Engine(model)
    events = engine.stream("say", max_tokens=100)
    events.close()  # type: ignore[attr-defined]
    engine.step()
    assert engine.is_idle and not left_behind(engine)


def test_many_requests_with_cancellations_leave_nothing(model: Omni) -> None:
    """200 requests, 50 cancelled at random steps."""
    pick, engine, found, numbers = random.Random(0), Engine(model, budget=128, max_running=24), Found(), []
    cancelled: set[int] = set()
    for n in range(200):
        prompt, options = some_request(n, 8)
        numbers.append(engine.add(prompt, options.changed({"max_tokens": 1 + n % 7, "steps": 1})))
        if n % 4 == 3:
            cancelled.add(number := pick.choice([m for m in numbers[-12:] if m not in cancelled]))
            engine.cancel(number)
        if pick.random() < 0.5:
            step(engine, found)
    finish(engine, found)
    assert len(cancelled) == 50 and set(numbers) - cancelled <= set(found.events)
    for number in set(numbers) - cancelled:
        assert isinstance(found.last(number), Stop)
    assert not left_behind(engine)


# ---- loops over steps ----------------------------------------------------------------------------------------------


def test_two_streams_in_turn_share_passes(exact: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gives its own events, whichever of them steps."""
    asks, passes, extend = [some_request(n, 9) for n in (0, 1)], [], exact.transformer.extend
    monkeypatch.setattr(exact.transformer, "extend", lambda *a: passes.append(1) or extend(*a))
    texts, counts = [], []
    for ask in asks:
        texts.append(text_of(alone(exact, ask)[1]))
        counts.append(len(passes) - sum(counts))
    passes.clear()
    engine = Engine(exact)
    streams = [engine.stream(*ask) for ask in asks]
    events: list[list[Event]] = [[], []]
    left = [0, 1]
    while left:
        for n in list(left):
            event = next(streams[n], None)
            if event is None:
                left.remove(n)
            else:
                events[n].append(event)
    assert [text_of(one) for one in events] == texts and all(isinstance(one[-1], Stop) for one in events)
    assert max(counts) <= len(passes) < sum(counts)
    assert not left_behind(engine)


def test_threads_share_one_engine(exact: Omni) -> None:
    asks = [some_request(n, 11) for n in range(6)]
    engine, found = Engine(exact), {}

    def ask(n: int) -> None:
        prompt, options = asks[n]
        found[n] = engine.generate(prompt, options) if n % 2 else text_of(list(engine.stream(prompt, options)))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asks))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    for n, (prompt, options) in enumerate(asks):
        reply = Engine(exact).generate(prompt, options)
        assert (found[n].text if n % 2 else found[n]) == reply.text
    assert not left_behind(engine)


def test_added_requests_and_loops_do_not_take_each_others_events(model: Omni) -> None:
    engine, found = Engine(model), Found()
    text_alone(engine)
    added = engine.add("mine", max_tokens=50, tokens_per_pass=1)
    reply = engine.generate("theirs", max_tokens=3, tokens_per_pass=1)
    assert len(reply.text) > 0
    finish(engine, found)
    assert set(found.events) == {added} and isinstance(found.last(added), Stop)


def test_a_seed_is_the_request_and_not_its_number(model: Omni) -> None:
    """In a fresh engine and in a used one, at any id."""
    engine = Engine(model)
    options = GenerationOptions(temperature=1.0, max_tokens=20, max_images=0, seed=3, tokens_per_pass=1)
    texts = [engine.generate("say", options).text for _ in range(2)] + [Engine(model).generate("say", options).text]
    assert texts[0] == texts[1] == texts[2] != engine.generate("say", options.changed({"seed": 4})).text


# ---- found by breaking it ------------------------------------------------------------------------------------------


def test_events_of_added_requests_survive_a_loop(model: Omni) -> None:
    """A loop makes the steps in which an added request ends; the next `step` returns its events."""
    engine = Engine(model)
    number = engine.add("x", max_tokens=3, max_images=0, seed=1)
    engine.generate("y", max_tokens=20, max_images=0, seed=2, tokens_per_pass=1)
    events = [event for found, event in engine.step() if found == number]
    alone = list(Engine(model).stream("x", max_tokens=3, max_images=0, seed=1))
    assert [type(event) for event in events] == [type(event) for event in alone] and isinstance(events[-1], Stop)
    assert text_of(events) == text_of(alone)


def test_short_reads_do_not_starve_a_long_prompt(model: Omni) -> None:
    engine = Engine(model, budget=8)
    text_alone(engine)
    plain = GenerationOptions(tokens_per_pass=1, max_images=0)
    for seed in range(8):
        engine.add("a", plain, max_tokens=60, seed=seed)
    long = engine.add("a long prompt " * 12, plain, max_tokens=2)
    first = next(n for n in range(100) if any(number == long for number, _ in engine.step()))
    assert first < 30


def test_drafting_requests_read_their_prompts_within_the_budget(model: Omni) -> None:
    engine, found = Engine(model, budget=2 * SHORT), Found()
    text_alone(engine)
    for seed in range(2):
        engine.add("a long prompt " * 40, max_tokens=4, max_images=0, tokens_per_pass=4, seed=seed)
    before, most = 0, 0
    while not engine.is_idle:
        step(engine, found)
        most, before = max(most, engine.steps.computed - before), engine.steps.computed
    assert most <= 3 * SHORT + 16  # the last positions of a prompt are a short read


def test_blocks_take_turns_where_they_exceed_the_budget(model: Omni) -> None:
    engine = Engine(model, budget=4)
    options = GenerationOptions(force_image=True, image_size=(8, 8), steps=4, max_images=1, max_tokens=1)
    numbers, order = [engine.add("draw", options, seed=seed) for seed in range(3)], []
    while not engine.is_idle:
        order += [number for number, event in engine.step() if isinstance(event, BlockStep)]
    assert order == 4 * numbers


def test_an_interrupted_step_ends_what_runs(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop waits for ever, and no page stays."""
    engine = Engine(model)
    stream = engine.stream("x", max_tokens=20, max_images=0)
    next(stream)

    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer, "extend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("y", max_tokens=4)
    with pytest.raises(RuntimeError, match="a step was interrupted by KeyboardInterrupt"):
        list(stream)
    assert engine.is_idle and engine.pages_in_use == 0


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"budget": 0}, "budget = 0 of an engine: give at least 1"),
        ({"max_running": 0}, "max_running = 0"),
        ({"max_positions": -3}, "max_positions = -3"),
        ({"kept_positions": -1}, "kept_positions = -1 of an engine: give at least 0"),
    ],
)
def test_bounds_that_allow_nothing_raise(model: Omni, bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model, **bounds)


def test_edits_of_a_forced_picture_and_of_a_full_reply(model: Omni) -> None:
    """The picture is not forced again, and no token exceeds max_tokens."""
    engine = Engine(model)
    text_alone(engine)
    options = GenerationOptions(force_image=True, image_size=(8, 8), steps=1, max_images=1, max_tokens=9)
    reply = engine.generate("draw", options)
    edited = engine.edit(reply, 1)
    assert [type(part) for part in edited.parts] == [type(part) for part in reply.parts] and edited.text == reply.text
    full = engine.edit(reply, len(reply.parts))
    assert full.stop_reason == "length" and full.text == reply.text
    for wrong, message in ((True, "part = True"), (7, "part = 7 of a reply of 2 parts"), ("0", "part = '0'")):
        with pytest.raises(ValueError, match=message):
            engine.edit(reply, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="edit takes a Reply of an engine"):
        engine.edit("reply", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num = 0; give a whole number"):
        engine.answers("x", 0)


def test_a_history_of_changed_weights_is_not_kept(model: Omni) -> None:
    engine = Engine(model)
    stream = engine.stream("the same prompt", max_tokens=8, max_images=0)
    next(stream)
    weight = model.get_parameter("transformer.blocks.0.text.qkv.weight")
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        list(stream)
        assert engine.prefixes.pages == 0
        fresh = Engine(model).generate("the same prompt", max_tokens=8, max_images=0)
        assert engine.generate("the same prompt", max_tokens=8, max_images=0).text == fresh.text
    finally:
        with torch.no_grad():
            weight.div_(1.5)
