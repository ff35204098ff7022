"""Builds a run from a recipe: tokenizer, codec, model, data, loader, objectives, optimiser. Checks that they fit.

Everything that a recipe names is resolved here, so `--dry-run` finds every mistake before the first step.
`publish_model` writes the finished run to a model directory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from omni.checkpoint import Published
from omni.codecs import Codec
from omni.config import build
from omni.data.source import Source, build_source
from omni.document import Document
from omni.encoders import Encoder
from omni.generation.denoise import require_effect
from omni.generation.options import GenerationOptions
from omni.heads import FlowHeadConfig
from omni.importers.model_files import ModelFiles
from omni.media.preparation import Preparation, target_size
from omni.model import TOWER, Omni, OmniConfig
from omni.nn.compiled import compile_blocks
from omni.nn.declare import hidden_names
from omni.objectives import OBJECTIVES, Objective
from omni.objectives.base import check_blocks
from omni.pretrained import from_pretrained
from omni.rng import Key
from omni.text import Tokenizer
from omni.text.compose import compose
from omni.weights import is_text_path
from train.attached import build_codec, build_encoder, build_tokenizer, check_same_parts, fingerprints
from train.checkpoint import AVERAGES, WEIGHTS
from train.context_cache import ContextCache
from train.data.batch import BatchConfig
from train.data.held_out import HeldOut, hold_out
from train.data.latents import LatentMemo
from train.data.loader import Loader
from train.data.mixture import Mixture
from train.data.workers import Tickets, WorkerLoader
from train.decoder import base_of, freeze_text_path, published_files
from train.guard import Guard
from train.loop import Run
from train.optim.critic import Critic, rollout_objective
from train.optim.ema import Ema, copy_of
from train.optim.optimiser import build_optimiser
from train.optim.target import build_target
from train.recipe import NO_CODEC, DataConfig, Recipe
from train.sampler import choose_sampler
from train.upcycling import with_latent_weights
from train.validation import Validation

# How noise and times are sampled from their keys: 1 was a generator each, 2 is Key.each. Stored as "draws".
NOISE_VERSION = 2
WITHOUT_EFFECT = {"attention", "tangents", "tangent_step", "sampler", "max_grid", "max_chunks", "transformer", "flow"}
WITHOUT_EFFECT |= {"joint", "vocab_size", "max_context"}
# Weights of the context stream that are not of the text path.
OF_CONTEXT = ("transformer.loras.", "token.new_", "flow.clean", "features.", "tower.")
# Setting -> the value that init_from may have instead: it lacks those weights, which change nothing at first, or
# upcycling copies them.
UPCYCLED_FROM = {"latent_weights": "shared", "expert": None, "loras": [], "encoder": None, "pool_layers": None}


def build_run(recipe: Recipe, out: Path) -> Run:
    """A run at step 0. Raises ValueError, in one line, where a part of the recipe is missing or does not fit."""
    key = Key(recipe.seed)
    tokenizer, codec, encoder = build_tokenizer(recipe), build_codec(recipe), build_encoder(recipe)
    attached = fingerprints(tokenizer, codec, encoder)  # of the encoder before it is trained
    objectives = build_objectives(recipe)
    model = build_model(recipe, tokenizer, codec, key, choose_sampler(recipe, objectives), encoder)
    check_blocks_of(recipe, objectives, model.config)
    mixture = build_mixture(recipe, key)
    mixture.held_out, more_data = build_held_out(recipe, mixture, key)
    load = partial(
        Loader,
        prepare=model.prepare,
        compose=partial(_compose, tokenizer, invokes_lora(recipe)),
        pad_id=tokenizer.control.pad,
        ends=tokenizer.ends,
        is_additive=tokenizer.own_turns,
        null_contexts=any(objective.needs_null for objective in objectives),
    )
    shape = recipe.batch.model_copy(update={"fixed": recipe.batch.fixed or recipe.compile})
    train = partial(load, mixture.document, shape=shape, key=key.fold("loader"), drop=recipe.drop)
    own = {"memo": build_memo(recipe, model, codec), "channels": 0 if codec is None else codec.spec.channels}

    def open_workers(cursors: Sequence[int], step: int, counts: Mapping[str, int]) -> WorkerLoader:
        def loader_of_worker(tickets: Tickets, num_workers: int) -> Loader:
            made = train(memo=tickets, channels=tickets.channels, stride=num_workers)
            made.counts.update({name: count // num_workers for name, count in counts.items()})
            return made

        assert codec is not None  # Recipe refuses workers without one
        alone = model.config.encoder is not None and model.config.encoder.pictures == "features"
        return WorkerLoader(loader_of_worker, codec, cursors, step, recipe.device, encoder, alone, recipe.tune_encoder)

    held_out = () if mixture.held_out is None else mixture.held_out.documents
    validation = build_validation(held_out, partial(load, **own), shape, key.fold("validation")) if held_out else None
    return Run(
        recipe=recipe,
        model=model,
        objectives=objectives,
        loader=train(**own),
        optimiser=build_optimiser(model.named_parameters(), recipe.optimiser, hidden_names(model), TOWER),
        ema=Ema(model, recipe.ema_decay),
        guard=Guard(recipe.max_nonfinite),
        out=out,
        identity={
            "recipe": recipe.model_dump(mode="json"),
            "draws": NOISE_VERSION,
            "data": mixture.fingerprint() + more_data,
            **attached,
        },
        contexts=build_contexts(recipe, model, objectives),
        target=build_target(model, objectives),
        critic=build_critic(recipe, model, objectives),
        validation=validation,
        held_out=held_out,
        open_workers=open_workers if recipe.workers else None,
    )


def build_validation(
    documents: Sequence[Document], load: Callable[..., Loader], shape: BatchConfig, key: Key
) -> Validation:
    """The loss on held-out documents, whole and in their order."""
    whole = shape.model_copy(update={"trim": 0.0, "fixed": False})
    return Validation(load(documents.__getitem__, shape=whole, key=key, end=len(documents)), key)


def build_contexts(recipe: Recipe, model: Omni, objectives: Sequence[Objective]) -> ContextCache | None:
    """The cache of contexts, where the recipe has one. ValueError for objectives that read hidden states where nothing
    of the context stream is trained, and for what it does not serve."""
    if not recipe.context_memory_mb:
        return None
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.startswith(OF_CONTEXT)]
    if trained and not invokes_lora(recipe):
        raise ValueError(
            f"context_memory_mb: {trained[0]!r} is trained, and acts everywhere in the context; freeze it with "
            "train_only, or leave context_memory_mb out"
        )
    reading = [type(one).__name__ for one in objectives if one.reads not in ("flow", "logits")]
    reading += [type(one).__name__ for one in objectives if one.reads == "logits" and not trained]
    if reading:
        raise ValueError(f"context_memory_mb has no effect with {reading[0]}, which needs a whole pass; leave it out")
    return ContextCache(model, recipe.context_memory_mb << 20, bool(trained))


def build_memo(recipe: Recipe, model: Omni, codec: Codec | None) -> LatentMemo:
    """The cache of latents, and of features where the encoder is frozen."""
    size = recipe.latent_memory_mb << 20
    if codec is None:
        return LatentMemo(lambda media: model.encode_media(media) if media else [], size)
    if recipe.tune_encoder:  # features change with every step
        return LatentMemo(codec.encode_media, size, partial(model.encode_features, as_pixels=True))
    return LatentMemo(model.encode_media, size)


def check_without_inputs(recipe: Recipe) -> None:
    """Check a recipe whose tokenizer, codec or first weights do not exist yet. ValueError as `build_run`."""
    objectives, key = build_objectives(recipe), Key(recipe.seed)
    sampler, features = choose_sampler(recipe, objectives), None if recipe.encoder is None else recipe.model.width
    channels = None if recipe.codec == NO_CODEC else 4
    config = model_config(recipe, vocab_size=512, channels=channels, sampler=sampler, features=features)
    check_blocks_of(recipe, objectives, config)
    if recipe.train_only or config.joint is not None:  # checks that need the weights or the head
        prefixes = [prefix for prefix in recipe.train_only if not (recipe.tune_encoder and prefix.startswith(TOWER))]
        freeze_all_but(Omni(config), prefixes or ("",))
    build_held_out(recipe, build_mixture(recipe, key), key)


def model_config(
    recipe: Recipe, vocab_size: int, channels: int | None, sampler: str, features: int | None = None
) -> OmniConfig:
    """The model's config.json: from [model], [heads], the tokenizer's size, the codec's channels (None: no flow head),
    and the width of an encoder's features."""
    fields = dict(recipe.heads)
    if features is not None:
        fields["encoder"] = {**fields.pop("encoder", {}), "width": features}
    fields |= {"transformer": recipe.model.model_dump(), "vocab_size": vocab_size, "sampler": sampler}
    if channels is None:
        fields["flow"] = None
    else:
        flow = {**fields.pop("flow", {}), "channels": channels}
        fields["flow"] = build(flow, FlowHeadConfig, "heads.flow").model_dump()
    return build(fields, OmniConfig, "heads")


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, codec: Codec | None, key: Key, sampler: str, encoder: Encoder | None = None
) -> Omni:
    """The model with its first weights, tokenizer, codec, encoder and preparation; frozen and compiled as the recipe
    says."""
    features = None if encoder is None else encoder.spec.width
    channels = None if codec is None else codec.spec.channels
    config = model_config(recipe, tokenizer.vocab_size, channels, sampler, features)
    model = Omni(config, key.fold("model"))
    model.tokenizer, model.codec, model.encoder, model.defaults = tokenizer, codec, encoder, recipe.generation
    model.preparation = recipe.preparation
    if recipe.tune_encoder:
        model.tune_encoder()
    model.published = {} if recipe.decoder is None else published_files(recipe.decoder)
    if recipe.preparation.size is not None:
        target_size(*recipe.preparation.size, recipe.preparation, model.limits)
    if recipe.init_from is not None:
        lacking = recipe.decoder is not None
        left = load_initial_weights(model, recipe.init_from, recipe.init_partial, lacking, recipe.upcycle)
        if left:
            begin = f"init_from {str(recipe.init_from)!r}: {len(left)} weights stay as initialised, such as {left[0]!r}"
            print(begin, file=sys.stderr)
        for difference in settings_differences(recipe.init_from, model.config):
            message = f"init_from {str(recipe.init_from)!r} has {difference}"
            if recipe.train_only:
                raise ValueError(f"{message}; frozen weights cannot adapt: use the same")
            print(message, file=sys.stderr)
        if (preparation := preparation_difference(recipe.init_from, recipe.preparation)) is not None:
            print(f"init_from {str(recipe.init_from)!r} has {preparation}", file=sys.stderr)
        if not recipe.init_partial:
            check_same_parts(recipe.init_from, tokenizer, codec, encoder=encoder)
    if recipe.train_only:
        freeze_all_but(model, recipe.train_only)
    if model.tower is not None and not any(p.requires_grad for p in model.tower.parameters()):
        raise ValueError(f"tune_encoder has no effect with train_only = {[*recipe.train_only]}; add {TOWER!r} to it")
    if recipe.text_path == "frozen":
        freeze_text_path(model, recipe.lora)
    if recipe.publish_base is not None and recipe.decoder is not None:
        model.base = base_of(recipe.decoder, recipe.publish_base, model)
    model.transformer.active_lora = recipe.lora
    if recipe.compile:
        compile_blocks(model.transformer)
    return model.to(recipe.device).train()


