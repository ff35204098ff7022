"""What a request may ask for: every option with its bounds and its description, in four groups.

    GenerationOptions                 the whole request: seed, longest reply, stop texts
        .text         TextOptions         how text is sampled
        .picture      PictureOptions      how pictures and clips are sampled
        .speculative  SpeculativeOptions  how text is drafted and verified

Names are unique over the groups, so an option may be given flat, steps=4, or in its group, picture={"steps": 4} (see
omni.generation.grouped). It is read in its group alone, options.picture.steps: one way to read, which a type checker
knows. The command line (omni/cli/options.py) and the commands of `omni chat` are made from these fields; a model's
generation.json and a recipe's [generation] are checked by them. To add an option, add a field with `_option`. A rule
between options of one group is a validator of the group; one between groups is a validator of GenerationOptions. This
file loads torch only to look up a sampler or a grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from omni.config import Frozen, build, nearest
from omni.generation.grouped import Grouped

MAX_STEPS = 1000
MAX_SIDE = 8192  # pixels
MAX_ROUNDS = 1 << 16
MAX_PASSES = 64 * MAX_STEPS  # of a clip
BLOCK_ORDERS = ("staggered", "level_major")
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
SMALLEST_TEMPERATURE = 1e-3
RENAMED = {"told_guidance": "guidance_embedding"}  # old name -> new name
WHOLE_REQUEST = "the whole request"  # the title of the options of no group


def _option(
    default: Any, description: str, metavar: str | None = None, *, flag: str | None = None,
    names: tuple[str, str] | None = None, in_chat: bool = False, **bounds: Any,
) -> Any:  # fmt: skip
    """A field that is an option. flag: its name on the command line, where that is not the field's own. names: the
    package and the registry whose names it takes. in_chat: it is a command of `omni chat`."""
    about = {"metavar": metavar, "flag": flag, "names": names and list(names), "in_chat": in_chat}
    return Field(default, description=description, json_schema_extra=about, **bounds)


class _Options(Frozen):
    """None leaves an option out. Scalars and arrays of numpy and torch are numbers and lists. A str or a bool is no
    number."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _as_python(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = {name: value for name, value in data.items() if value is not None or name == "seed"}
        return {name: _plain(value) for name, value in given.items()}


class _Group(_Options):
    """A group of options."""

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some values changed, all of it checked; pydantic's own copy checks nothing."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return build({**given, **(update or {})}, type(self), type(self).__name__)


