"""Tasks with text: naming or describing a given picture, when to generate a picture, questions that need none."""

from __future__ import annotations

from collections.abc import Sequence

from eval.requests import RequestOptions, kind_filter, panel, replies, requests
from eval.task import Context, Measure, Outcome, percentage, task
from omni.data.emoji_world.documents import REWRITE_WEIGHTS
from omni.document import Document, Role
from omni.generation.reply import Reply

NAME_KINDS = ("plain", "tone", "language")
DESCRIBE_KINDS = ("pair", "small", "big")
REWRITE_KINDS = tuple(REWRITE_WEIGHTS)
TEXT_KINDS = ("is", "translate", "english", "member")


@task("naming", RequestOptions, rows=("right", *NAME_KINDS))
def naming(context: Context, options: RequestOptions) -> Outcome:
    """Name a given picture, in English or in the requested language: the reply is exactly the name."""
    return exact_words(context, options, "name", NAME_KINDS)


@task("describe", RequestOptions, rows=("right", *DESCRIBE_KINDS))
def describe(context: Context, options: RequestOptions) -> Outcome:
    """Describe one or two given objects, their places and background: the reply is exactly the caption."""
    return exact_words(context, options, "describe", DESCRIBE_KINDS)


@task("rewriting", RequestOptions, rows=("right", *REWRITE_KINDS))
def rewriting(context: Context, options: RequestOptions) -> Outcome:
    """A scene in words and an edit of it: the reply is exactly the caption of the result, without a picture."""
    return exact_words(context, options, "rewrite", REWRITE_KINDS)


def exact_words(context: Context, options: RequestOptions, kind: str, rows: Sequence[str]) -> Outcome:
    """The share of replies that are exactly the expected words, without a picture; by kind."""
    documents = requests(context, {kind: 1.0}, options.requests, kind_filter(options))
    answers, note = replies(context, documents, options, max_images=1, max_tokens=48)
    right = [
        not reply.images and reply.text.strip() == document.meta["answer"]
        for document, reply in zip(documents, answers, strict=True)
    ]
    return by_kind(documents, answers, right, rows, note)


class WhenOptions(RequestOptions):
    """steps: the pictures are not judged here, so two sampling steps are enough."""

    steps: int = 2


def wants_picture(document: Document) -> bool:
    """Whether the document's own last assistant turn has a picture."""
    role, turn = list(document.turns())[-1]
    assert role == Role.ASSISTANT
    return bool(Document(turn).images())


@task("when_to_draw", WhenOptions, rows=("right", "drawn_when_asked", "not_drawn_when_not_asked"))
def when_to_draw(context: Context, options: WhenOptions) -> Outcome:
    """All kinds of requests, half of them for a picture: the reply has a picture exactly where it is requested."""
    half = options.requests // 2
    asking = {"draw": 3, "scene": 3, "edit": 2, "open": 2, "story": 1, "chat": 1}
    asked = requests(context, asking, options.requests - half, kind_filter(options))
    unasked = requests(context, {"text": 2, "name": 1}, half, kind_filter(options)) if half else []
    documents = [*asked, *unasked]
    answers, note = replies(context, documents, options, max_images=1, max_tokens=64)
    wanted = [wants_picture(document) for document in documents]
    right = [bool(reply.images) == want for reply, want in zip(answers, wanted, strict=True)]
    split = {want: [r for r, w in zip(right, wanted, strict=True) if w == want] for want in (True, False)}
    measures = [
        Measure("right", percentage(right), "%"),
        Measure("drawn_when_asked", percentage(split[True]), "%"),
        Measure("not_drawn_when_not_asked", percentage(split[False]), "%"),
    ]
    panels = [
        panel(d, reply, [], "asked for a picture" if want else "did not ask for a picture", flag)
        for d, reply, want, flag in zip(documents, answers, wanted, right, strict=True)
        if not flag
    ]
    return Outcome(measures, panels, notes=[note])


class QuestionOptions(RequestOptions):
    """kinds: those of questions that need no picture."""

    requests: int = 150
    kinds: tuple[str, ...] = TEXT_KINDS


@task("questions", QuestionOptions, rows=("right", *TEXT_KINDS))
def questions(context: Context, options: QuestionOptions) -> Outcome:
    """Questions that need no picture: classes, translations, a member of a class."""
    documents = requests(context, {"text": 1.0}, options.requests, kind_filter(options))
    answers, note = replies(context, documents, options, max_images=1, max_tokens=48)
    right = []
    for document, reply in zip(documents, answers, strict=True):
        allowed = document.meta["members"] if document.meta["kind"] == "member" else [document.meta["answer"]]
        right.append(not reply.images and reply.text.strip() in allowed)
    return by_kind(documents, answers, right, TEXT_KINDS, note)


def by_kind(
    documents: Sequence[Document], answers: Sequence[Reply], right: Sequence[bool], kinds: Sequence[str], note: str
) -> Outcome:
    """The share of right answers, over all and for each kind of request that occurs, with a panel per answer."""
    measures = [Measure("right", percentage(right), "%")]
    for kind in kinds:
        flags = [flag for flag, document in zip(right, documents, strict=True) if document.meta["kind"] == kind]
        if flags:
            measures.append(Measure(kind, percentage(flags), "%"))
    panels = [
        panel(d, reply, [], f"expected: {d.meta['answer']}", flag)
        for d, reply, flag in zip(documents, answers, right, strict=True)
    ]
    return Outcome(measures, panels, notes=[note])
