"""Histories that are kept for later requests: a prompt that begins like an earlier one is not read again.

Every position of a history has a mark, a number that identifies what made it: an id, or a latent by the digest of its
block (context.marks_of). Two histories of one model with equal marks have equal keys and values. The longest common
prefix is forked, which is free until it is written to.

Only whole blocks are shared: inside a block of latents every position depends on all of it. At least one position is
left to read, because its hidden state gives the next token.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from omni.document import Image, Role, Video
from omni.generation.context import Append
from omni.nn.cache import History
from omni.sequence.features import Blocks
from omni.sequence.layout import Span, TokenSpan, num_context

Media = Image | Video


def common_length(marks: Sequence[int], append: Append) -> int:
    """How many positions of a whole prompt a history with these marks holds: the longest common prefix that cuts no
    block of latents and leaves a position to read."""
    wanted, laid = append.marks, append.laid
    n = min(len(marks), len(wanted) - 1)
    if list(marks[:n]) != wanted[:n]:
        n = next(i for i, (a, b) in enumerate(zip(marks, wanted, strict=False)) if a != b)
    while n > 0 and laid.block[n] == laid.block[n - 1]:
        n -= 1
    return max(n, 0)


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, in a fixed order; in a tenth of the time of `model.parameters()`, whose names and sets
    are not needed here."""
    found, modules = [], [model]
    while modules:
        module = modules.pop()
        found += [parameter for parameter in module._parameters.values() if parameter is not None]
        modules += [child for child in module._modules.values() if child is not None]
    return found


class Prefixes:
    """Finished histories, least recently used first, of at most `max_positions` positions together."""

    def __init__(self, max_positions: int) -> None:
        self.max_positions = max_positions
        self._kept: OrderedDict[int, History] = OrderedDict()
        self._number = 0
        self._weights: list[tuple[int, int]] = []
        self.epoch = 0  # counts the changes of the weights

    @property
    def pages(self) -> int:
        """Pages that kept histories hold, and no request reads."""
        return sum(one.pages_alone for one in self._kept.values())

    def check(self, model: nn.Module) -> bool:
        """Whether weights have been replaced, or changed in place, since the last check; then everything is forgotten.
        Changes of `.data` are not seen. Weights made under inference_mode have no version: nothing is kept of them."""
        parameters = parameters_of(model)
        known = not any(p.is_inference() for p in parameters)
        weights = [(p.data_ptr(), p._version) for p in parameters] if known else []
        if known and weights == self._weights:
            return False
        self.clear()
        self._weights, self.epoch = weights, self.epoch + 1
        return True

    def find(self, whole: Append, others: Sequence[History] = ()) -> History | None:
        """A fork of the history, kept or of `others`, with the longest common prefix, cut to it. whole: the prompt,
        laid out from position 0. Only histories with its LoRA fit."""
        fitting = [one for one in (*others, *self._kept.values()) if one.lora == whole.history.lora]
        found = [(common_length(one.marks, whole), one) for one in fitting]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or not length:
            return None
        for number, one in self._kept.items():
            if one is best:
                self._kept.move_to_end(number)
                break
        fork = best.fork()
        fork.truncate(length, whole.laid.position[length][0], whole.laid.block[length])
        return fork

    def keep(self, history: History) -> None:
        """Take over a history that its request no longer needs; release the oldest beyond the bound, and those that it
        continues."""
        if not 0 < history.length <= self.max_positions:
            history.release()
            return
        for number, other in list(self._kept.items()):
            is_part = other.lora == history.lora and other.length <= history.length
            if is_part and history.marks[: other.length] == other.marks:
                self._kept.pop(number).release()
        history.rest()
        self._number += 1
        self._kept[self._number] = history
        while sum(one.length for one in self._kept.values()) > self.max_positions:
            self._kept.popitem(last=False)[1].release()

    def make_room(self) -> bool:
        """Release the history that was used least recently; False where none is kept."""
        if not self._kept:
            return False
        self._kept.popitem(last=False)[1].release()
        return True

    def clear(self) -> None:
        for one in self._kept.values():
            one.release()
        self._kept.clear()


def without_first(spans: Sequence[Span], num: int) -> list[Span]:
    """The spans without their first `num` positions, which cut no block of latents."""
    out: list[Span] = []
    for span in spans:
        size = num_context(span)
        if num >= size:
            num -= size
            continue
        if isinstance(span, TokenSpan):
            span, num = span.part(num), 0
        out.append(span)
    return out


class Latents:
    """Latents and features of pictures and clips by the digest of their pixels: nothing is encoded twice. In the
    assistant's turns, what the model drew keeps the latents it was drawn with. At most `max_latents`, least recently
    used out first."""

    def __init__(self, max_latents: int) -> None:
        self.max_latents = max_latents
        self._kept: OrderedDict[bytes, Blocks] = OrderedDict()

    def encode(self, media: Sequence[Media], encode: Callable[[list[Media]], list[Blocks]]) -> list[Blocks]:
        """The blocks of each; those that are not kept are encoded in one call."""
        names = [self._name(one) for one in media]
        new = {name: one for name, one in zip(names, media, strict=True) if name not in self._kept}
        made = dict(zip(new, encode(list(new.values())), strict=True)) if new else {}
        found = [made[name] if name in made else self._kept[name] for name in names]
        for name, blocks in zip(names, found, strict=True):
            self._put(name, blocks)
        return found

    def put(self, one: Media, blocks: Blocks) -> None:
        """The latents with which the model drew a picture or clip."""
        self._put(DRAWN + _digest(one), blocks)

    def _name(self, one: Media) -> bytes:
        digest = _digest(one)
        return DRAWN + digest if one.role == Role.ASSISTANT and DRAWN + digest in self._kept else digest

    def _put(self, name: bytes, blocks: Blocks) -> None:
        self._kept[name] = blocks
        self._kept.move_to_end(name)
        while self._kept and sum(map(_count, self._kept.values())) > self.max_latents:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()


DRAWN = b"drawn"


def _count(blocks: Blocks) -> int:
    return sum((one if isinstance(one, Tensor) else one.values)[..., 0].numel() for one in blocks)


def _digest(one: Media) -> bytes:
    pixels = one.pixels if isinstance(one, Image) else one.frames
    data = pixels.contiguous().numpy().tobytes()
    return hashlib.blake2b(repr(tuple(pixels.shape)).encode() + data, digest_size=16).digest()
