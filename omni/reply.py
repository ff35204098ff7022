"""What generation takes and gives: options, parts of a reply, and the ordered stream of events.

Terminal, files, evaluation and any server read this one stream; none of them knows the engine's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image as PILImage
from pydantic import Field, field_validator
from torch import Tensor

from omni.config import Frozen, build, nearest
from omni.document import Document
from omni.samplers import SamplerName, knobs, num_steps, time_grid
from omni.samplers.verification import VERIFICATIONS


class GenerationOptions(Frozen):
    """One request's budget. None means the model's own default (its generation.json).

    steps: jumps per block; each is one evaluation of the network (Heun's: two, but for the last) for each branch of
    guidance. sampler: a name of omni.samplers.SAMPLERS. gamma: how much noise sampler "gamma" adds again, 0 to 1.
    grid: where the jumps end: a name of omni.samplers.GRIDS, or the times themselves, from at most 1 (noise) to 0, in
    which case they say how many steps there are. start_time: the first time, 1 is noise. shift: time-grid warp.
    guidance / image_guidance: weights of text and pictures, 1 is none (see omni.guidance).
    told_guidance: the weight that a network trained with guidance in it is told (its input is 1 / told_guidance), so
    that a guided step is one evaluation; 1 is for a network trained without.
    tokens_per_pass: how many tokens a pass may draft, with a model that has a joint-token head (its default is all that
    the head draws, but in an Engine with compile=True); 1 is plain decoding.
    verify: what becomes of a draft: "coupled" (exactly what plain decoding says with this seed), "rejection", "block"
    (its law), "greedy" (coupled, temperature 0), or "none", which keeps drafts as they are: LOSSY.
    sweeps: passes that redraw a draft, each token with its own noise, before "coupled" judges it or "none" keeps it; as
    many as it has tokens make it what plain decoding says.
    recycle: with "coupled" and "greedy", what plain decoding made of the rest of a draft that fell is judged before the
    head drafts again: a cheaper round, that keeps less.
    adaptive: drafts as long as the last ones stood, at most tokens_per_pass.
    temperature 0 is greedy; top_p keeps the smallest set of tokens with that mass. stop: strings that end the reply.
    force_image: the reply starts with a picture. image_size: (height, width) in pixels of every picture.
    fps: frames per second of every clip; its header names them rounded.
    max_images: pictures and clips of the reply; where the model asks for one more, the reply ends.
    """

    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    told_guidance: float | None = None
    shift: float | None = None
    sampler: SamplerName | None = None
    gamma: float | None = None
    grid: str | tuple[float, ...] | None = None
    start_time: float | None = None
    seed: int = 0
    tokens_per_pass: int | None = None
    verify: str | None = None
    sweeps: int = 0
    recycle: bool = False
    adaptive: bool = False
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int = 256
    max_images: int = 16
    stop: tuple[str, ...] = ()
    force_image: bool = False
    image_size: tuple[int, int] | None = None
    fps: float | None = Field(
        default=None, ge=0.5, lt=64.5, description="frames per second of every clip, instead of the model's choice"
    )

    @field_validator("verify")
    @classmethod
    def _known_verification(cls, name: str | None) -> str | None:
        known = (*VERIFICATIONS, "greedy")
        if name is not None and name not in known:
            raise ValueError(f"unknown verification {name!r}; known: {', '.join(known)}")
        return name

    @field_validator("grid")
    @classmethod
    def _known_grid(cls, grid: str | tuple[float, ...] | None) -> str | tuple[float, ...] | None:
        if grid is not None:
            num_steps(grid)
        return grid

    def resolved(self, defaults: dict[str, Any]) -> GenerationOptions:
        """With the defaults filled in. Raises ValueError naming an impossible value, or one without effect."""
        known = {n for n, f in type(self).model_fields.items() if f.default is None}
        for key in sorted(defaults.keys() - known):
            way_out = nearest(key, known) or "; give it with each request"
            raise ValueError(f"{key!r} is no default of a model's generation.json{way_out}")
        base = {
            "steps": 8, "guidance": 1.0, "image_guidance": 1.0, "told_guidance": 1.0, "shift": 1.0,
            "sampler": "euler", "grid": "uniform", "temperature": 0.0, "tokens_per_pass": 1, "verify": "coupled",
            **defaults,
        }  # fmt: skip
        if self.grid is not None:  # another grid than the model's: what goes with the model's stays behind
            base.pop("start_time", None)
            base["shift"] = base["shift"] if isinstance(self.grid, str) else 1.0
        elif self.steps is not None and num_steps(base["grid"]) not in (None, self.steps):
            base["grid"] = "uniform"
        base["steps"] = num_steps(base["grid"] if self.grid is None else self.grid) or base["steps"]
        if self.sampler is not None:
            base.pop("gamma", None)
        filled = {n: base[n] for n in type(self).model_fields if getattr(self, n) is None and base.get(n) is not None}
        out = build({**self.model_dump(), **filled}, type(self), "the model's generation.json")
        out.times()
        assert out.temperature is not None and out.sampler is not None
        takes_gamma = "gamma" in knobs(out.sampler)
        if out.gamma is not None and not takes_gamma:
            raise ValueError(f"gamma = {out.gamma} means nothing to the sampler {out.sampler!r}; take sampler 'gamma'")
        if out.gamma is not None and not 0 <= out.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {out.gamma}; 0 adds no noise, 1 is restart")
        if out.told_guidance is not None and not out.told_guidance > 0:
            raise ValueError(
                f"told_guidance must be above 0, got {out.told_guidance}; 1 is a network trained without it"
            )
        if out.tokens_per_pass is not None and out.tokens_per_pass < 1:
            raise ValueError(f"tokens_per_pass must be at least 1, got {out.tokens_per_pass}; 1 is plain decoding")
        if out.sweeps < 0:
            raise ValueError(f"sweeps must not be negative, got {out.sweeps}; 0 takes drafts as the head makes them")
        if out.sweeps and out.verify in ("rejection", "block"):
            raise ValueError(f"verify = {out.verify!r} needs the law of a draft, which sweeps change; take 'coupled'")
        if out.sweeps and out.tokens_per_pass == 1:
            raise ValueError(f"sweeps = {out.sweeps} has no effect on one token a pass; take tokens_per_pass above 1")
        if out.verify == "greedy" and out.temperature > 0:
            raise ValueError(f"verify = 'greedy' has no meaning at temperature {out.temperature}; take 'coupled', or 0")
        if out.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {out.temperature}; 0 is greedy")
        if not 0 < out.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {out.top_p}; 1 keeps every token")
        if out.top_p < 1 and out.temperature == 0:
            raise ValueError(f"top_p = {out.top_p} has no effect at temperature 0; give a temperature too, such as 1")
        for name, plain in (("verify", "coupled"), ("recycle", False), ("adaptive", False)):
            value = getattr(out, name)
            if value != plain and out.tokens_per_pass == 1:
                raise ValueError(f"{name} = {value!r} has no effect on one token a pass; take tokens_per_pass above 1")
        if out.recycle and (out.sweeps or out.verify not in ("coupled", "greedy")):
            raise ValueError(
                f"recycle has no effect with verify = {out.verify!r}, sweeps = {out.sweeps}; take 'coupled', no sweeps"
            )
        if out.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {out.max_tokens}")
        return out.model_copy(update={"gamma": 0.5}) if takes_gamma and out.gamma is None else out

    def times(self) -> list[float]:
        """The times of resolved options, from noise to 0. ValueError where there is no such grid."""
        assert self.steps is not None and self.shift is not None and self.grid is not None
        return time_grid(self.steps, self.shift, self.grid, self.start_time)


# ---- what comes out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A drawn picture. index counts the pictures of the reply from 0.

    steps: jumps from noise to the picture. evaluations: passes through the transformer spent on them, counted as they
    were made; with guidance each of its branches counts (what papers call NFE).
    """

    image: PILImage.Image
    height: int
    width: int
    steps: int
    seed: int
    index: int
    evaluations: int = 0


@dataclass(frozen=True, eq=False)
class VideoPart:
    """A drawn clip: frames uint8 (T, H, W, 3) at `fps` a second, the request's or what the model wrote in its header.
    steps: of each of its blocks; evaluations: of all of them."""

    frames: Tensor
    fps: float
    steps: int
    seed: int
    index: int
    evaluations: int = 0


Part = TextPart | ImagePart | VideoPart
StopReason = Literal["end", "stop", "length", "images"]  # see Stop


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class BlockStart:
    """A block begins: kind "image" or "video", its index among the reply's media, its grid (t, h, w) in latents."""

    kind: str
    index: int
    grid: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class BlockStep:
    """After refinement step `step` of `steps`: the latents (N, C) at that time."""

    index: int
    step: int
    steps: int
    latents: Tensor


@dataclass(frozen=True)
class BlockDone:
    index: int
    part: ImagePart | VideoPart


@dataclass(frozen=True)
class Stop:
    """Why the reply is over: "end", the model ended it; "stop", a stop string; "length", max_tokens or the model's
    longest context; "images", the model asked for a picture or clip beyond max_images."""

    reason: StopReason


@dataclass(frozen=True)
class Drafted:
    """One round of text in blocks: how many tokens were drafted, how many of them were kept, and the passes through
    the transformer that it took. again: drafted by plain decoding, from a draft of the head that fell."""

    drafted: int
    kept: int
    passes: int
    again: bool = False


Event = TextDelta | Drafted | BlockStart | BlockStep | BlockDone | Stop


@dataclass(frozen=True)
class Reply:
    """An ordered reply. `document` is the prompt followed by the reply, ready for the next turn."""

    parts: list[Part]
    document: Document
    stop_reason: StopReason
    drafts: tuple[Drafted, ...] = ()  # of each round of text in blocks

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))

    @property
    def evaluations(self) -> int:
        """Passes through the transformer spent on all its pictures and clips; see ImagePart."""
        return sum(p.evaluations for p in self.parts if not isinstance(p, TextPart))

    @property
    def images(self) -> list[PILImage.Image]:
        return [p.image for p in self.parts if isinstance(p, ImagePart)]
