"""Foreign words in templates, so that a model does not memorise the few training phrasings.

A foreign word is inserted into a template or replaces one of its words, never a filled-in value. Foreign words are
made-up words, fillers that do not change the meaning, and words of other templates, so that no such word identifies a
kind ("side by side" is a row of three; "on the right side" is not). Words that decide the request (relations, edits,
colours) are never replaced.
"""

from __future__ import annotations

import random
from functools import cache

from omni.data.emoji_world.phrases import TEMPLATES, template_numbers

ONSETS = "b br c ch d dr f fl g gr h j k l m n p pl qu r s sh sk st t tr v w z".split()
VOWELS = "a e i o u ai ea oo ou".split()
CODAS = ("", "", "b", "d", "g", "ck", "l", "m", "n", "nd", "p", "r", "rt", "s", "st", "t", "x")
# Words that change no meaning. Sampled by index, as the lists above: any change changes the corpus.
FILLERS = (
    "again also another anyway certainly clearly cute directly even fine friendly gladly good hey"
    " honestly indeed just kind kindly later likely lovely maybe nice nicely now often ok once only perhaps pretty"
    " promptly quick quickly rather real really simple simply so soon still sure surely there today together"
    " truly very well"
).split()
# Words that decide a request: never replaced.
DECIDING = (
    "above add alike anywhere background below bottom change delete describe draw drop emoji english exactly"
    " first instead left make middle move name nothing replace remove right rows shift swap switch take then"
    " translate turn under with without"
).split()
# Beginnings of the kinds of templates in which no word is replaced.
NEVER_REPLACED = (
    *("scene.", "edit.", "background", "open.background", "open.anywhere"),
    *("series", "text.rewrite", "video"),
)
MIN_WORDS = 3  # of its own, for a replacement: a greeting of one word would lose its meaning


@cache
def borrowed_words() -> tuple[str, ...]:
    """Words of at least four letters in the English training templates, without those of DECIDING."""
    kinds = [k for k in TEMPLATES if not k.startswith(("name.", "edit.", "open.", "video"))]
    texts = (TEMPLATES[k][n] for k in kinds for n in template_numbers(k, "train"))
    words = {word for text in texts for word in text.split() if word.isalpha() and word.islower() and len(word) > 3}
    return tuple(sorted(words.difference(DECIDING)))


def foreign_word(rng: random.Random) -> str:
    """A made-up word of one to three syllables, a filler, or a word of another template."""
    chance = rng.random()
    if chance < 0.6:
        return rng.choice(FILLERS if chance < 0.35 else borrowed_words())
    syllables = rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)


def with_foreign_words(template: str, kind: str, rng: random.Random) -> str:
    """The template of a kind with one word inserted or, in half of the allowed cases, replaced. Braces stay."""
    words = template.split(" ")
    own = [i for i, word in enumerate(words) if word.isalpha() and word.lower() not in DECIDING]
    if len(own) >= MIN_WORDS and not kind.startswith(NEVER_REPLACED) and rng.random() < 0.5:
        index = rng.choice(own)
        new = words[index]
        while new == words[index]:
            new = foreign_word(rng)
        words[index] = new
    else:
        words.insert(rng.randrange(len(words)), foreign_word(rng))  # not at the end, after a "?"
    return " ".join(words)
