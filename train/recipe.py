"""Recipe: everything that decides a training run, as frozen, validated data. Read from TOML with key=value overrides.

A resume needs the recipe of its checkpoint. The keys in CHANGEABLE may differ: each change is printed and recorded.
Without a change the resume is exact. With `max_minutes` the learning rate follows the clock, and a resume is not equal
to the bit: exact resume needs the length in steps (`max_steps` alone).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from omni.config import Frozen, build, read_toml
from omni.errors import RetiredKeyWarning
from omni.generation.options import RENAMED, GenerationOptions, check_defaults
from omni.media.preparation import Preparation
from omni.nn.compiled import require_compilable
from omni.nn.precision import fast_bf16, require_device
from omni.nn.transformer import TransformerConfig
from train.data.batch import BatchConfig, DropConfig
from train.decoder import PublishBase, with_decoder
from train.optim.optimiser import OptimiserConfig

# What a resume may change, as patterns of dotted keys. All other keys decide the saved weights (shapes, objectives,
# averages) or the documents that they were trained on.
CHANGEABLE = (
    *("max_steps", "max_minutes", "report.*", "generation*", "init_from", "init_partial", "latent_memory_mb"),
    *("publish_base*", "max_nonfinite", "context_memory_mb", "validation.steps", "batch.max_corrupt"),
    *("batch.min_corrupt", "workers"),
    *("ema_decay", "optimiser.*rate", "optimiser.weight_decay", "optimiser.clip", "optimiser.warmup_steps"),
    *("optimiser.decay", "optimiser.decay_fraction", "optimiser.schedule_steps", "optimiser.min_factor"),
    # These change the order of sums or the rounding, so the last bits.
    *("compile", "threads", "device", "autocast"),
)


NO_CODEC = "none"


class DataConfig(Frozen):
    """One source of the mixture: a registered name, its share, and the options of that source."""

    name: str
    weight: float = Field(1.0, gt=0)
    options: dict[str, Any] = {}


class ObjectiveConfig(Frozen):
    """One objective: a registered name, its weight in the total, and its options."""

    name: str
    weight: float = Field(1.0, gt=0)
    options: dict[str, Any] = {}


class ValidationConfig(Frozen):
    """The loss on held-out documents (train.data.held_out), every `steps` steps and at the end.

    share: of the records of each source, by a keyed hash; of a generated source, documents beyond those of training.
    data: separate sources instead. Training skips every held-out document, also where it occurs again.
    """

    share: float | None = Field(None, gt=0, le=0.5)
    data: tuple[DataConfig, ...] = ()
    steps: int = Field(200, ge=1)
    documents: int = Field(256, ge=1, le=100_000, description="at most, over all sources")

    @model_validator(mode="after")
    def _one_of_two(self) -> ValidationConfig:
        if (self.share is None) == (not self.data):
            raise ValueError("give a share of the training data, or data of its own: share = 0.01, or data = [...]")
        return self


class ReportConfig(Frozen):
    """How often, in steps, the run logs, saves and writes sample sheets; none of it changes the numbers."""

    log_steps: int = Field(10, ge=1)
    save_steps: int = Field(200, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints kept")
    sheet_steps: int = Field(0, ge=0, description="steps between sample sheets; 0: none")
    sheet_pictures: int = Field(8, ge=1, le=64)
    sheet_sampling_steps: int = Field(8, ge=1)
    tensorboard: bool = False


class Recipe(Frozen):
    """See the head of this file. Paths are relative to the current directory."""

    kind: Literal["model"] = "model"
    seed: int = Field(0, ge=0)
    max_steps: int = Field(ge=1)
    max_minutes: float | None = Field(None, gt=0)
    device: str = "cpu"
    threads: int = Field(1, ge=1, le=1024)
    workers: int = Field(
        0, ge=0, le=256, description="data-loading workers, see train.data.workers; 0: the training process loads"
    )
    autocast: Literal["auto", "bf16", "none"] = Field("auto", description="auto: bf16 where the device is fast at it")
    compile: bool = Field(False, description="compile the layers: faster steps after minutes of compiling")
    tokenizer: str = Field("bytes", description='directory of a tokenizer, or "bytes"')
    codec: str | dict[str, Any] = Field(
        description='directory of a codec, or the table of one without weights; "none": a model of text alone'
    )
    codec_options: dict[str, Any] = Field({}, description="keys of its configuration that replace those of a directory")
    codec_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    decoder: Path | None = Field(
        None, description="imported language model to build on: its tokenizer, its weights, and what [model] leaves out"
    )
    text_path: Literal["tuned", "frozen"] = Field(
        "tuned",
        description="frozen: the text weights and the published ids stay; new ids, LoRA and latents are trained",
    )
    lora: str | None = Field(None, description="adapter of [model] loras to train with; needs text_path = frozen")
    publish_base: PublishBase | None = Field(
        None, description="leave the frozen language model out of the published model: true, or where it can be found"
    )
    upcycle: bool = Field(True, description="latents' own weights that are not saved start as copies of the text's")
    encoder: str | None = Field(
        None, description="directory of a picture encoder, or of a transformers checkpoint with one; see heads.encoder"
    )
    encoder_options: dict[str, Any] = Field({}, description="options of the encoder, for a transformers checkpoint")
    tune_encoder: bool = Field(False, description="train the encoder, too, at optimiser.encoder_rate")
    init_from: Path | None = Field(None, description="model directory or checkpoint whose weights to start from")
    init_partial: bool = Field(False, description="allow init_from to lack weights, or to have others")
    train_only: tuple[str, ...] = Field((), description="train only weights with these prefixes (* is any text)")
    ema_decay: float = Field(0.999, ge=0, lt=1)
    max_nonfinite: int = Field(10, ge=1, description="non-finite steps in a row that stop the run")
    latent_memory_mb: int = Field(512, ge=1)
    context_memory_mb: int = Field(
        0, ge=0, description="kept keys and values of prompts of a frozen text path, see train.context_cache; 0: none"
    )
    model: TransformerConfig
    heads: dict[str, Any] = Field({}, description="further fields of the model's config.json")
    batch: BatchConfig
    drop: DropConfig = DropConfig()
    preparation: Preparation = Field(Preparation(), description="of pictures and clips, stored with the model")
    optimiser: OptimiserConfig = OptimiserConfig()
    data: tuple[DataConfig, ...] = Field(min_length=1)
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    generation: dict[str, Any] = Field({}, description="default generation options stored with the model")
    report: ReportConfig = ReportConfig()
    validation: ValidationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, data: Any) -> Any:
        """`coupling` was a key of format 1: false has no effect, true is no longer supported."""
        if not isinstance(data, dict) or "coupling" not in data:
            return data
        if data["coupling"]:
            raise ValueError(
                f'coupling = {data["coupling"]!r} is no longer supported; leave it out (pairing = "transport" of an '
                "objective pairs noise with data in another way)"
            )
        warnings.warn("coupling is no longer a key of recipes; remove it", RetiredKeyWarning, stacklevel=2)
        return without_retired(data)

    @model_validator(mode="before")
    @classmethod
    def _of_a_decoder(cls, data: Any) -> Any:
        """What the recipe leaves out is that of the decoder: see train.decoder."""
        if not isinstance(data, dict) or data.get("decoder") is None:
            return data
        return with_decoder(data)

    @field_validator("publish_base", mode="before")
    @classmethod
    def _may_be_false(cls, given: Any) -> Any:
        return None if given is False else given

    @field_validator("generation")
    @classmethod
    def _can_be_generated(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The options under their present names. ValueError for options that no request may have."""
        checked = check_defaults(given, "[generation]")
        GenerationOptions().resolved({"tokens_per_pass": 1, **checked}, "[generation]")
        return checked

    @field_validator("heads")
    @classmethod
    def _not_decided_elsewhere(cls, given: dict[str, Any]) -> dict[str, Any]:
        flow = given.get("flow", {})
        if not isinstance(flow, dict):
            raise ValueError(f"flow must be a table, got {flow!r}")
        for name in ("transformer", "vocab_size"):
            if name in given:
                raise ValueError(f"{name!r} has no effect here: [model] and the tokenizer decide it; leave it out")
        if "channels" in flow:
            raise ValueError("'flow.channels' has no effect here: the codec decides it; leave it out")
        encoder = given.get("encoder")
        if isinstance(encoder, dict) and "width" in encoder:
            raise ValueError("'encoder.width' has no effect here: the encoder decides it; leave it out")
        return given

    @field_validator("device")
    @classmethod
    def _is_there(cls, name: str) -> str:
        return require_device(name)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives must have different names, got {names}")
        if self.compile:
            require_compilable(self.model)
        if self.lora is not None and self.lora not in [spec.name for spec in self.model.loras]:
            raise ValueError(
                f"lora = {self.lora!r} is not one of [model] loras; add it there: {{ name = {self.lora!r} }}"
            )
        if self.lora is not None and self.text_path == "tuned":
            raise ValueError(f"lora = {self.lora!r} adapts frozen text weights; set text_path = 'frozen'")
        if self.publish_base is not None and (self.decoder is None or self.text_path == "tuned"):
            raise ValueError(
                "publish_base leaves a frozen language model out; it needs decoder and text_path = 'frozen'"
            )
        if self.encoder is None and ("encoder" in self.heads or self.encoder_options or self.tune_encoder):
            raise ValueError(
                "heads.encoder, encoder_options and tune_encoder have no effect without encoder; give its directory"
            )
        usual = OptimiserConfig.model_fields["encoder_rate"].default
        if not self.tune_encoder and self.optimiser.encoder_rate != usual:
            raise ValueError(
                f"optimiser.encoder_rate = {self.optimiser.encoder_rate} has no effect on a frozen encoder; set "
                "tune_encoder, or leave it out"
            )
        if self.context_memory_mb and self.text_path != "frozen":
            raise ValueError(
                f"context_memory_mb = {self.context_memory_mb} keeps what a frozen text path computes; set text_path = "
                "'frozen', or leave it out"
            )
        if self.codec == NO_CODEC:
            self._check_text_alone()
        if self.codec_options and not isinstance(self.codec, str):
            raise ValueError("codec_options have no effect on the table of a codec; put them into the table")
        if self.drop.text + self.drop.images + self.drop.all > 1:
            raise ValueError(f"drop probabilities must not exceed 1 together, got {self.drop.model_dump()}")
        return self

    def _check_text_alone(self) -> None:
        """ValueError for settings that have no effect without a codec."""
        idle = {"codec_options": self.codec_options, "heads.flow": self.heads.get("flow"), "workers": self.workers}
        if given := [name for name, value in idle.items() if value]:
            raise ValueError(f'{given[0]} has no effect with codec = "none", a model of text alone; leave it out')

    @property
    def autocasts(self) -> bool:
        """Whether the forward pass runs under bfloat16 autocast."""
        return fast_bf16(self.device) if self.autocast == "auto" else self.autocast == "bf16"

    def fraction(self, step: int, seconds: float) -> float:
        """How much of the run is done, in [0, 1]: by steps or by the clock, whichever is larger."""
        return fraction_of(self.max_steps, self.max_minutes, step, seconds)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe's file with overrides, as omni.config.load_toml. Options of [generation] may be flat or in their groups
    in either: an override replaces the file's."""
    data = with_flat_generation(read_toml(path))
    groups = "|".join(GenerationOptions.groups())
    flat = [re.sub(rf"^\s*generation\s*\.\s*(?:{groups})\s*\.", "generation.", text) for text in overrides]
    return build(data, Recipe, str(path), flat)


