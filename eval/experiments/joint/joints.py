"""Joint distributions with known probabilities, to measure joint-token heads before they train on text.

A `Table` lists its support: entropies, lower bounds (lower_bounds.py) and total variation are sums, not estimates.
A `Chain` (a Markov chain over many words) has known transitions and any number of strings. Names are a kind and, for
most, a number: "poker_s6", "parity8", "permutation5"; see the end of this file.

Legend: B rows, K tokens, V ids, N strings of the support, M prefixes.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import permutations, product

import torch
from torch import Tensor

from omni.registry import Registry
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

MOST_STRINGS = 1 << 18  # in a listed support


@dataclass(frozen=True, eq=False)
class Joint(ABC):
    """A distribution of K = `length` ids out of V = `vocab_size`. `words`: the texts of the ids, if any."""

    name: str
    vocab_size: int
    length: int
    words: tuple[str, ...] = ()

    @abstractmethod
    def draw(self, key: Key, num: int) -> Tensor:
        """(num, K) int64. Depends on the key alone."""

    @abstractmethod
    def conditionals(self, ids: Tensor) -> Tensor:
        """(B, K, V) float64 log p(. | x_<k) for ids (B, K): the autoregressive oracle. After a prefix of probability 0
        it is uniform, so that draft verification can evaluate it."""

    @abstractmethod
    def entropy(self) -> float:
        """Entropy of whole strings, in nats."""

    @abstractmethod
    def log_prob(self, ids: Tensor) -> Tensor:
        """(B,) float64 of ids (B, K); -inf outside the support, also for ids of V and above."""


def codes(ids: Tensor, base: int) -> Tensor:
    """(...) int64: rows of ids (..., m) as numbers in base `base`; ValueError where they exceed 63 bits."""
    m = ids.shape[-1]
    if m * math.log2(max(base, 2)) > 62:
        raise ValueError(f"{m} ids of {base} do not fit a number of 63 bits; use a shorter block")
    found = ids.new_zeros(ids.shape[:-1])
    for k in range(m):
        found = found * base + ids[..., k]
    return found


@dataclass(frozen=True, eq=False)
class Table(Joint):
    """A listed distribution: `ids` (N, K) int64, distinct, in the order of their codes; `p` (N,) float64, above 0 and
    of sum 1. Build one with `table`."""

    ids: Tensor = torch.empty(0)
    p: Tensor = torch.empty(0)

    @cached_property
    def codes(self) -> Tensor:
        """(N,) int64: the strings as numbers, ascending."""
        return codes(self.ids, self.vocab_size)

    @cached_property
    def cumulative(self) -> Tensor:
        """(N,) float64: cumulative probabilities."""
        return self.p.cumsum(0)

    @cached_property
    def prefixes(self) -> list[tuple[Tensor, Tensor]]:
        """For k = 0 .. K - 1: codes (M,) of the prefixes of k ids, ascending, and the masses (M, V) of the next id."""
        found = []
        for k in range(self.length):
            known, place = codes(self.ids[:, :k], self.vocab_size).unique(return_inverse=True)
            mass = torch.zeros(len(known) * self.vocab_size, dtype=torch.float64)
            mass.index_add_(0, place * self.vocab_size + self.ids[:, k], self.p)
            found.append((known, mass.view(len(known), self.vocab_size)))
        return found

    def draw(self, key: Key, num: int) -> Tensor:
        u = key.fold("draw", self.name).uniform((num,), torch.float64) * self.cumulative[-1]
        return self.ids[torch.searchsorted(self.cumulative, u, right=True).clamp(max=len(self.p) - 1)]

    def find(self, ids: Tensor) -> Tensor:
        """(B,) int64: indices of ids (B, K) in the support; -1 for strings that are not in it."""
        inside = ((ids >= 0) & (ids < self.vocab_size)).all(-1)
        wanted = codes(torch.where(inside.unsqueeze(-1), ids, 0), self.vocab_size)
        at = torch.searchsorted(self.codes, wanted).clamp(max=len(self.codes) - 1)
        return torch.where(inside & (self.codes[at] == wanted), at, -1)

    def conditionals(self, ids: Tensor) -> Tensor:
        uniform = torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)
        out = []
        for k, (known, mass) in enumerate(self.prefixes):
            wanted = codes(ids[:, :k], self.vocab_size)
            at = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
            probs = mass[at] / mass[at].sum(-1, keepdim=True)
            out.append(torch.where((known[at] == wanted).unsqueeze(-1), probs, uniform))
        return torch.stack(out, 1).log()

    def entropy(self) -> float:
        return float(-(self.p * self.p.log()).sum())

    def log_prob(self, ids: Tensor) -> Tensor:
        at = self.find(ids)
        return torch.where(at >= 0, self.p[at.clamp(min=0)].log(), -math.inf)

    def marginals(self) -> Tensor:
        """(K, V) float64."""
        found = torch.zeros(self.length, self.vocab_size, dtype=torch.float64)
        for k in range(self.length):
            found[k].index_add_(0, self.ids[:, k], self.p)
        return found

    def full(self) -> Tensor:
        """(V,) * K float64: all probabilities, with zeros."""
        if self.vocab_size**self.length > MOST_STRINGS:
            raise ValueError(f"{self.name}: {self.vocab_size}^{self.length} strings are too many to list")
        probs = torch.zeros(self.vocab_size**self.length, dtype=torch.float64)
        probs[self.codes] = self.p
        return probs.view((self.vocab_size,) * self.length)


def table(name: str, ids: Tensor, vocab_size: int, p: Tensor | None = None, words: Sequence[str] = ()) -> Table:
    """The distribution of strings ids (N, K) with weights p (N,), of any sum; uniform without. Weights of 0 are left
    out; weights of equal strings are added."""
    weights = torch.ones(len(ids)) if p is None else p
    known, place = codes(ids, vocab_size).unique(return_inverse=True)
    mass = torch.zeros(len(known), dtype=torch.float64).index_add_(0, place, weights.double())
    first = torch.full((len(known),), len(ids)).scatter_reduce_(0, place, torch.arange(len(ids)), "amin")
    kept = mass > 0
    return Table(name, vocab_size, ids.shape[1], tuple(words), ids[first[kept]], mass[kept] / mass.sum())


@dataclass(frozen=True, eq=False)
class Chain(Joint):
    """A Markov chain: log-probabilities of the first id (V,) and of the next given the last (V, V), float64."""

    first: Tensor = torch.empty(0)
    moves: Tensor = torch.empty(0)

    def draw(self, key: Key, num: int) -> Tensor:
        u = key.fold("draw", self.name).uniform((num, self.length), torch.float64)
        found = [inverse_cdf_sample(self.first.expand(num, -1), u[:, 0])]
        for k in range(1, self.length):
            found.append(inverse_cdf_sample(self.moves[found[-1]], u[:, k]))
        return torch.stack(found, 1)

    def conditionals(self, ids: Tensor) -> Tensor:
        start = self.first.expand(len(ids), 1, -1)
        return torch.cat([start, self.moves[ids[:, :-1]]], 1)

    def log_prob(self, ids: Tensor) -> Tensor:
        inside, ids = (ids < self.vocab_size).all(-1), ids.clamp(max=self.vocab_size - 1)
        found = self.first[ids[:, 0]] + self.moves[ids[:, :-1], ids[:, 1:]].sum(-1)
        return torch.where(inside, found, -math.inf)

    def entropy(self) -> float:
        probs, total = self.first.exp(), float(_entropy(self.first))
        for _ in range(self.length - 1):
            total += float(probs @ _entropy(self.moves))
            probs = probs @ self.moves.exp()
        return total

    def listed(self) -> Table:
        """The same as a table. ValueError where there are too many strings."""
        if self.vocab_size**self.length > MOST_STRINGS:
            raise ValueError(f"{self.name}: {self.vocab_size}^{self.length} strings are too many to list")
        ids = _all_strings(self.vocab_size, self.length)
        return table(self.name, ids, self.vocab_size, self.log_prob(ids).exp(), self.words)


def _entropy(log_p: Tensor) -> Tensor:
    """Entropy of distributions (..., V), in nats."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def _all_strings(vocab_size: int, length: int) -> Tensor:
    """(V^K, K) int64, in the order of their codes."""
    return torch.tensor(list(product(range(vocab_size), repeat=length)))


