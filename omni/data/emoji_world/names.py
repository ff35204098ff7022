"""Names of emoji in the `emoji` package, cleaned. Only this file imports that package, at the first use."""

from __future__ import annotations

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE_CHARACTERS: dict[str, str] = dict(zip(TONES, "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff", strict=True))


def tone_name(base: str, tone: str) -> str:
    """ "waving hand", "dark" -> "waving hand: dark skin tone"."""
    return f"{base}: {tone} skin tone"


def clean_name(raw: str) -> str:
    """ ":red_apple:" -> "red apple": spaces, lower case, straight quotes."""
    for old, new in (("_", " "), ("’", "'"), ("“", '"'), ("”", '"')):
        raw = raw.replace(old, new)
    return raw.strip(":").lower().strip()


def package_name(character: str, language: str) -> str:
    """The cleaned name in the installed `emoji` package; ValueError if package, language or name is missing."""
    try:
        import emoji
    except ImportError as error:
        raise ValueError(
            f"the name of {character!r} in {language!r} is not stored; `pip install emoji` for all names"
        ) from error
    if language not in emoji.LANGUAGES:
        raise ValueError(f"unknown language {language!r}; known: {', '.join(emoji.LANGUAGES)}")
    emoji.config.load_language(language)
    raw = emoji.EMOJI_DATA.get(character, {}).get(language)
    if raw is None:
        raise ValueError(f"the emoji package has no {language!r} name of {character!r}")
    return clean_name(raw)


def package_aliases(character: str) -> list[str]:
    """The English aliases in the installed `emoji` package, without colons."""
    import emoji

    return [one.strip(":") for one in emoji.EMOJI_DATA.get(character, {}).get("alias", [])]


def candidates() -> dict[str, str]:
    """Names and characters of the base emoji: fully qualified, without place flags, skin tones or mirrored variants."""
    import emoji

    chosen: dict[str, str] = {}
    for character, data in emoji.EMOJI_DATA.items():
        tone = any(c in TONE_CHARACTERS.values() for c in character)
        flag = "\U0001f1e6" <= character[0] <= "\U0001f1ff" or "\U000e007f" in character
        name = clean_name(data["en"])
        if data["status"] == emoji.STATUS["fully_qualified"] and not (tone or flag or name.endswith("facing right")):
            chosen[name] = character
    order = sorted(chosen, key=lambda name: (len(chosen[name].replace("\ufe0f", "")), name))
    return {name: chosen[name] for name in order}
