"""A list of stages as one run:  python -m train STAGES.toml [key=value ...] [--out DIR] [--resume] [--dry-run]

    kind = "stages"
    out = "runs/mine"                       # stage NAME leaves its files in runs/mine/NAME
    base = "recipes/mine.toml"              # the recipe of every stage that names none; or the table [base]

    [[stages]]
    name = "words"
    tokenizer = "recipes/tokenizer.toml"    # a recipe of train.tools.tokenizer

    [[stages]]
    name = "pictures"
    recipe = "recipes/codec.toml"           # its own recipe, here of kind "codec"

    [[stages]]
    name = "first"                          # the base recipe with changes
    changes.max_steps = 1000

    [[stages]]
    name = "second"
    changes.optimiser.rate = 1e-3
    changes.data.0.options.mixture = { draw = 1.0 }     # in a list, digits are an index

    [[stages]]
    name = "mean"
    average = { first = 0.3, second = 0.7 }             # train.tools.average, of earlier stages

    [[stages]]
    name = "other_words"
    retokenize = { pictures = "emoji_world" }           # train.tools.retokenize, to the last tokenizer

    [[stages]]
    name = "projector"                      # train.tools.projector, on the model and the sources of the recipe
    recipe = "recipes/chats.toml"
    projector = { caption = "name", documents = 6000, steps = 4000 }

A recipe takes the tokenizer, the codec and the model (as init_from) of the last stages before it that made one. `init`
names another stage for the model, or "none"; `changes` may name any path. `changes` at the top of the file apply to
every stage that trains a model; the stage's own apply after them, those of the command line (`changes.device=cuda`)
last. Tables merge key by key; any other value replaces. Paths are relative to the current directory.

With --resume a finished stage is skipped and one that has begun continues. train.runs does the training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from omni.config import Frozen, build, nearest, parse_json, parse_toml
from train import checkpoint as state
from train import runs
from train.build import build_run, check_without_inputs
from train.codec.loop import CodecRecipe, CodecRun
from train.lock import hold
from train.recipe import Recipe, with_flat_generation
from train.tools.average import average
from train.tools.projector import ProjectorConfig, make_projector
from train.tools.retokenize import convert
from train.tools.tokenizer import TokenizerRecipe, train_tokenizer

RECORD = "recipe.json"  # the settings that made a stage; train.runs writes those of models and codecs
INPUTS = ("tokenizer", "codec", "init_from")
# What may differ from the record of a finished stage: none of it changes the product by design.
WITHOUT_EFFECT = (
    *("device", "threads", "workers", "autocast", "compile", "latent_memory_mb", "report.*"),
    *("max_nonfinite", "batch.max_corrupt", "batch.min_corrupt"),
    *("eval_every", "eval_pictures", "final_pictures", "save_every"),
)
Kind = Literal["tokenizer", "codec", "model", "average", "retokenize", "projector"]


class RetokenizeConfig(Frozen):
    """pictures: the source of the picture codes for ids of names (see train.tools.retokenize)."""

    pictures: Literal["emoji_world"] | None = None


class StageConfig(Frozen):
    """One stage: a recipe (its own, or the base) with changes, or one call of a tool."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name of its folder")
    recipe: Path | None = Field(None, description="of a model or a codec")
    init: str | None = Field(None, description='earlier stage whose model to start from, or "none"; default: the last')
    tokenizer: Path | None = Field(None, description="a recipe of a tokenizer")
    average: dict[str, float] | None = Field(None, description="earlier stages that make a model, and their shares")
    retokenize: RetokenizeConfig | None = None
    projector: ProjectorConfig | None = Field(None, description="trains the projector of the recipe's model alone")
    changes: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_one_thing(self) -> StageConfig:
        given = [name for name in ("recipe", "tokenizer", "average", "retokenize") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"stage {self.name!r} has {' and '.join(given)}; give one")
        kind = given[0] if given else "recipe"
        takers = {"changes": ("recipe", "tokenizer"), "init": ("recipe",), "projector": ("recipe",)}
        for key, effective in takers.items():
            if getattr(self, key) and kind not in effective:
                raise ValueError(f"stage {self.name!r}: {key} has no effect on {kind}; leave it out")
        return self