# ---- kinds ---------------------------------------------------------------------------------------------------------

JOINTS: Registry[Callable[[str], Joint]] = Registry("joint")
SIZED_JOINTS: Registry[Callable[[str, int], Joint]] = Registry("joint with a number")


def build_joint(name: str) -> Joint:
    """The joint called `name`: "permutation5" is permutation(5). ValueError with the nearest known kind."""
    match = re.fullmatch(r"(.*\D)(\d+)", name)
    if name not in JOINTS.names() and match is not None:
        return SIZED_JOINTS.get(match[1])(name, int(match[2]))
    if name in SIZED_JOINTS.names():
        raise ValueError(f"joint {name!r} needs a number, as in {name + '4'!r}")
    return JOINTS.get(name)(name)


WORDS = tuple("high card one pair two full house straight flush royal".split())
HANDS = {  # deals of each kind, of five cards of fifty-two
    "high card": 1_302_540, "one pair": 1_098_240, "two pair": 123_552, "full house": 3_744,
    "straight flush": 36, "royal flush": 4,
}  # fmt: skip


def poker(name: str, without: Sequence[str] = (), dealt: bool = False) -> Table:
    """Two-word names of poker hands (arXiv 2503.07154), uniform or with the frequencies of deals. S6 has all six; S5
    lacks "one pair"; S4 also lacks "royal flush", so that no word occurs twice in one place."""
    hands = [hand for hand in HANDS if hand not in without]
    ids = torch.tensor([[WORDS.index(word) for word in hand.split()] for hand in hands])
    counts = torch.tensor([HANDS[hand] if dealt else 1 for hand in hands])
    return table(name, ids, len(WORDS), counts, WORDS)


