"""The tasks of everyday requests on models with known answers: right ones, wrong ones, blurred ones, none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from eval.metrics.emoji_judge import Judge
from eval.task import TASKS, Context, Outcome
from eval.tasks.smol import laptop, laptop_process
from eval.tasks.smol.draw import sheet
from eval.tasks.smol.laptop_process import Waited, first_of, text_rate
from eval.tasks.smol.requests import PAIRS, SecondTurn, all_requests, name_of
from eval.tasks.smol.stories import has_sentence
from omni.data.emoji_world import Atlas, render
from omni.data.emoji_world.scene import PAIR_SLOTS, Scene, single, small_objects
from omni.document import Document, Text
from omni.generation.events import BlockDone, ImagePart, Stop, TextDelta, TextPart
from omni.generation.options import GenerationOptions
from omni.generation.reply import Reply

Part = str | Scene | torch.Tensor
Answer = Callable[[str, GenerationOptions], list[Part]]
REQUESTS = all_requests()
NEVER = "accordion"  # no request accepts it
NUM = {"requests": 7, "dtype": "float32"}


def names(accepted: Sequence[str]) -> list[str]:
    return [name for one in accepted if (name := name_of(one)) is not None]


def drawn(accepted: Sequence[str], background: str = "white") -> Scene:
    return single((names(accepted) or [NEVER])[0], background)


def pair(accepted: Any) -> Scene:
    number = [set(sides) for sides in PAIRS].index(set(accepted))
    return small_objects([names(accepted[side])[0] for side in PAIRS[number]], PAIR_SLOTS[number])


def second(request: SecondTurn) -> list[Part]:
    if request.kind == "name":
        assert request.answers is not None
        return [f"It is a {request.answers[0]}."]
    return [pair(request.pair) if request.kind == "add" else drawn(request.single, request.background or "white")]


def right_answers() -> dict[str, list[Part]]:
    """The right reply to every request, by its last text."""
    found: dict[str, list[Part]] = {one.first: [drawn(["🐱"])] for one in REQUESTS.second}
    found |= {one.request: [drawn(one.accept)] for one in REQUESTS.draw}
    found |= {one.request: [pair(one.accept)] for one in REQUESTS.scenes}
    found |= {one.request: ["The cat slept. ", drawn(one.about)] * one.pictures for one in REQUESTS.stories}
    found |= {one.request: ["Some words."] for one in REQUESTS.plain}
    found |= {one.request: [f"I cannot draw {one.thing}."] for one in REQUESTS.unknown}
    return found | {one.second: second(one) for one in REQUESTS.second}


RIGHT = right_answers()
NAMED = {one.request: one.answers[0] for one in REQUESTS.naming}


def right(text: str, options: GenerationOptions) -> list[Part]:
    return RIGHT[text] if text in RIGHT else [f"This is a {NAMED[text]}."]


def wrong(text: str, options: GenerationOptions) -> list[Part]:
    """A picture of what nobody asked for, and other words without the adapter."""
    return ["no"] if options.lora == "none" else [single(NEVER)]


class Known:
    """A model with known answers."""

    base = None

    def __init__(self, answer: Answer, atlas: Atlas) -> None:
        self.answer, self.atlas = answer, atlas
        self.settings: list[GenerationOptions] = []

    def generate_batch(self, prompts: Sequence[Any], options: GenerationOptions, seeds: list[int]) -> list[Reply]:
        assert len(prompts) == len(seeds) and options.text.temperature == 0
        self.settings.append(options)
        return [self.reply(prompt, options) for prompt in prompts]

    def reply(self, prompt: Any, options: GenerationOptions) -> Reply:
        if isinstance(prompt, Document):
            text = next(one.text for one in prompt.segments if isinstance(one, Text))
        else:
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            assert isinstance(prompt, str) or prompt[1]["role"] == "assistant"
        parts: list[Any] = []
        for part in self.answer(text, options):
            if isinstance(part, str):
                parts.append(TextPart(part))
                continue
            pixels = render(part, self.atlas) if isinstance(part, Scene) else part
            steps = options.picture.steps or 2
            parts.append(ImagePart(PILImage.fromarray(pixels.numpy()), 64, 64, steps, 0, len(parts), steps))
        return Reply(parts, Document((Text(text),)), "end")


@pytest.fixture(scope="module")
def small() -> Judge:
    """A judge among the names that the requests accept and a few more: building all templates takes seconds."""
    atlas = Atlas()
    wanted = [one.accept for one in REQUESTS.draw] + [one.about for one in REQUESTS.stories]
    pairs = [one.accept for one in REQUESTS.scenes]
    for one in REQUESTS.second:
        wanted += [] if one.kind == "add" else [one.single]
        pairs += [one.pair] if one.kind == "add" else []
    wanted += [those for accept in pairs for those in accept.values()]
    some = {NEVER, "cat face", *(name for accepted in wanted for name in names(accepted)[:1])}
    atlas.names = tuple(name for name in atlas.names if name in some)
    return Judge(atlas)


@pytest.fixture
def run(small: Judge, tmp_path: Path) -> Callable[..., Outcome]:
    def go(name: str, answer: Answer, alone: Answer = right, **options: Any) -> Outcome:
        model, other = Known(answer, small.atlas), Known(alone, small.atlas)
        shared = {"atlas": small.atlas, "judge": small, "smol float32": model, "smol language model float32": other}
        folder = {"folder": str(tmp_path)} if name == "smol_draw" else {}
        task = TASKS.get(name)
        outcome = task.run(Context(shared=shared), task.options(**{**NUM, **folder, **options}))
        assert {measure.name for measure in outcome.measures} <= set(task.rows)
        return outcome

    return go


def values(outcome: Outcome) -> dict[str, float]:
    return {measure.name: measure.value for measure in outcome.measures}


TASKS_OF_PICTURES = ["smol_draw", "smol_scenes", "smol_second", "smol_stories"]


@pytest.mark.parametrize("name", [*TASKS_OF_PICTURES, "smol_unknown", "smol_naming"])
def test_right_answers_score_100(run: Callable[..., Outcome], name: str) -> None:
    found = values(run(name, right))
    found.pop("held_out", None)
    assert len(found) > 1 and set(found.values()) == {100.0}


@pytest.mark.parametrize("name", [*TASKS_OF_PICTURES, "smol_unknown", "smol_naming"])
def test_wrong_answers_score_0(run: Callable[..., Outcome], name: str) -> None:
    found = values(run(name, wrong))
    scored = {row: value for row, value in found.items() if row not in ("starts", "sharp", "held_out", "one_over_many")}
    assert scored and set(scored.values()) == {0.0}


@pytest.mark.parametrize("name", TASKS_OF_PICTURES)
def test_no_answer_scores_0(run: Callable[..., Outcome], name: str) -> None:
    found = values(run(name, lambda text, options: []))
    assert {value for value in found.values() if not math.isnan(value)} == {0.0}


def test_held_out_names_are_counted_apart(run: Callable[..., Outcome]) -> None:
    unseen = {one.request for one in REQUESTS.draw if one.is_held_out}
    held_out = {one: [single("cat face")] for one in unseen}
    outcome = run(
        "smol_draw", lambda text, options: held_out.get(text) or right(text, options), requests=None, compare=False
    )
    found = values(outcome)
    assert found["held_out"] == 0 and found["starts"] == 100
    assert "tooth" in outcome.notes[1] and "high heel, loo roll" in outcome.notes[1]


def test_few_and_many_jumps_are_compared(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """One jump answers every second request."""
    asked = [one.request for one in REQUESTS.draw]

    def answer(text: str, options: GenerationOptions) -> list[Part]:
        is_right = options.picture.steps != 1 or asked.index(text) * 7 // len(asked) % 2
        return right(text, options) if is_right else [single(NEVER)]

    outcome = run("smol_draw", answer)
    assert values(outcome)["right"] == 100 and 30 <= values(outcome)["one_over_many"] <= 70
    assert len(outcome.panels) == 7 and (tmp_path / "smol_draw.png").is_file()
    assert "one_over_many" not in values(run("smol_draw", answer, compare=False))


@pytest.mark.parametrize("mixed", [0.3, 0.5])
def test_mixtures_are_not_right(run: Callable[..., Outcome], small: Judge, mixed: float) -> None:
    """Neither a third of another emoji nor half of it."""

    def answer(text: str, options: GenerationOptions) -> list[Part]:
        pictures = [render(scene, small.atlas).float() for scene in (*right(text, options), single(NEVER))]
        return [(pictures[0] * (1 - mixed) + pictures[1] * mixed).round().to(torch.uint8)]

    found = values(run("smol_draw", answer))
    assert found["right"] == 0 and found["sharp"] <= 25 and found["starts"] == 100


def test_open_requests_count_names(run: Callable[..., Outcome], small: Judge) -> None:
    turns = iter(range(1000))

    def answer(text: str, options: GenerationOptions) -> list[Part]:
        return [single(small.atlas.names[next(turns) % 3])]

    outcome = run("smol_diversity", answer, requests=2, seeds=6)
    assert values(outcome) == {"starts": 100, "distinct": 3, "sharp": 100}
    assert "3 names in 6 replies" in outcome.notes[1]


def test_plain_requests_are_compared_with_and_without_the_adapter(run: Callable[..., Outcome]) -> None:
    assert values(run("smol_plain", right)) == {"starts": 0, "equal": 100, "off": 0}
    assert values(run("smol_plain", wrong)) == {"starts": 100, "equal": 0, "off": 7}
    asked = REQUESTS.plain[0].request

    def once(text: str, options: GenerationOptions) -> list[Part]:
        return ["Other words."] if text == asked else right(text, options)

    assert values(run("smol_plain", right, once)) == {"starts": 0, "equal": 100, "off": 1}


def test_second_turns_by_kind(run: Callable[..., Outcome], small: Judge) -> None:
    """The first picture again, on white, answers few kinds."""
    again = {one.second: [drawn(one.single)] for one in REQUESTS.second if one.kind in ("again", "background", "name")}
    found = values(run("smol_second", lambda text, options: again.get(text, RIGHT.get(text, [])), requests=None))
    assert found["again"] == found["other"] == found["add"] == 100 and found["name"] == 0
    assert 0 < found["background"] < 20, "some ask for white"


@pytest.mark.parametrize(
    ("parts", "in_place"),
    [
        (["A cat slept. ", 1, "It woke up.", 1, "It ate.", 1], True),
        (["A cat slept. ", 1, "It woke up.", 1, "It ate.", 1, " The end."], True),
        (["A cat slept. ", 1, "It woke up.", 1], False),
        (["A cat slept. ", 1, "It woke up.", 1, "It ate.", 1, "It slept.", 1], False),
        (["A cat slept. ", 1, 1, "It woke up. It ate.", 1], False),
        (["A cat slept. ", 1, "...", 1, "It ate.", 1], False),
        ([1, "A cat slept. ", 1, "It woke up.", 1, "It ate."], False),
    ],
)
def test_pictures_of_stories_stand_after_sentences(
    run: Callable[..., Outcome], parts: list[Any], in_place: bool
) -> None:
    answer = [part if isinstance(part, str) else single("cat face") for part in parts]
    found = values(run("smol_stories", lambda text, options: answer, requests=1))
    assert found == {"in_place": 100 * in_place, "hero": 100}
    assert has_sentence("a cat, it slept!") and not has_sentence("Once.") and not has_sentence("a cat")


def test_the_hero_may_be_small(run: Callable[..., Outcome]) -> None:
    small_hero = small_objects(("cat face", NEVER), PAIR_SLOTS[1])
    answer = ["A cat slept. ", small_hero, "It ate.", single(NEVER), "It ate.", Scene()]
    assert values(run("smol_stories", lambda text, options: answer, requests=1))["hero"] == pytest.approx(100 / 3)


def test_a_sheet_has_five_pictures_a_row() -> None:
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8)
    found = sheet([picture] * 5 + [None])
    assert found.shape == (2 * 128, 5 * 128, 3) and found[:128].max() == 0 and found[128:].unique().tolist() == [128]


# ---- one user ------------------------------------------------------------------------------------------------------


class Events:
    """An engine with known events, and a tokenizer with an id for each character."""

    def __init__(self, *events: Any) -> None:
        self.events, self.tokenizer = events, self

    def stream(self, prompt: str, **options: Any) -> Any:
        yield from self.events

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)


def test_the_first_text_and_picture_are_timed() -> None:
    part = ImagePart(PILImage.new("RGB", (64, 64)), 64, 64, 1, 0, 0, 1)
    engine = Events(TextDelta("a"), TextDelta("bc"), BlockDone(0, part), Stop("end"))
    first, picture = (first_of(engine, way, 8) for way in ("text", "picture"))
    assert 0 < first < picture and text_rate(engine, 8) > 0
    assert math.isnan(first_of(Events(Stop("end")), "picture", 8)) and math.isnan(text_rate(Events(Stop("end")), 8))


def test_rows_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([Waited(1.0, 2.0, float(n), n / 10) for n in range(1, 10)])
    monkeypatch.setattr(laptop, "in_new_process", lambda *given: next(made))
    task = TASKS.get("smol_laptop")
    found = values(task.run(Context(), task.options(dtype="float32")))
    assert found == {
        "loading": 2, "imports": 1, "first_text": 4, "picture": 5, "tokens_per_second": 6, "memory_gb": 0.9,
    }  # fmt: skip


def test_a_process_prints_what_it_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(laptop_process, "measure", lambda *given: Waited(1.0, 2.0, 3.0, float(len(given))))
    laptop_process.main(["text", "bf16", "", "8", "1"])
    assert Waited(**json.loads(capsys.readouterr().out)) == Waited(1.0, 2.0, 3.0, 5.0)


@pytest.mark.slow
def test_a_process_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="(?s)'text' failed: .*no model directory"):
        laptop.in_new_process("text", "float32", "no/such/model", 8, 1)
