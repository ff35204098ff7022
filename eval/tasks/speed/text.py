"""Text against transformers' LlamaForCausalLM.generate, of the same width, depth, vocabulary and dtype: decoding of one
request, the first token after a long prompt, and decoding of a batch. Both prefill as many ids and emit as many tokens.

Omni's compiled side is `Engine(model, compile=True)`: the step of one request as native code, float32 arithmetic on
float32 weights, or on a bfloat16 copy where it is exact (as with published checkpoints and bfloat16 models). Prompts
and batches have no compiled side: their report rows compare Omni's eager code with theirs, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from eval.peers import build_llama, llama_decode, num_parameters, with_compiled_forward
from eval.task import Context, Measure, Outcome, task
from eval.tasks.speed.comparison import (
    DTYPES,
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
from omni.generation.events import Stop
from omni.generation.options import GenerationOptions
from omni.model import Omni

EAGER = ("transformers dynamic", "transformers static")
THEIRS = ("transformers compiled", *EAGER)
Runs = dict[str, Callable[[], Any]]


class SizedOptions(SpeedOptions):
    """sizes: keys of SIZES. new_tokens: per size, after a prompt of `prompt` bytes (an id each). repeats: runs of each
    measurement."""

    repeats: int = Field(default=5, ge=1)
    sizes: tuple[str, ...] = ("8m", "90m")
    new_tokens: dict[str, int] = {"8m": 96, "90m": 32}
    prompt: int = Field(default=16, ge=1)

    @field_validator("sizes")
    @classmethod
    def _known(cls, sizes: tuple[str, ...]) -> tuple[str, ...]:
        for size in sizes:
            if size not in SIZES:
                raise ValueError(f"sizes has {size!r}; known: {', '.join(SIZES)}")
        return sizes

    @property
    def measured(self) -> tuple[str, ...]:
        """The sizes that this run measures."""
        return ("tiny",) if self.quick else self.sizes

    def num_new(self, size: str) -> int:
        """New tokens at a size; 4 without an entry."""
        return self.new_tokens.get(size, 4)

    @property
    def named(self) -> tuple[str, ...]:
        """The sizes in the names of rows: a bar can be set on them, measured or not."""
        return tuple(dict.fromkeys((*self.sizes, *self.measured)))

    def rows(self, *names: str) -> list[str]:
        """Each name in each dtype and size, after the parameters."""
        parameters = [f"parameters_{library}_{size}" for size in self.named for library in ("omni", "transformers")]
        return parameters + [f"{name}_{dtype}_{size}" for size in self.named for dtype in DTYPES for name in names]


class PrefillOptions(SizedOptions):
    """prompt: bytes, each an id; a few control ids are added."""

    prompt: int = Field(default=512, ge=1)


class BatchOptions(SizedOptions):
    """batches: numbers of requests at once."""

    repeats: int = Field(default=3, ge=1)
    new_tokens: dict[str, int] = {"8m": 32, "90m": 16}
    batches: tuple[int, ...] = (8, 16)


# ---- runs ------------------------------------------------------------------------------------------------------------


def omni_decode(model: Omni, prompts: list[str], num_new: int, compile: bool = False) -> Callable[[], None]:
    """Greedy decoding of exactly `num_new` tokens after each prompt by the engine, with events and text."""
    engine = engine_without_ends(model, compile)
    options = GenerationOptions(max_tokens=num_new)

    def run() -> None:
        if len(prompts) == 1:
            stream_exactly(engine, prompts[0], num_new)
        else:
            assert all(reply.stop_reason == "length" for reply in engine.generate_batch(prompts, options))

    return run


def engine_without_ends(model: Omni, compile: bool = False) -> Engine:
    """An engine whose replies end at `max_tokens` alone. Every request reads its prompt."""
    engine = Engine(model, compile, kept_positions=0)
    control = engine.control
    engine.grammar.allowed["text"][[*engine.tokenizer.ends, control.image, control.video]] = -torch.inf
    return engine


def stream_exactly(engine: Engine, prompt: str, num_new: int) -> None:
    """Exactly `num_new` tokens by an engine without ends."""
    [*_, last] = engine.stream(prompt, GenerationOptions(max_tokens=num_new))
    assert isinstance(last, Stop) and last.reason == "length"


def llama_runs(model: Any, prompts: Tensor, num_new: int, compiled: bool) -> Runs:
    """Runs with each cache, and with compiled steps after the prompt."""
    caches = ("dynamic", "static", "compiled")[: 3 if compiled else 2]
    return {f"transformers {cache}": llama_decode(model, prompts, num_new, cache) for cache in caches}


def without_failing(runs: Runs, notes: list[str], where: str) -> Runs:
    """The runs that compile on this machine. The error of another run is appended to `notes`."""
    why = first_run(runs["transformers compiled"]) if "transformers compiled" in runs else ""
    if not why:
        return runs
    notes.append(f"transformers compiled ({where}) is not measured: {why}")
    return {name: run for name, run in runs.items() if name != "transformers compiled"}


def build_pair(
    context: Context, size: str, options: SizedOptions, dtype: str, bf16_values: bool = False
) -> tuple[Omni, Any]:
    """The models of both libraries in one dtype."""
    ours = build_omni(context, size, options.vocab_size, pictures=False, bf16_values=bf16_values).eval()
    width, depth, heads, hidden = SIZES[size]
    positions = num_prompt_ids(ours, prompt_of(options.prompt)) + options.num_new(size)
    theirs = build_llama(width, depth, heads, hidden, options.vocab_size, max(positions, 512))
    return ours.to(DTYPES[dtype]), theirs.to(DTYPES[dtype])


def conditions_and_parameters(context: Context, options: SizedOptions) -> tuple[str, list[str], list[Measure]]:
    """(conditions, first notes, rows of parameters): all that decoding reads, with embeddings and output projection."""
    conditions = machine("transformers")
    measures = []
    for size in options.measured:
        ours, theirs = build_pair(context, size, options, "float32")
        decoder = num_parameters(ours.transformer.blocks) + num_parameters(ours.token)
        counts = {"omni": decoder, "transformers": num_parameters(theirs)}
        measures += [Measure(f"parameters_{library}_{size}", count, "") for library, count in counts.items()]
    return conditions, notes_of(options, conditions), measures


# ---- one request -----------------------------------------------------------------------------------------------------

TEXT_RATIOS = ("ratio_eager", "ratio_compiled")
TEXT_RATES = ("omni_eager", "omni_compiled", "transformers_dynamic", "transformers_static", "transformers_compiled")
BF16_VALUES = ("ratio_compiled_bf16_values", "omni_compiled_bf16_values")


def text_rows(options: SizedOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    more = [f"{name}_float32_{size}" for size in options.named for name in BF16_VALUES]
    return options.rows(*TEXT_RATIOS, *TEXT_RATES) + more


@task("speed_text", SizedOptions, rows=text_rows)
def speed_text(context: Context, options: SizedOptions) -> Outcome:
    """Cached greedy decoding of one request in tokens/s: eager against eager, compiled against compiled."""
    conditions, notes, measures = conditions_and_parameters(context, options)
    notes.append(
        "compiled: ours native code, theirs the fastest of compiled steps with a static cache and its eager runs. "
        "float32: both read float32 weights. bf16_values: both compute in float32, with weights whose values bfloat16 "
        "holds, which ours reads from a bfloat16 copy. bf16: theirs computes in bfloat16, and so does ours where it is "
        "eager; compiled, ours is that of bf16_values"
    )
    for size in options.measured:
        for dtype in DTYPES:
            runs = text_runs(context, size, options, dtype) if dtype in options.dtypes else {}
            runs = without_failing(runs, notes, f"{size}, {dtype}")
            times, end, num_new = Times.of(runs, options.runs, conditions), f"{dtype}_{size}", options.num_new(size)
            measures.append(times.ratio(f"ratio_eager_{end}", EAGER, "omni eager"))
            measures.append(times.ratio(f"ratio_compiled_{end}", THEIRS, "omni compiled"))
            measures += [times.rate(f"{name}_{end}", name.replace("_", " "), num_new) for name in TEXT_RATES]
            if dtype == "float32":
                ours = "omni compiled, bf16 values"
                measures.append(times.ratio(f"ratio_compiled_bf16_values_{end}", THEIRS, ours))
                measures.append(times.rate(f"omni_compiled_bf16_values_{end}", ours, num_new))
    return Outcome(measures, notes=notes)


def text_runs(context: Context, size: str, options: SizedOptions, dtype: str) -> Runs:
    """Runs of both libraries for one request, by name."""
    ours, theirs = build_pair(context, size, options, dtype)
    prompt, num_new = prompt_of(options.prompt), options.num_new(size)
    compiled = "compiled" in options.modes
    runs = {"omni eager": omni_decode(ours, [prompt], num_new)}
    runs |= llama_runs(theirs, ids_like(1, num_prompt_ids(ours, prompt)), num_new, compiled)
    if compiled:
        exact = build_omni(context, size, options.vocab_size, pictures=False, bf16_values=True).eval()
        native = omni_decode(exact, [prompt], num_new, compile=True)
        if dtype == "float32":
            runs["omni compiled"] = omni_decode(ours, [prompt], num_new, compile=True)
        runs["omni compiled, bf16 values" if dtype == "float32" else "omni compiled"] = native
    return runs


# ---- prompts and batches ---------------------------------------------------------------------------------------------

EAGER_ONLY = ("ratio_eager", "ratio_theirs_compiled", "omni", "transformers_eager", "transformers_compiled")


def eager_only_measures(times: Times, end: str, rate: Callable[[str, str], Measure]) -> list[Measure]:
    """The rows of EAGER_ONLY. ratio_theirs_compiled: the fastest of all of theirs over ours."""
    return [
        times.ratio(f"ratio_eager_{end}", EAGER, "omni"),
        times.ratio(f"ratio_theirs_compiled_{end}", THEIRS, "omni"),
        rate(f"omni_{end}", "omni"),
        rate(f"transformers_eager_{end}", times.fastest(EAGER)),
        rate(f"transformers_compiled_{end}", "transformers compiled"),
    ]


@task("speed_prefill", PrefillOptions, rows=lambda options: options.rows(*EAGER_ONLY))
def speed_prefill(context: Context, options: PrefillOptions) -> Outcome:
    """Milliseconds to the first token after a long prompt, against transformers, eager and compiled."""
    conditions, notes, measures = conditions_and_parameters(context, options)
    notes.append(
        f"one token after a prompt of {options.prompt} bytes, an id each; ours has no compiled pass of prompts"
    )
    for size in options.measured:
        for dtype in DTYPES:
            runs: Runs = {}
            if dtype in options.dtypes:
                ours, theirs = build_pair(context, size, options, dtype)
                prompt = prompt_of(options.prompt)
                ids = ids_like(1, num_prompt_ids(ours, prompt))
                runs = {"omni": omni_decode(ours, [prompt], 1), **llama_runs(theirs, ids, 1, compiled=False)}
                if "compiled" in options.modes:
                    runs["transformers compiled"] = llama_decode(with_compiled_forward(theirs), ids, 1, "static")
            runs = without_failing(runs, notes, f"{size}, {dtype}")
            times = Times.of(runs, options.runs, conditions)
            measures += eager_only_measures(times, f"{dtype}_{size}", times.milliseconds)
    return Outcome(measures, notes=notes)


def batch_rows(options: BatchOptions) -> list[str]:
    """All report rows; suites set bars on these names."""
    return options.rows(*(f"{name}_{count}" for count in options.batches for name in EAGER_ONLY))


@task("speed_batch", BatchOptions, rows=batch_rows)
def speed_batch(context: Context, options: BatchOptions) -> Outcome:
    """Cached greedy decoding of a batch of requests, total tokens/s, against transformers, eager and compiled."""
    conditions, notes, measures = conditions_and_parameters(context, options)
    notes.append("rows of equal length; ours has no compiled step of many rows")
    for size in options.measured:
        num_new = options.num_new(size)
        for dtype in DTYPES:
            for count in options.batches:
                runs: Runs = {}
                if dtype in options.dtypes:
                    ours, theirs = build_pair(context, size, options, dtype)
                    prompt = prompt_of(options.prompt)
                    ids = ids_like(count, num_prompt_ids(ours, prompt))
                    runs = {"omni": omni_decode(ours, [prompt] * count, num_new)}
                    runs |= llama_runs(theirs, ids, num_new, "compiled" in options.modes)
                runs = without_failing(runs, notes, f"{count} rows, {size}, {dtype}")
                times = Times.of(runs, options.runs, conditions)
                measures += eager_only_measures(
                    times, f"{count}_{dtype}_{size}", tokens_per_second(times, count * num_new)
                )
    return Outcome(measures, notes=notes)


def tokens_per_second(times: Times, tokens: int) -> Callable[[str, str], Measure]:
    """A function of (row, run) to the report row of `tokens` per second."""
    return lambda row, name: times.rate(row, name, tokens)