def with_flat_generation(table: dict[str, Any]) -> dict[str, Any]:
    """A table of recipe keys with the options of its [generation] out of their groups. ValueError for one given
    twice."""
    given = table.get("generation")
    if not isinstance(given, Mapping):
        return table
    return {**table, "generation": GenerationOptions.flatten(given, "[generation]: ")}


# Names in recipes of earlier versions. Saved recipes have them: never remove one.
RENAMED_OBJECTIVES = {"straight": "rectified_jumps"}  # old name -> new name
RENAMED_OPTIONS = {  # objective -> old option -> new option
    "rectified_jumps": {"told_guidance": "guidance_embedding"},
    "shortcut": {"tell_guidance": "embed_guidance"},
    "drifting": {"floor": "min_affinity"},
    "moment_matching": {"gap_floor": "kernel_gap"},
}


RENAMED_VALUES = {("consistency", "clock", "house"): "flow"}  # (objective, option, old value) -> new value


def without_retired(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON of a saved recipe without the keys that earlier versions had and that changed nothing; others under their
    new names."""
    kept = {name: value for name, value in data.items() if name != "coupling" or value}
    if isinstance(options := kept.get("generation"), dict):
        kept["generation"] = {RENAMED.get(name, name): value for name, value in options.items()}
    if isinstance(objectives := kept.get("objectives"), list | tuple):
        kept["objectives"] = [_renamed_objective(one) if isinstance(one, dict) else one for one in objectives]
    return kept


def _renamed_objective(data: Mapping[str, Any]) -> dict[str, Any]:
    """An objective of a saved recipe with its name and options as they are now."""
    out = {**data, "name": RENAMED_OBJECTIVES.get(data.get("name", ""), data.get("name"))}
    if isinstance(options := data.get("options"), dict):
        renamed = RENAMED_OPTIONS.get(out["name"], {})
        found = {renamed.get(name, name): value for name, value in options.items()}
        new = {name: RENAMED_VALUES.get((out["name"], name, str(value)), value) for name, value in found.items()}
        out["options"] = new
    return out


def fraction_of(max_steps: int, max_minutes: float | None, step: int, seconds: float) -> float:
    """`Recipe.fraction` of a run of that length."""
    done = step / max_steps
    if max_minutes is not None:
        done = max(done, seconds / (60 * max_minutes))
    return min(done, 1.0)
