"""The everyday requests: the committed file is valid, wrong entries are named, answers are matched by whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.tasks.smol.requests import (
    REQUESTS_FILE,
    Requests,
    accepts,
    all_requests,
    evenly,
    is_unseen,
    mentions,
    name_of,
)
from omni.data.everyday.names import is_held_out, other_names


def test_the_committed_lists() -> None:
    found = all_requests()
    sizes = {name: len(getattr(found, name)) for name in Requests.model_fields}
    assert sizes == {
        "draw": 190, "plain": 100, "unknown": 60, "second": 60, "scenes": 60, "stories": 30, "naming": 60,
    }  # fmt: skip
    unanswerable = [one.name for one in found.draw if not any(map(name_of, one.accept))]
    assert unanswerable == ["tooth"]
    assert [one.emoji for one in found.naming if name_of(one.emoji) is None] == ["⛄"]
    pairs = [*(one.accept for one in found.scenes), *(one.pair for one in found.second if one.kind == "add")]
    assert all(any(map(name_of, those)) for accept in pairs for those in accept.values())
    assert all(any(map(name_of, one.about)) for one in found.stories)


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        (("draw", 0), {"request": "draw something"}, "'cat' does not occur"),
        (("draw", 0), {"accept": []}, "accept"),
        (("draw", 0), {"accept": ["cat"]}, "'cat' is no emoji"),
        (("draw", 0), {"acept": ["🐱"]}, "did you mean 'accept'"),
        (("plain", 0), {"request": " "}, "request"),
        (("plain", 0), {"request": "Who painted the Mona Lisa?"}, "occurs twice"),
        (("unknown", 0), {"thing": "a capybara"}, "'a capybara' does not occur"),
        (("second", 0), {"kind": "name"}, "answers"),
        (("second", 0), {"background": "blue"}, "background"),
        (("second", 20), {"background": "beige"}, "'beige'; known: white"),
        (("second", 0), {"accept": {"left": ["🐱"], "right": ["🐶"]}}, "add"),
        (("scenes", 0), {"accept": {"left": ["🐱"], "below": ["🐶"]}}, "left and right, or above and below"),
        (("stories", 0), {"pictures": 0}, "pictures"),
        (("naming", 0), {"answers": []}, "answers"),
    ],
)
def test_wrong_entries_are_named(place: tuple[str, int], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = json.loads(REQUESTS_FILE.read_text(encoding="utf-8"))
    table[place[0]][place[1]] |= changes
    (tmp_path / "r.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message) as error:
        all_requests(tmp_path / "r.json")
    assert "\n" not in str(error.value) and place[0] in str(error.value)


def test_emoji_match_without_variation_selectors() -> None:
    assert accepts(["☂️"], "☂") and accepts(["☂"], "☂️") and accepts(["🐱", "🐈"], "🐈")
    assert not accepts(["🐈"], "🐈‍⬛") and not accepts([], "🐈")
    assert name_of("☂") == name_of("☂️") == "umbrella" and name_of("x") is None


def test_answers_match_as_whole_words() -> None:
    assert mentions("That's a Hot-dog!", ["hot dog"]) and mentions("cats. Dog,", ["bird", "dog"])
    assert not mentions("a carpet", ["car"]) and not mentions("two dogs", ["dog"]) and not mentions("", ["dog"])
    assert not mentions("hot and dog", ["hot dog"])


def test_names_that_training_has_not_seen() -> None:
    held_out = next(name for names in other_names().values() for name in names if is_held_out(name))
    seen = next(name for names in other_names().values() for name in names if not is_held_out(name))
    assert is_unseen(held_out) and not is_unseen(seen) and not is_unseen("cat")
    assert not is_unseen("unicorns"), "training has the singular"
    assert is_unseen("8-ball"), "it is nobody's name"
    assert [one.name for one in all_requests().draw if one.is_held_out] == [
        "high heel", "loo roll", "present", "spaceship", "red rose", "four-leaf clover", "smiley face", "8-ball",
    ]  # fmt: skip


def test_some_of_a_list_are_spread_over_it() -> None:
    assert evenly(range(10), 3) == [0, 3, 6] and evenly(range(3), None) == evenly(range(3), 7) == [0, 1, 2]
    kinds = {one.kind for one in evenly(all_requests().second, 12)}
    assert kinds == {"other", "again", "background", "add", "name"}
