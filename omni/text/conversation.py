"""Turns of a document as a published model's chat template writes them: ids of text and special tokens, and media.

    1  contents   the text of each turn; a sign for each picture or clip
    2  guard      a sign inside every spelling of a special token or mark in the contents, and at edges of contents that
                  could be part of one
    3  render     the template writes the turns
    4  split      what still spells a special token was written by the template, and becomes its id; the signs go; each
                  piece between is encoded as text, template words and contents together

Thus ids equal those of transformers' apply_chat_template, except where contents spell a special token: here they stay
text. Signs are private-use characters that occur nowhere else.

Supervised text is found again by two more signs around it, in a second rendering that must be equal otherwise. An id is
supervised where its last character is. Also supervised is what the model writes by itself: the end of the turn, and
template words between the generation prompt and the reply.

A thought, "<think>...</think>" before an assistant's text, is given to templates that know it as `reasoning_content`,
or left out where the template reads none: the template writes its marks. This is the one case in which text of a
document becomes marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from omni.document import Document, Image, Role, Segment, Text, Video
from omni.sequence.layout import TokenSpan
from omni.text.published import PublishedTokenizer
from omni.text.template import ChatTemplate


class Invocation:
    """Stands where a reply of an invoked LoRA begins (nn.lora)."""


INVOCATION = Invocation()
Item = TokenSpan | Image | Video | Invocation
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\n*", re.DOTALL)
_OPENED = re.compile(r"<think>\s*\Z")


class Signs(NamedTuple):
    """Private-use characters, none of which occurs in a conversation."""

    gap: str  # inside a spelling; removed
    media: str  # a picture or clip
    begin: str  # supervised text begins, with the reply
    on: str  # supervised text begins
    off: str  # supervised text ends
    cut: str  # the last turn goes on from here


@dataclass(frozen=True)
class Words:
    """A content: characters, media signs among them, and whether each is supervised."""

    text: str
    supervise: tuple[bool, ...]

    def part(self, start: int, stop: int) -> Words:
        return Words(self.text[start:stop], self.supervise[start:stop])


@dataclass(frozen=True)
class Turn:
    role: Role
    words: Words
    thought: Words | None = None


def lay_out_turns(
    document: Document, tokenizer: PublishedTokenizer, generation_prompt: bool = False, is_open: bool = False,
    invokes: bool = False, reply_invoked: bool = False,
) -> Iterator[Item]:  # fmt: skip
    """Ids and media of a document, in order, without the ids of media. generation_prompt: up to where a reply begins.
    is_open: without the end of the last turn. invokes: INVOCATION begins the assistant's turns that have a picture, a
    clip or a supervised segment; with `reply_invoked` the open turn too. ValueError for a conversation that the
    template refuses."""
    turns = list(document.turns())
    template = tokenizer.template
    if template is None:
        yield from _plain(document, tokenizer, not generation_prompt and not is_open)
        return
    if is_open and turns and turns[-1][0] == Role.ASSISTANT and not any(map(_has_content, turns[-1][1])):
        turns, generation_prompt, is_open = turns[:-1], True, False
    if not turns:
        raise ValueError("a chat template needs at least one turn; the document has none")
    texts = [s.text for _, segments in turns for s in segments if isinstance(s, Text)]
    signs = _unused(template.source, *template.special.values(), *texts)
    media: list[Image | Video | Invocation] = []
    made = []
    for role, segments in turns:
        is_text = all(isinstance(s, Text) and not s.supervise for s in segments)
        is_reply = reply_invoked and is_open and len(made) == len(turns) - 1
        is_invoked = invokes and role == Role.ASSISTANT and (is_reply or not is_text)
        media += [INVOCATION] * is_invoked + [s for s in segments if not isinstance(s, Text)]
        made.append(_turn(role, segments, template, signs, is_invoked))
    made = [_guarded_turn(turn, tokenizer, signs) for turn in made]
    rendered = _render(made, template, signs, generation_prompt, is_open)
    text, supervise = _marks_of(rendered, template, signs)
    _check(text, made, signs, len(media))
    yield from _split(text, supervise, tokenizer, signs, media)
    if invokes and reply_invoked and generation_prompt:
        yield INVOCATION


def _has_content(segment: Segment) -> bool:
    return not isinstance(segment, Text) or bool(segment.text)


def _plain(document: Document, tokenizer: PublishedTokenizer, is_over: bool) -> Iterator[Item]:
    """Without a template: the begin token, the segments, and the end of a finished document."""
    settings = tokenizer.settings
    if settings.adds_bos and settings.bos is not None:
        yield TokenSpan([settings.bos], [False])
    waiting, is_first = Words("", ()), True
    for segment in document.segments:
        if isinstance(segment, Text):
            flags = (*waiting.supervise, *[segment.supervise] * len(segment.text))
            waiting = Words(waiting.text + segment.text, flags)
            continue
        yield _encoded(waiting, tokenizer, is_first)
        yield segment
        waiting, is_first = Words("", ()), False
    yield _encoded(waiting, tokenizer, is_first)
    if is_over and tokenizer.end < tokenizer.num_text:
        last = [segments for _, segments in document.turns()][-1:]
        yield TokenSpan([tokenizer.end], [any(s.supervise for segments in last for s in segments)])


# ---- contents ------------------------------------------------------------------------------------------------------


def _unused(*texts: str) -> Signs:
    """Signs that no text contains."""
    used = set().union(*texts)
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
    try:
        return Signs(*(next(free) for _ in Signs._fields))
    except (StopIteration, RuntimeError):
        raise ValueError("the conversation uses all private-use characters; leave some out") from None


def _turn(
    role: Role, segments: Sequence[Segment], template: ChatTemplate, signs: Signs, is_invoked: bool = False
) -> Turn:
    """A turn with its content, and with its thought apart where the template knows thoughts. is_invoked: a sign for the
    INVOCATION begins it."""
    parts = [segment.text if isinstance(segment, Text) else signs.media for segment in segments]
    flags = [[segment.supervise] * len(part) for segment, part in zip(segments, parts, strict=True)]
    if is_invoked:
        parts, flags = [signs.media, *parts], [[segments[0].supervise], *flags]
    words = Words("".join(parts), tuple(flag for some in flags for flag in some))
    found = _THOUGHT.match(words.text) if role == Role.ASSISTANT and "</think>" in template.source else None
    if found is None or signs.media in found.group():
        return Turn(role, words)
    start, stop = found.span(1)
    while start < stop and words.text[start] == "\n":
        start += 1
    while start < stop and words.text[stop - 1] == "\n":
        stop -= 1
    return Turn(role, words.part(found.end(), len(words.text)), words.part(start, stop))


def _guarded_turn(turn: Turn, tokenizer: PublishedTokenizer, signs: Signs) -> Turn:
    thought = None if turn.thought is None else _guarded(turn.thought, tokenizer, signs.gap)
    return replace(turn, words=_guarded(turn.words, tokenizer, signs.gap), thought=thought)


def _guarded(words: Words, tokenizer: PublishedTokenizer, gap: str) -> Words:
    """The content with a gap inside every spelling, and at an edge that could be part of one with template words."""
    text, at = words.text, 0
    gaps: set[int] = set()
    while found := tokenizer.spelled.search(text, at):
        at = found.start() + 1
        gaps.add(at)
    inner = text.strip()
    start = len(text) - len(text.lstrip())
    if tokenizer.may_end_spelling(inner):
        gaps.add(start)
    if tokenizer.may_begin_spelling(inner):
        gaps.add(start + len(inner))
    parts: list[str] = []
    flags: list[bool] = []
    last = 0
    for place in sorted(gaps):
        parts += text[last:place], gap
        flags += words.supervise[last:place]
        flags.append(words.supervise[place - 1 if place == start + len(inner) else place])
        last = place
    return Words("".join(parts) + text[last:], (*flags, *words.supervise[last:]))


def _signed(words: Words, signs: Signs, whole: bool, starts: bool, closes: bool = True) -> str:
    """The content with signs around supervised text. whole: white space at its edges belongs to it; else a template
    that strips contents works as without signs. starts: whether the reply begins here. closes: whether to sign its
    end."""
    inner = words.text.strip()
    first = 0 if whole else len(words.text) - len(words.text.lstrip())
    last = len(words.text) if whole else first + len(inner)
    parts, before = [words.text[:first]], False
    for place in range(first, last):
        flag = words.supervise[place]
        if flag != before:
            parts.append(signs.off if before else signs.begin if starts and place == first else signs.on)
        parts.append(words.text[place])
        before = flag
    return "".join(parts) + (signs.off if before and closes else "") + words.text[last:]


# ---- rendering -----------------------------------------------------------------------------------------------------


def _render(turns: list[Turn], template: ChatTemplate, signs: Signs, generation_prompt: bool, is_open: bool) -> str:
    """The rendered turns, with signs around supervised text. ValueError where those change what the template writes."""

    def render(whole: bool | None) -> str:
        messages = [_message(turn, template, signs, whole) for turn in turns]
        if is_open:
            messages[-1]["content"] += signs.cut + " "
        text = template.render(messages, generation_prompt)
        return _cut(text, signs) if is_open else text

    plain = render(None)
    if not any(flag for turn in turns for words in (turn.words, turn.thought) if words for flag in words.supervise):
        return plain
    table = str.maketrans(dict.fromkeys((signs.begin, signs.on, signs.off), ""))
    for whole in (True, False):
        marked = render(whole)
        if marked.translate(table) == plain:
            return marked
    raise ValueError(
        "this model's chat template writes a turn differently for other contents, so supervised text cannot be found "
        "in it; supervise nothing, or replace the template"
    )


def _message(turn: Turn, template: ChatTemplate, signs: Signs, whole: bool | None) -> dict[str, str]:
    """What the template reads of a turn. whole: see `_signed`; None: no signs."""
    content, thought = turn.words.text, turn.thought
    joins = thought is not None and thought.supervise[-1:] == turn.words.supervise[:1] == (True,)
    if whole is not None:
        content = _signed(turn.words, signs, whole, starts=thought is None)
    message = {"role": str(turn.role), "content": content}
    if thought is not None and "reasoning_content" in template.source:
        is_closed = not (joins and signs.off in content)
        message["reasoning_content"] = (
            thought.text if whole is None else _signed(thought, signs, whole, True, closes=is_closed)
        )
    return message


def _cut(text: str, signs: Signs) -> str:
    """The text up to the cut, and without white space there where the template strips contents."""
    at = text.rfind(signs.cut)
    if at < 0:
        raise ValueError("this model's chat template leaves out the last turn, which is to go on")
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


def _marks_of(rendered: str, template: ChatTemplate, signs: Signs) -> tuple[str, bytearray]:
    """The text without supervise signs, and whether each character is supervised."""
    text, size, start = [], 0, -1
    regions: list[tuple[int, int]] = []
    for part in re.split(f"([{signs.begin}{signs.on}{signs.off}])", rendered):
        if part in (signs.begin, signs.on) and part and start < 0:
            start = size
            if part == signs.begin:
                start = _begin_of_reply("".join(text), template)
        elif part == signs.off and start >= 0:
            regions.append((start, size))
            start = -1
        elif part not in (signs.begin, signs.on, signs.off):
            text.append(part)
            size += len(part)
    if start >= 0:
        regions.append((start, size))
    supervise = bytearray(size)
    for first, last in regions:
        supervise[first:last] = b"\1" * (last - first)
    return "".join(text), supervise


def _begin_of_reply(before: str, template: ChatTemplate) -> int:
    """Where a reply begins whose text follows `before`: behind the generation prompt."""
    if found := _OPENED.search(before):
        before = before[: found.start()]
    return len(before) - (len(template.lead) if template.lead and before.endswith(template.lead) else 0)


def _check(text: str, turns: Sequence[Turn], signs: Signs, num_media: int) -> None:
    """ValueError where the template leaves out a picture or a system turn."""
    if text.count(signs.media) != num_media:
        raise ValueError(
            f"this model's chat template writes {text.count(signs.media)} of {num_media} pictures and clips; put them "
            "into other turns"
        )
    for turn in turns:
        if turn.role == Role.SYSTEM and turn.words.text.strip() not in text:
            raise ValueError("this model's chat template leaves out the system turn; write it into the user's")


# ---- ids -----------------------------------------------------------------------------------------------------------


def _split(
    text: str, supervise: bytearray, tokenizer: PublishedTokenizer, signs: Signs,
    media: Sequence[Image | Video | Invocation],
) -> Iterator[Item]:  # fmt: skip
    """The ids of special tokens and of the text between them, and media."""
    found = list(tokenizer.spelled_in(text))
    ends = _supervised_ends(text, supervise, found, tokenizer)
    waiting = iter(media)
    before = 0
    for number, (start, stop, token) in enumerate([*found, (len(text), len(text), -1)]):
        at = before
        for place in (*(m.start() for m in re.finditer(signs.media, text[before:start])), None):
            until = start if place is None else before + place
            yield _encoded(_without_gaps(text[at:until], supervise[at:until], signs.gap), tokenizer, at == 0)
            if place is not None:
                yield next(waiting)
                at = until + 1
        if token >= 0:
            yield TokenSpan([token], [number in ends or bool(supervise[stop - 1])])
        before = stop


def _without_gaps(text: str, supervise: bytearray, gap: str) -> Words:
    """A piece of rendered text without its signs; without flags where nothing is supervised."""
    if not any(supervise):
        return Words(text.replace(gap, ""), ())
    kept = [n for n, char in enumerate(text) if char != gap]
    return Words("".join([text[n] for n in kept]), tuple(bool(supervise[n]) for n in kept))


def _supervised_ends(
    text: str, supervise: bytearray, found: Sequence[tuple[int, int, int]], tokenizer: PublishedTokenizer
) -> set[int]:
    """Which of the special tokens found end a supervised turn. Supervises white space before them."""
    ends: set[int] = set()
    last = 0
    for number, (start, stop, token) in enumerate(found):
        at = supervise.rfind(1, last, start)
        if at >= 0 and token in tokenizer.ends:
            ends.add(number)
            if text[at + 1 : start].isspace():
                supervise[at + 1 : start] = b"\1" * (start - at - 1)
        last = stop
    return ends


def _encoded(words: Words, tokenizer: PublishedTokenizer, is_first: bool) -> TokenSpan:
    """The ids of a piece of text; an id is supervised where its last character is."""
    ids, where = tokenizer.encode_piece(words.text, is_first)
    flags = words.supervise
    if not any(flags):
        return TokenSpan(ids, [False] * len(ids))
    return TokenSpan(ids, [flags[stop - 1] if stop > start else not stop and flags[0] for start, stop in where])