class StagesConfig(Frozen):
    """See the head of this file."""

    kind: Literal["stages"] = "stages"
    out: Path | None = Field(None, description="default: runs/ and the name of the file")
    base: Path | dict[str, Any] | None = Field(None, description="recipe of the stages that name none")
    changes: dict[str, Any] = Field({}, description="for every stage that trains a model, before its own")
    last: dict[str, Any] = Field({}, description="the same, after its own: changes of the command line")
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> StagesConfig:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are named {twice[0]!r}; give each its own name")
        return self


@dataclass(frozen=True)
class Stage:
    """A planned stage. settings: compared with the record of a finished stage."""

    name: str
    out: Path
    kind: Kind
    settings: Recipe | CodecRecipe | TokenizerRecipe | dict[str, Any]
    inputs: tuple[str, ...] = ()  # paths that earlier stages make

    @property
    def product(self) -> Path:
        """The directory that later stages read."""
        return self.out / {"tokenizer": "tokenizer", "codec": "codec"}.get(self.kind, "model")

    @property
    def begun(self) -> bool:
        """Whether the stage has a folder."""
        return self.out.exists()

    @property
    def finished(self) -> bool:
        """Whether its product is complete: the file that is written last is there."""
        last = "tokenizer_config.json" if self.kind == "tokenizer" else "manifest.json"
        return (self.product / last).is_file()


# --------------------------------------------------------------------------------------------- the plan


def plan(config: StagesConfig, source: str, out: Path) -> list[Stage]:
    """Every stage with its recipe built, so that a mistake in the last stage is found before the first begins.
    ValueError names the stage and the key."""
    made: list[Stage] = []
    for listed in config.stages:
        with naming_stage(listed.name):
            made.append(_planned(listed, config, source, out / listed.name, made))
    return made


def _planned(listed: StageConfig, config: StagesConfig, source: str, out: Path, earlier: list[Stage]) -> Stage:
    """One stage, with paths from the stages before it."""
    models = {stage.name: str(stage.product) for stage in earlier if stage.product.name == "model"}
    last = {stage.product.name: str(stage.product) for stage in earlier}
    if listed.average is not None:
        shares = {_model_of(name, models, "average"): share for name, share in listed.average.items()}
        return Stage(listed.name, out, "average", {"average": shares}, tuple(shares))
    if listed.retokenize is not None:
        if "model" not in last or "tokenizer" not in last:
            raise ValueError("retokenize: needs a stage that makes a model and one that makes a tokenizer before it")
        given = {"model": last["model"], "tokenizer": last["tokenizer"]}
        settings = {"retokenize": {**given, "pictures": listed.retokenize.pictures}}
        return Stage(listed.name, out, "retokenize", settings, tuple(given.values()))
    table, origin = _recipe_of(listed, config, source)
    if listed.tokenizer is not None:
        made = {"out": str(out / "tokenizer")}
        recipe = build(merged(merged(table, listed.changes, "changes"), made, ""), TokenizerRecipe, origin)
        return Stage(listed.name, out, "tokenizer", recipe)
    if table.get("kind") == "codec":
        if listed.projector is not None:
            raise ValueError("projector has no effect on a codec; leave it out")
        if listed.init is not None:
            raise ValueError("init has no effect on a codec; leave it out (changes.init_from names a codec directory)")
        return Stage(listed.name, out, "codec", build(merged(table, listed.changes, "changes"), CodecRecipe, origin))
    inputs: dict[str, str | None] = {("init_from" if kind == "model" else kind): last[kind] for kind in last}
    if listed.init is not None:
        inputs["init_from"] = None if listed.init == "none" else _model_of(listed.init, models, "init")
    table = with_flat_generation(table)
    for changes in (inputs, config.changes, listed.changes, config.last):
        table = merged(table, with_flat_generation(changes), "changes")
    used = tuple(path for name, path in inputs.items() if path is not None and table[name] == path)
    recipe = build(table, Recipe, origin)
    if listed.projector is not None:
        settings = {**recipe.model_dump(mode="json"), "projector": listed.projector.model_dump(mode="json")}
        return Stage(listed.name, out, "projector", settings, used)
    return Stage(listed.name, out, "model", recipe, used)


