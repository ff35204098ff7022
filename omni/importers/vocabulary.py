"""The vocabulary of a byte-pair tokenizer, and tokenizer.json files without it.

A model directory beside its language model (omni.importers.base) does not repeat the tokens and the merges, nearly all
of a tokenizer.json: where the file lists them, it has a mark, such as "<base tokens compact 49152>". `filled` puts them
back, byte for byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any

from omni.config import parse_json

MARK = re.compile(r'"<base (tokens|merges|merges-joined) (compact|indented) ([0-9]{1,8})>"')
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """tokens: by id. merges: two tokens with a space between them, in order of their rank."""

    tokens: list[str]
    merges: list[str]

    def rendered(self, what: str, style: str, count: int) -> str:
        """The first `count` tokens or merges as the tokenizers library writes them: in one line, or indented."""
        if what == "tokens":
            colon = ":" if style == "compact" else ": "
            items = [f"{quoted(token)}{colon}{number}" for number, token in enumerate(self.tokens[:count])]
            return _listed(items, "{}", style)
        if what == "merges-joined":
            return _listed([quoted(merge) for merge in self.merges[:count]], "[]", style)
        # Quotation marks do not depend on what is beside them, so a pair is its text with the space replaced.
        between, start, stop = (
            ('","', "[", "]") if style == "compact" else ('",\n        "', "[\n        ", "\n      ]")
        )
        return _listed(
            [f"{start}{quoted(merge).replace(' ', between)}{stop}" for merge in self.merges[:count]], "[]", style
        )

    def left_out(self, data: bytes) -> bytes:
        """A file of a tokenizer with marks in place of the tokens and merges; as it is where it lists none of these."""
        try:
            text, table = data.decode("utf-8"), parse_json(data, TOKENIZER_FILE)
            counts = {"tokens": len(table["model"]["vocab"]), "merges": len(table["model"]["merges"])}
        except (ValueError, LookupError, TypeError):
            return data
        for what in ("tokens", "merges", "merges-joined"):
            count = counts[what.removesuffix("-joined")]
            for style in ("compact", "indented"):
                whole = self.rendered(what, style, count)
                if count and text.count(whole) == 1:
                    text = text.replace(whole, f'"<base {what} {style} {count}>"')
        found = text.encode("utf-8")
        return found if self.filled(found) == data else data

    def filled(self, data: bytes) -> bytes:
        """The inverse of `left_out`."""
        text = data.decode("utf-8")
        return MARK.sub(lambda mark: self.rendered(mark[1], mark[2], int(mark[3])), text).encode("utf-8")


def _listed(items: list[str], brackets: str, style: str) -> str:
    """A list or a table of the field `model`, whose contents are indented by six spaces."""
    start, stop = brackets
    if style == "compact" or not items:
        return start + ",".join(items) + stop
    return f"{start}\n      " + ",\n      ".join(items) + f"\n    {stop}"


def vocabulary_of_file(path: Path) -> Vocabulary:
    """Of a tokenizer.json: the tokens with those that were added, by id. Empty where there is no file, or ids without a
    token."""
    if not path.is_file():
        return Vocabulary([], [])
    table: Any = parse_json(path.read_bytes(), str(path))
    try:
        ids = dict(table["model"]["vocab"])
        ids |= {added["content"]: added["id"] for added in table.get("added_tokens") or ()}
        merges = [one if isinstance(one, str) else " ".join(one) for one in table["model"].get("merges") or ()]
    except (LookupError, TypeError, ValueError):
        return Vocabulary([], [])
    by_id = {token: text for text, token in ids.items()}
    if not all(isinstance(text, str) for text in ids) or by_id.keys() != set(range(len(by_id))):
        return Vocabulary([], [])
    return Vocabulary([by_id[token] for token in range(len(by_id))], merges)
