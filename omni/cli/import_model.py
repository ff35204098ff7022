"""`omni import`: write a published decoder as a model directory; and its report for `omni inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from omni.checkpoint import MANIFEST
from omni.cli.terminal import Printer, table
from omni.errors import check_place
from omni.importers.decoders import PublishedDecoder, import_decoder, read_decoder
from omni.importers.places import find_checkpoint, origin_of
from omni.sequence.rotary_scaling import DynamicScaling, LongRopeScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "keep": None}


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    out = Path(arguments.out)
    if out.exists() and not (arguments.overwrite and (out / MANIFEST).is_file()):
        way_out = "" if arguments.overwrite else ", or replace a model directory with --overwrite"
        raise ValueError(f"--out {str(out)!r} exists already; name another folder{way_out}")
    check_place(out, "--out")
    printer = Printer()
    path = find_checkpoint(arguments.path, printer.line)
    import_decoder(
        path,
        out,
        codec=arguments.codec,
        dtype=DTYPES[arguments.dtype],
        context=arguments.context,
        replace=arguments.overwrite,
        origin=origin_of(arguments.path, path),
    )
    found = read_decoder(path, arguments.context)
    for line in (*summary(found), f'wrote {out}; try: omni generate --model {out} "..."'):
        printer.line(line)
    return 0


def describe(path: Path) -> list[str]:
    """The report of a published decoder: family and sizes, what is refused, and where every tensor goes."""
    found = read_decoder(path)
    lines = [f"{path}: a published decoder, {'; '.join(summary(found))}", ""]
    lines += [f"refused: {problem}" for problem in found.problems] or [f"omni import {path} --out DIR can read it"]
    uses = found.uses()
    rows = []
    for name, stored in found.source.tensors.items():
        if name in found.refused:
            what = f"refused: {found.refused[name]}"
        elif name in found.skipped:
            what = f"skipped: {found.skipped[name]}"
        else:
            what = uses.get(name, "not compared: the config is refused")
        rows.append((name, stored.kind, " x ".join(map(str, stored.shape)), what))
    return [*lines, "", *table(("tensor", "type", "shape", "what becomes of it"), rows)]


def summary(found: PublishedDecoder) -> list[str]:
    """Family and sizes; the context that rotary frequencies are fixed to."""
    count = sum(torch.Size(stored.shape).numel() for stored in found.source.tensors.values())
    lines = [f"{found.family}, {count:,} numbers in {len(found.source.tensors)} tensors"]
    if found.config is None:
        return lines
    c, scaling = found.config.transformer, found.config.transformer.rotary.scaling
    lines.append(
        f"{c.depth} layers of width {c.width}, {c.num_heads} heads and {c.num_kv_heads} of keys, "
        f"{found.config.vocab_size:,} ids ({found.config.new_rows} new), contexts of {found.config.max_context:,}"
    )
    if isinstance(scaling, DynamicScaling | LongRopeScaling):
        lines.append(f"{scaling.kind} frequencies for contexts of {scaling.length:,}: another with --context")
    return lines
