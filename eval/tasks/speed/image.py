"""One image block of 64 latents after a text prompt, against transfusion-pytorch of equal parameters and dtype.

Main rows: equal evaluations of the network, Euler steps by both. Other rows: equal steps of each library's default
solver (theirs has a higher order and two evaluations a step), and theirs compiled; ours has no compiled pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from eval.peers import (
    EULER,
    MIDPOINT,
    compile_transfusion,
    inputs_of,
    num_parameters,
    transfusion_draw,
    transfusion_of_size,
)
from eval.task import Context, Measure, Outcome, task
from eval.tasks.speed.comparison import (
    CHANNELS,
    DTYPES,
    GRID,
    PATCH,
    SIZES,
    SpeedOptions,
    Times,
    build_omni,
    first_run,
    ids_like,
    machine,
    notes_of,
    num_prompt_ids,
    prompt_of,
)
from omni.generation.engine import Engine
from omni.generation.events import BlockDone
from omni.generation.options import GenerationOptions
from omni.model import Omni

PROMPT = prompt_of(16)
SAMPLERS = ("sample_one", "sample_many")  # of theirs; the faster counts
Runs = dict[str, Callable[[], Any]]


class ImageOptions(SpeedOptions):
    """steps: solver steps per picture."""

    steps: int = Field(default=8, ge=1)


ROWS = [f"parameters_{library}" for library in ("omni", "transfusion")]
for _dtype in DTYPES:
    ROWS += [f"{name}_{_dtype}" for name in ("ratio_equal_evaluations", "ratio_equal_steps", "ratio_theirs_compiled")]
    ROWS += [
        f"{name}_{_dtype}" for name in ("omni", "transfusion_euler", "transfusion_midpoint", "transfusion_compiled")
    ]


@task("speed_image", ImageOptions, rows=ROWS)
def speed_image(context: Context, options: ImageOptions) -> Outcome:
    """One image block of 64 latents after a text prompt, against transfusion-pytorch: equal evaluations and steps."""
    conditions = machine("transfusion_pytorch")
    size = "tiny" if options.quick else "8m"
    ours = build_omni(context, size, options.vocab_size)
    sizes = {"vocab_size": options.vocab_size, "channels": CHANNELS, "grid": GRID}
    models = {"eager": transfusion_of_size(num_parameters(ours), SIZES[size].depth, **sizes)}
    if "compiled" in options.modes:
        models["compiled"] = transfusion_of_size(num_parameters(ours), SIZES[size].depth, **sizes)
        compile_transfusion(models["compiled"])
    counts = {"omni": num_parameters(ours), "transfusion": num_parameters(models["eager"])}
    measures = [Measure(f"parameters_{library}", count, "") for library, count in counts.items()]
    notes = notes_of(
        options,
        conditions,
        f"equal_evaluations: {options.steps} Euler steps by both, {options.steps} evaluations each; equal_steps: ours "
        f"as before, theirs {options.steps} midpoint steps, its default, {2 * options.steps} evaluations; no guidance",
        "of its sample_one and sample_many the faster counts; both end with the picture, ours decoded to pixels; "
        "bfloat16: ours with weights in it, theirs by autocast",
    )
    for dtype in DTYPES:
        runs: Runs = {}
        if dtype in options.dtypes:
            runs = image_runs(ours, models, options, dtype)
            for name in [name for name in runs if name.startswith("compiled")]:
                if why := first_run(runs[name]):
                    notes.append(f"transfusion {name} in {dtype} is not measured: {why}")
                    del runs[name]
        times = Times.of(runs, options.runs, conditions)
        euler, midpoint, compiled = (by_sampler(kind) for kind in ("eager euler", "eager midpoint", "compiled euler"))
        measures += [
            times.ratio(f"ratio_equal_evaluations_{dtype}", euler, "omni"),
            times.ratio(f"ratio_equal_steps_{dtype}", midpoint, "omni"),
            times.ratio(f"ratio_theirs_compiled_{dtype}", [*compiled, *euler], "omni"),
            times.milliseconds(f"omni_{dtype}", "omni"),
            times.milliseconds(f"transfusion_euler_{dtype}", times.fastest(euler)),
            times.milliseconds(f"transfusion_midpoint_{dtype}", times.fastest(midpoint)),
            times.milliseconds(f"transfusion_compiled_{dtype}", times.fastest(compiled)),
        ]
    return Outcome(measures, notes=notes)


def by_sampler(kind: str) -> list[str]:
    """Names of the runs of a kind, by their library's sampler."""
    return [f"{kind}, {sampler}" for sampler in SAMPLERS]


def image_runs(ours: Omni, models: dict[str, Any], options: ImageOptions, dtype: str) -> Runs:
    """Runs of both libraries in `dtype`: ours by sampler, theirs by mode and solver. Casts `ours` to `dtype`.
    AssertionError where theirs runs another number of evaluations than its row names."""
    prompt = ids_like(1, num_prompt_ids(ours, PROMPT))[0]
    runs: Runs = {"omni": omni_draw(ours.eval().to(DTYPES[dtype]), PROMPT, options.steps)}
    for mode, model in models.items():
        for name, solver, evaluations in (("euler", EULER, options.steps), ("midpoint", MIDPOINT, 2 * options.steps)):
            if (mode, name) == ("compiled", "midpoint"):
                continue
            for sampler, run in transfusion_draw(model, prompt, GRID, options.steps, solver, DTYPES[dtype]).items():
                if mode == "eager":
                    assert num_evaluations(model, run) == evaluations, (name, sampler)
                runs[f"{mode} {name}, {sampler}"] = run
    return runs


def num_evaluations(model: Any, run: Callable[[], Any]) -> int:
    """Evaluations of theirs: passes of its transformer over at least a whole picture."""
    with inputs_of(model.transformer) as shapes:
        run()
    return sum(shape[1] >= GRID[0] * GRID[1] for shape in shapes)


def omni_draw(model: Omni, prompt: str, steps: int) -> Callable[[], Any]:
    """Text prompt and forced picture of 64 latents, decoded to pixels; ends with its event."""
    engine = Engine(model, kept_positions=0)
    options = GenerationOptions(
        steps=steps, force_image=True, image_size=(GRID[0] * PATCH, GRID[1] * PATCH), max_images=1, max_tokens=4
    )

    def run() -> None:
        assert any(isinstance(event, BlockDone) for event in engine.stream(prompt, options))

    return run
