"""The corpus: pure, without leaks between splits; the pictures of every document match its meta."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from omni.data.emoji_world import CLASSES, SCENE_NAMES, TASKS, Atlas, EmojiWorld, Scene, prompt_of, render, story_scene
from omni.data.emoji_world.documents import REWRITE_WEIGHTS
from omni.data.emoji_world.edits import caption, spoken
from omni.data.emoji_world.phrases import TEMPLATES, is_heldout, template_numbers
from omni.data.emoji_world.scene import scene_is_heldout, tone_is_heldout
from omni.data.emoji_world.words import plural, with_article
from omni.document import Document, Image, Role, Text, Video

NUM = 1200


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas()


@pytest.fixture(scope="module")
def corpora(atlas: Atlas) -> dict[str, list[Document]]:
    return {split: [EmojiWorld(atlas, 5, split).document(i) for i in range(NUM)] for split in ("train", "heldout")}


def pictures(document: Document, role: Role) -> list[torch.Tensor]:
    return [s.pixels for s in document.images() if s.role == role]


def scenes(document: Document) -> list[Scene]:
    """All scenes in pictures and in meta."""
    meta = document.meta
    edited = [meta[key] for key in ("before", "after") if key in meta]
    return [Scene.from_json(data) for data in (*meta["given"], *meta["scenes"], *edited)]


def test_document_is_a_pure_function_of_seed_split_and_index(atlas: Atlas) -> None:
    for split in ("train", "heldout"):
        world, again = EmojiWorld(atlas, 1, split), EmojiWorld(Atlas(), 1, split)
        for i in (0, 7, 3, 123456789):
            assert world.document(i).to_json() == again.document(i).to_json()
    assert EmojiWorld(atlas, 1).document(0).to_json() != EmojiWorld(atlas, 2).document(0).to_json()


def test_mixture(atlas: Atlas, corpora: dict[str, list[Document]]) -> None:
    counts = Counter(d.meta["task"] for d in corpora["train"])
    assert sum(weight for weight, _ in TASKS.values()) == pytest.approx(1)
    for task, (weight, _) in TASKS.items():
        assert abs(counts[task] / NUM - weight) < 0.05
    only = EmojiWorld(atlas, mixture={"edit": 2.0})
    assert {only.document(i).meta["task"] for i in range(20)} == {"edit"}
    with pytest.raises(ValueError, match="did you mean 'draw'"):
        EmojiWorld(atlas, mixture={"drew": 1.0})
    with pytest.raises(ValueError, match="no positive weight"):
        EmojiWorld(atlas, mixture={"draw": 0.0})
    with pytest.raises(ValueError, match="unknown split 'test'"):
        EmojiWorld(atlas, split="test")


def test_segments_and_meta_agree(corpora: dict[str, list[Document]], atlas: Atlas) -> None:
    for document in (*corpora["train"], *corpora["heldout"]):
        json.dumps(document.meta)
        assert document.segments[0].role == Role.USER and document.segments[-1].role == Role.ASSISTANT
        assert all(s.supervise == (s.role == Role.ASSISTANT) for s in document.segments)
        for role, key in ((Role.USER, "given"), (Role.ASSISTANT, "scenes")):
            shown = pictures(document, role)
            assert len(shown) == len(document.meta[key])
            for pixels, data in zip(shown, document.meta[key], strict=True):
                assert torch.equal(pixels, render(Scene.from_json(data), atlas))
        spoken = [s.text for s in document.segments if isinstance(s, Text) and s.role == Role.ASSISTANT]
        assert " ".join(spoken) == document.meta["answer"]
        assert all("{" not in s.text for s in document.segments if isinstance(s, Text))


def test_phrasings_pairs_and_tones_never_leak(corpora: dict[str, list[Document]], atlas: Atlas) -> None:
    used = {split: {p for d in documents for p in d.meta["phrasing"]} for split, documents in corpora.items()}
    assert not used["train"] & used["heldout"]
    assert all(is_heldout(int(p.split("/")[1])) == (s == "heldout") for s, ps in used.items() for p in ps)
    for document in corpora["train"]:
        for scene in scenes(document):
            assert not scene_is_heldout(scene)
            assert not any(tone_is_heldout(name) for name in scene.names if name in atlas.tones)
    for document in corpora["heldout"]:
        if document.meta["task"] == "scene" and document.meta["kind"] != "count":
            assert all(scene_is_heldout(scene) for scene in scenes(document))
        if document.meta["task"] == "edit" and document.meta["kind"] == "tone":
            assert tone_is_heldout(document.meta["scenes"][0]["placements"][0][0])


def test_templates_are_distinct_and_a_fifth_is_heldout() -> None:
    assert sum(len(t) for k, t in TEMPLATES.items() if k.startswith("text.")) >= 24
    for task in ("draw", "name", "open", "story"):
        assert len(TEMPLATES[task]) >= 24
    for task in ("scene", "edit"):
        assert sum(len(templates) for kind, templates in TEMPLATES.items() if kind.split(".")[0] == task) >= 24
    for kind, templates in TEMPLATES.items():
        assert len(templates) == len(set(templates)) and len(templates) % 5 == 0, kind
        assert len(template_numbers(kind, "heldout")) * 5 == len(templates)
        assert not set(template_numbers(kind, "heldout")) & set(template_numbers(kind, "train"))


def test_requests_are_unambiguous(corpora: dict[str, list[Document]], atlas: Atlas) -> None:
    """An open request never equals a request for one emoji: no article precedes its class noun."""
    assert all("{a}" not in template for template in TEMPLATES["open"])
    assert not {f"any {noun}" for noun in CLASSES} & set(atlas.names)
    assert not {f"some {noun}" for noun in CLASSES} & set(atlas.names)
    ambiguous = EmojiWorld(atlas, 0, mixture={"draw": 1.0}).document(7403).meta  # "small airplane" is also an emoji
    assert f"small {ambiguous['name']}" not in atlas.names


def test_tasks(corpora: dict[str, list[Document]], atlas: Atlas) -> None:
    for document in (*corpora["train"], *corpora["heldout"]):
        meta, after = document.meta, [Scene.from_json(data) for data in document.meta["scenes"]]
        match meta["task"]:
            case "draw":
                assert [scene.names for scene in after] == [(meta["name"],)]
            case "name":
                assert meta["answer"] == atlas.name_in(meta["name"], meta["language"]) and not after
            case "edit":
                assert len(after) == 1 and after[0] != Scene.from_json(meta["given"][0])
            case "describe":
                assert meta["given"] and not after
            case "open":
                assert set(after[0].names) <= set(meta["members"])
            case "story":
                assert len(after) == meta["num_pictures"] == len(meta["sentences"])
                for text, scene in zip(meta["sentences"], after, strict=True):
                    hero = meta["hero"]
                    assert story_scene(hero, text) == scene
            case "text":
                assert not document.images()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rewriting_edits_captions(atlas: Atlas, split: str) -> None:
    world, kinds = EmojiWorld(atlas, 5, split, mixture={"rewrite": 1.0}), set()
    for i in range(300):
        document = world.document(i)
        before, after = scenes(document)
        kinds.add(document.meta["kind"])
        assert not document.images() and before != after
        [asked, answer] = [s.text for s in document.segments if isinstance(s, Text)]
        assert caption(before)[1:] in asked and answer == f"{caption(after)}."
        assert split == "heldout" or not any(map(scene_is_heldout, (before, after)))
    assert kinds == set(REWRITE_WEIGHTS)


def test_the_answer_of_an_edit_has_both_captions(atlas: Atlas) -> None:
    """The captions in an edit's answer determine the scenes before and after."""
    world = EmojiWorld(atlas, mixture={"edit": 2.0, "describe": 1.0})
    scene_of: dict[str, Scene] = {}
    for i in range(3000):
        meta = world.document(i).meta
        scene = Scene.from_json((meta["scenes"] or meta["given"])[0])
        words = meta["answer"]
        if meta["task"] == "edit":
            seen, words = words.split(". Here you are: ")
            assert seen == f"I see {caption(Scene.from_json(meta['given'][0]))}"
        assert scene_of.setdefault(words, scene) == scene
        assert all(spoken(name) in words for name in scene.names)
        assert scene.background == "white" or words.endswith(f"{scene.background} background.")
    assert len(scene_of) > 2000


