"""Tools that let a language model write stories and replies: keyed plans, rules for sentences, resumed runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni.data.emoji_world.scene import pair_is_heldout
from omni.document import Role, Text
from omni.rng import Key
from train.tools import replies, stories
from train.tools.story_plans import Plans, Step


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans()


def test_plans_begin_and_end_well(plans: Plans) -> None:
    key = Key(0)
    for number in range(400):
        plan = plans.plan(number, key)
        beats = [plans.beats[step.beat] for step in plan]
        assert 2 <= len(plan) <= 4 and len({step.hero for step in plan}) == 1
        assert beats[-1]["place"] in ("ending", "goodbye") and all(
            beat["place"] not in ("ending", "goodbye") for beat in beats[:-1]
        )
        assert len({step.beat for step in plan}) == len(plan)
        assert all(step.other is None or not pair_is_heldout(step.hero[0], step.other[0]) for step in plan)
        prompt = plans.prompt(plan[0])
        assert prompt.segments[-1] == Text(plan[0].ask) and prompt.segments[-2].role is Role.ASSISTANT
    assert plans.plan(7, key) == plans.plan(7, key) != plans.plan(7, Key(1))


def test_rules_for_sentences(plans: Plans) -> None:
    number = next(n for n, beat in enumerate(plans.beats) if beat["name"] == "meets")
    step = Step(number, ("fox", "fox"), ("owl", "owl"), "A fox meets an owl.")
    assert plans.problem("The fox met an owl in the forest.", step) is None
    for wrong, why in {
        "The fox met an owl": "not one short plain sentence",
        "The fox met an owl. It ran.": "not one short plain sentence",
        "The fox met someone.": "'owl' not just once",
        "The fox met an owl who met a fox.": "'fox' not just once",
        "The owl met a fox today.": "'owl' before the hero",
        "The fox met a owl.": "a owl",
        "The fox is an owl now.": "without a word of the beat",
        "The fox met an owl and a pig.": "has 'pig'",
        "The fox met an owl and died.": "has 'died'",
        "The fox met an owl in the very very dark.": "has 'very' twice",
    }.items():
        assert plans.problem(wrong, step) == why


def test_beats_that_stand_out_are_dropped() -> None:
    beats = [[f"The fox {rest}.", ["fox"], "white"] for rest in ("slept well", "ran far", "slept far", "ran famy")]
    slept, ran, far, famy = beats
    others = [["fox", [slept, ran]], ["fox", [far, ["The fox ran well.", ["fox"], "white"]]]]
    assert stories.reviewed(others) == others
    assert stories.reviewed([*others, ["fox", [slept, famy, ran]]]) == [*others, ["fox", [slept, ran]]]
    assert stories.reviewed([*others, ["fox", [slept, ran, famy]]]) == others
    assert stories.reviewed([*others, ["fox", [slept, ["The fox hugs well.", ["fox"], "white"], ran]]])[2][1] == [
        slept,
        ran,
    ]


def test_stories_go_on_after_a_stop(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model writes nothing that the rules take; here they take any text."""
    monkeypatch.setattr(Plans, "problem", lambda self, sentence, step: None if sentence else "empty")
    monkeypatch.setattr(stories, "MAX_TOKENS", 4)
    monkeypatch.setattr(stories, "reviewed", list)

    def run(name: str, *more: str) -> Path:
        own = ["--part", "2", "--attempts", "2", *more]
        assert stories.main([str(tiny_model), str(tmp_path / name), *own]) == 0
        return tmp_path / name

    whole = run("whole.json", "--num", "4").read_bytes()
    assert run("stopped.json", "--num", "2").read_bytes() != whole
    assert json.loads(run("stopped.json", "--num", "4", "--minutes", "0").read_bytes()) == json.loads(whole)[:2]
    assert run("stopped.json", "--num", "4").read_bytes() == whole
    assert stories.main([str(tiny_model), str(tmp_path / "whole.json"), "--part", "2", "--seed", "1"]) == 2


def test_replies_are_whole_sentences(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replies.whole_sentences("One. Two! And thr") == "One. Two!"
    assert replies.whole_sentences("First:\n\n1. Eat.\n2. Sleep") == "First:\n\n1. Eat."
    assert replies.whole_sentences("no end") == ""
    monkeypatch.setattr(replies, "whole_sentences", lambda text: text or "Nothing.")
    out = tmp_path / "replies.json"
    for _ in range(2):
        assert replies.main([str(tiny_model), str(out), "--num", "3", "--tokens", "4"]) == 0
        assert len(json.loads(out.read_text())) == 3
