"""The anonymous memory of an import and of a load, for a model of any size (RssAnon of /proc/self/status; Linux).

    python -m eval.experiments.imports.memory WORK     a Llama of 6.7 billion weights of zeros, in bfloat16

The published files are sparse: they hold headers, and holes where weights would be; so are the files that are written.
Each step runs in a process of its own. Mapped pages are no anonymous memory: the system can drop them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
PERIOD_SECONDS = 0.005


@dataclass(frozen=True)
class Cost:
    """Of one step: the largest anonymous memory beyond that before it, in bytes, and its time."""

    anonymous: int
    seconds: float


def sparse_checkpoint(folder: Path, config: dict[str, Any], num_shards: int = 3) -> int:
    """Write config.json, an index and shards of zeros in bfloat16 that take no space. Returns the bytes of weights."""
    from omni.importers.families import FAMILIES
    from omni.importers.layout import layout_of

    keys = FAMILIES[config["model_type"]].model_validate(
        {name: value for name, value in config.items() if name not in ("architectures", "torch_dtype")}
    )
    shapes = {p.name: p.shape for weight in layout_of(keys, keys.heads[2], "model.") for p in weight.parts}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, places, total = sorted(shapes), {}, 0
    for shard in range(num_shards):
        file, header, at = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors", {}, 0
        for name in names[shard::num_shards]:
            size = 2
            for side in shapes[name]:
                size *= side
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [at, at + size]}
            places[name], at = file, at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return total


def memory_of_import(work: Path, config: dict[str, Any] | None = None) -> dict[str, Cost]:
    """The costs of "import" and of "load" (from_pretrained in bfloat16, with one pass of text), in new processes of one
    thread. Writes work/published and work/model."""
    sparse_checkpoint(work / "published", config or LLAMA_7B)
    found = {}
    for step in ("import", "load"):
        command = [sys.executable, "-m", __spec__.name, str(work), step]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise ValueError(f"the step {step} failed: {done.stderr.strip()[-500:]}")
        found[step] = Cost(**json.loads(done.stdout.splitlines()[-1]))
    return found


def disk_bytes(folder: Path) -> int:
    """The space that files below the folder take on disk; holes take none."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no RssAnon; run this on Linux")


def cost_of(step: Callable[[], None]) -> Cost:
    """Run a step; a thread reads the memory every few milliseconds."""
    before, most, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(PERIOD_SECONDS):
            most[0] = max(most[0], anonymous_bytes())

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        step()
        most[0] = max(most[0], anonymous_bytes())
    finally:
        stop.set()
        watcher.join()
    return Cost(most[0] - before, time.perf_counter() - start)


def _step(work: Path, name: str) -> Callable[[], None]:
    """One step, with its imports done."""
    import torch

    import omni
    from omni.generation.context import append_of, run_context
    from omni.importers.decoders import import_decoder
    from omni.nn.cache import History
    from omni.sequence.layout import TokenSpan

    def import_it() -> None:
        import_decoder(work / "published", work / "model", with_tokenizer=False)

    @torch.no_grad()
    def load() -> None:
        model = omni.from_pretrained(work / "model", dtype=torch.bfloat16)
        run_context(model, [append_of(History(model.transformer.new_pool()), [TokenSpan([1, 2], [False] * 2)], 0)])

    return {"import": import_it, "load": load}[name]


def main(arguments: list[str]) -> None:
    """WORK: both steps, as a table. WORK STEP: one step; its cost as JSON."""
    work = Path(arguments[0])
    if arguments[1:]:
        cost = cost_of(_step(work, arguments[1]))
        print(json.dumps({"anonymous": cost.anonymous, "seconds": cost.seconds}))
        return
    for step, cost in memory_of_import(work).items():
        print(f"{step}: {cost.anonymous / 2**30:.2f} GiB anonymous, {cost.seconds:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
