"""English articles, plurals and numbers for the names. Covers the vocabulary, not all of English."""

from __future__ import annotations

from omni.data.emoji_world.objects import listed

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
LANGUAGE_NAMES = {
    "es": "Spanish",
    "fr": "French",
    "de": "German",
    "it": "Italian",
    "pt": "Portuguese",
    "id": "Indonesian",
    "tr": "Turkish",
}

# The word before one of these takes the plural.
_PREPOSITIONS = (" with ", " in ", " of ", " on ", " for ", " holding ", " lifting ", ":")
# Singular words that end in s.
_NOT_PLURAL = frozenset(
    listed(
        """
        bus|minibus|trolleybus|cactus|octopus|lotus|hibiscus|hippopotamus|rhinoceros|tennis|abacus|plus|minus
        aquarius|aries|pisces|taurus|sagittarius|ophiuchus|claus|fleur-de-lis|meridians
        """
    )
)
# Words without a plural.
_MASS = frozenset(
    listed(
        """
        bread|broccoli|rice|cheese|corn|fire|fog|honey|salt|soap|sushi|butter|bacon|garlic|ginger|sake|mate|money
        tennis|spaghetti|popcorn|baggage|yarn|thread|wood|fishing|chess|christmas|japanese|custard|music|luggage
        """
    )
)
_PLURAL_WORDS = frozenset({"men", "women", "people"})
_IRREGULAR = {
    "mouse": "mice", "wolf": "wolves", "fish": "fish", "child": "children", "ewe": "ewes", "man": "men",
    "goose": "geese", "tomato": "tomatoes", "snowman": "snowmen",
}  # fmt: skip


def head_word(name: str) -> str:
    """The word that takes the plural: "woman with veil" -> "woman", "red apple" -> "apple"."""
    for link in _PREPOSITIONS:
        name = name.split(link)[0]
    return name.split()[-1] if name.split() else name


def is_countable(name: str) -> bool:
    """Whether "a NAME" and "two NAMEs" are English."""
    head = head_word(name)
    if head in _MASS or head in _PLURAL_WORDS or name.split()[0] in _PLURAL_WORDS:
        return False
    return head in _NOT_PLURAL or head.endswith("ss") or not head.endswith("s")


def with_article(name: str, adjective: str = "") -> str:
    """ "apple" -> "an apple", "grapes" -> "grapes"; with an adjective "a small apple", "small grapes"."""
    words = f"{adjective} {name}".strip()
    if not is_countable(name):
        return words
    return article_for(words)


def article_for(name: str) -> str:
    """ "orange" -> "an orange"."""
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "one-", "ewe", "eu"))
    vowel = vowel or name.startswith(("hour", "x-", "sos ", "ng "))
    return f"{'an' if vowel else 'a'} {name}"


def plural(name: str) -> str:
    """ "cherry blossom" -> "cherry blossoms", "ear of corn" -> "ears of corn"; names already plural stay."""
    if not is_countable(name):
        return name
    head = head_word(name)
    start = name.index(head)
    if head in _IRREGULAR:
        many = _IRREGULAR[head]
    elif head.endswith(("s", "x", "ch", "sh")):
        many = head + "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        many = head[:-1] + "ies"
    else:
        many = head + "s"
    return name[:start] + many + name[start + len(head) :]


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
