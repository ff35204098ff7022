"""Kept histories: a prompt that begins like an earlier one is not read again, and the reply stays the same."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from histories import histories_of, text
from scripted import follow, living

from omni.document import Document, Image, Role, Text
from omni.generation.context import append_of, marks_of
from omni.generation.engine import Engine
from omni.generation.events import BlockStep
from omni.generation.options import GenerationOptions
from omni.generation.prefixes import Latents, Prefixes, common_length, without_first
from omni.generation.reply import Reply
from omni.model import Omni
from omni.nn.cache import PAGE, History, Pool
from omni.rng import Key
from omni.sequence.layout import LatentSpan, Span, TokenSpan

PIXELS = torch.arange(8 * 12 * 3, dtype=torch.uint8).reshape(8, 12, 3)
SYSTEM = "You are a careful assistant, and you answer in a few words. "
PLAIN = GenerationOptions(temperature=1.0, max_tokens=12, max_images=0, seed=3)


@pytest.fixture(scope="module")
def model(tiny_model) -> Omni:  # noqa: ANN001
    """float64, where equal ids need no luck."""
    return living(tiny_model).double()


def text_alone(engine: Engine) -> Engine:
    control = engine.control
    engine.grammar.allowed["text"][[control.end, control.image, control.video]] = -torch.inf
    return engine


def cost(engine: Engine, prompt: Any, options: GenerationOptions = PLAIN) -> tuple[Reply, int]:
    """The reply, and the number of positions that were computed for it."""
    before = engine.steps.computed
    return engine.generate(prompt, options), engine.steps.computed - before


def equal(a: Reply, b: Reply) -> bool:
    assert a.text == b.text and a.stop_reason == b.stop_reason and len(a.images) == len(b.images)
    for one, other in zip(a.images, b.images, strict=True):
        x, y = (torch.tensor(list(image.tobytes())) for image in (one, other))
        assert int((x - y).abs().max()) <= 1
    return True


# ---- found and recomputed ------------------------------------------------------------------------------------------


def test_a_found_prefix_gives_the_same_reply_and_costs_less(model: Omni) -> None:
    engine = text_alone(Engine(model))
    first, whole = cost(engine, SYSTEM + "What is a cat?")
    for question in ("What is a cow?", "And now?", "What is a cat?", "What is a cat? Say it."):
        found, less = cost(engine, SYSTEM + question)
        fresh, more = cost(text_alone(Engine(model)), SYSTEM + question)
        assert equal(found, fresh) and found.text != ""
        assert more - less >= len(SYSTEM) and more <= whole + len(question)
    again, least = cost(engine, SYSTEM + "What is a cat?")
    assert equal(again, first) and least == PLAIN.max_tokens  # one position of the prompt, and the reply but its last


def test_the_next_turn_reads_only_what_is_new(model: Omni) -> None:
    """Of a conversation with pictures and guidance."""
    draw = {"max_images": 1, "steps": 2, "force_image": True, "image_size": (8, 12)}
    options = PLAIN.changed({**draw, "guidance": 2.0, "image_guidance": 1.5})
    engine = text_alone(Engine(model))
    first, _ = cost(engine, Document((Text(SYSTEM), Image(PIXELS), Text("draw it"))), options)
    after = Document((*first.document.segments, Text("and another one?")))
    found, less = cost(engine, after, options)
    other = text_alone(Engine(model))
    cost(other, Document((Text(SYSTEM), Image(PIXELS), Text("draw it"))), options)
    other.prefixes.clear()  # it knows the latents that were drawn, but keeps no history
    fresh, more = cost(other, after, options)
    assert equal(found, fresh) and len(found.images) == 1
    assert more - less >= len(SYSTEM) + 2 * 6  # text, the given picture in two branches


def test_latents_of_drawn_pictures_are_found_in_the_next_turn(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is encoded, and the context has the latents that were drawn, not those of the rounded pixels."""
    engine = text_alone(Engine(model))
    draw = GenerationOptions(steps=2, max_tokens=4, max_images=1, force_image=True, image_size=(8, 12), seed=1)
    events = list(engine.stream("draw", draw))
    [drawn] = [e.latents for e in events if isinstance(e, BlockStep) and e.step == e.steps]
    reply = engine.generate("draw", draw)
    [segment] = [s for s in reply.document.segments if isinstance(s, Image)]
    spans: list[Span] = []
    encoded, encode = [], model.codec.encode_media  # type: ignore[union-attr]
    monkeypatch.setattr(model.codec, "encode_media", lambda media: encoded.extend(media) or encode(media))
    number = engine.add(Document((*reply.document.segments, Text("again?"))), PLAIN)
    [request] = engine._waiting
    spans = request.pending
    [block] = [span for span in spans if isinstance(span, LatentSpan)]
    assert encoded == [] and torch.equal(block.latents.float(), drawn)
    [rounded] = encode([segment])[0]
    assert not torch.equal(rounded.reshape(drawn.shape).float(), drawn)  # pixels are rounded
    engine.cancel(number)
    fresh = Engine(model)
    fresh.add(Document((*reply.document.segments, Text("again?"))), PLAIN)
    assert len(encoded) == 1  # another engine knows the pixels alone