def build_critic(recipe: Recipe, model: Omni, objectives: Sequence[Objective]) -> Critic | None:
    """Teacher and critic of the objective that needs them; None if none does. ValueError for a teacher with another
    tokenizer or codec than `model`."""
    objective = rollout_objective(objectives)
    if objective is None:
        return None
    teacher = copy_of(model)
    if objective.teacher is not None:
        assert model.tokenizer is not None and model.codec is not None
        check_same_parts(Path(objective.teacher), model.tokenizer, model.codec, "teacher", model.encoder)
        teacher = from_pretrained(objective.teacher, device=recipe.device)
    amount = {"steps": objective.critic_steps, "rate": objective.critic_rate, "limit": recipe.max_nonfinite}
    return Critic(model, teacher, recipe.optimiser, hidden_names(model), **amount)


def freeze_all_but(model: torch.nn.Module, prefixes: Sequence[str]) -> None:
    """Give gradients only to weights whose names begin with one of `prefixes`; "*" stands for any characters.
    ValueError for a prefix that matches no name."""
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not any(fnmatchcase(name, f"{prefix}*") for name in names):
            tops = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"train_only = {prefix!r} matches no weight's name; names begin with {tops}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, f"{prefix}*") for prefix in prefixes))


def load_initial_weights(
    model: Omni, directory: Path, partial_allowed: bool, lacking_allowed: bool = False, upcycle: bool = True
) -> list[str]:
    """Load a model directory, or the averages of a checkpoint. Returns the names left as initialised.

    Separate latent weights that are not saved are upcycled (see train.upcycling), unless `upcycle` is False. Raises
    ValueError where a weight is missing, unknown or of another shape, unless `partial_allowed`; with `lacking_allowed`
    weights may be missing, except those of the text path.
    """
    if not directory.is_dir():
        raise ValueError(f"init_from {str(directory)!r} is not a directory; give a model directory or a checkpoint")
    published, own = ModelFiles(directory), model.state_dict()
    saved = published.weights(AVERAGES if AVERAGES in published else WEIGHTS)
    published.read_rest()
    if not any(name.startswith(TOWER) for name in saved):  # the encoder's own files have them
        own = {name: value for name, value in own.items() if not name.startswith(TOWER)}
    elif model.tower is None:
        raise ValueError(
            f"init_from {str(directory)!r} has a trained encoder; set tune_encoder, or publish it and use its encoder/"
        )
    saved = with_latent_weights(saved, own) if upcycle else saved
    usable = {name: v for name, v in saved.items() if name in own and own[name].shape == v.shape}
    integers = [name for name, v in usable.items() if v.is_floating_point() != own[name].is_floating_point()]
    if integers:
        name = integers[0]
        raise ValueError(f"init_from {str(directory)!r}: {name!r} is of {usable[name].dtype}, not of {own[name].dtype}")
    left = sorted(own.keys() - usable.keys())
    missing = [name for name in left if name in saved or is_text_path(name) or not lacking_allowed]
    odd = missing + sorted(saved.keys() - usable.keys())
    if not usable:
        raise ValueError(f"init_from {str(directory)!r} shares no weight with this model; use the same sizes")
    if odd and not partial_allowed:
        raise ValueError(
            f"init_from {str(directory)!r} does not fit this model in {odd[0]!r} ({len(odd)} names); "
            "use the same sizes, or init_partial=true"
        )
    model.load_state_dict({name: v.to(own[name].dtype) for name, v in usable.items()}, strict=False)
    return left


