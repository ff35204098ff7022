"""Conversations by published chat templates: ids beside those of apply_chat_template, and texts that try to forge
control ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from eval.experiments.imports.chat_families import FAMILIES, HAS_NO_SYSTEM, read_published
from omni.document import Document, Role, Text
from omni.sequence.layout import TokenSpan
from omni.text.compose import compose
from omni.text.convert import convert_tokenizer
from omni.text.loading import load_tokenizer
from omni.text.published import PublishedTokenizer

Turns = Sequence[tuple[Role, str]]
S, U, A = Role.SYSTEM, Role.USER, Role.ASSISTANT
CONVERSATIONS: list[list[tuple[Role, str]]] = [
    [(U, "draw a red apple")],
    [(U, "what is this?"), (A, "this is a cat.")],
    [(S, "you are the cat"), (U, "draw"), (A, "a dog"), (U, "two  dogs,\n\nthree")],
    [(U, "  spaces before\nand after  "), (A, "\n\nfür été \n"), (U, "\t猫\n")],
    [(U, "рисуй 👩🏽‍🚀 e\u0301 \u212b ﬁ"), (A, "猫猫"), (U, "ok")],
    [(S, " trimmed \n"), (U, "x"), (A, "  "), (U, "y"), (A, " z ")],
    [(U, ""), (A, ""), (U, "x")],
    [(U, "a < b |> c <| [ INST ] <table> </ s> <x>"), (A, "1 > 0 <"), (U, ">")],
    [(U, "▁▁ under ▁"), (A, "<0x0A> [/INST"), (U, "\r\n\u00a0\u2028 x")],
    [(U, "a"), (A, "b"), (U, "c"), (A, "d"), (U, "e"), (A, "the red apple of the cat")],
]


@dataclass(frozen=True)
class Family:
    """A published tokenizer on both sides."""

    name: str
    ours: PublishedTokenizer
    theirs: Any


def build_family(name: str, folder: Path) -> Family:
    """Write the tokenizer of a family to the folder, convert it, save and load what came of it."""
    FAMILIES[name](folder)
    ours = convert_tokenizer(folder)
    ours.save(folder / "ours")
    loaded = load_tokenizer(folder / "ours")
    assert isinstance(loaded, PublishedTokenizer) and loaded.describe() == ours.describe()
    return Family(name, loaded, read_published(folder))


def document(turns: Turns, supervise: bool = False) -> Document:
    """supervise: the assistant's turns."""
    return Document(tuple(Text(text, role, supervise and role == A) for role, text in turns))


def no_media(_: Any) -> Any:
    raise AssertionError("there is no media to encode")


def our_ids(parts: Document, family: Family, prompt: bool = False) -> list[int]:
    """The ids of a document of text. prompt: up to where a reply begins."""
    [span] = compose(parts, family.ours, no_media, prompt)
    assert isinstance(span, TokenSpan)
    return span.ids


def their_ids(turns: Turns, family: Family, prompt: bool = False) -> list[int]:
    """The ids of apply_chat_template."""
    messages = [{"role": str(role), "content": text} for role, text in turns]
    return family.theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=False)


def is_equal(turns: Turns, family: Family) -> bool:
    """Whether the ids are equal, with and without a generation prompt. Of a system turn that the family's template does
    not take: whether both sides refuse it."""
    if family.name in HAS_NO_SYSTEM and turns[0][0] == S:
        return _is_refused(lambda: our_ids(document(turns), family)) and _is_refused(lambda: their_ids(turns, family))
    return all(our_ids(document(turns), family, one) == their_ids(turns, family, one) for one in (False, True))


def _is_refused(run: Any) -> bool:
    import jinja2

    try:
        run()
    except (ValueError, jinja2.TemplateError):
        return True
    return False


# ---- forged ids ----------------------------------------------------------------------------------------------------


def control_ids(turns: Sequence[Sequence[str]], family: Family) -> list[int]:
    """The special ids of the model, and ours, in turns of user and assistant by turns; each turn is some texts."""
    roles = [U, A] * len(turns)
    parts = tuple(Text(text, role) for role, texts in zip(roles, turns, strict=False) for text in texts)
    theirs = set(family.ours.theirs.values())
    ids = our_ids(Document(parts), family, prompt=True)
    return [token for token in ids if token in theirs or token >= family.ours.num_text]


def num_forged(family: Family, num_random: int, random: Random) -> tuple[int, int]:
    """(conversations whose control ids differ from those of harmless words, conversations): every spelling whole, cut
    in two texts and beside template words, and random fragments."""
    flags = [
        control_ids(turns, family) != control_ids([["x"]] * len(turns), family)
        for turns in (*_cut_spellings(family), *(_random_turns(family, random) for _ in range(num_random)))
    ]
    return sum(flags), len(flags)


def _spellings(family: Family) -> list[str]:
    return [one for one in family.ours.theirs if "think" not in one]  # a thought is written by its marks


def _cut_spellings(family: Family) -> Iterator[list[list[str]]]:
    for one in _spellings(family):
        yield [[f"a{one}b"], [one], [f" {one}{one} "]]
        for at in range(1, len(one)):
            yield [[one[:at], one[at:]], [one[at:]], [one[:at]]]


def _random_turns(family: Family, random: Random) -> list[list[str]]:
    def fragment() -> str:
        one = random.choice(_spellings(family))
        first, last = sorted((random.randint(0, len(one)), random.randint(0, len(one))))
        return random.choice([one[first:last], one, "x", " ", "\n", "<", "|", ">", "[image]", "\U000f0000"])

    return [[fragment() for _ in range(random.randint(1, 4))] for _ in range(random.randint(1, 3))]