def _model_of(name: str, models: Mapping[str, str], key: str) -> str:
    """The model directory of an earlier stage. ValueError names the nearest."""
    if name in models:
        return models[name]
    known = nearest(name, models) or f"; models before it: {', '.join(models) or 'none'}"
    raise ValueError(f"{key}: {name!r} is no earlier stage that makes a model{known}")


def _recipe_of(listed: StageConfig, config: StagesConfig, source: str) -> tuple[dict[str, Any], str]:
    """The table that a stage's changes apply to, and its name in errors."""
    path = listed.tokenizer or listed.recipe or config.base
    if path is None:
        raise ValueError(f"{source}: it has no recipe; give `recipe`, or `base` for all stages")
    if isinstance(path, dict):
        return path, f"{source}, base and changes"
    try:
        data = path.read_bytes()
    except OSError as error:
        siblings = [other.name for other in path.parent.glob(f"*{path.suffix}")]
        hint = nearest(path.name, siblings) or "; give the path of an existing file"
        raise ValueError(f"{source}: cannot read {str(path)!r}: {error.strerror}{hint}") from None
    return parse_toml(data, str(path)), f"{source}, changes of {path}"


def merged(base: Any, changes: Any, where: str) -> Any:
    """`base` with `changes`: tables merge key by key; in a list, the keys of `changes` are indices; any other value
    replaces. ValueError naming the key `where` for an index outside the list."""
    if isinstance(base, list) and isinstance(changes, Mapping) and all(key.isdecimal() for key in changes):
        items = list(base)
        for key, value in changes.items():
            if int(key) >= len(items):
                raise ValueError(f"{where}.{key}: there is no such item in a list of {len(items)}")
            items[int(key)] = merged(items[int(key)], value, f"{where}.{key}")
        return items
    if isinstance(base, Mapping) and isinstance(changes, Mapping):
        return {**base, **{key: merged(base.get(key), value, f"{where}.{key}") for key, value in changes.items()}}
    return changes


@contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Errors inside name the stage."""
    try:
        yield
    except ValueError as error:
        error.args = (f"stage {name!r}: {error}",)
        raise


# --------------------------------------------------------------------------------------------- making it


def run(stages: list[Stage], resume: bool) -> int:
    """Make every unfinished stage, in order. Returns the exit code of the one that stopped, or 0."""
    with hold(stages[0].out.parent):
        begun = [stage.name for stage in stages if stage.begun]
        if begun and not resume:
            where = str(stages[0].out.parent)
            raise ValueError(f"{where!r} holds {begun[0]!r} already; continue with --resume, or choose another --out")
        check_finished(stages)
        for stage in stages:
            with naming_stage(stage.name):
                check(stage)
        for number, stage in enumerate(stages, 1):
            title = f"stage {number} of {len(stages)}, {stage.name!r}"
            if stage.finished:
                print(f"{title}: finished, {stage.product}", flush=True)
                continue
            print(f"{title}: {stage.kind}, to {stage.product}", flush=True)
            with naming_stage(stage.name):
                code = run_stage(stage)
            if code:
                print(f"{title}: stopped; continue with --resume", file=sys.stderr)
                return code
    return 0


def check_finished(stages: list[Stage]) -> None:
    """ValueError where a finished stage was made with other settings, or from a stage that no longer exists."""
    unfinished = {str(stage.product): stage.name for stage in stages if not stage.finished}
    for stage in stages:
        if stage.finished:
            with naming_stage(stage.name):
                for path in stage.inputs:
                    if path in unfinished:
                        again = f"remove {str(stage.out)!r} to make it again"
                        raise ValueError(f"it is finished, and {unfinished[path]!r} before it is not; {again}")
                compare_with_record(stage)


def compare_with_record(stage: Stage) -> None:
    """ValueError naming a key that differs from the record of the finished stage, unless it is HARMLESS."""
    record = stage.out / RECORD
    if not record.is_file():
        raise ValueError(f"it is finished and has no {str(record)!r}; remove {str(stage.out)!r} to make it again")
    saved, own = parse_json(record.read_bytes(), str(record)), _settings(stage)
    saved = {**own, **saved}
    for name in INPUTS:  # two spellings of one path are equal
        if isinstance(saved.get(name), str) and isinstance(own.get(name), str):
            saved[name], own[name] = (str(Path(table[name]).resolve()) for table in (saved, own))
    state.compare({"recipe": saved}, {"recipe": own}, WITHOUT_EFFECT, stage.out)


def run_stage(stage: Stage) -> int:
    """Train or convert one stage, or continue it. Returns the exit code."""
    if isinstance(stage.settings, Recipe):
        return runs.train_model(stage.settings, stage.out, bool(state.saved_steps(stage.out / "state")))
    if isinstance(stage.settings, CodecRecipe):
        return runs.train_codec(stage.settings, stage.out)
    stage.out.mkdir(parents=True, exist_ok=True)
    (stage.out / RECORD).write_text(json.dumps(_settings(stage), indent=1) + "\n", encoding="utf-8")
    match stage.settings:
        case TokenizerRecipe() as recipe:
            train_tokenizer(recipe)
        case {"average": shares}:
            average(list(shares.items())).save_pretrained(stage.product)
        case {"retokenize": given}:
            convert(stage.product, given["model"], given["tokenizer"], with_pictures=given["pictures"] is not None)
        case {"projector": given} as table:
            make_projector(_recipe_in(table), stage.product, ProjectorConfig.model_validate(given))
    return 0


def _recipe_in(settings: Mapping[str, Any]) -> Recipe:
    """The recipe of a projector stage, whose settings are the recipe's keys and `projector`."""
    return Recipe.model_validate({key: value for key, value in settings.items() if key != "projector"})


def _settings(stage: Stage) -> dict[str, Any]:
    """JSON of the settings, as `RECORD` stores them."""
    given = stage.settings
    return dict(given) if isinstance(given, dict) else given.model_dump(mode="json")


# --------------------------------------------------------------------------------------------- a dry run


def dry_run(stages: list[Stage]) -> int:
    """Build and check every stage, train nothing, write nothing; print a line for each."""
    check_finished(stages)
    for stage in stages:
        with naming_stage(stage.name):
            print(f"{stage.name}: {stage.kind}, {check(stage)}", flush=True)
    return 0


def check(stage: Stage) -> str:
    """Build as much of a stage as exists; return a description of what was checked. ValueError for a mistake."""
    if stage.finished:
        return f"finished, {stage.product}"
    missing = [path for path in stage.inputs if not Path(path).is_dir()]
    settings = stage.settings
    if isinstance(settings, dict) and "projector" in settings:
        settings = _recipe_in(settings)
    match settings:
        case Recipe() as recipe if missing:
            check_without_inputs(recipe)
        case Recipe() as recipe:
            build_run(recipe, stage.out)
        case CodecRecipe() as recipe if recipe.init_from is None or Path(recipe.init_from).is_dir():
            CodecRun(recipe, stage.out)
    begun = "has begun" if stage.begun else "to be made"
    return f"{begun}, checked without {missing[0]}" if missing else f"{begun}, checked"