def test_a_change_of_weights_clears_what_is_kept(tiny_model) -> None:  # noqa: ANN001
    """In place, and by a load."""
    model = living(tiny_model).double()
    engine = text_alone(Engine(model))
    prompt = SYSTEM + "What is a cat?"
    engine.generate(prompt, PLAIN)
    for change in ("in place", "by a load"):
        _, before = cost(engine, prompt)
        assert before == PLAIN.max_tokens
        with torch.no_grad():
            if change == "in place":
                model.get_parameter("transformer.blocks.0.text.qkv.weight").mul_(1.5)
            else:
                model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
        found, num = cost(engine, prompt)
        assert num > len(prompt) and equal(found, text_alone(Engine(model)).generate(prompt, PLAIN))


def test_replies_do_not_depend_on_what_is_kept(model: Omni) -> None:
    """Random prompts that share beginnings, pictures among them, one after the other and at once."""
    pick, engine = random.Random(0), text_alone(Engine(model, kept_positions=300))
    parts: list[Any] = [Text("ab"), Text("abc"), Image(PIXELS), Image(PIXELS.flip(0)), Text("x", Role.ASSISTANT)]
    documents = [Document((*(pick.choice(parts) for _ in range(pick.randint(1, 5))), Text("?"))) for _ in range(24)]
    replies = [engine.generate(document, PLAIN) for document in documents[:12]]
    replies += engine.generate_batch(documents[12:], PLAIN)
    for document, reply in zip(documents, replies, strict=True):
        assert equal(reply, text_alone(Engine(model)).generate(document, PLAIN))
    engine.forget()
    assert engine.pool.pages_in_use == 0


def test_pages_of_kept_histories_are_not_in_use(model: Omni) -> None:
    engine = text_alone(Engine(model))
    engine.generate(SYSTEM, PLAIN)
    assert engine.pages_in_use == 0 < engine.pool.pages_in_use
    engine.generate(SYSTEM + "again", PLAIN)
    engine.answers(SYSTEM + "again", 3, PLAIN)
    assert engine.pages_in_use == 0
    engine.forget()
    assert engine.pages_in_use == engine.pool.pages_in_use == 0


# ---- several answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [512, 16])
def test_answers_read_the_prompt_once(model: Omni, budget: int) -> None:
    """They equal separate requests with those seeds, with pictures in the prompt and in the replies."""
    prompt = Document((Text(SYSTEM), Image(PIXELS), Text("what is this?")))
    for options in (PLAIN, PLAIN.changed({"force_image": True, "max_images": 1, "image_size": (8, 8), "steps": 2})):
        engine = text_alone(Engine(model, budget=budget))
        before = engine.steps.computed
        replies = engine.answers(prompt, 4, options)
        num = engine.steps.computed - before
        costs = []
        for seed, reply in enumerate(replies, options.seed or 0):
            fresh = text_alone(Engine(model, budget=budget))
            assert equal(reply, fresh.generate(prompt, options.changed({"seed": seed})))
            assert reply.record["options"]["seed"] == seed
            costs.append(fresh.steps.computed)
        positions = len(SYSTEM) + 6 + len("what is this?")
        assert num <= sum(costs) - 3 * positions
        assert len({reply.text for reply in replies}) == 4
        engine.forget()
        assert engine.pool.pages_in_use == 0


