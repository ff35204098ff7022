"""A language model's own greedy replies to requests for text, as data for the task "chat" of omni.data.everyday:

    python -m train.tools.replies MODEL OUT.json [--num 400] [--tokens 60] [--minutes 25] [--seed 0] [--compile]

MODEL: an imported language model (`omni import`). The requests are those of phrases/plain.toml, in keyed order. A reply
ends with a sentence; one without an end of a sentence is left out. It goes on where an unfinished run stopped, as
train.tools.stories does. OUT has a line [request, reply] for each.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from omni.cli.arguments import exit_code
from omni.data.everyday.phrases import wordings
from omni.errors import check_place
from omni.generation.options import GenerationOptions
from omni.rng import Key
from train.tools.written import Parts, engine_of

PART = 32
SENTENCES = re.compile(r".*[.!?](?=\s|$)", re.DOTALL)
LIST_ITEM = re.compile(r"\s*(\d+|[-*])\.?$")


def whole_sentences(text: str) -> str:
    """A text up to its last end of a sentence that is not a list item's lone number; "" if there is none."""
    while found := SENTENCES.match(text.strip()):
        text, line, last = found.group().rpartition("\n")
        if not LIST_ITEM.fullmatch(last):
            return text + line + last
    return ""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.tools.replies", description="See the head of the file.")
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--num", default=400, type=int, help="requests")
    parser.add_argument("--tokens", default=60, type=int, help="of a reply, at most")
    parser.add_argument("--minutes", default=25.0, type=float, help="no part begins later")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--compile", action="store_true", help="native code")
    given = parser.parse_args(arguments)

    def work() -> None:
        check_place(given.out, "OUT", is_folder=False)
        start, requests = time.monotonic(), list(wordings()["plain.requests"])
        Key(given.seed).fold("replies").python().shuffle(requests)
        parts, engine = Parts(given.out, [str(given.model), given.tokens, given.seed]), None
        options = GenerationOptions(temperature=0.0, max_tokens=given.tokens, tokens_per_pass=1)
        for first in range(0, min(given.num, len(requests)), PART):
            if parts.has(first) or time.monotonic() - start > 60 * given.minutes:
                continue
            engine = engine or engine_of(given.model, given.compile)
            engine.forget()
            asked = requests[first : min(first + PART, given.num)]
            replies = [whole_sentences(reply.text) for reply in engine.generate_batch(asked, options)]
            parts.add(first, [[request, reply] for request, reply in zip(asked, replies, strict=True) if reply])
            print(f"{first + len(asked)} of {given.num} requests: {len(parts.rows())} replies", file=sys.stderr)
        parts.write(parts.rows())
        print(given.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
