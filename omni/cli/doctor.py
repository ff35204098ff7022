"""`omni doctor`: the parts of this installation, missing parts, and the command that installs each.

Exit code 0 if `omni generate` can run, 1 if a part that it needs is missing or damaged. Changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from omni.checkpoint import verify
from omni.cli.terminal import Printer, detect, table
from omni.data.emoji_world.atlas import Glyphs
from omni.data.emoji_world.font import find_font
from omni.pretrained import BUNDLED
from omni.version import VERSION

DISTRIBUTION = "omni-flow"
TESTED_TORCH = "2.13"
# Package -> the name that it is imported by, where the two differ.
IMPORT_NAMES = {"pillow": "PIL", "flash-attn": "flash_attn", "transfusion-pytorch": "transfusion_pytorch"}


@dataclass(frozen=True)
class Finding:
    """One row of the report. state: "ok", "note" (works, with a remark), "absent" (optional), "bad" (needed)."""

    name: str
    value: str
    state: Literal["ok", "note", "absent", "bad"] = "ok"


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.font is not None:
        Glyphs(find_font(arguments.font))  # raises ValueError for a missing or unusable font
    findings = [*_versions(), *_machine(), *_extras(), *_font(arguments.font), *_model()]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        printer = Printer()
        for line in table(("what", "state", "found"), [(f.name, f.state, f.value) for f in findings]):
            printer.line(line)
    return int(any(finding.state == "bad" for finding in findings))


def _versions() -> Iterator[Finding]:
    yield Finding("omni", VERSION)
    yield Finding("python", platform.python_version())
    tested = torch.__version__.startswith(TESTED_TORCH)
    yield Finding("torch", f"{torch.__version__} (tested with {TESTED_TORCH})", "ok" if tested else "note")


def _machine() -> Iterator[Finding]:
    """Threads, CUDA, attention backend, terminal."""
    threads = torch.get_num_threads()
    crowded = threads > 1 and "OMP_NUM_THREADS" not in os.environ
    hint = "; OMP_NUM_THREADS=1 is often faster for small models on a busy machine" if crowded else ""
    yield Finding("threads", f"{threads} of {os.cpu_count()} processors{hint}")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Finding("cuda", f"{torch.version.cuda}: {names}")
    else:
        yield Finding("cuda", "none: everything runs on the CPU", "absent")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from omni.nn.attention.backends import choose_backend

    backends = f"{choose_backend(None, device)}; to train: {choose_backend(None, device, training=True)}"
    yield Finding("attention", f"{backends} ({device})")
    yield Finding("terminal", f"pictures as {detect(sys.stdout)}")


def _extras() -> Iterator[Finding]:
    """Missing packages of the core and of each extra, by the package's metadata."""
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("package", "not installed (running from a checkout); pip install -e .", "note")
        return
    extras: dict[str, list[str]] = {}
    for line in required:
        package = re.split(r"[\s;\[<>=!~(]", line, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        extras.setdefault(extra[1] if extra else "", []).append(package)
    for extra, packages in sorted(extras.items()):
        missing = [package for package in packages if not _is_installed(package)]
        name = f"extra {extra}" if extra else "core packages"
        if not missing:
            yield Finding(name, ", ".join(packages))
            continue
        install = f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {' '.join(missing)}"
        needed = extra in ("", "vae")  # the bundled model's codec is a diffusers autoencoder
        yield Finding(name, f"without {', '.join(missing)}; {install}", "bad" if needed else "absent")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(IMPORT_NAMES.get(package, package)) is not None


def _font(path: str | None) -> Iterator[Finding]:
    """The font; checked by two emoji in colour."""
    try:
        yield Finding("emoji font", str(Glyphs(path).path))
    except ValueError as error:
        yield Finding("emoji font", f"{error} (for training and evaluation)", "absent")


def _model() -> Iterator[Finding]:
    """The bundled model's digest check."""
    try:
        files = verify(BUNDLED)["files"]
    except (ValueError, OSError) as error:
        yield Finding("bundled model", str(error), "bad")
        return
    size = sum(entry["bytes"] for entry in files.values()) / 1e6
    yield Finding("bundled model", f"{size:.1f} MB in {len(files)} files, every digest right")
