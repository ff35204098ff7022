"""The command line: `omni generate | chat | inspect | verify | doctor`."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to the process's arguments."""
    from omni.cli.commands import main as run

    return run(argv)
