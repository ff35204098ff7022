"""A model's own continuations of given text, as data to train its joint-token head on:

    python -m train.tools.continuations MODEL OUT.jsonl --text FILE [--unit line] [--num 256] [--tokens 128]
        [--temperature 1] [--opening 24] [--request "Continue this text."] [--seed 0] [--batch 32] [--compile]

Each document of the text gives a prompt: the request and the document's first words. The replies are keyed by the seed
and their number: the same command writes the same file. OUT has a Document a line, for the source "jsonl"; the
assistant's text is learnt. A head drafts what its model would write, so such text is nearer to its use than the text of
people. Weights are rounded to bfloat16, as in the model directory that training writes. --compile: native code, several
times as fast on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from omni.cli.arguments import exit_code
from omni.data.source import build_source
from omni.document import Document, Role, Text
from omni.errors import check_place
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.model import Omni
from omni.nn.precision import fast_bf16
from omni.pretrained import from_pretrained
from omni.rng import Key

REQUEST = "Continue this text."


def prompts_of(
    text: Path, unit: str, opening: int, request: str, num: int, min_words: int, seed: int
) -> list[Document]:
    """The first `num` prompts of a text in keyed order: without repetition, so at most as many as it has documents."""
    options = {"path": str(text), "unit": unit, "opening": opening, "request": request, "min_words": min_words}
    source = build_source("text", options, Key(seed).fold("continuations"), "text")
    num = min(num, source.num_records)  # type: ignore[attr-defined]
    return [Document(source.document(index).segments[:1]) for index in range(num)]


def continuations(
    model: Omni, prompts: Sequence[Document], options: GenerationOptions, seed: int, batch: int, compile: bool = False
) -> Iterator[Document]:
    """The prompts with the model's replies, `batch` at a time; the assistant's text is supervised."""
    engine = Engine(model, compile, kept_positions=0)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        seeds = [Key(seed).fold("reply", start + n).integer() % 2**31 for n in range(len(part))]
        for reply in engine.generate_batch(part, options, seeds):
            segments = tuple(_learnt(segment) for segment in reply.document.segments)
            if any(isinstance(segment, Text) and segment.supervise for segment in segments):
                yield Document(segments, {"temperature": options.text.temperature, "end": reply.stop_reason})


def _learnt(segment: object) -> Text:
    assert isinstance(segment, Text), segment
    return replace(segment, supervise=True) if segment.role is Role.ASSISTANT else segment


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.tools.continuations", description="See the head of the file."
    )
    parser.add_argument("model", help="a model directory")
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--text", required=True, type=Path, help="a text file")
    parser.add_argument("--unit", default="line", choices=("line", "paragraph"), help="of the text: one document")
    parser.add_argument("--num", default=256, type=int, help="continuations at most")
    parser.add_argument("--tokens", default=128, type=int, help="of each, at most")
    parser.add_argument("--temperature", default=1.0, type=float)
    parser.add_argument("--opening", default=24, type=int, help="words of a document that the prompt has")
    parser.add_argument("--min-words", default=48, type=int, help="of a document; shorter ones are left out")
    parser.add_argument("--request", default=REQUEST, help="stands before the words")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--batch", default=32, type=int, help="replies that share passes")
    parser.add_argument("--compile", action="store_true", help="native code")
    given = parser.parse_args(arguments)

    def work() -> None:
        check_place(given.out, "OUT", is_folder=False)
        prompts = prompts_of(
            given.text, given.unit, given.opening, given.request, given.num, given.min_words, given.seed
        )
        model = from_pretrained(given.model).bfloat16()
        if given.compile or not fast_bf16():
            model = model.float()
        options = GenerationOptions(temperature=given.temperature, max_tokens=given.tokens, tokens_per_pass=1)
        unfinished = given.out.with_name(f".{given.out.name}.tmp")
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as stream:
            replies = continuations(model, prompts, options, given.seed, given.batch, given.compile)
            for number, document in enumerate(replies, 1):
                stream.write(document.to_json() + "\n")
                if number % given.batch == 0:
                    print(f"{number} of {len(prompts)}", file=sys.stderr)
        os.replace(unfinished, given.out)
        print(given.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
