"""Picture stories in sentences of a language model, data of the task "story" of omni.data.everyday:

    python -m train.tools.stories MODEL OUT.json [--num 880] [--temperature 0.8] [--attempts 5] [--minutes 25]
        [--seed 0] [--part 80] [--compile]

MODEL: an imported language model (`omni import`). Plans list who does what with what (story_plans.py). For each beat
the model reads examples and writes one sentence. Sentences are checked by rule and written again with another key, else
the beat is dropped; in the end those go, too, that have a word that no other sentence has, or the present tense. A
story of one beat, or without its ending, is dropped. Everything is keyed by the seed and the story's number. The
stories of a part share passes; finished parts stand in .OUT.json.parts, where the same command goes on. OUT has all
that is finished. --minutes: no part begins later. --compile: native code, several times as fast on a CPU.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from omni.cli.arguments import exit_code
from omni.data.digests import file_fingerprint
from omni.data.everyday.stories import Beat, Story, layout_of, words_of
from omni.errors import check_place
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.rng import Key
from train.tools.story_plans import PLANS_FILE, Plans, Step
from train.tools.written import Parts, engine_of

BATCH = 32
MAX_TOKENS = 32  # of a sentence

PRESENT = re.compile(
    r"\b(hugs|dances|laughs|smiles|waves|yawns|jumps|sings|opens|hides|shows|learns|tries|meets|swims|dreams of)\b"
)

Row = list  # [hero, [[sentence, names, layout], ...]], a line of the file
Place = tuple[int, int]  # number of a story, number of a beat in it


def write_sentences(
    engine: Engine, plans: Plans, steps: dict[Place, Step], key: Key, temperature: float, attempts: int
) -> dict[Place, str]:
    """The sentences that are taken. Those of one kind of beat share their examples, which are read once."""
    options = GenerationOptions(
        temperature=temperature,
        top_p=0.9 if temperature else 1.0,
        max_tokens=MAX_TOKENS,
        stop=("\n",),
        tokens_per_pass=1,
    )
    taken: dict[Place, str] = {}
    for attempt in range(attempts):
        missing = sorted((step.beat, place) for place, step in steps.items() if place not in taken)
        for _, group in groupby(missing, key=lambda one: one[0]):
            places = [place for _, place in group]
            for part in batches(places):
                seeds = [key.fold("sentence", *place, attempt).integer() % 2**31 for place in part]
                prompts = [plans.prompt(steps[place]) for place in part]
                for place, reply in zip(part, engine.generate_batch(prompts, options, seeds), strict=True):
                    text = reply.text.strip()
                    if plans.problem(text, steps[place]) is None:
                        taken[place] = text
    return taken


def batches(places: list[Place]) -> Iterator[list[Place]]:
    """The first alone, whose examples the others find in the cache; then BATCH at a time."""
    yield places[:1]
    for start in range(1, len(places), BATCH):
        yield places[start : start + BATCH]


def story_of(plans: Plans, plan: Sequence[Step], sentences: Sequence[str | None]) -> Story | None:
    """The story of the sentences that are there; None without two of them, or without the last."""
    beats = []
    for step, sentence in zip(plan, sentences, strict=True):
        if sentence is not None:
            names = (step.hero[0],) if step.other is None else (step.hero[0], step.other[0])
            place = "" if step.other is None else plans.beats[step.beat].get("layout", "beside")
            beats.append(Beat(sentence, names, layout_of(sentence, place)))
    return Story(plan[0].hero[0], tuple(beats)) if len(beats) > 1 and sentences[-1] is not None else None


def write_part(
    engine: Engine, plans: Plans, numbers: range, key: Key, temperature: float, attempts: int
) -> list[Story]:
    """The stories of some numbers."""
    engine.forget()  # so that a part is the same after a resume
    planned = {number: plans.plan(number, key) for number in numbers}
    steps = {(number, n): step for number, plan in planned.items() for n, step in enumerate(plan)}
    taken = write_sentences(engine, plans, steps, key, temperature, attempts)
    found = []
    for number, plan in planned.items():
        story = story_of(plans, plan, [taken.get((number, n)) for n in range(len(plan))])
        found += [] if story is None else [story]
    return found


def reviewed(rows: Sequence[Row]) -> list[Row]:
    """Rows of stories without the beats that stand out: the model's slips are mostly rare words."""
    counts = Counter(word for _, beats in rows for sentence, _, _ in beats for word in set(words_of(sentence)))

    def is_usual(sentence: str) -> bool:
        return PRESENT.search(sentence) is None and all(counts[word] > 1 for word in words_of(sentence))

    found = [[hero, [beat for beat in beats if is_usual(beat[0])]] for hero, beats in rows]
    return [row for row, (_, beats) in zip(found, rows, strict=True) if len(row[1]) > 1 and row[1][-1] == beats[-1]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.tools.stories", description="See the head of the file.")
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--num", default=880, type=int, help="plans of stories")
    parser.add_argument("--temperature", default=0.8, type=float)
    parser.add_argument("--attempts", default=5, type=int, help="of a sentence, at most")
    parser.add_argument("--minutes", default=25.0, type=float, help="no part begins later")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--part", default=80, type=int, help="stories that share passes")
    parser.add_argument("--compile", action="store_true", help="native code")
    given = parser.parse_args(arguments)

    def work() -> None:
        check_place(given.out, "OUT", is_folder=False)
        start, plans, key = time.monotonic(), Plans(), Key(given.seed).fold("stories")
        settings = [
            file_fingerprint(PLANS_FILE),
            given.model.name,
            given.temperature,
            given.attempts,
            given.seed,
            given.part,
        ]
        parts, engine = Parts(given.out, settings), None
        for first in range(0, given.num, given.part):
            numbers = range(first, min(first + given.part, given.num))
            if parts.has(first) or time.monotonic() - start > 60 * given.minutes:
                continue
            engine = engine or engine_of(given.model, given.compile)
            found = write_part(engine, plans, numbers, key, given.temperature, given.attempts)
            parts.add(first, [[s.hero, [[b.sentence, b.names, b.layout] for b in s.beats]] for s in found])
            print(f"{numbers.stop} of {given.num} plans: {len(parts.rows())} stories", file=sys.stderr)
        parts.write(reviewed(parts.rows()))
        print(given.out)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
