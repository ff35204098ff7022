"""The two axes of generation on the bundled model: sequence length against refinement, for stories and for text.

    bundled_axes   stories of 2 to 5 pictures in 1 to 8 steps each; text in drafts of K tokens with N sweeps

Report rows. A draft of K tokens is blockwise parallel decoding (arXiv 1811.03115); sweeps redraw it with the same
noise, as Jacobi iteration does (arXiv 2305.10427). Both are verified: the ids are those of autoregressive decoding.

    story_P_STEPS    percentage of the pictures of stories of P pictures that show their sentence
    seconds_P_STEPS  seconds of a story, many in shared steps, with the time of judging
    text_K_N         tokens of text for each pass of the transformer; sweeps are passes too
    identical        percentage of replies that equal autoregressive decoding, over all K and N
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from eval.experiments.joint.text_tasks import KINDS, measured_reply
from eval.requests import RequestOptions, judge_of, requests
from eval.task import Context, Curve, Measure, Outcome, percentage, task
from eval.tasks.story import StoryOptions, story
from omni.data.emoji_world.documents import prompt_of
from omni.generation.engine import Engine


class BundledAxesOptions(RequestOptions):
    """requests: stories of each cell. pictures: of a story. picture_steps: of a picture. texts: replies of each cell.
    drafts: K. sweeps: N."""

    requests: int = Field(default=24, ge=1)
    pictures: tuple[int, ...] = (2, 3, 5)
    picture_steps: tuple[int, ...] = (1, 2, 4, 8)
    texts: int = Field(default=24, ge=1)
    drafts: tuple[int, ...] = (2, 4, 8)
    sweeps: tuple[int, ...] = (0, 1, 2)


def axes_rows(options: BundledAxesOptions) -> list[str]:
    """All report rows."""
    cells = [f"{pictures}_{steps}" for pictures in options.pictures for steps in options.picture_steps]
    rows = [f"{kind}_{cell}" for kind in ("story", "seconds") for cell in cells]
    return [*rows, "text_1_0", *(f"text_{K}_{N}" for K in options.drafts for N in options.sweeps), "identical"]


@task("bundled_axes", BundledAxesOptions, rows=axes_rows)
def bundled_axes(context: Context, options: BundledAxesOptions) -> Outcome:
    """Quality of stories over pictures and steps; tokens for each pass over the length of drafts and sweeps."""
    if context.model.joint is None:
        raise ValueError("bundled_axes needs a model with a joint-token head; see train/recipes/bundled")
    judge_of(context)  # calibrated before times are taken
    stories = {(pictures, steps): _story(context, options, pictures, steps)
               for pictures in options.pictures for steps in options.picture_steps}  # fmt: skip
    text, same = _texts(context, options)
    measures = [Measure(f"story_{p}_{steps}", right, "%") for (p, steps), (right, _) in stories.items()]
    measures += [Measure(f"seconds_{p}_{steps}", seconds, "s") for (p, steps), (_, seconds) in stories.items()]
    measures += [Measure(f"text_{K}_{N}", value, "tokens/pass") for (K, N), value in text.items()]
    lines = {f"{p} pictures": [(s, stories[p, s][0]) for s in options.picture_steps] for p in options.pictures}
    drafts = {f"{N} sweeps": [(K, text[K, N]) for K in options.drafts] for N in options.sweeps}
    curves = [
        Curve("pictures of stories", "steps", "% right", lines),
        Curve("verified text", "tokens of a draft", "tokens for each pass", drafts),
    ]
    return Outcome([*measures, Measure("identical", percentage(same), "%")], curves=curves)


def _story(context: Context, options: BundledAxesOptions, pictures: int, steps: int) -> tuple[float, float]:
    """The percentage of pictures that show their sentence, and seconds of a story."""
    own = StoryOptions(requests=options.requests, batch=options.batch, pictures=pictures, steps=steps)
    start = time.perf_counter()
    found = {measure.name: measure.value for measure in story(context, own).measures}
    return found.get("pictures", 0.0), (time.perf_counter() - start) / options.requests


def _texts(context: Context, options: BundledAxesOptions) -> tuple[dict[tuple[int, int], float], list[bool]]:
    """Tokens for each pass by (K, N), and whether each reply equals autoregressive decoding."""
    engine = Engine(context.model)
    prompts = [prompt_of(document) for document in requests(context, dict.fromkeys(KINDS, 1.0), options.texts)]

    def all_replies(**how: Any) -> list[Any]:
        given = {"max_tokens": 96, "steps": 1, **how}
        return [measured_reply(engine, prompt, seed, given) for seed, prompt in enumerate(prompts)]

    plain = all_replies(tokens_per_pass=1)
    found, same = {(1, 0): 1.0}, []
    for K in options.drafts:
        for N in options.sweeps:
            drafted = all_replies(tokens_per_pass=K, verify="coupled", sweeps=N)
            passes = sum(one.passes for reply in drafted for one in reply.rounds)
            found[K, N] = sum(reply.num_tokens for reply in plain) / passes
            same += [a.text == b.text for a, b in zip(plain, drafted, strict=True)]
    return found, same