def settings_differences(directory: Path, config: OmniConfig) -> list[str]:
    """Settings that differ between `directory` and this recipe and that change no shape of a weight."""
    published, name = Published(directory), "config.json"
    if name not in published:
        return []
    saved = build(published.table(name), OmniConfig, str(directory / name))
    theirs, ours = saved.model_dump(mode="json"), config.model_dump(mode="json")
    parts = [part for part in ("transformer", "flow") if theirs[part] is not None and ours[part] is not None]
    pairs = [("", theirs, ours), *((f"{part}.", theirs[part], ours[part]) for part in parts)]
    return [
        f"{prefix}{name} = {json.dumps(a[name])}, this recipe has {json.dumps(b[name])}"
        for prefix, a, b in pairs
        for name in sorted(a.keys() - WITHOUT_EFFECT)
        if a[name] != b[name] and not (name in UPCYCLED_FROM and a[name] == UPCYCLED_FROM[name])
    ]


def preparation_difference(directory: Path, ours: Preparation) -> str | None:
    """How `directory` prepares pictures and clips; None where this recipe does the same."""
    published, name = Published(directory), "preparation.json"
    if name not in published:
        return None
    theirs = build(published.table(name), Preparation, str(directory / name))
    if theirs == ours:
        return None
    a, b = (json.dumps(one.model_dump(mode="json", exclude_none=True)) for one in (theirs, ours))
    return f"preparation = {a}, this recipe has {b}"


