"""Conversations by the chat templates of published families: their ids, and control ids that no text may forge."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import Field

from eval.experiments.imports.chat_families import FAMILIES
from eval.experiments.imports.chats import CONVERSATIONS, build_family, is_equal, num_forged
from eval.peers import quiet_transformers, version_of
from eval.task import Context, Measure, Outcome, TaskOptions, names_of, percentage, task


class ChatOptions(TaskOptions):
    """random: conversations per family of random fragments of control tokens, beside every spelling cut in two.
    families: those that are measured; other rows are missing."""

    families: tuple[str, ...] = tuple(FAMILIES)
    _known = names_of("families", FAMILIES)

    random: int = Field(default=200, ge=0)


@task("pretrained_chats", ChatOptions, rows=(*FAMILIES, "forged"))
def pretrained_chats(context: Context, options: ChatOptions) -> Outcome:
    """Percent of conversations whose ids are those of apply_chat_template, per family; conversations whose texts gave a
    control id."""
    version = f"transformers {version_of('transformers')}"
    quiet_transformers()
    measures, forged, tried = [], 0, 0
    for name in options.families:
        with tempfile.TemporaryDirectory() as folder:
            family = build_family(name, Path(folder))
        equal = [is_equal(turns, family) for turns in CONVERSATIONS]
        note = f"{len(equal)} conversations, with and without a generation prompt; {version}"
        measures.append(Measure(name, percentage(equal), "%", note))
        found, num = num_forged(family, options.random, context.key("chats", name).python())
        forged, tried = forged + found, tried + num
    note = f"of {tried} conversations; {version}"
    return Outcome([*measures, Measure("forged", forged, "", note)])
