"""`omni verify`: the contract check of a model directory, as a table. Exit code 1 if a check fails."""

from __future__ import annotations

import argparse
import json

from omni.cli.generate import load_model
from omni.cli.terminal import Printer, table
from omni.generation.contract import verify


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    if arguments.model is not None and arguments.named is not None:
        raise ValueError(f"two models: {arguments.model!r} and --model {arguments.named!r}; give one")
    checks = verify(load_model(arguments.model or arguments.named, arguments.device))
    if arguments.json:
        rows = [{"name": c.name, "value": c.value, "bar": c.bar, "unit": c.unit, "holds": c.holds} for c in checks]
        print(json.dumps(rows, indent=1))
    else:
        printer = Printer()
        rows = [(c.name, f"{c.value:.2e}", f"{c.bar:.0e}", c.unit, "yes" if c.holds else "NO") for c in checks]
        for line in table(("check", "largest difference", "bar", "unit", "holds"), rows):
            printer.line(line)
    return int(not all(check.holds for check in checks))
