"""A model whose weights come from several that were trained apart:

    python -m train.tools.combine OUT MODEL OTHER=PREFIX,PREFIX ...

Everything is the first model's, but for the weights whose names begin with a prefix (* is any text): these are OTHER's,
which must have all of them, of equal shape. So a picture expert and a LoRA, which never touch one another's weights,
can be trained side by side beside one frozen language model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from omni.cli.arguments import exit_code
from omni.model import Omni
from omni.pretrained import from_pretrained


@torch.no_grad()
def combine(first: str, others: Mapping[str, Sequence[str]]) -> Omni:
    """The model of directory `first`, with weights of other directories by prefix. ValueError for a prefix without
    weights, for weights that one of the two lacks, or of another shape, and for a weight that two others give."""
    result = from_pretrained(first)
    own, taken = result.state_dict(), {}
    for path, prefixes in others.items():
        theirs = from_pretrained(path).state_dict()
        for prefix in prefixes:
            names = [name for name in own.keys() | theirs.keys() if fnmatchcase(name, f"{prefix}*")]
            if not names:
                raise ValueError(f"{prefix!r} matches no weight of {path} or {first}; names begin as in transformer.")
            for name in sorted(names):
                if name not in own or name not in theirs or own[name].shape != theirs[name].shape:
                    raise ValueError(f"{path} and {first} differ in {name!r}: both must have it, of one shape")
                if taken.setdefault(name, path) != path:
                    raise ValueError(f"{name!r} is given by {taken[name]} and {path}; give it by one")
                own[name].copy_(theirs[name])
    return result


def main(arguments: Sequence[str]) -> int:
    def work() -> None:
        if len(arguments) < 3:
            raise ValueError("usage: python -m train.tools.combine OUT MODEL OTHER=PREFIX,PREFIX ...")
        others = {}
        for text in arguments[2:]:
            path, separator, prefixes = text.partition("=")
            if not separator or not all(prefixes.split(",")):
                raise ValueError(f"{text!r} is not of the form MODEL=PREFIX,PREFIX, such as runs/a/model=transformer.")
            others[path] = prefixes.split(",")
        combine(arguments[1], others).save_pretrained(Path(arguments[0]), torch.float32)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