class TextOptions(_Group):
    """How text is sampled. None is the model's own choice."""

    temperature: float | None = _option(
        None, "temperature of text; 0 takes the likeliest token", "T", in_chat=True, ge=0, le=100
    )
    top_p: float | None = _option(
        None, "keep the likeliest tokens whose probabilities sum to P; 1 keeps all", "P", ge=1e-6, le=1
    )
    top_k: int | None = _option(None, "keep the K likeliest tokens; 0 keeps all", "K", ge=0, le=1 << 24)

    @field_validator("temperature")
    @classmethod
    def _not_nearly_greedy(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < SMALLEST_TEMPERATURE:
            raise ValueError(f"must be 0 (greedy), or from {SMALLEST_TEMPERATURE} to 100")
        return value

    @model_validator(mode="after")
    def _has_effect(self) -> TextOptions:
        for name, has_effect in (("top_p", (self.top_p or 1) < 1), ("top_k", bool(self.top_k))):
            if has_effect and self.temperature == 0:
                value = getattr(self, name)
                raise ValueError(f"{name} = {value} has no effect at temperature 0; give a temperature too, such as 1")
        return self


class PictureOptions(_Group):
    """How pictures and clips are sampled. None is the model's own choice.

    Guidance weights: see omni.sequence.guidance. Samplers and grids: see omni.samplers.
    """

    steps: int | None = _option(
        None, "jumps from noise to each picture, and to each block of a clip", "N", in_chat=True, ge=1, le=MAX_STEPS
    )
    guidance: float | None = _option(
        None, "how strongly pictures follow the text; 1 is off", "W", in_chat=True, ge=0, le=100
    )
    image_guidance: float | None = _option(
        None, "how strongly pictures follow earlier pictures; 1 is off", "W", ge=0, le=100
    )
    guidance_embedding: float | None = _option(
        None, "the weight that is an input of a network trained with guidance in it (its input is 1 / W), so that a "
        "guided step is one evaluation; 1 is for a network trained without", "W", ge=1e-3, le=100
    )  # fmt: skip
    image_size: tuple[int, int] | None = _option(
        None, f"height and width of every picture, in pixels, at most {MAX_SIDE} each", "HxW", flag="size", in_chat=True
    )
    fps: float | None = _option(
        None, "frames per second of every clip, instead of the model's choice", "FPS", ge=0.5, lt=64.5
    )
    sampler: str | None = _option(None, "how jumps are taken", "NAME", names=("omni.samplers", "SAMPLERS"))
    gamma: float | None = _option(
        None, "how much noise the sampler gamma adds again: 0 is flow_map, 1 is restart", "G", ge=0, le=1
    )
    grid: str | tuple[float, ...] | None = _option(
        None, "where the jumps end: a name, or the times from noise to 0, such as 1,0.58,0", "NAME",
        names=("omni.samplers", "GRIDS"),
    )  # fmt: skip
    start_time: float | None = _option(None, "the first time; 1 is noise", "T", ge=1e-6, le=1)
    shift: float | None = _option(None, "warp of the times; above 1 stays longer at noise", "K", ge=1e-3, le=1e3)
    blocks: str | tuple[tuple[int, ...], ...] | None = _option(
        None, "in which order the blocks of a clip are refined: staggered, level_major, or (not on the command line) a "
        "matrix of levels, see omni.sequence.schedule", "NAME"
    )  # fmt: skip
    delay: float | None = _option(
        None, "jumps after which the next block of a clip starts, with blocks = staggered: 0 is all blocks together, "
        "the number of steps one after another", "D", ge=0, le=MAX_STEPS
    )  # fmt: skip

    rounds: int | None = _option(
        None, "passes of each picture, for models that draw some latents in each; the rest of them is known or masked. "
        "By default one latent in each", "N", ge=1, le=MAX_ROUNDS
    )  # fmt: skip

    @field_validator("image_size", mode="before")
    @classmethod
    def _height_and_width(cls, value: Any) -> Any:
        if value is None:
            return None
        pair = tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else ()
        if not pair or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in pair):
            raise ValueError(f"must be (height, width) in pixels, each a whole number from 1 to {MAX_SIDE}")
        return pair

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str | None) -> str | None:
        if name is not None:
            from omni.samplers import SAMPLERS

            SAMPLERS.get(name)
        return name

    @field_validator("grid", mode="before")
    @classmethod
    def _known_grid(cls, value: Any) -> Any:
        if value is None:
            return None
        from omni.samplers import num_steps, time_grid

        if isinstance(value, str):
            num_steps(value)
            return value
        if isinstance(value, list | tuple) and len(value) > MAX_STEPS + 1:
            raise ValueError(f"has {len(value)} times; give at most {MAX_STEPS + 1}")
        if not isinstance(value, list | tuple) or not all(_is_number(time) for time in value):
            raise ValueError("must be the name of a grid, or a list of times such as [1, 0.58, 0]")
        times = tuple(float(time) for time in value)
        time_grid(num_steps(times) or 1, grid=times)
        return times

    @field_validator("blocks", mode="before")
    @classmethod
    def _known_order(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            if value not in (None, *BLOCK_ORDERS):
                raise ValueError(
                    f"unknown order {value!r}{nearest(value, BLOCK_ORDERS)}; known: {', '.join(BLOCK_ORDERS)}"
                )
            return value
        rows = value if isinstance(value, list | tuple) else [None]
        if not all(isinstance(row, list | tuple) and all(type(level) is int for level in row) for row in rows):
            raise ValueError("must be a name, or a matrix of integer levels such as [[2, 2], [1, 2], [0, 1], [0, 0]]")
        if len(value) > MAX_PASSES + 1:
            raise ValueError(f"has {len(value)} rows; give at most {MAX_PASSES + 1}")
        return tuple(map(tuple, value))

    @model_validator(mode="after")
    def _matrix_is_a_schedule(self) -> PictureOptions:
        if self.delay is not None and self.blocks not in (None, "staggered"):
            raise ValueError("delay has an effect with blocks = 'staggered' only; leave one out")
        if isinstance(self.blocks, tuple):
            from omni.sequence.schedule import Schedule

            highest = max((level for row in self.blocks for level in row), default=0)
            steps = highest if self.steps is None else self.steps
            schedule = Schedule(self.blocks, max(steps, 1))
            if set(schedule.levels[0]) != {steps}:
                raise ValueError(
                    f"the first row of blocks is {list(self.blocks[0])}; every block starts as noise, at level {steps}"
                    + ("" if self.steps is None else ", the steps")
                )
        return self

    @model_validator(mode="after")
    def _jumps_fit(self) -> PictureOptions:
        if self.gamma is not None and self.sampler is not None:
            from omni.samplers import knobs

            if "gamma" not in knobs(self.sampler):
                raise ValueError(
                    f"gamma = {self.gamma} means nothing to the sampler {self.sampler!r}; take sampler 'gamma'"
                )
        if self.steps is not None and self.shift is not None and self.grid is not None:
            self.times()
        return self

    def times(self) -> list[float]:
        """The times of resolved options, from noise to 0. ValueError where there is no such grid."""
        from omni.samplers import time_grid

        assert self.steps is not None and self.shift is not None and self.grid is not None
        return time_grid(self.steps, self.shift, self.grid, self.start_time)


class SpeculativeOptions(_Group):
    """How text is drafted and verified, by a model with a joint-token head. None is the model's own choice.

    Verification: see omni.samplers.verification.
    """

    tokens_per_pass: int | None = _option(
        None, "most tokens drafted in one pass, by a model with a joint-token head; 1 is autoregressive decoding",
        "K", ge=1, le=64
    )  # fmt: skip
    verify: str | None = _option(
        None, "how drafts are verified: coupled (the tokens of autoregressive decoding with this seed), rejection, "
        "block (its distribution), greedy, or none (drafts as they are: lossy)", "NAME"
    )  # fmt: skip
    sweeps: int = _option(
        0, "passes that redraw a draft, with the same noise, before its verification", "N", ge=0, le=64
    )
    recycle: bool = _option(False, "verify the rest of a rejected draft before the next draft")
    adaptive: bool = _option(False, "drafts as long as the last ones were accepted")

    @field_validator("verify")
    @classmethod
    def _known_verification(cls, name: str | None) -> str | None:
        if name is not None:
            from omni.samplers.verification import VERIFICATIONS

            known = (*VERIFICATIONS, "greedy")
            if name not in known:
                raise ValueError(f"unknown verification {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _has_effect(self) -> SpeculativeOptions:
        if self.sweeps and self.verify in ("rejection", "block"):
            raise ValueError(
                f"verify = {self.verify!r} needs the distribution of a draft, which sweeps change; take 'coupled'"
            )
        if self.tokens_per_pass == 1:
            idle = {"sweeps": 0, "verify": "coupled", "recycle": False, "adaptive": False}
            for name, plain in idle.items():
                value = getattr(self, name)
                if value not in (None, plain):
                    raise ValueError(
                        f"{name} = {value!r} has no effect on one token a pass; take tokens_per_pass above 1"
                    )
        if self.recycle and (self.sweeps or self.verify not in (None, "coupled", "greedy")):
            raise ValueError(
                f"recycle has no effect with verify = {self.verify!r}, sweeps = {self.sweeps}; "
                "take 'coupled', no sweeps"
            )
        return self


class GenerationOptions(_Options, Grouped):
    """One request's budget and choices. None is the model's own default (its generation.json) where there is one. For
    the seed it means a fresh one, which the reply records.

    Example:
        >>> GenerationOptions(steps=4, seed=1) == GenerationOptions(picture={"steps": 4}, seed=1)
        True
    """

    renamed: ClassVar[Mapping[str, str]] = RENAMED

    seed: int | None = _option(0, "all randomness depends on it", "S", in_chat=True, ge=0, le=2**63 - 1)
    max_tokens: int = _option(256, "most text tokens of the reply", "N", in_chat=True, ge=1, le=1_000_000)
    max_images: int = _option(
        16, "most pictures and clips of the reply; where the model asks for one more, the reply ends", "N",
        in_chat=True, ge=0, le=1000
    )  # fmt: skip
    stop: tuple[str, ...] = _option(
        (), f"text that ends the reply where it occurs; at most {MAX_STOPS} such texts of {MAX_STOP_LENGTH} characters",
        "TEXT", in_chat=True
    )  # fmt: skip
    force_image: bool = _option(False, "begin the reply with a picture", in_chat=True)
    lora: str | None = _option(
        None, "the adapter of the text weights that the model computes with, by its name; none: no adapter", "NAME",
        in_chat=True, max_length=64
    )  # fmt: skip

    text: TextOptions = Field(TextOptions(), description="text")
    picture: PictureOptions = Field(PictureOptions(), description="pictures and clips")
    speculative: SpeculativeOptions = Field(SpeculativeOptions(), description="speculative decoding")

    if TYPE_CHECKING:

        def __init__(self, /, **options: Any) -> None: ...

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> Any:
        """A str is one of them, as for OpenAI."""
        found = (value,) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
            raise ValueError("must be a text or a list of texts")
        if len(found) > MAX_STOPS:
            raise ValueError(f"has {len(found)} texts; give at most {MAX_STOPS}")
        if "" in found:
            raise ValueError("an empty text would end every reply at once; leave it out")
        if any(len(text) > MAX_STOP_LENGTH for text in found):
            raise ValueError(f"a text is longer than {MAX_STOP_LENGTH} characters; make it shorter")
        if not all(_is_unicode(text) for text in found):
            raise ValueError("is not valid Unicode text; check the encoding")
        return tuple(found)

    @model_validator(mode="after")
    def _greedy_is_greedy(self) -> GenerationOptions:
        if self.speculative.verify == "greedy" and self.text.temperature:
            raise ValueError(
                f"verify = 'greedy' has no meaning at temperature {self.text.temperature}; take 'coupled', or 0"
            )
        return self

    def resolved(self, defaults: Mapping[str, Any], source: str = "the model's generation.json") -> GenerationOptions:
        """With the defaults filled in, and a seed. Raises ValueError that names the value: `source` with it where it
        is one of the defaults."""
        base = {
            "steps": 8, "guidance": 1.0, "image_guidance": 1.0, "guidance_embedding": 1.0, "shift": 1.0,
            "sampler": "euler", "grid": "uniform", "temperature": 0.0, "top_p": 1.0, "top_k": 0,
            "tokens_per_pass": 1, "verify": "coupled", "lora": "none", **check_defaults(defaults, source),
        }  # fmt: skip
        from omni.samplers import knobs, num_steps

        given = self.picture
        if self.text.temperature == 0:
            base |= {"top_p": 1.0, "top_k": 0}  # the model's go with its temperature
        # With another grid or sampler than the model's, what goes with the model's stays behind.
        if given.grid is not None and not _is_same_grid(given.grid, base["grid"]):
            base.pop("start_time", None)
            base["shift"] = base["shift"] if isinstance(given.grid, str) else 1.0
        steps = max(given.blocks[0]) if isinstance(given.blocks, tuple) else given.steps
        if given.grid is None and steps is not None and num_steps(base["grid"]) not in (None, steps):
            base["grid"] = "uniform"
        base["steps"] = num_steps(base["grid"] if given.grid is None else given.grid) or base["steps"]
        matrix = given.blocks or base.get("blocks")
        if isinstance(matrix, list | tuple):
            wanted = given.steps or (None if given.grid is None else num_steps(given.grid))
            if given.blocks is None and wanted not in (None, max(matrix[0])):
                base.pop("blocks")
            else:
                base["steps"] = max(matrix[0])
        if given.blocks not in (None, "staggered"):
            base.pop("delay", None)
        if given.delay is not None:
            base.pop("blocks", None)
        if given.sampler not in (None, base["sampler"]):
            base.pop("gamma", None)
        if "gamma" in knobs(given.sampler or base["sampler"]):
            base.setdefault("gamma", 0.5)
        if self.seed is None:
            from omni.rng import fresh_seed

            base["seed"] = fresh_seed()
        return self.changed({name: base.get(name) for name, value in self.flat().items() if value is None})


def check_defaults(defaults: Mapping[str, Any], source: str = "the model's generation.json") -> dict[str, Any]:
    """The default options of a model, checked, as a flat table of today's names. ValueError naming `source` for a value
    out of bounds, for an unknown key, and for an option that only a request can have."""
    if not isinstance(defaults, Mapping):
        raise ValueError(f"{source}: must be a table of options, got a {type(defaults).__name__}")
    flat = GenerationOptions.flatten({str(key): value for key, value in defaults.items()}, f"{source}: ")
    known = {n for n, f in GenerationOptions.fields_by_key().items() if f.default is None}
    for key in sorted(flat.keys() - known - GenerationOptions.groups().keys()):
        way_out = nearest(key, known) or "; give it with each request"
        raise ValueError(f"{source}: {key!r} is no default of a model's generation.json{way_out}")
    if unset := [name for name, value in flat.items() if value is None]:
        raise ValueError(f"{source}: {unset[0]} is null; leave it out or give it a value")
    build(flat, GenerationOptions, source)
    return flat


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "ndim") else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_same_grid(one: Any, other: Any) -> bool:
    """Whether two grids, names or times, are equal."""
    return one == other if isinstance(one, str) or isinstance(other, str) else tuple(one) == tuple(other)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