def build_sources(configs: Sequence[DataConfig], key: Key, origin: str) -> list[Source]:
    """The sources of a list, each keyed by `origin`, its number and its name: another order of the list changes the
    data."""
    return [
        build_source(config.name, config.options, key.fold(origin, number, config.name), f"{origin}.{number}")
        for number, config in enumerate(configs)
    ]


def build_mixture(recipe: Recipe, key: Key) -> Mixture:
    """The mixture of all training sources."""
    sources = build_sources(recipe.data, key, "data")
    return Mixture(sources, [config.weight for config in recipe.data], key.fold("data"))


def build_held_out(recipe: Recipe, mixture: Mixture, key: Key) -> tuple[HeldOut | None, list[str]]:
    """The held-out documents, and the fingerprints of validation's own sources."""
    plan = recipe.validation
    if plan is None:
        return None, []
    sources, weights = mixture.sources, [config.weight for config in recipe.data]
    if plan.data:
        sources, weights = build_sources(plan.data, key, "validation"), [config.weight for config in plan.data]
    found = hold_out(sources, weights, plan.documents, plan.share, key.fold("validation"))
    return found, [source.fingerprint() for source in sources] if plan.data else []


def build_objectives(recipe: Recipe) -> list[Objective]:
    """The objectives of the recipe, in order. ValueError names the wrong one."""
    found = []
    for number, o in enumerate(recipe.objectives):
        where, kind = f"objectives.{number} ({o.name})", OBJECTIVES.get(o.name)
        if "weight" in o.options:
            raise ValueError(f"{where}: weight stands beside the name, not among its options; move it there")
        if missing := getattr(kind, "__abstractmethods__", None):
            raise ValueError(f"{where}: {kind.__name__} must define {', '.join(sorted(missing))}")
        found.append(build({"weight": o.weight, **o.options}, kind, f"{where} options"))
    return found


