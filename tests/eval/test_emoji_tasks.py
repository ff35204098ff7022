"""Every emoji-world task on models with known answers: right ones, wrong ones, averaged ones, none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

import eval.requests
from eval.metrics.emoji_judge import Judge
from eval.task import TASKS, Context, Outcome
from omni.data.emoji_world.documents import prompt_of
from omni.document import Document, Image, Segment, Text
from omni.generation.events import ImagePart, TextPart
from omni.generation.reply import Reply

Answer = Callable[[list[tuple[Segment, ...]], int], tuple[Segment, ...]]  # (all right answers, which request)


def right(answers: list[tuple[Segment, ...]], i: int) -> tuple[Segment, ...]:
    return answers[i]


def of_another(answers: list[tuple[Segment, ...]], i: int) -> tuple[Segment, ...]:
    return answers[(i + 1) % len(answers)]


def averaged(answers: list[tuple[Segment, ...]], i: int) -> tuple[Segment, ...]:
    """Each picture mixed half and half with the next request's."""
    out: list[Segment] = []
    others = [s for s in of_another(answers, i) if isinstance(s, Image)]
    for segment in answers[i]:
        if isinstance(segment, Image) and others:
            mixed = (segment.pixels.float() + others.pop(0).pixels.float()) / 2
            out.append(Image(mixed.round().to(torch.uint8), segment.role))
        else:
            out.append(segment)
    return tuple(out)


def nothing(answers: list[tuple[Segment, ...]], i: int) -> tuple[Segment, ...]:
    return ()


class KnownModel:
    """Answers from the documents that the prompts were cut from."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.originals: dict[int, Document] = {}
        self.kept: list[Document] = []  # so that no id is reused

    def cut(self, document: Document) -> Document:
        prompt = prompt_of(document)
        self.originals[id(prompt)] = document
        self.kept.append(prompt)
        return prompt

    def generate_batch(self, prompts: list[Document], options: Any, seeds: list[int]) -> list[Reply]:
        assert len(prompts) == len(seeds) and options.picture.steps >= 1
        right_answers = [tuple(self.originals[id(p)].turns())[-1][1] for p in prompts]
        if self.answer is unchanged:
            return [self.reply(p, (p.images()[-1],)) for p in prompts]
        return [self.reply(p, self.answer(right_answers, i)) for i, p in enumerate(prompts)]

    def reply(self, prompt: Document, segments: tuple[Segment, ...]) -> Reply:
        parts: list[Any] = []
        for segment in segments:
            if isinstance(segment, Text):
                parts.append(TextPart(segment.text))
            elif isinstance(segment, Image):
                parts.append(ImagePart(PILImage.fromarray(segment.pixels.numpy()), 64, 64, 8, 0, len(parts)))
        return Reply(parts, Document((*prompt.segments, *segments)), "end")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, judge: Judge) -> Callable[..., dict[str, float]]:
    def go(name: str, answer: Answer, **options: Any) -> dict[str, float]:
        model = KnownModel(answer)
        monkeypatch.setattr(eval.requests, "prompt_of", model.cut)
        context = Context(shared={"atlas": judge.atlas, "judge": judge})
        context.__dict__["model"] = model
        task = TASKS.get(name)
        outcome: Outcome = task.run(context, task.options(requests=24, batch=24, **options))
        assert {m.name for m in outcome.measures} <= set(task.rows)
        return {m.name: m.value for m in outcome.measures}

    return go


SCENE_TASKS = ["scenes", "counts", "edits", "chat_edits"]


@pytest.mark.parametrize("name", ["draw", *SCENE_TASKS, "naming", "describe", "rewriting", "when_to_draw", "questions"])
def test_right_answers_score_100(run: Callable[..., dict[str, float]], name: str) -> None:
    assert set(run(name, right).values()) == {100.0}


@pytest.mark.parametrize("name", ["draw", *SCENE_TASKS, "naming", "describe", "rewriting", "questions"])
def test_answers_to_other_requests_score_almost_0(run: Callable[..., dict[str, float]], name: str) -> None:
    assert run(name, of_another)["right"] <= 10


def unchanged(answers: list[tuple[Segment, ...]], i: int) -> tuple[Segment, ...]:
    """The words of the right answer, with the given picture."""
    raise NotImplementedError  # KnownModel answers with the prompt's own picture


@pytest.mark.parametrize("name", ["edits", "chat_edits"])
def test_an_unchanged_picture_scores_0(run: Callable[..., dict[str, float]], name: str) -> None:
    assert run(name, unchanged)["right"] == 0


@pytest.mark.parametrize("name", SCENE_TASKS)
def test_averaged_answers_score_almost_0(run: Callable[..., dict[str, float]], name: str) -> None:
    assert run(name, averaged)["right"] <= 10


def test_averaged_drawings_are_neither_clear_nor_sharp(run: Callable[..., dict[str, float]]) -> None:
    values = run("draw", averaged)
    assert values["clear"] <= 5 and values["sharp"] <= 5


@pytest.mark.parametrize("name", ["draw", *SCENE_TASKS, "naming", "describe", "story", "open"])
def test_no_answer_scores_0(run: Callable[..., dict[str, float]], name: str) -> None:
    values = run(name, nothing, **({"draws": 0} if name == "open" else {}))
    assert set(values.values()) == {0.0}


def test_when_to_draw_counts_both_mistakes(run: Callable[..., dict[str, float]]) -> None:
    values = run("when_to_draw", nothing)
    assert values == {"right": 50.0, "drawn_when_asked": 0.0, "not_drawn_when_not_asked": 100.0}


def test_open_requests_and_their_coverage(run: Callable[..., dict[str, float]]) -> None:
    values = run("open", right, draws=60, coverage_class="heart")
    assert values["right"] == values["right_and_sharp"] == 100.0
    assert 0 < values["coverage"] <= 100 and 0 < values["evenness"] <= 1
    averages = run("open", averaged, draws=0, kinds=("class",))
    assert averages["right_and_sharp"] <= 10


def test_a_story_out_of_place_scores_0(run: Callable[..., dict[str, float]]) -> None:
    values = run("story", right)
    assert set(values.values()) == {100.0}
    assert run("story", lambda answers, i: answers[i][:-1])["in_place"] == 0
    assert run("story", lambda answers, i: answers[i][::-1])["in_place"] == 0
    exchanged = run("story", lambda answers, i: tuple(answers[i][k] for k in (0, 3, 2, 1, 4, 5)))
    assert exchanged["in_place"] == 100 and exchanged["pictures"] <= 60
