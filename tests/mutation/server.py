"""Runs pytest repeatedly in forks of one process that has the heavy packages loaded. Started by run.py; POSIX.

A request is a line of JSON on stdin: {"tree": folder, "arguments": of pytest, "timeout": seconds, "log": file}. The
answer is a line on stdout: {"code": exit code, null after the timeout, "seconds": ...}. Nothing of the tree is loaded
before the fork, so every run imports the current tree; nothing writes bytecode.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time

HEAVY = (
    *("torch", "torch._dynamo", "torch.nn.attention.flex_attention", "numpy", "pydantic", "PIL.Image", "hypothesis"),
    *("safetensors.torch", "tokenizers", "sentencepiece", "diffusers", "diffusers.models", "jinja2", "pytest"),
)


def run(tree: str, arguments: list[str], log: str) -> None:
    """In the fork: pytest as if started in the tree."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree  # of the processes that tests start
    sys.path[0] = tree
    import pytest

    code = pytest.main(arguments)
    sys.stdout.flush()
    os._exit(int(code))


def wait(process: int, timeout: float) -> int | None:
    """The exit code, or None past the timeout, when the whole group is killed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def main() -> None:
    sys.dont_write_bytecode = True
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    own = sorted({name.split(".")[0] for name in sys.modules} & {"omni", "train", "eval", "tests"})
    assert not own, f"{own} would not be imported from the tree"
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        begun = time.monotonic()
        process = os.fork()
        if not process:
            try:
                run(request["tree"], request["arguments"], request["log"])
            finally:
                os._exit(70)
        code = wait(process, request["timeout"])
        answers.write(json.dumps({"code": code, "seconds": time.monotonic() - begun}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