def check_blocks_of(recipe: Recipe, objectives: Sequence[Objective], config: OmniConfig) -> None:
    """ValueError for an objective that cannot train what noisy blocks read, heads.blocks, and for an order of
    generation that such a model does not have."""
    for number, (o, objective) in enumerate(zip(recipe.objectives, objectives, strict=True)):
        try:
            check_blocks(objective, config.blocks, config.flow is not None and config.flow.head_depth is not None)
        except ValueError as error:
            raise ValueError(f"objectives.{number} ({o.name}) with heads.blocks: {error}") from None
    options = GenerationOptions().resolved({"tokens_per_pass": 1, **recipe.generation}, "[generation]")
    try:
        require_effect(options.picture, config.blocks)
    except ValueError as error:
        raise ValueError(f"[generation] with heads.blocks: {error}") from None


def publish_model(run: Run, directory: Path) -> Path:
    """Publish the averaged weights, with tokenizer, codec and configuration; replace an older directory. With
    publish_base, without the frozen language model."""
    dtype = published_dtype(run)
    with run.ema.applied():
        run.model.save_pretrained(directory, dtype, replace=True, base=run.model.base)
    return directory


def published_dtype(run: Run) -> torch.dtype:
    """bfloat16; float32 where bfloat16 would round a frozen text path that is published too."""
    kept = run.recipe.text_path == "frozen" and run.model.base is None
    frozen = (p for name, p in run.model.named_parameters() if kept and is_text_path(name))
    return torch.bfloat16 if all(torch.equal(p.bfloat16().to(p.dtype), p) for p in frozen) else torch.float32


def invokes_lora(recipe: Recipe) -> bool:
    """Whether the LoRA of a recipe is active in invoked turns alone."""
    return any(spec.name == recipe.lora and spec.invoked for spec in recipe.model.loras)


def _compose(tokenizer: Tokenizer, invokes: bool, document: Any, encode_media: Any) -> Any:
    """`compose` with the tokenizer first, for `partial`."""
    return compose(document, tokenizer, encode_media, invokes=invokes)