def equal_pairs(name: str, vocab_size: int, num_pairs: int = 2) -> Table:
    """x1 = x2, x3 = x4, ...; pairs are uniform and independent."""
    return table(name, _all_strings(vocab_size, num_pairs).repeat_interleave(2, 1), vocab_size)


def parity(name: str, length: int) -> Table:
    """Strings of bits with an even number of ones: any K - 1 of them are independent."""
    bits = _all_strings(2, length)
    return table(name, bits[bits.sum(-1) % 2 == 0], 2)


def permutation(name: str, length: int) -> Table:
    """All orders of K = V ids, equally likely."""
    return table(name, torch.tensor(list(permutations(range(length)))), length)


def sticky(name: str, length: int, vocab_size: int = 4, stay: float = 0.7) -> Chain:
    """A chain that keeps its id with probability `stay`, else moves to any other id; the start is uniform."""
    moves = torch.full((vocab_size, vocab_size), (1 - stay) / (vocab_size - 1), dtype=torch.float64)
    first = torch.full((vocab_size,), -math.log(vocab_size), dtype=torch.float64)
    return Chain(name, vocab_size, length, first=first, moves=moves.fill_diagonal_(stay).log())


def bigram(name: str, length: int, vocab_size: int = 256, spread: float = 2.0) -> Chain:
    """A language whose next word depends on the last by a fixed random table, with normal logits of deviation `spread`:
    the same for every length."""
    key = Key(0).fold("bigram language", vocab_size)
    moves = key.fold("moves").normal((vocab_size, vocab_size), torch.float64) * spread
    first = key.fold("first").normal((vocab_size,), torch.float64) * spread
    return Chain(name, vocab_size, length, first=first.log_softmax(-1), moves=moves.log_softmax(-1))


