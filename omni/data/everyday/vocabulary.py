"""Choose the everyday names of emoji and write `names.json`:

    python -m omni.data.everyday.vocabulary --emojibase FOLDER

FOLDER is the unpacked package emojibase-data of the npm registry (MIT), whose tags are the keywords of the Unicode CLDR
and whose shortcodes are those of GitHub, Slack, JoyPixels and the CLDR; further aliases come from the `emoji` package.
A word that several emoji share belongs to few of them, and the most ordinary one is drawn for it: see `owner_of`. Names
under "written" were written for this file: what people call such a picture. They come first, and the program keeps
them. Run it to change the vocabulary; the model omni/smol was trained on the committed file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from omni.data.emoji_world.atlas import vocabulary
from omni.data.emoji_world.names import clean_name, package_aliases
from omni.data.everyday.names import NAMES_FILE

SHORTCODES = ("cldr", "github", "iamcal", "joypixels", "emojibase")
MOST_OWNERS = 7  # a keyword of more emoji names none of them
PLAIN = re.compile(r"[a-z0-9][a-z0-9 '.&!#*+-]*")
NOT_NAMES = frozenset({"face", "cat face", "animal", "sign", "symbol", "person", "man", "woman", "button", "tone"})


def bare(character: str) -> str:
    """Without variation selectors, which sources write differently."""
    return character.replace("\ufe0f", "")


def word_of(raw: str) -> str | None:
    """A shortcode or keyword as words, or None where it is not English text."""
    words = clean_name(raw.replace("-", " ") if "_" not in raw and raw.count("-") > 1 else raw)
    return words if PLAIN.fullmatch(words) and len(words) > 1 and not words.isdigit() else None


def emojibase(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Bare character -> (shortcodes, keywords), cleaned."""
    data = json.loads((folder / "en" / "data.json").read_text(encoding="utf-8"))
    codes = [json.loads((folder / "en/shortcodes" / f"{name}.json").read_text(encoding="utf-8")) for name in SHORTCODES]
    found = {}
    for entry in data:
        listed: list[str] = []
        for table in codes:
            one = table.get(entry["hexcode"], [])
            listed += [one] if isinstance(one, str) else one
        found[bare(entry["emoji"])] = cleaned(listed), cleaned(entry.get("tags", []))
    return found


def cleaned(raw: Iterable[str]) -> list[str]:
    """The words of each that has some, without repetition."""
    return list(dict.fromkeys(word for one in raw if (word := word_of(one)) is not None))


def owner_of(word: str, owners: list[str], order: Mapping[str, int], names: Mapping[str, str]) -> str:
    """The emoji that a shared word names: one that has it in a name of one or two words, then one with a short name,
    then the first in Unicode's order."""

    def rank(character: str) -> tuple[bool, int, int]:
        words = names[character].split()
        return word not in words or len(words) > 2, len(words), order[character]

    return min(owners, key=rank)


def choose(folder: Path, written: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Short name -> its listed names, shortcodes and aliases before keywords: no short names, none that is written."""
    names = {bare(character): name for name, character in vocabulary()["names"].items()}
    characters = {bare(character): character for character in vocabulary()["names"].values()}
    found = {key: value for key, value in emojibase(folder).items() if key in names}
    order = {character: number for number, character in enumerate([*found, *(c for c in names if c not in found)])}
    own = {
        character: [*found.get(character, ([], []))[0], *cleaned(package_aliases(characters[character]))]
        for character in names
    }
    keywords = {character: found.get(character, ([], []))[1] for character in names}
    owners: dict[str, list[str]] = {}
    for table in (own, keywords):
        for character, words in table.items():
            for word in words:
                if character not in owners.setdefault(word, []):
                    owners[word].append(character)
    chosen: dict[str, list[str]] = {name: [] for name in names.values()}
    taken = set(names.values()) | NOT_NAMES | {name for those in written.values() for name in those}
    for word, those in owners.items():
        by_code = [character for character in those if word in own[character]]
        if word in taken or (not by_code and len(those) > MOST_OWNERS):
            continue
        chosen[names[owner_of(word, by_code or those, order, names)]].append(word)
    return dict(sorted(chosen.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--emojibase", type=Path, required=True)
    written = json.loads(NAMES_FILE.read_text(encoding="utf-8"))["written"]
    listed = choose(parser.parse_args().emojibase, written)
    write(written, listed)
    print(f"{len(listed)} emoji, {num(written)} written names, {num(listed)} listed ones: {NAMES_FILE}")


def num(table: Mapping[str, list[str]]) -> int:
    return sum(map(len, table.values()))


def write(written: Mapping[str, list[str]], listed: Mapping[str, list[str]]) -> None:
    """Write the file, a line for an emoji."""
    parts = []
    for key, table in (("written", written), ("listed", listed)):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
        parts.append(f' "{key}": {{\n{lines}\n }}')
    NAMES_FILE.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
