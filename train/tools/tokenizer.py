"""Train a tokenizer from a recipe.

    python -m train.tools.tokenizer tokenizers_cfg/emoji_bpe.toml corpus=FILE out=DIR

The corpus is a text file (one text per line) or "emoji_world": the text of that world's training documents. The same
recipe, corpus and library version give the same files. Prints sizes, bytes per id and a digest; exits 2 on a bad
recipe.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import Field

from omni.cli.arguments import exit_code
from omni.config import Frozen, load_toml
from omni.document import Text
from omni.text.tokenizer import Tokenizer, backends


class TokenizerRecipe(Frozen):
    """backend: bpe or sentencepiece; vocab_size: number of text ids, without phrases; num_texts: lines or documents, at
    most; phrases: None, a text file with one phrase a line, or "emoji_world"."""

    backend: str
    vocab_size: int = Field(gt=0)
    corpus: str
    out: str
    num_texts: int = Field(20_000, gt=0)
    seed: int = 0
    phrases: str | None = None


def train_tokenizer(recipe: TokenizerRecipe) -> Tokenizer:
    """Train and save to recipe.out. Raises ValueError for an unknown backend, a missing or too small corpus."""
    backend = backends.get(recipe.backend)
    tokenizer = backend.train(read_corpus(recipe), recipe.vocab_size)
    if recipe.phrases is not None:
        tokenizer = tokenizer.with_phrases(read_phrases(recipe.phrases))
    tokenizer.save(recipe.out)
    return tokenizer


def read_corpus(recipe: TokenizerRecipe) -> Iterator[str]:
    """The recipe's texts, in order, at most num_texts lines (of a file) or documents (of the emoji world)."""
    if recipe.corpus == "emoji_world":
        yield from _emoji_world_texts(recipe)
        return
    path = Path(recipe.corpus)
    if not path.is_file():
        raise ValueError(f"corpus {recipe.corpus!r} is no file; give a text file's path, or emoji_world")
    with path.open(encoding="utf-8", errors="replace") as lines:
        for index, line in enumerate(lines):
            if index == recipe.num_texts:
                return
            yield line


def read_phrases(source: str) -> list[str]:
    """The phrases of a text file, one a line, or of the emoji world; each after a space, and at the start of a text."""
    if source == "emoji_world":
        from omni.data.emoji_world import Atlas
        from omni.data.emoji_world.classes import CLASSES

        names: Iterable[str] = (*CLASSES, *Atlas().names)
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"phrases {source!r} is no file; give a text file's path, or emoji_world")
        names = path.read_text(encoding="utf-8").splitlines()
    names = [name.strip() for name in names if name.strip()]
    return list(dict.fromkeys([*(f" {name}" for name in names), *names]))


def _emoji_world_texts(recipe: TokenizerRecipe) -> Iterator[str]:
    """The texts of the first num_texts training documents."""
    from omni.data.emoji_world import Atlas, EmojiWorld

    world = EmojiWorld(Atlas(), recipe.seed, split="train")
    for index in range(recipe.num_texts):
        for segment in world.document(index).segments:
            if isinstance(segment, Text):
                yield segment.text


def main(arguments: list[str]) -> int:
    """The command line: RECIPE.toml [key=value ...]. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2

    def work() -> None:
        started = time.perf_counter()
        recipe = load_toml(arguments[0], arguments[1:], TokenizerRecipe)
        tokenizer = train_tokenizer(recipe)
        seconds = time.perf_counter() - started
        num_bytes = num_ids = 0
        for text, _ in zip(read_corpus(recipe), range(1_000), strict=False):
            num_bytes += len(text.encode())
            num_ids += len(tokenizer.encode(text))
        print(f"{recipe.out}: {recipe.backend}, {tokenizer.num_text} text ids + {len(tokenizer.control)} control ids,")
        print(f"{num_bytes / max(num_ids, 1):.2f} bytes per id on the first 1,000 texts, {seconds:.1f} s")
        print(f"model file blake2b {tokenizer.describe()['blake2b']}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
