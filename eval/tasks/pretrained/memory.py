"""Memory and disk that the import of a large language model needs: a Llama of 6.7 billion weights in sparse files."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from eval.experiments.imports.memory import LLAMA_7B, disk_bytes, memory_of_import
from eval.task import Context, Measure, Outcome, TaskOptions, task

GIB = 2**30
ROOM = 1 << 30  # bytes of disk that must be free; the files take a few MiB where the file system has holes


class MemoryOptions(TaskOptions):
    """layers: of the model."""

    layers: int = Field(default=LLAMA_7B["num_hidden_layers"], ge=1, le=128)


@task(
    "pretrained_memory", MemoryOptions, rows=("import", "load", "disk", "import_seconds", "load_seconds", "gigabytes")
)
def pretrained_memory(context: Context, options: MemoryOptions) -> Outcome:
    """Anonymous memory of an import and of a load, and the disk that all files take, in GiB. The files are removed."""
    config: dict[str, Any] = {**LLAMA_7B, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory() as folder:
        if (free := shutil.disk_usage(folder).free) < ROOM:
            raise ValueError(f"{folder} has {free / GIB:.1f} GiB free; set TMPDIR to a place with 1 GiB")
        costs = memory_of_import(Path(folder), config)
        size = (Path(folder) / "model" / "model.safetensors").stat().st_size
        disk = disk_bytes(Path(folder))
    note = f"{options.layers} layers, {size / 1e9:.1f} GB of bfloat16 weights, zeros but for the rows of new ids"
    memory = [Measure(step, cost.anonymous / GIB, "GiB", note) for step, cost in costs.items()]
    times = [Measure(f"{step}_seconds", cost.seconds, "s", note) for step, cost in costs.items()]
    return Outcome([*memory, Measure("disk", disk / GIB, "GiB", note), *times, Measure("gigabytes", size / 1e9, "GB")])
