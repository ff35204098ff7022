"""Logits of imported decoders against transformers' classes, per family: tied and untied, in one file and in shards,
and from GGUF files where transformers reads them; uncached, cached and together with others, past a window."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from eval.experiments.imports import gguf_files, rotary
from eval.experiments.imports.decoders import CASES, Case, differences, largest
from eval.experiments.imports.oracle import FAMILIES
from eval.peers import quiet_transformers, version_of
from eval.task import Context, Measure, Outcome, TaskOptions, names_of, task

DTYPES = ("float64", "float32")
ONE_FILE, SHARDS = "1GB", "20KB"


class DecoderOptions(TaskOptions):
    """families: those that are measured; other rows are missing."""

    families: tuple[str, ...] = FAMILIES

    _known = names_of("families", FAMILIES)


def row_of(family: str, dtype: str) -> str:
    return f"{family.removesuffix('_text')}_{dtype}"


ROWS = [row_of(family, dtype) for family in FAMILIES for dtype in DTYPES] + ["rotary"]


@task("pretrained_decoders", DecoderOptions, rows=ROWS)
def pretrained_decoders(context: Context, options: DecoderOptions) -> Outcome:
    """Largest difference of logits to transformers, relative to the largest logit; in float64 casts to float32 inside
    of transformers are replaced, in float32 it is as published."""
    versions = ", ".join(f"{package} {version_of(package)}" for package in ("transformers", "gguf"))
    quiet_transformers()
    measures = []
    for family in options.families:
        comparisons = dict(_comparisons(family))
        found = [_in_new_folder(compare) for compare in comparisons.values()]
        for dtype in DTYPES:
            note = f"{len(found)} checkpoints: {'; '.join(comparisons)}. {versions}"
            measures.append(Measure(row_of(family, dtype), largest(one[dtype] for one in found), "", note))
    scalings = ", ".join(rotary.CASES)
    off = largest(map(rotary.difference, rotary.CASES))
    measures.append(Measure("rotary", off, "", f"frequencies, magnitudes, tables of {scalings}. {versions}"))
    return Outcome(measures)


def _comparisons(family: str) -> Iterator[tuple[str, Callable[[Path], dict[str, float]]]]:
    """What is compared, and a function of an empty folder. Tied checkpoints are one file, others are shards."""
    for name, case in CASES.items():
        if case.family != family:
            continue
        for tied in (True, False):
            changed = Case(family, {**case.settings, "tie_word_embeddings": tied}, case.context, case.shortest)
            size = ONE_FILE if tied else SHARDS
            yield f"{name}, {'tied' if tied else 'untied'}", partial(differences, changed, max_shard_size=size)
    for name, (of, settings, kind) in gguf_files.CASES.items():
        if of == family:
            yield f"GGUF {name}", partial(gguf_files.gguf_differences, of, settings, kind)


def _in_new_folder(compare: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder))
