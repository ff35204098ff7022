"""One request to an imported language model in a process of its own: loading, first text, tokens per second, memory.

    python -m eval.experiments.imports.fresh omni_native bf16 MODEL 64 3     prints one line of JSON

Both sides read float32 or bfloat16 from one folder of weights in its own dtype, answer one prompt greedily, and emit as
many tokens. The first request is cold; the rate is of later ones, without their prompt.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WAYS = ("omni_eager", "omni_native", "transformers dynamic", "transformers static")
PROMPT = "Tell me in a few sentences why the sky is blue at noon and red in the evening."


@dataclass(frozen=True)
class Fresh:
    """Of one process. load_seconds: until a request can be made, native code and its copy of the weights included.
    first_text_seconds: from the first request to its first token. peak_gib: resident memory, mapped files included."""

    load_seconds: float
    first_text_seconds: float
    tokens_per_second: float
    peak_gib: float


def in_new_process(way: str, dtype: str, folder: Path, tokens: int, repeats: int, threads: int) -> Fresh:
    """Measure in a new process. ValueError with the end of its errors where it fails."""
    command = [sys.executable, "-m", __spec__.name, way, dtype, str(folder), str(tokens), str(repeats)]
    return Fresh(**json.loads(_output(command, {"OMP_NUM_THREADS": str(threads)})))


def library_seconds(cache: Path) -> float:
    """Seconds that the library of the native step takes in a new process, with kept libraries in `cache`."""
    code = (
        "import time; from omni.nn.native_library import load_library\n"
        "start = time.perf_counter(); load_library(); print(time.perf_counter() - start)"
    )
    return float(_output([sys.executable, "-c", code], {"XDG_CACHE_HOME": str(cache)}))


def _output(command: list[str], changes: dict[str, str]) -> str:
    """The last line that a process prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **changes})
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:4])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.splitlines()[-1]


def measure(way: str, dtype: str, folder: Path, tokens: int, repeats: int) -> Fresh:
    """Measure in this process. folder: a model directory, or its exported text path for transformers."""
    from eval.tasks.speed.comparison import DTYPES

    start = time.perf_counter()
    load = omni_request if way.startswith("omni") else transformers_request
    request = load(folder, DTYPES[dtype], way)
    loaded = time.perf_counter() - start
    first = _seconds(lambda: request(1))
    request(tokens)
    pairs = [(_seconds(lambda: request(1)), _seconds(lambda: request(tokens))) for _ in range(repeats)]
    prompt, whole = map(statistics.median, zip(*pairs, strict=True))
    return Fresh(loaded, first, (tokens - 1) / (whole - prompt), peak_bytes() / 2**30)


def peak_bytes() -> int:
    """The largest resident memory of this process so far (getrusage would count its parent before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no VmHWM; run this on Linux")


def omni_request(folder: Path, dtype: Any, way: str) -> Callable[[int], Any]:
    import omni
    from eval.tasks.speed.text import engine_without_ends, stream_exactly

    engine = engine_without_ends(omni.from_pretrained(folder, dtype=dtype), compile=way == "omni_native")
    return lambda tokens: stream_exactly(engine, PROMPT, tokens)


def transformers_request(folder: Path, dtype: Any, way: str) -> Callable[[int], Any]:
    from eval.peers import llama_decode, load_folder, quiet_transformers

    quiet_transformers()
    tokenizer, model = load_folder(folder, dtype)
    turns = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    cache = way.removeprefix("transformers ")
    return lambda tokens: llama_decode(model, ids, tokens, cache)()


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """WAY DTYPE FOLDER TOKENS REPEATS."""
    way, dtype, folder, tokens, repeats = arguments
    print(json.dumps(asdict(measure(way, dtype, Path(folder), int(tokens), int(repeats)))))


if __name__ == "__main__":
    main(sys.argv[1:])