def test_answers_of_a_cancelled_leader_go_on(model: Omni) -> None:
    """A reply that reads the prompt for others may leave."""
    engine = text_alone(Engine(model, budget=16))
    options = engine.resolve(PLAIN)
    many = [options.changed({"seed": n}) for n in range(3)]
    requests = engine._add([SYSTEM] * 3, many, alike=True)
    engine.step()
    engine.cancel(requests[0].number)
    found: dict[int, str] = {}
    while not engine.is_idle:
        for number, event in engine.step():
            found[number] = found.get(number, "") + getattr(event, "text", "")
    wanted = [text_alone(Engine(model)).generate(SYSTEM, options.changed({"seed": n})).text for n in (1, 2)]
    assert [found[request.number] for request in requests[1:]] == wanted


# ---- the longest common prefix -------------------------------------------------------------------------------------


def block(seed: int, grid: tuple[int, int, int] = (1, 2, 3)) -> LatentSpan:
    return LatentSpan(Key(seed).normal((grid[0] * grid[1] * grid[2], 48)), grid)


def test_a_prefix_never_cuts_a_block_and_leaves_a_position_to_read(model: Omni) -> None:
    other = block(1)
    nearly = LatentSpan(other.latents.index_fill(0, torch.tensor([5]), 0.5), other.grid)
    turned = LatentSpan(other.latents, (1, 3, 2))
    kept: list[Span] = [text([1, 2]), other, text([3, 4]), block(2), text([5])]
    marks = marks_of(kept)
    assert len(marks) == len(set(marks)) == 17 and marks[:2] == [1, 2] and max(marks[2:8]) < 0
    cases: list[tuple[list[Span], int]] = [
        (kept, 16),
        ([*kept, text([6])], 17),
        (kept[:-1], 10),  # the last block must be read, and not a part of it
        ([text([1, 2]), other], 2),
        ([text([1, 2]), other, text([3])], 8),
        ([text([1, 2]), nearly, text([3])], 2),  # one latent differs, the last
        ([text([1, 2]), turned, text([3])], 2),  # the same latents in another grid
        ([text([1, 9]), other], 1),
        ([text([9])], 0),
        ([other, text([1])], 0),
        ([text([1])], 0),
    ]
    [history] = histories_of(model, [kept])
    assert history.marks == marks
    for spans, wanted in cases:
        whole = append_of(History(history.pool), spans, 0)
        length = common_length(marks, whole)
        assert length == wanted
        rest = without_first(spans, length)
        assert marks_of(rest) == whole.marks[length:] and all(isinstance(s, TokenSpan | LatentSpan) for s in rest)
        store = Prefixes(1000)
        store.keep(history.fork())
        fork = store.find(whole)
        assert (fork is None) == (wanted == 0)
        if fork is not None:
            assert fork.length == wanted and fork.marks == whole.marks[:wanted]
            assert (fork.next_position, fork.next_block) == (whole.laid.position[wanted][0], whole.laid.block[wanted])


def plain_history(pool: Pool, ids: list[int]) -> History:
    one = History(pool)
    one.reserve(len(ids))
    one.commit(len(ids), len(ids), len(ids), ids)
    return one


def kept_in(store: Prefixes) -> list[list[int]]:
    return [one.marks for one in store._kept.values()]


