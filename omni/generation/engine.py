"""The engine: many requests in steps. Text of any requests shares one context pass, blocks of any sizes one refine
pass.

    add(prompt) -> id      a request joins at any time
    step()  -> events      at most one context pass (prompts in parts, decoded ids, verified drafts, finished blocks,
                           guidance branches) and one refine pass (blocks, each at its own (t, s), with its branches)
    cancel(id)             a request leaves at any time; its pages are free at once

Each request is a generator (generation.turn). A step collects what the generators wait for, computes it for all of them
without padding (generation.steps), and sends the results back. Requests in text and requests that refine do not wait
for one another; where blocks exceed the budget, those go first that have waited longest. A request that fails ends
alone. `generate`, `stream` and `generate_batch` are short loops over `step`.

Histories of finished requests are kept for prompts that begin alike, and the latents of pictures for later turns, both
bounded (generation.prefixes). So equal bytes for equal seeds hold for a fresh engine; float32 results after a kept
history may differ in the last bits.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from omni.document import Document, Text
from omni.generation.context import append_of
from omni.generation.denoise import require_effect
from omni.generation.events import Event, Failed, Part, Stop
from omni.generation.grammar import Grammar
from omni.generation.options import GenerationOptions, check_defaults
from omni.generation.prefixes import Latents, Prefixes, without_first
from omni.generation.reply import Reply, part_of
from omni.generation.request import Request
from omni.generation.runtime import Runtime
from omni.generation.steps import Active, Steps
from omni.generation.turn import begin, turn
from omni.model import Omni
from omni.nn.native_step import CompiledStep
from omni.text.chat import messages_to_document
from omni.version import VERSION


class Engine:
    """Generation with one model.

    compile: decode text as native code on the CPU (see nn.native_step), in float32 or bfloat16. Needs a C++ compiler,
    which takes a few seconds at the first use on a machine; copies the weights, anew when they change. ValueError where
    this is impossible.
    allow_paths: whether chat messages may name files of this machine. A server reads untrusted messages and passes
    False; see omni.text.chat.messages_to_document.
    budget: positions of a context pass beyond short reads, and of a refine pass, where several requests run: a long
    prompt is read in parts, so that text keeps flowing. max_running: requests that share passes; others wait.
    max_positions: of the cache, all requests together. kept_positions: of histories that are kept for later prompts.
    """

    def __init__(
        self, model: Omni, compile: bool = False, allow_paths: bool = True, *, budget: int = 512,
        max_running: int = 256, max_positions: int = 1 << 22, kept_positions: int = 1 << 13,
    ) -> None:  # fmt: skip
        if model.tokenizer is None:
            raise ValueError(
                "generation needs a tokenizer; load the model with omni.from_pretrained or set model.tokenizer"
            )
        least = {"budget": 1, "max_running": 1, "max_positions": 1, "kept_positions": 0}
        given = dict(zip(least, (budget, max_running, max_positions, kept_positions), strict=True))
        if wrong := [name for name, value in given.items() if value < least[name]]:
            raise ValueError(f"{wrong[0]} = {given[wrong[0]]} of an engine: give at least {least[wrong[0]]}")
        self.model, self.allow_paths, self.max_running = model, allow_paths, max_running
        self.tokenizer, self.control = model.tokenizer, model.tokenizer.control
        spec, device = None if model.codec is None else model.codec.spec, model.token.embedding.weight.device
        encoder = None if model.encoder is None else model.encoder.spec
        self.grammar = Grammar(model.tokenizer, model.config, spec, device, encoder)
        self.pool = model.transformer.new_pool(max_positions)
        self.prefixes, self.latents = Prefixes(kept_positions), Latents(kept_positions)
        prefixes = weakref.ref(self.prefixes)  # no cycle: a lost engine gives its memory back at once
        self.pool.make_room = lambda: (kept := prefixes()) is not None and kept.make_room()
        native = CompiledStep(model.transformer, model.token.output_weight) if compile else None
        self.runtime = Runtime(model, model.tokenizer, self.grammar, self.pool, self.latents, native)
        self.steps = Steps(self.runtime, budget)
        self._parts = model.codec, model.encoder
        self.prefixes.check(model)
        self._numbers = itertools.count()
        self._waiting: list[Request] = []
        self._running: dict[int, Active] = {}
        self._inboxes: dict[int, deque[Event]] = {}  # of requests whose events a loop of this object reads
        self._outbox: list[tuple[int, Event]] = []  # of other requests, for the next `step`
        self._lock = threading.RLock()

    # ---- requests -------------------------------------------------------------------------------------------------

    def add(self, prompt: Any, options: GenerationOptions | Mapping[str, Any] | None = None, **changes: Any) -> int:
        """Begin a request: a string, chat messages or a Document. Returns its id. ValueError for what cannot be
        fulfilled."""
        return self._add([prompt], [_options(options).changed(changes)])[0].number

    def cancel(self, number: int) -> None:
        """End a request without further events. An id that is not known belongs to a request that has ended."""
        with self._lock:
            self._inboxes.pop(number, None)
            self._waiting = [request for request in self._waiting if request.number != number]
            if active := self._running.pop(number, None):
                active.turn.close()
                active.request.release()

    def step(self) -> list[tuple[int, Event]]:
        """One step for all requests; returns (id, event) of added requests in order, also those of steps that a loop
        made. The last event of a request is Stop or Failed."""
        with self._lock:
            self._step()
            found, self._outbox = self._outbox, []
        return found

    def _step(self) -> None:
        """One step. An interruption inside it (KeyboardInterrupt) fails all requests that run, and is raised."""
        with self._lock:
            try:
                self._admit()
                self.steps.step(list(self._running.values()))
            except BaseException as interruption:
                for active in (one for one in self._running.values() if not one.is_over):
                    active.fail(RuntimeError(f"a step was interrupted by {type(interruption).__name__}"))
                raise
            finally:
                self._deliver()

    def _deliver(self) -> None:
        """Hand out the events of a step; what has ended leaves."""
        for number, active in list(self._running.items()):
            events, active.events = active.events, []
            if active.is_over:
                del self._running[number]
                self._finish(active.request, any(isinstance(event, Failed) for event in events))
            inbox = self._inboxes.get(number)
            if inbox is None:
                self._outbox += [(number, event) for event in events]
            else:
                inbox += events

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not self._running and not self._waiting

    def is_known(self, number: int) -> bool:
        """Whether a request runs or waits."""
        return number in self._running or any(request.number == number for request in self._waiting)

    @property
    def pages_in_use(self) -> int:
        """Pages of requests; those of kept histories do not count."""
        return self.pool.pages_in_use - self.prefixes.pages

    def forget(self) -> None:
        """Release all kept histories and latents."""
        with self._lock:
            self.prefixes.clear()
            self.latents.clear()

    # ---- loops over steps -----------------------------------------------------------------------------------------

    def generate(self, prompt: Any, options: GenerationOptions | None = None, **changes: Any) -> Reply:
        """The whole reply to a string, chat messages or a Document."""
        return self.generate_batch([prompt], _options(options).changed(changes))[0]

    def generate_batch(
        self, prompts: Sequence[Any], options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:  # fmt: skip
        """Replies to many prompts that share passes. One options object for all or one each; `seeds` overrides their
        seeds. The first failure is raised, and ends the others."""
        if isinstance(prompts, str | bytes | Mapping | Document) or not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a list of prompts, got a {type(prompts).__name__}; put it in a list")
        single = options is None or isinstance(options, GenerationOptions | Mapping)
        many = [_options(one) for one in ([options] * len(prompts) if single else options)]  # type: ignore[union-attr]
        if len(many) != len(prompts) or (seeds is not None and len(seeds) != len(prompts)):
            raise ValueError(
                f"{len(prompts)} prompts need as many options and seeds, got {len(many)} and {seeds and len(seeds)}"
            )
        if seeds is not None:
            many = [one.changed({"seed": seed}) for one, seed in zip(many, seeds, strict=True)]
        return self._replies(self._add(prompts, many, inbox=True))

    def answers(self, prompt: Any, num: int, options: GenerationOptions | None = None, **changes: Any) -> list[Reply]:
        """`num` replies to one prompt, which is read once. Their seeds count up from that of the options."""
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise ValueError(f"answers: num = {num!r}; give a whole number of at least 1")
        one = self.resolve(_options(options).changed(changes))
        assert one.seed is not None
        many = [one.changed({"seed": one.seed + n}) for n in range(num)]
        return self._replies(self._add([prompt] * num, many, inbox=True, alike=True))

    def edit(self, reply: Reply, part: int, replacement: Any = None, **changes: Any) -> Reply:
        """A reply with part number `part` replaced (None: left out) and written anew from there. What is before it is
        not read again. replacement: a str, a picture (PIL, array, tensor, bytes, Path), or a part. The options are
        those of the reply, with `changes`. ValueError for a part that the reply does not have."""
        if not isinstance(reply, Reply) or "options" not in reply.record:
            raise ValueError("edit takes a Reply of an engine, with its record of options")
        if isinstance(replacement, Path) and not self.allow_paths:
            raise ValueError(f"{str(replacement)!r} is a path, and this engine takes none (allow_paths=False)")
        if isinstance(part, bool) or not isinstance(part, int) or not 0 <= part <= len(reply.parts):
            raise ValueError(f"part = {part!r} of a reply of {len(reply.parts)} parts; give 0 to {len(reply.parts)}")
        before = [*reply.parts[:part], *([] if replacement is None else [part_of(replacement, reply.parts[:part])])]
        given = Document(reply.document.segments[: len(reply.document.segments) - len(reply.parts)])
        options = GenerationOptions().changed(reply.record["options"]).changed(changes)
        return self._replies(self._add([given], [options], inbox=True, continues=before))[0]

    def stream(self, prompt: Any, options: GenerationOptions | None = None, **changes: Any) -> Iterator[Event]:
        """The events of one reply, in order, as they happen. The last one is Stop. Closing the iterator cancels the
        request."""
        [request] = self._add([prompt], [_options(options).changed(changes)], inbox=True)
        return Stream(self, request.number, self._events(request))

    def _events(self, request: Request) -> Iterator[Event]:
        """The events of one request; steps where there are none. Raises what made it fail."""
        number = request.number
        try:
            while True:
                inbox = self._inboxes.get(number)
                if inbox is None:  # closed by another thread
                    return
                if not inbox:
                    self._step()
                    continue
                event = inbox.popleft()
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Stop):
                    return
        finally:
            self.cancel(number)

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        pending = {request.number for request in requests}
        try:
            while pending:
                self._step()
                for number in list(pending):
                    events, self._inboxes[number] = self._inboxes[number], deque()
                    if failed := [event.error for event in events if isinstance(event, Failed)]:
                        raise failed[0]
                    if any(isinstance(event, Stop) for event in events):
                        pending.remove(number)
        finally:
            for request in requests:
                self.cancel(request.number)
        return [Reply(r.parts, r.document, r.reason, tuple(r.drafts), self.record(r.options)) for r in requests]

    # ---- begin and end --------------------------------------------------------------------------------------------

    def resolve(self, options: GenerationOptions) -> GenerationOptions:
        """`options` with the model's defaults filled in. ValueError names an impossible value."""
        joint = self.model.config.joint
        length = 1 if joint is None else joint.length
        own = check_defaults(self.model.defaults)
        if self.runtime.native is not None:
            own["tokens_per_pass"] = 1  # native code costs less per token than a draft (see train.tools.decoding)
        out = options.resolved({"sampler": self.model.config.sampler, "tokens_per_pass": 1, **own})
        num = out.speculative.tokens_per_pass or 1
        if num > length:
            why = "this model has no joint-token head" if joint is None else f"its joint-token head drafts {length}"
            raise ValueError(f"tokens_per_pass = {num} is too many: {why}; take at most {length}")
        require_effect(out.picture, self.model.block_context)
        if out.lora != "none":
            self.model.transformer.lora(out.lora or "")  # raises for an unknown name
        return out

    def record(self, options: GenerationOptions) -> dict[str, Any]:
        """Options, model and versions of a reply, as JSON values. Equal requests have equal records."""
        return {
            "options": options.flat("json"),
            "model": dict(self.model.origin),
            "versions": {"omni": VERSION, "torch": torch.__version__},
        }

    def _add(
        self, prompts: Sequence[Any], options: Sequence[GenerationOptions], inbox: bool = False, alike: bool = False,
        continues: Sequence[Part] = (),
    ) -> list[Request]:  # fmt: skip
        """Requests that wait for the next step. alike: all have one prompt, which the first reads. continues: the
        beginning of the reply."""
        with self._lock:
            found = [self._begun(prompt, one, continues) for prompt, one in zip(prompts, options, strict=True)]
            for request in found[1:] if alike else ():
                request.like = found[0]
            self._waiting += found
            self._inboxes |= {request.number: deque[Event]() for request in found if inbox}
        return found

    def _begun(self, prompt: Any, options: GenerationOptions, continues: Sequence[Part]) -> Request:
        """A request that is checked and composed. ValueError for what cannot be fulfilled."""
        if (self.model.codec, self.model.encoder) != self._parts:
            self._parts = self.model.codec, self.model.encoder
            self.latents.clear()
        document = prompt
        if not isinstance(prompt, Document):
            document = messages_to_document(prompt, allow_paths=self.allow_paths)
        if not document.segments or all(isinstance(s, Text) and not s.text.strip() for s in document.segments):
            raise ValueError("the prompt is empty; say what you want, for example 'draw a red apple'")
        options = self.resolve(options)
        history = self.model.transformer.new_history(self.pool, None if options.lora == "none" else options.lora)
        request = Request(next(self._numbers), history, options, document.segments, self.tokenizer.stream())
        request.continues = tuple(continues)
        begin(self.runtime, request)
        return request

    def _admit(self) -> None:
        """Waiting requests run, in their order, while there is room."""
        if self._waiting and self.prefixes.check(self.model) and self.runtime.native is not None:
            self.runtime.native = CompiledStep(self.model.transformer, self.model.token.output_weight)
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            leader = request.like
            reads = leader is not None and (leader.number in self._running or leader in waiting)
            if len(self._running) >= self.max_running or (leader and reads and not leader.has_read_prompt):
                self._waiting.append(request)
                continue
            request.epoch = self.prefixes.epoch
            self._share(request)
            active = self._running[request.number] = Active(request, turn(self.runtime, request))
            with torch.inference_mode():
                active.resume()

    def _share(self, request: Request) -> None:
        """Begin with the longest history that is kept, or that of the request with the same prompt."""
        whole = append_of(request.history, request.pending, self.control.pad)
        others = [] if request.like is None else [request.like.history]
        found = self.prefixes.find(whole, others)
        if found is not None:
            request.history = found
            request.pending = without_first(request.pending, found.length)

    def _finish(self, request: Request, failed: bool) -> None:
        self.prefixes.check(self.model)
        if failed or request.epoch != self.prefixes.epoch:  # the weights changed while it ran
            request.release()
            return
        self.prefixes.keep(request.history)
        for branch in request.branches.values():
            self.prefixes.keep(branch)


class Stream(Iterator[Event]):
    """The events of one request. `close`, or losing the last reference, cancels it, also before the first event."""

    def __init__(self, engine: Engine, number: int, events: Iterator[Event]) -> None:
        self._engine, self._number, self._events = engine, number, events

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        self._events = iter(())
        self._engine.cancel(self._number)

    def __del__(self) -> None:
        self.close()


def _options(options: GenerationOptions | Mapping[str, Any] | None) -> GenerationOptions:
    if options is None:
        return GenerationOptions()
    if isinstance(options, Mapping):
        return GenerationOptions().changed(options)
    if not isinstance(options, GenerationOptions):
        raise ValueError(f"options = {options!r}: give a GenerationOptions or a table of options")
    return options
