"""The requests of requests.json, checked, and what counts as an answer to one.

People wrote the requests before the model was trained. Emoji are characters; two are the same without U+FE0F. `accept`
lists all that a request allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from omni.config import Frozen, load_json
from omni.data.emoji_world.atlas import vocabulary
from omni.data.emoji_world.scene import BACKGROUNDS
from omni.data.everyday.names import emoji_of, is_held_out

REQUESTS_FILE = Path(__file__).with_name("requests.json")
Side = Literal["left", "right", "above", "below"]
PAIRS: tuple[tuple[Side, Side], ...] = (("left", "right"), ("above", "below"))
T = TypeVar("T")


def bare(character: str) -> str:
    """Without variation selectors, which sources write differently."""
    return character.replace("\ufe0f", "")


def _emoji(character: str) -> str:
    if character.isascii():  # of the empty text too
        raise ValueError(f"{character!r} is no emoji; write the character itself")
    return character


def _pair(given: Mapping[Side, Any]) -> Mapping[Side, Any]:
    if set(given) not in map(set, PAIRS):
        raise ValueError(f"has the places {sorted(given)}; give left and right, or above and below")
    return given


Filled = Annotated[str, Field(min_length=1, pattern=r"\S")]
Emoji = Annotated[str, AfterValidator(_emoji)]
Accepted = Annotated[tuple[Emoji, ...], Field(min_length=1)]
AcceptedPair = Annotated[dict[Side, Accepted], AfterValidator(_pair)]
Answers = Annotated[tuple[Filled, ...], Field(min_length=1)]


class DrawRequest(Frozen):
    """A picture of one thing. name: what the request calls it."""

    request: Filled
    accept: Accepted
    name: Filled

    @model_validator(mode="after")
    def _names_the_thing(self) -> DrawRequest:
        return _contains(self, self.name)

    @property
    def is_held_out(self) -> bool:
        """Whether no training document asks by this name: see `is_unseen`."""
        return is_unseen(self.name)


class PlainRequest(Frozen):
    """A request for text alone."""

    request: Filled


class UnknownRequest(Frozen):
    """A picture of a thing that no emoji shows."""

    request: Filled
    thing: Filled

    @model_validator(mode="after")
    def _names_the_thing(self) -> UnknownRequest:
        return _contains(self, self.thing)


class SecondTurn(Frozen):
    """A request for a picture, and another one that follows it.

    accept: of the second picture; of kind "add" for both of its places, of kind "name" of the first picture.
    background: a colour, of kind "background". answers: of kind "name".
    """

    first: Filled
    second: Filled
    kind: Literal["other", "again", "background", "add", "name"]
    accept: Accepted | AcceptedPair
    background: str | None = None
    answers: Answers | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> SecondTurn:
        wanted = {"background": self.background, "add": isinstance(self.accept, dict) or None, "name": self.answers}
        given = {kind for kind, value in wanted.items() if value is not None}
        if given != {self.kind} & wanted.keys():
            fields = "background (a colour), add (accept by place), name (answers)"
            raise ValueError(
                f"kind = {self.kind!r} with the fields of {sorted(given)}; these belong together: {fields}"
            )
        if self.background is not None and self.background not in BACKGROUNDS:
            raise ValueError(f"background = {self.background!r}; known: {', '.join(BACKGROUNDS)}")
        return self

    @property
    def single(self) -> tuple[str, ...]:
        """What is accepted, of a picture of one thing."""
        assert not isinstance(self.accept, dict), self.kind
        return self.accept

    @property
    def pair(self) -> dict[Side, tuple[str, ...]]:
        """What is accepted at each place, of kind "add"."""
        assert isinstance(self.accept, dict), self.kind
        return self.accept


class SceneRequest(Frozen):
    """A picture of two things."""

    request: Filled
    accept: AcceptedPair


class StoryRequest(Frozen):
    """An illustrated story. about: emoji of its hero."""

    request: Filled
    pictures: int = Field(ge=1, le=8)
    about: Accepted


class NamingRequest(Frozen):
    """A question about a picture of an emoji."""

    request: Filled
    emoji: Emoji
    answers: Answers


class Requests(Frozen):
    """All lists. No list has an entry twice."""

    draw: tuple[DrawRequest, ...]
    plain: tuple[PlainRequest, ...]
    unknown: tuple[UnknownRequest, ...]
    second: tuple[SecondTurn, ...]
    scenes: tuple[SceneRequest, ...]
    stories: tuple[StoryRequest, ...]
    naming: tuple[NamingRequest, ...]

    @field_validator("*")
    @classmethod
    def _distinct(cls, given: tuple[Frozen, ...]) -> tuple[Frozen, ...]:
        lines = [one.model_dump_json() for one in given]
        if twice := [line for line in lines if lines.count(line) > 1]:
            raise ValueError(f"{twice[0]} occurs twice; leave one out")
        if not given:
            raise ValueError("has no requests; give at least one")
        return given


def _contains(request: T, words: str) -> T:
    text = request.request  # type: ignore[attr-defined]
    if words.lower() not in text.lower():
        raise ValueError(f"{words!r} does not occur in {text!r}; write it as the request does")
    return request


@cache
def all_requests(path: Path = REQUESTS_FILE) -> Requests:
    """The requests of a file. ValueError names the entry that is wrong."""
    return load_json(path, Requests)


def evenly(given: Sequence[T], number: int | None) -> list[T]:
    """`number` of the entries, evenly over the list; None: all."""
    num = len(given) if number is None else min(number, len(given))
    return [given[at * len(given) // num] for at in range(num)]


# ---- what counts as an answer --------------------------------------------------------------------------------------


def accepts(accepted: Iterable[str], character: str) -> bool:
    """Whether an emoji is one of the accepted ones."""
    return bare(character) in map(bare, accepted)


@cache
def _names() -> dict[str, str]:
    return {bare(character): name for name, character in vocabulary()["names"].items()}


def name_of(character: str) -> str | None:
    """The short name of an emoji; None for one that the vocabulary lacks."""
    return _names().get(bare(character))


def is_unseen(name: str) -> bool:
    """Whether no training document asks for an emoji by this name or by its singular: it is held out, or it is nobody's
    name."""
    known = next((one for one in (name, name.removesuffix("s")) if emoji_of(one) is not None), None)
    return known is None or is_held_out(known)


def words_of(text: str) -> str:
    """The words in lower case, between single spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def mentions(text: str, answers: Iterable[str]) -> bool:
    """Whether one of the answers occurs in the text as whole words, whatever the case and the marks between words."""
    words = f" {words_of(text)} "
    return any(f" {words_of(answer)} " in words for answer in answers)