Permutation = tuple[int, ...]  # i goes to its i-th number


def symmetric_group(degree: int) -> list[Permutation]:
    """All permutations, the identity first; the product of a and b is a after b."""
    return list(permutations(range(degree)))


def compose(a: Permutation, b: Permutation) -> Permutation:
    """a after b."""
    return tuple(a[i] for i in b)


def products(words: Tensor, elements: Sequence[Permutation]) -> Tensor:
    """(N,) int64: the number of x1 x2 .. xm for words (N, m) of numbers of elements."""
    number = {element: n for n, element in enumerate(elements)}
    times = torch.tensor([[number[compose(a, b)] for b in elements] for a in elements])
    found = words[:, 0]
    for k in range(1, words.shape[1]):
        found = times[found, words[:, k]]
    return found


def word_problem(name: str, length: int, degree: int = 3) -> Table:
    """x_K = x_1 x_2 .. x_(K-1) in the symmetric group, whose elements are the ids: a deep, non-commutative product."""
    elements = symmetric_group(degree)
    free = _all_strings(len(elements), length - 1)
    return table(name, torch.cat([free, products(free, elements).unsqueeze(1)], 1), len(elements))


def group_words(name: str, length: int, degree: int = 3) -> Table:
    """Words of transpositions of neighbours, and of the identity, whose product is the identity; equally likely."""
    elements = symmetric_group(degree)
    letters = [elements[0]]
    for i in range(degree - 1):
        swapped = list(elements[0])
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        letters.append(tuple(swapped))
    number = torch.tensor([elements.index(letter) for letter in letters])
    words = _all_strings(len(letters), length)
    return table(name, words[products(number[words], elements) == 0], len(letters))


def sudoku(name: str) -> Table:
    """The 288 grids of 4 x 4, row by row; equally likely."""
    rows = list(permutations(range(4)))

    def fits(grid: Sequence[Permutation]) -> bool:
        columns = all(len(set(column)) == len(grid) for column in zip(*grid, strict=True))
        pairs = zip(grid[::2], grid[1::2], strict=False)
        return columns and all(len({*a[i : i + 2], *b[i : i + 2]}) == 4 for a, b in pairs for i in (0, 2))

    grids: list[tuple[Permutation, ...]] = [()]
    for _ in range(4):
        grids = [(*grid, row) for grid in grids for row in rows if fits((*grid, row))]
    return table(name, torch.tensor([[id for row in grid for id in row] for grid in grids]), 4)


for _name, _dealt in (("poker_s{}", False), ("poker_s{}_dealt", True)):
    JOINTS.register(_name.format(4))(partial(poker, without=("one pair", "royal flush"), dealt=_dealt))
    JOINTS.register(_name.format(5))(partial(poker, without=("one pair",), dealt=_dealt))
    JOINTS.register(_name.format(6))(partial(poker, dealt=_dealt))
JOINTS.register("sudoku")(sudoku)
SIZED_JOINTS.register("equal_pairs")(equal_pairs)  # the number: V
SIZED_JOINTS.register("parity")(parity)  # K, here and below
SIZED_JOINTS.register("permutation")(permutation)
SIZED_JOINTS.register("sticky")(lambda name, length: sticky(name, length).listed())  # V = 4, stays with 0.7
SIZED_JOINTS.register("very_sticky")(lambda name, length: sticky(name, length, stay=0.9).listed())
SIZED_JOINTS.register("word_problem")(word_problem)  # in S3
SIZED_JOINTS.register("group_words")(group_words)  # in S3
SIZED_JOINTS.register("bigram")(lambda name, length: bigram(name, length, 16).listed())  # V = 16
SIZED_JOINTS.register("large_bigram")(bigram)  # V = 256: a chain, never listed
