"""The passes of a step: the work of many turns, computed together, and the results sent back.

    context pass    Read: parts of prompts, decoded ids, drafts to verify, finished blocks
                    Propose: drafts of the joint-token head
    refine pass     Evaluate: one evaluation of F for every block, with its guidance branches beside it
    codec           Decode: pictures of one size in one call

Short reads come first; longer ones take what is left of the budget, in the order of their requests, and go on in the
next step. So text keeps flowing while a long prompt is read. A block of latents is never cut.

Legend: N positions of a pass, C channels, W width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omni.errors import NotFiniteError
from omni.generation.context import Append, group_runs, run_context
from omni.generation.events import Drafted, Event, Failed
from omni.generation.request import Request
from omni.generation.runtime import Runtime
from omni.generation.speculative import draft_together
from omni.generation.work import SHORT, Decode, Evaluate, Propose, Read, Scores, Turn, Work, item_tensors
from omni.nn.cache import History, PoolFullError
from omni.samplers.token import masked_scores

ALONE = 16384  # positions of one pass where a single request runs


@dataclass(eq=False)
class Active:
    """A running request: its turn, what it waits for, and the hidden states of the parts of a Read that are done."""

    request: Request
    turn: Turn
    work: Work | None = None
    done: list[list[Tensor]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    is_over: bool = False
    evaluated: int = 0  # the number of its last evaluation

    def resume(self, result: Any = None) -> None:
        """Send the result of the work; collect events up to the next work, or to the end."""
        self.work, self.done = None, []
        try:
            item = self.turn.send(result)
            while not isinstance(item, Work):
                self.events.append(item)
                item = next(self.turn)
            self.work = item
        except StopIteration:
            self.is_over = True
        except Exception as error:  # this request ends, the others go on
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.turn.close()
        self.request.release()
        self.work, self.is_over = None, True
        self.events.append(Failed(error))


Parts = list[tuple[Active, Append]]  # parts of Reads, of one context pass


@dataclass
class Steps:
    """budget: positions of a context pass beyond short reads, and of a refine pass."""

    runtime: Runtime
    budget: int
    evaluations: int = 0  # of blocks so far
    computed: int = 0  # positions of all passes so far
    wasted: int = 0  # those of them whose output, keys and values are not used: of rejected drafts

    @torch.inference_mode()
    def step(self, active: Sequence[Active]) -> None:
        """One context pass and one refine pass for everything that waits."""
        parts = self._parts([one for one in active if isinstance(one.work, Read)], alone=len(active) == 1)
        parts = self._propose([one for one in active if isinstance(one.work, Propose)], parts)
        if parts:
            self._together([one for one, _ in parts], lambda: self._done(parts, self._pass(parts)))
        self._evaluate([one for one in active if isinstance(one.work, Evaluate)])
        self._decode([one for one in active if isinstance(one.work, Decode)])
        for event in (event for one in active for event in one.events if isinstance(event, Drafted)):
            self.wasted += (event.drafted - event.accepted) * (2 if event.passes > 1 else 1)

    # ---- the context pass -----------------------------------------------------------------------------------------

    def _parts(self, active: Sequence[Active], alone: bool) -> Parts:
        """What a context pass reads of each Read, within the budget."""
        parts: Parts = []
        left = ALONE if alone else self.budget
        for one in sorted(active, key=lambda one: _rest(one) > SHORT):
            assert isinstance(one.work, Read)
            for n, append in enumerate(one.work.appends):
                start = sum(map(len, one.done[n])) if n < len(one.done) else 0
                if start == len(append):
                    continue
                rest = append.part(start, len(append)) if start else append
                most = len(rest) if len(rest) <= SHORT else left
                if most <= 0:
                    break
                stop = rest.legal_stop(most)
                if not _has_room(one, [(append.history, stop)]):
                    break
                parts.append((one, rest if stop == len(rest) else rest.part(0, stop)))
                left -= stop if len(rest) > SHORT else 0
                if stop < len(rest):
                    break
        return [(one, part) for one, part in parts if not one.is_over]

    def _pass(self, parts: Parts) -> list[Tensor]:
        """Hidden states (n, W) of each part."""
        appends = [part for _, part in parts]
        self.computed += sum(map(len, appends))
        return run_context(self.runtime.model, appends, self.runtime.control.pad, self.runtime.native)[0]

    def _done(self, parts: Parts, hidden: Sequence[Tensor]) -> None:
        """Turns go on whose Read is done."""
        for (one, part), states in zip(parts, hidden, strict=True):
            assert isinstance(one.work, Read)
            number = next(n for n, append in enumerate(one.work.appends) if append.history is part.history)
            while len(one.done) <= number:
                one.done.append([])
            one.done[number].append(states)
        ready = [one for one, _ in dict.fromkeys((one, None) for one, _ in parts) if _rest(one) == 0]
        wants = [one for one in ready if isinstance(one.work, Read) and one.work.mask is not None]
        scores = dict(zip(map(id, wants), self._scores(wants), strict=True))
        for one in ready:
            result = scores.get(id(one))
            if isinstance(result, Exception):
                one.fail(result)
            else:
                one.resume([torch.cat(states) for states in one.done] if result is None else result)

    def _scores(self, active: Sequence[Active]) -> list[Scores | NotFiniteError]:
        """The scores after the last position of each Read, or what is wrong with them."""
        if not active:
            return []
        logits = self.runtime.logits(torch.stack([one.done[-1][-1][-1] for one in active]))
        works = [one.work for one in active if isinstance(one.work, Read)]
        masks = [work.mask for work in works if work.mask is not None]
        same = all(mask is masks[0] for mask in masks)
        try:
            found = masked_scores(logits, masks[0] if same else torch.stack(masks), [work.number for work in works])
            return list(map(Scores, found[0], found[1].tolist()))
        except NotFiniteError as error:
            if len(active) == 1:
                return [error]
            return [self._scores([one])[0] for one in active]

    def _propose(self, active: Sequence[Active], parts: Parts) -> Parts:
        """Drafts, together for all requests that agree in `Propose.kind`. The first pass computes the parts too;
        returns those that no pass has computed."""
        groups: dict[tuple[bool, bool], list[Active]] = {}
        for one in active:
            assert isinstance(one.work, Propose)
            append, num = one.work.append, one.work.request.options.speculative.tokens_per_pass or 1
            if append is None or _has_room(one, [(append.history, len(append) + num)]):
                groups.setdefault(one.work.kind, []).append(one)
        for (needs_no_pass, _), group in groups.items():
            beside, parts = ([], parts) if needs_no_pass or self.runtime.native is not None else (parts, [])
            together = [*group, *(one for one, _ in beside)]
            self._together(together, lambda group=group, beside=beside: self._draft(group, beside))
        return parts

    def _draft(self, group: Sequence[Active], beside: Parts) -> None:
        works = [one.work for one in group if isinstance(one.work, Propose)]
        self.computed += sum(len(work.append) + work.request.draft_length for work in works if work.append is not None)
        self.computed += sum(len(part) for _, part in beside)
        found, hidden = draft_together(self.runtime, works, [part for _, part in beside])
        for one, result in zip(group, found, strict=True):
            if isinstance(result, Exception):
                one.fail(result)
            else:
                one.resume(result)
        self._done(beside, hidden)

    # ---- the refine pass ------------------------------------------------------------------------------------------

    def _evaluate(self, active: Sequence[Active]) -> None:
        """F of as many blocks as the budget allows, at least one."""
        chosen: list[Active] = []
        total = 0
        for one in sorted(active, key=lambda one: one.evaluated):  # those first that have waited longest
            assert isinstance(one.work, Evaluate)
            if chosen and total + len(one.work) > self.budget:
                break
            if _has_room(one, [(history, one.work.num) for history in one.work.histories]):
                chosen.append(one)
                total += len(one.work)
                self.evaluations += 1
                one.evaluated = self.evaluations
        if chosen:
            self._together(chosen, lambda: self._refine(chosen))

    def _refine(self, active: Sequence[Active]) -> None:
        model, device = self.runtime.model, self.runtime.device
        works = [one.work for one in active if isinstance(one.work, Evaluate)]
        groups = [
            (history, [(block.grid, block.start) for block in work.blocks], work.is_causal)
            for work in works for history in work.histories
        ]  # fmt: skip
        stream, runs = group_runs(groups, device)
        x = torch.cat([block.x for work in works for _ in work.histories for block in work.blocks])[None]
        t, s, beta, item = item_tensors([(work.blocks, work.betas) for work in works], device)
        item = item if len(t) > 1 else None
        self.computed += runs.num
        if model.has_latent_head:
            F = model.known_states(x, t, beta, stream, item, runs)[0]
        else:
            F = model.velocity(x, t, s, beta, stream, item, runs)[0]
        parts = iter(F.split([len(work) for work in works]))
        for one, work in zip(active, works, strict=True):
            one.resume(next(parts).view(len(work.histories), work.num, -1))

    # ---- the codec ------------------------------------------------------------------------------------------------

    def _decode(self, active: Sequence[Active]) -> None:
        codec = self.runtime.model.codec
        assert codec is not None or not active
        groups: dict[object, list[Active]] = {}
        for one in active:
            assert isinstance(one.work, Decode)
            at = id(one) if one.work.is_clip else one.work.blocks[0].shape
            groups.setdefault(at, []).append(one)
        for group in groups.values():
            try:
                pixels = self._pixels(group)
            except Exception:  # one of them may be refused: each alone
                for one in group:
                    self._together([one], lambda one=one: one.resume(self._pixels([one])[0]))
                continue
            for one, picture in zip(group, pixels, strict=True):
                one.resume(picture)

    def _pixels(self, group: Sequence[Active]) -> Sequence[Tensor]:
        """uint8 pixels of each picture, all of one size, or of one clip."""
        codec, works = self.runtime.model.codec, [one.work for one in group if isinstance(one.work, Decode)]
        assert codec is not None
        if works[0].is_clip:
            return [codec.decode_video(works[0].blocks).cpu()]
        return codec.decode(torch.cat([work.blocks[0] for work in works])).cpu().unbind(0)

    # ---- failures -------------------------------------------------------------------------------------------------

    def _together(self, active: Sequence[Active], work: Callable[[], None]) -> None:
        """Do the work of several requests. If it fails, every one whose work is not done fails."""
        waiting = {id(one): one.work for one in active}
        try:
            work()
        except Exception as error:
            for one in active:
                if one.work is waiting[id(one)] and not one.is_over:
                    one.fail(error)


def _has_room(one: Active, needed: Sequence[tuple[History, int]]) -> bool:
    """Reserve positions after histories; where the pool is full, this request alone fails."""
    try:
        for history, num in needed:
            history.reserve(num)
    except PoolFullError as error:
        one.fail(error)
    return not one.is_over


def _rest(one: Active) -> int:
    """Positions of a Read that no pass has computed yet."""
    assert isinstance(one.work, Read)
    return sum(map(len, one.work.appends)) - sum(len(states) for parts in one.done for states in parts)
