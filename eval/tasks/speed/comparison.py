"""Parts of all speed tasks: sizes, models with random weights, the machine as text, times of alternating runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from eval.metrics.timing import alternate
from eval.peers import require
from eval.task import Context, Measure, TaskOptions
from omni.codecs import PixelCodec, PixelConfig
from omni.document import Document, Role, Text
from omni.heads import FlowHeadConfig
from omni.model import Omni, OmniConfig
from omni.nn.precision import fast_bf16
from omni.nn.transformer import TransformerConfig
from omni.sequence.layout import TokenSpan
from omni.text.bpe import BPETokenizer


class Size(NamedTuple):
    """Sizes of a transformer. hidden: width of the MLP."""

    width: int
    depth: int
    heads: int
    hidden: int


SIZES = {"tiny": Size(64, 2, 1, 128), "8m": Size(256, 8, 4, 704), "90m": Size(768, 12, 12, 2048)}
PATCH = 4
CHANNELS = PATCH * PATCH * 3
GRID = (8, 8)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eager", "compiled")


class SpeedOptions(TaskOptions):
    """repeats: alternating runs of each library; the median counts. compiled: measure the compiled rows, with minutes
    of compiling; None: unless quick. slow_bf16: measure bfloat16 also where the machine computes it slowly. quick: tiny
    models, one run, both dtypes: checks that everything runs; its figures have no meaning."""

    repeats: int = Field(default=7, ge=1)
    vocab_size: int = Field(default=4096, ge=512)
    compiled: bool | None = None
    slow_bf16: bool = False
    quick: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        """ "eager", and "compiled" where it is measured."""
        compiled = not self.quick if self.compiled is None else self.compiled
        return MODES if compiled else MODES[:1]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The names of the dtypes that are measured on this machine."""
        return tuple(DTYPES) if self.quick or self.slow_bf16 or fast_bf16() else ("float32",)

    @property
    def runs(self) -> int:
        """Alternating runs of each library."""
        return 1 if self.quick else self.repeats


def build_omni(context: Context, size: str, vocab_size: int, pictures: bool = True, bf16_values: bool = False) -> Omni:
    """A model of a size in SIZES with random weights, a byte tokenizer and the exact codec (64 latents for 32x32).

    bf16_values: float32 weights with values that are exact in bfloat16, as in a published checkpoint."""
    width, depth, heads, hidden = SIZES[size]
    transformer = TransformerConfig(
        width=width, depth=depth, num_heads=heads, num_kv_heads=heads, head_dim=64, mlp_width=hidden
    )
    config = OmniConfig(transformer=transformer, flow=FlowHeadConfig(channels=CHANNELS), vocab_size=vocab_size)
    model = Omni(config, context.key("speed", size))
    if bf16_values:
        model = model.to(torch.bfloat16).to(torch.float32)
    model.tokenizer = BPETokenizer.train(["speed"], 256)
    model.codec = PixelCodec(PixelConfig(patch=PATCH)) if pictures else None
    return model


def prompt_of(num_bytes: int) -> str:
    """A prompt of exactly this many bytes."""
    return ("sixteen bytes ok" * -(-num_bytes // 16))[:num_bytes]


def num_prompt_ids(model: Omni, prompt: str) -> int:
    """Number of ids that the engine prefills for a prompt, with control ids; the other library gets as many."""
    spans = model.spans(Document((Text(prompt, Role.USER),)), generation_prompt=True)
    return sum(len(span.ids) for span in spans if isinstance(span, TokenSpan))


def machine(*packages: str) -> str:
    """Versions, capabilities of the processor, threads. Raises ValueError where a package is missing."""
    versions = ", ".join(f"{package} {require(package)}" for package in ("torch", *packages))
    bf16 = "fast" if fast_bf16() else "slow"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{versions}; CPU with {capability}, bfloat16 {bf16}; {torch.get_num_threads()} thread(s)"


def notes_of(options: SpeedOptions, *notes: str) -> list[str]:
    """The notes, and what bfloat16 rows mean on this machine."""
    if "bf16" in options.dtypes and not fast_bf16():
        return [*notes, "this machine computes bfloat16 slowly: its bfloat16 rows do not transfer to other machines"]
    if "bf16" not in options.dtypes:
        return [*notes, "this machine computes bfloat16 slowly: rows in it are not measured (nan); slow_bf16=true does"]
    return list(notes)


@dataclass(frozen=True)
class Times:
    """Seconds of alternating runs, by name; nan without a run. `conditions` end every row's note."""

    seconds: Mapping[str, Sequence[float]]
    conditions: str

    @classmethod
    def of(cls, runs: Mapping[str, Callable[[], Any]], repeats: int, conditions: str, warmup: int = 1) -> Times:
        """Time the runs, alternating."""
        return cls(alternate(runs, repeats, warmup), conditions)

    def median(self, name: str) -> float:
        """Median seconds; NaN without a run."""
        return statistics.median(self.seconds[name]) if name in self.seconds else math.nan

    def fastest(self, names: Sequence[str]) -> str:
        """The fastest of the runs; the first name where none was run."""
        return min((name for name in names if name in self.seconds), key=self.median, default=names[0])

    def spread(self, name: str) -> str:
        """As text: median, minimum and maximum."""
        if name not in self.seconds:
            return f"{name}: not measured"
        low, high = min(self.seconds[name]), max(self.seconds[name])
        return f"{name} {self.median(name) * 1e3:.1f} ms ({low * 1e3:.1f}-{high * 1e3:.1f})"

    def note(self, *names: str) -> str:
        """The spread of the named runs, their number and the conditions."""
        runs = max((len(self.seconds[name]) for name in names if name in self.seconds), default=0)
        return f"{', '.join(map(self.spread, names))}; {runs} run(s); {self.conditions}"

    def ratio(self, row: str, theirs: Sequence[str], ours: str) -> Measure:
        """Time of the fastest of theirs over ours; nan where ours or the first of theirs was not run."""
        base = self.fastest(theirs) if theirs[0] in self.seconds else theirs[0]
        return Measure(row, self.median(base) / self.median(ours), "x", self.note(base, ours))

    def rate(self, row: str, name: str, tokens: int) -> Measure:
        """Tokens per second of a run, as a report row."""
        return Measure(row, tokens / self.median(name), "tokens/s", self.note(name))

    def milliseconds(self, row: str, name: str) -> Measure:
        """Median milliseconds of a run, as a report row."""
        return Measure(row, self.median(name) * 1e3, "ms", self.note(name))


def first_run(run: Callable[[], Any]) -> str:
    """Run once a function that compiles at its first call. Returns the error in one line, or an empty text."""
    try:
        run()
    except RuntimeError as error:  # of torch._dynamo and torch._inductor too
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def ids_like(rows: int, length: int) -> Tensor:
    """(rows, length) int64: the same ids in every row."""
    return (torch.arange(length) % 256).expand(rows, length).contiguous()
