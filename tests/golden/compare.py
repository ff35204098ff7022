"""Whether another commit answers the golden requests, and trains, like this checkout: to the bit, on this machine.

    python tests/golden/compare.py BASE

BASE (any name of a commit) is checked out into a temporary worktree; record.py of this checkout runs on both, in
float64 and float32. Prints what differs; exit status 1 where something does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def recorded(checkout: Path, out: Path, dtype: str) -> dict[str, Any]:
    """What record.py finds with the code of a checkout."""
    command = [sys.executable, str(HERE / "record.py"), str(out), "--dtype", dtype]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    losses = ["--losses"] if dtype == "float64" else []
    subprocess.run([*command, *losses], check=True, cwd=checkout, env=environment)
    found = json.loads(out.read_text())
    if Path(found.pop("code")).parent != checkout.resolve():
        raise RuntimeError(f"the code that ran is not that of {checkout}")
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    """A line for each request whose answer differs, and for the losses."""
    for name in one["answers"].keys() | other["answers"].keys():
        a, b = one["answers"].get(name, {}), other["answers"].get(name, {})
        if fields := sorted(field for field in a.keys() | b.keys() if a.get(field) != b.get(field)):
            yield f"{name}: {', '.join(fields)}"
    if one["losses"] != other["losses"]:
        yield f"losses: {one['losses']} and {other['losses']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a commit")
    base = parser.parse_args().base
    found = []
    with tempfile.TemporaryDirectory() as folder:
        worktree = Path(folder, "base")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", worktree, base], check=True, cwd=ROOT)
        try:
            for dtype in ("float64", "float32"):
                before = recorded(worktree, Path(folder, "before.json"), dtype)
                after = recorded(ROOT, Path(folder, "after.json"), dtype)
                found += [f"{dtype}: {line}" for line in differences(before, after)]
                number = len(after["answers"]) - 1
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", worktree], check=True, cwd=ROOT)
    for line in found:
        print(line)
    verified = "DIFFERENT" if found else "equal to the bit"
    print(f"{number} requests in float64 and float32, 20 losses, {base} and here: {verified}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