def test_open_requests_vary_and_cover_their_class(atlas: Atlas) -> None:
    world = EmojiWorld(atlas, mixture={"open": 1.0})
    drawn: dict[str, set[str]] = {}
    for i in range(2500):
        meta = world.document(i).meta
        if meta["kind"] != "anywhere":
            drawn.setdefault(meta["class"], set()).add(meta["scenes"][0]["placements"][0][0])
    assert {noun: len(members) for noun, members in drawn.items()}.keys() == CLASSES.keys()
    assert all(len(drawn[noun]) > 0.8 * len(set(CLASSES[noun])) for noun in CLASSES)


def test_prompt_stops_before_the_last_answer(corpora: dict[str, list[Document]]) -> None:
    for document in corpora["train"][:200]:
        prompt = prompt_of(document)
        rest = document.segments[len(prompt.segments) :]
        assert prompt.segments[-1].role == Role.USER and rest and all(s.role == Role.ASSISTANT for s in rest)


def test_moving_emoji(atlas: Atlas) -> None:
    world = EmojiWorld(atlas)
    clips = [world.moving_emoji(i) for i in range(12)]
    assert len({(d.meta["name"], d.meta["direction"]) for d in clips}) == 12
    for document in clips:
        video = document.segments[-1]
        assert isinstance(video, Video) and video.frames.shape == (8, 32, 32, 3) and video.supervise
        assert all(not torch.equal(a, b) for a, b in pairwise(video.frames))
    assert not any(isinstance(s, Image) for s in clips[0].segments)
    assert world.moving_emoji(3, 4, 64).segments[-1].frames.shape == (4, 64, 64, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("red apple", "a red apple", "red apples"),
        ("octopus", "an octopus", "octopuses"),
        ("ear of corn", "an ear of corn", "ears of corn"),
        ("grapes", "grapes", "grapes"),
        ("mouse", "a mouse", "mice"),
        ("strawberry", "a strawberry", "strawberries"),
        ("unicorn", "a unicorn", "unicorns"),
        ("bus", "a bus", "buses"),
        ("goose", "a goose", "geese"),
        ("tomato", "a tomato", "tomatoes"),
        ("snowman", "a snowman", "snowmen"),
        ("hourglass done", "an hourglass done", "hourglass dones"),
        ("euro banknote", "a euro banknote", "euro banknotes"),
        ("men wrestling", "men wrestling", "men wrestling"),
    ],
)
def test_articles_and_plurals(name: str, one: str, many: str) -> None:
    assert (with_article(name), plural(name)) == (one, many)


def test_scene_names_have_distinct_plurals() -> None:
    assert len({plural(name) for name in SCENE_NAMES}) == len(SCENE_NAMES)
