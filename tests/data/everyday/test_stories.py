"""Picture stories and chats of everyday requests: the stored files keep their rules, documents are well formed."""

from __future__ import annotations

import pytest

from omni.data.emoji_world import Atlas
from omni.data.emoji_world.scene import pair_is_heldout, render
from omni.data.everyday.builder import Builder
from omni.data.everyday.names import emoji_of, is_held_out, names_of
from omni.data.everyday.phrases import replies, wordings
from omni.data.everyday.stories import MOST_PICTURES, Beat, background_of, is_sentence, layout_of, stories, words_of
from omni.data.everyday_requests import EverydayRequests
from omni.document import Document, Image, Role, Text
from omni.rng import Key


def source(task: str, split: str = "train") -> EverydayRequests:
    options = EverydayRequests.Options(mixture={task: 1.0}, split=split)
    return EverydayRequests(options, Key(1))


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas()


def mentions(sentence: str, name: str) -> bool:
    """Whether a sentence has a name of an emoji that training may have."""
    words = f" {' '.join(words_of(sentence))} "
    return any(f" {' '.join(words_of(one))} " in words for one in names_of(name, "train"))


def test_stored_stories_keep_the_rules(atlas: Atlas) -> None:
    assert len(stories()) >= 400
    for story in stories():
        assert story.hero in atlas.names and 2 <= len(story.beats) <= MOST_PICTURES
        for beat in story.beats:
            assert is_sentence(beat.sentence) and beat.sentence.isascii(), beat
            assert beat.names[0] == story.hero and len(beat.names) <= 2 and set(beat.names) <= set(atlas.names), beat
            assert all(mentions(beat.sentence, name) for name in beat.names), beat
            place = beat.layout.split()[0] if len(beat.names) == 2 else ""
            assert beat.layout == layout_of(beat.sentence, place), beat
            assert len(beat.names) == 1 or not pair_is_heldout(*beat.names), beat
            assert beat.scene().background == background_of(beat.sentence)


def test_the_layout_of_a_sentence() -> None:
    assert layout_of("The fox slept at night.", "") == "purple"
    assert layout_of("The fox met an owl in the grass by the sea.", "beside") == "beside green"
    assert Beat("The fox saw the moon.", ("fox", "full moon"), "under").scene().names == ("full moon", "fox")
    assert not is_sentence("The fox ran. It hid.") and not is_sentence("The fox " + "very " * 16 + "fast.")
    with pytest.raises(ValueError, match="layout 'under' of"):
        Beat("The fox ran.", ("fox",), "under").scene()


def test_stories_alternate_sentences_and_pictures(atlas: Atlas) -> None:
    numbers = set()
    for index in range(40):
        document = source("story").document(index)
        ask, *rest = document.segments
        assert isinstance(ask, Text) and ask.role is Role.USER and emoji_of(document.meta["called"])
        assert document.meta["called"].lower() in ask.text.lower() and not is_held_out(document.meta["called"])
        assert [type(one) for one in rest] == [Text, Image] * document.meta["num_pictures"]
        assert all(one.supervise and one.role is Role.ASSISTANT for one in rest)
        numbers.add(document.meta["num_pictures"])
    assert numbers == {2, 3, 4}
    assert is_held_out(source("story", "heldout").document(0).meta["called"])


def test_a_cut_story_keeps_its_end() -> None:
    story = next(story for story in stories() if len(story.beats) == 4)
    assert story.cut(2).beats == (story.beats[0], story.beats[3]) and story.cut(4) == story


def test_chats_begin_with_the_language_models_own_reply() -> None:
    assert len(replies()) >= 300 and {request for request, _ in replies()} <= set(wordings()["plain.requests"])
    assert all(reply == reply.strip() and reply[-1] in ".!?" for _, reply in replies())
    kinds = set()
    for index in range(60):
        document = source("chat").document(index)
        roles = [role for role, _ in document.turns()]
        assert roles == [Role.USER, Role.ASSISTANT] * 2
        recalled = document.segments[1]
        assert isinstance(recalled, Text) and not recalled.supervise and recalled.text
        assert document.segments[-1].supervise
        kinds.add(document.meta["kind"])
    assert kinds == {"draw", "scene", "unknown", "plain", "name"}


@pytest.mark.parametrize("task", ("story", "chat"))
def test_documents_are_deterministic(task: str, atlas: Atlas) -> None:
    def once() -> list[Document]:
        return [source(task).document(index) for index in range(6)]

    assert [document.to_json() for document in once()] == [document.to_json() for document in once()]
    builder = Builder(Key(0).python(), atlas, "train")
    builder.show(stories()[0].beats[0].scene())
    assert render(builder.scenes[0], atlas).shape == (64, 64, 3)