def test_the_store_is_bounded_and_the_least_recently_used_goes_first() -> None:
    pool, store = Pool(1, 1, 2), Prefixes(3 * PAGE)
    asks = [[n] * PAGE for n in range(5)]
    for ids in asks[:3]:
        store.keep(plain_history(pool, ids))
    assert kept_in(store) == asks[:3] and pool.pages_in_use == store.pages > 0
    found = store.find(append_of(History(pool), [text([*asks[0], 7])], 0))
    assert found is not None and found.length == PAGE  # and the first is now the last used
    found.release()
    store.keep(plain_history(pool, asks[3]))
    assert kept_in(store) == [asks[2], asks[0], asks[3]]
    store.keep(plain_history(pool, asks[4] * 4))  # too long: not kept, and displaces nothing
    assert kept_in(store) == [asks[2], asks[0], asks[3]]
    store.keep(plain_history(pool, asks[4] * 3))  # as long as the bound
    assert kept_in(store) == [asks[4] * 3]
    store.clear()
    assert kept_in(store) == [] and pool.pages_in_use == store.pages == 0


def test_a_history_that_continues_a_kept_one_replaces_it() -> None:
    pool, store = Pool(1, 1, 2), Prefixes(100)
    store.keep(plain_history(pool, [1, 2]))
    store.keep(plain_history(pool, [1, 3]))
    store.keep(plain_history(pool, [1, 2, 4]))
    assert kept_in(store) == [[1, 3], [1, 2, 4]]
    store.keep(plain_history(pool, []))
    store.keep(plain_history(pool, [1, 3]))  # the same again
    assert kept_in(store) == [[1, 2, 4], [1, 3]]
    before = pool.pages_in_use
    assert store.make_room() and kept_in(store) == [[1, 3]] and pool.pages_in_use < before
    assert store.make_room() and not store.make_room() and pool.pages_in_use == 0


def test_kept_histories_make_room_for_requests(model: Omni) -> None:
    """A pool that is full of them is not full."""
    engine = text_alone(Engine(model, max_positions=24 * PAGE))
    for n in range(12):
        assert engine.generate(f"{n}: {SYSTEM}", PLAIN).stop_reason == "length"


def test_an_engine_keeps_at_most_what_it_may(model: Omni) -> None:
    engine = text_alone(Engine(model, kept_positions=150))
    for n in range(6):
        engine.generate(f"{n}: {SYSTEM}", PLAIN)
        assert sum(one.length for one in engine.prefixes._kept.values()) <= 150
    assert len(engine.prefixes._kept) == 1
    none = text_alone(Engine(model, kept_positions=0))
    none.generate("hello", PLAIN)
    assert none.pool.pages_in_use == 0


# ---- latents -------------------------------------------------------------------------------------------------------


def test_latents_are_encoded_once_and_bounded() -> None:
    calls: list[int] = []

    def encode(media: list[Any]) -> list[list[torch.Tensor]]:
        calls.append(len(media))
        return [[torch.full((1, 2, 3, 4), float(one.pixels[0, 0, 0]))] for one in media]

    def picture(value: int) -> Image:
        return Image(torch.full((8, 12, 3), value, dtype=torch.uint8))

    store = Latents(12)  # two pictures
    assert [float(z[0].mean()) for z in store.encode([picture(1), picture(2), picture(1)], encode)] == [1, 2, 1]
    assert calls == [2]
    store.encode([picture(1)], encode)
    assert calls == [2]
    store.encode([picture(3)], encode)  # the second goes
    store.encode([picture(1), picture(3)], encode)
    assert calls == [2, 1]
    assert [float(z[0].mean()) for z in store.encode([picture(2)], encode)] == [2] and calls == [2, 1, 1]
    store.put(picture(5), [torch.zeros(1, 9, 9, 4)])  # alone above the bound
    assert not store._kept and store.encode([], encode) == []
    turned = Image(torch.full((12, 8, 3), 5, dtype=torch.uint8))
    store.encode([turned], encode)  # the same bytes in another shape
    assert calls == [2, 1, 1, 1]


def test_a_follower_of_a_script_is_of_its_engine_alone(model: Omni) -> None:
    """Scripts of tests do not leak into other engines of the model."""
    engine, other = Engine(model), text_alone(Engine(model))
    follow(engine, lambda request: [*engine.tokenizer.encode("abc"), engine.control.end])
    assert engine.generate("say").text == "abc"
    assert other.generate("say", PLAIN).text == text_alone(Engine(model)).generate("say", PLAIN).text != "abc"
