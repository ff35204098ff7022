"""Training of picture codecs on emoji scenes:  python -m train RECIPE.toml [key=value ...]  (kind = "codec").

Reads a recipe (`train/recipes/bundled/codec.toml` is one), trains the autoencoder that it describes, and writes into
the output directory: recipe.json, metrics.jsonl, samples.png (originals above their reconstructions),
state/step-XXXXXXXX/ (for exact resume: run the same command again) and codec/, the finished codec (bf16 weights of the
moving average, latents normalised over training pictures). Locks, signals, damaged states and steps that are not finite
are as in train/loop.py; keys in CHANGEABLE may be others when it is resumed. Shapes: pictures (B, 3, H, W) in [-1, 1],
raw latents (B, C, h, w), all channels last in memory. Does not train the transformer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from omni.checkpoint import load_tensors, publish, read_bytes
from omni.codecs import AutoencoderCodec, codecs, load_codec, psnr
from omni.codecs.autoencoders import to_pictures, to_pixels
from omni.config import Frozen, canonical_json, parse_json
from omni.data.emoji_world import Atlas, random_scene, render
from omni.nn.precision import fast_bf16
from omni.rng import Key
from train import checkpoint as state
from train.guard import Guard, TooManyNonFinite
from train.metrics import drop_from, json_row
from train.optim.ema import Ema
from train.optim.kernels import KernelOptimiser
from train.optim.schedule import fall, rise

# Names of files in a checkpoint, and its kind in the manifest: never change them.
STATE, RECIPE, KIND = "state.safetensors", "recipe.json", "codec training state"
KEEP = 2  # checkpoints that stay
# Keys of the recipe that a resume may change.
CHANGEABLE = (
    *("steps", "stop_step", "learning_rate", "weight_decay", "warmup_steps", "ema_decay", "max_nonfinite"),
    *("statistics_pictures", "eval_every", "eval_pictures", "final_pictures", "save_every", "init_from"),
)


class CodecRecipe(Frozen):
    """A codec's training run; `train/recipes/bundled/codec.toml` explains the keys. `init_from`: a codec directory."""

    kind: Literal["codec"] = "codec"
    seed: int = 0
    steps: int = Field(ge=1)
    stop_step: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    latent_noise: float = Field(default=0.0, ge=0)
    latent_penalty: float = Field(default=0.0, ge=0)
    absolute_weight: float = Field(default=0.5, ge=0)
    statistics_pictures: int = Field(default=5000, ge=1)
    eval_every: int = Field(default=150, ge=1)
    eval_pictures: int = Field(default=192, ge=1)
    final_pictures: int = Field(default=1000, ge=1)
    save_every: int = Field(default=300, ge=1)
    max_nonfinite: int = Field(default=10, ge=1)
    init_from: str | None = None
    train_encoder: bool = True
    font: str | None = None
    codec: dict[str, Any]

    @property
    def last_step(self) -> int:
        """Where the run ends: the learning rate's schedule may be longer."""
        return min(self.steps, self.stop_step or self.steps)

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.stop_step is not None and self.stop_step > self.steps:
            raise ValueError(f"stop_step = {self.stop_step} is beyond steps = {self.steps}; lower it or leave it out")
        if not self.train_encoder and not self.init_from:
            raise ValueError("train_encoder = false needs init_from, the codec whose encoder is kept")
        return self


class SceneSource:
    """Pictures of emoji scenes by index: a pure function of (seed, split, index)."""

    def __init__(self, seed: int, split: str, font: str | None = None) -> None:
        self.atlas = Atlas(font)
        self.key = Key(seed).fold("codec scenes")
        self.split = split

    def pixels(self, start: int, count: int) -> Tensor:
        """Pictures start .. start + count - 1: uint8 (count, 64, 64, 3)."""
        scenes = (random_scene(self.key.fold(i), self.atlas, self.split) for i in range(start, start + count))
        return torch.stack([render(scene, self.atlas) for scene in scenes])


def learning_rate_at(step: int, recipe: CodecRecipe) -> float:
    """Linear warm-up, then linear decay to zero."""
    return recipe.learning_rate * rise(step, recipe.warmup_steps) * fall(step / recipe.steps, "linear")


def loss_terms(codec: AutoencoderCodec, pictures: Tensor, recipe: CodecRecipe, key: Key) -> dict[str, Tensor]:
    """Reconstruction through noisy (and, for FSQ, quantised) latents; scalars: loss, rmse, absolute, spread.

    The root mean square error is taken per picture, between mean square error and PSNR (its logarithm): hard
    pictures still count, easy ones keep improving. Noise makes the decoder forgive a generator's small errors.
    """
    latents = codec.encode_pictures(pictures)
    spread = (latents.var((0, 2, 3), keepdim=True) + 1e-6).sqrt()
    centre = latents.mean((0, 2, 3))
    received = codec.quantise(latents)
    if recipe.latent_noise:  # the deviation carries gradient: inflating the latents does not outgrow the noise
        level = key.fold("level").uniform((len(pictures), 1, 1, 1)) * recipe.latent_noise
        received = received + level * spread * key.fold("noise").normal(tuple(latents.shape))
    error = codec.decode_pictures(received) - pictures
    square = error.square().mean((1, 2, 3))
    rmse = (square + 1e-5).sqrt().mean()
    absolute = error.abs().mean()
    penalty = (spread - 1).square().mean() + centre.square().mean()
    loss = rmse + recipe.absolute_weight * absolute + recipe.latent_penalty * penalty
    return {"loss": loss, "rmse": rmse.detach(), "absolute": absolute.detach(), "spread": spread.mean().detach()}


class CodecRun:
    """One training run: state, step, evaluation, and the files of its output directory."""

    def __init__(self, recipe: CodecRecipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.key = Key(recipe.seed).fold("codec")
        self.keeps_latents = False  # only the decoder is trained: the latents stay those of init_from, to the bit
        self.codec = self._build()
        self.module = self.codec.module.to(memory_format=torch.channels_last).train()
        self.optimiser = KernelOptimiser(self.module, recipe.weight_decay)
        self.ema = Ema(self.module, recipe.ema_decay, start=11)
        self.step = 0
        self.guard = Guard(recipe.max_nonfinite)
        self.changes: list[state.Change] = []
        self.train_scenes = SceneSource(recipe.seed, "train", recipe.font)
        self.heldout_scenes = SceneSource(recipe.seed, "heldout", recipe.font)

    def _build(self) -> AutoencoderCodec:
        """The codec with fresh weights, or those of init_from, its encoder frozen without train_encoder."""
        family = codecs.get(self.recipe.codec.get("kind", "autoencoder"))
        if not issubclass(family, AutoencoderCodec):
            raise ValueError(f"[codec] kind = {self.recipe.codec['kind']!r} has no weights to train")
        codec = family.initialised(self.recipe.codec, "[codec]", self.key.fold("weights"))
        if self.recipe.init_from:
            source = load_codec(self.recipe.init_from)
            if not isinstance(source, AutoencoderCodec):
                raise ValueError(f"init_from = {self.recipe.init_from!r} is no autoencoder but {source.spec.name!r}")
            codec.copy_from(source)
            if not self.recipe.train_encoder:
                self.keeps_latents = type(source) is family
                for part in codec.encoder_parts() if self.keeps_latents else AutoencoderCodec.encoder_parts(codec):
                    part.requires_grad_(False)
        codec.precision = "bfloat16" if fast_bf16() else "float32"
        return codec

    def train_step(self) -> dict[str, float]:
        """One optimiser step; returns its scalars. One that is not finite changes no weight (see train.guard)."""
        recipe = self.recipe
        pixels = self.train_scenes.pixels(self.step * recipe.batch_size, recipe.batch_size)
        terms = loss_terms(self.codec, to_pictures(pixels), recipe, self.key.fold("step", self.step))
        terms["loss"].backward()
        norm = self.optimiser.clip()
        pictures = range(self.step * recipe.batch_size, (self.step + 1) * recipe.batch_size)
        if self.guard.accepts(self.step, terms["loss"].item(), norm.item(), pictures):
            self.optimiser.step(learning_rate_at(self.step, recipe))
            self.ema.update(self.step)  # the decay warms up with steps, those that are left out among them
        self.optimiser.zero_grad()
        self.step += 1
        return {name: value.item() for name, value in terms.items()} | {"gradient_norm": norm.item()}

    def evaluate(self, count: int) -> dict[str, float]:
        """Mean PSNR (dB) of held-out pictures with the averaged weights: clean, and latents with 15 % noise."""
        clean, noisy = [], []
        with self.ema.applied(), torch.no_grad():
            for start in range(0, count, 64):
                pixels = self.heldout_scenes.pixels(start, min(64, count - start))
                latents = self.codec.encode_pictures(to_pictures(pixels))
                clean.append(psnr(pixels, to_pixels(self.codec.decode_pictures(self.codec.quantise(latents)))))
                noise = self.key.fold("eval", start).normal(tuple(latents.shape))
                spread = latents.std((0, 2, 3), keepdim=True)
                shaken = self.codec.quantise(latents + 0.15 * spread * noise)
                noisy.append(psnr(pixels, to_pixels(self.codec.decode_pictures(shaken))))
        return {"psnr": torch.cat(clean).mean().item(), "psnr_noise_15": torch.cat(noisy).mean().item()}

    # ---------------------------------------------------------------------------------------------- files

    def save(self) -> None:
        """Publish everything that exact resume needs as state/step-XXXXXXXX; the last KEEP of them stay."""
        tensors = {f"average.{name}": value for name, value in self.ema.averages.items()}
        tensors |= {f"live.{name}": p.detach() for name, p in self.module.named_parameters()}
        tensors |= {f"optimiser.{_dotted(name)}": value for name, value in self.optimiser.state_tensors().items()}
        tensors["step"] = torch.tensor(self.step)
        limit = self.guard.limit
        tensors["nonfinite"] = torch.tensor([self.guard.num_skipped, self.guard.num_in_row % limit])
        folder = self.out / "state"
        files = {STATE: tensors, RECIPE: canonical_json(self.recipe)}
        publish(folder / f"step-{self.step:08d}", files, info={"kind": KIND, "step": self.step}, replace=True)
        state.remove_older(folder, self.step, KEEP)

    def resume(self, report: Callable[[str], None] = print) -> bool:
        """Continue from the newest intact state, if there is one; ValueError if it is another recipe's. What this
        recipe has otherwise is said, and kept in `changes`."""
        if not state.saved_steps(self.out / "state"):
            return False
        directory = state.newest(self.out / "state", report, KIND)
        saved = parse_json(read_bytes(directory / RECIPE), str(directory / RECIPE))
        own = json.loads(canonical_json(self.recipe))
        self.changes = state.compare({"recipe": {**own, **saved}}, {"recipe": own}, CHANGEABLE, directory)
        tensors = load_tensors(directory / STATE)
        part = {
            prefix: {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            for prefix in ("average.", "live.", "optimiser.")
        }
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(part["live."][name])
        self.step = int(tensors["step"])
        self.ema.load(part["average."], self.step)
        self.optimiser.load_state_tensors({name.replace(".", "/"): v for name, v in part["optimiser."].items()})
        self.guard.num_skipped, self.guard.num_in_row = tensors["nonfinite"].tolist()
        report(f"resumed {directory} at step {self.step} of {self.recipe.last_step}")
        for change in self.changes:
            report(f"changed: {change}")
        was = learning_rate_at(self.step, self.recipe.model_copy(update={c.key: c.was for c in self.changes}))
        if was != (now := learning_rate_at(self.step, self.recipe)):
            report(f"the learning rate of step {self.step} is {now:.3g}, by the saved recipe it was {was:.3g}")
        return True

    def publish(self, directory: Path) -> None:
        """Write the averaged weights as a codec directory, its latents normalised over training pictures."""
        with self.ema.applied():
            if not self.keeps_latents:
                count = self.recipe.statistics_pictures
                self.codec.normalise_over(
                    self.train_scenes.pixels(start, min(64, count - start)) for start in range(0, count, 64)
                )
            self.codec.save(directory, replace=True)

    def sample_sheet(self) -> None:
        """samples.png: 16 held-out pictures in pairs of rows, the original above its reconstruction."""
        pixels = self.heldout_scenes.pixels(0, 16)
        with self.ema.applied(), torch.no_grad():
            latents = self.codec.quantise(self.codec.encode_pictures(to_pictures(pixels)))
            restored = to_pixels(self.codec.decode_pictures(latents))
        rows = [torch.cat(list(part[i : i + 8]), dim=1) for i in (0, 8) for part in (pixels, restored)]
        Image.fromarray(torch.cat(rows).numpy()).resize((1536, 768), Image.Resampling.NEAREST).save(
            self.out / "samples.png"
        )


def _dotted(name: str) -> str:
    """`<part>/<number>/<slot>` with dots, as checkpoints of codecs have it."""
    return name.replace("/", ".")


def train(
    recipe: CodecRecipe, out: Path, stop_requested: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Train to the end (resuming from `out` if it holds a state), publish out/codec, return the final PSNR. None where
    `stop_requested` ended it before; the state is saved then, and where too many steps are not finite."""
    run = CodecRun(recipe, out)
    out.mkdir(parents=True, exist_ok=True)
    run.resume(lambda line: print(line, file=sys.stderr, flush=True))
    (out / RECIPE).write_text(canonical_json(recipe) + "\n", encoding="utf-8")
    drop_from(out / "metrics.jsonl", run.step + 1)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:

        def record(row: dict[str, Any], shown: bool = True) -> None:
            row = {"step": run.step, "pictures": run.step * recipe.batch_size, **row}
            if shown:
                print(
                    json_row({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                    end="",
                    flush=True,
                )
            metrics.write(json_row(row))
            metrics.flush()

        for change in run.changes:
            record({"event": "recipe changed", **asdict(change)}, shown=False)
        started = time.perf_counter()
        try:
            _train(run, record, stop_requested)
        except TooManyNonFinite:
            run.save()
            raise
        run.save()
        if run.step < recipe.last_step:
            print(f"stopped: saved at step {run.step}; run again to continue", file=sys.stderr)
            return None
        final = run.evaluate(recipe.final_pictures)
        record({"final": True, **final, "seconds": time.perf_counter() - started})
    run.sample_sheet()
    run.publish(out / "codec")
    return final


def _train(run: CodecRun, record: Callable[[dict[str, Any]], None], stop_requested: Callable[[], bool]) -> None:
    """The steps, until the last one or a stop."""
    recipe = run.recipe
    started, first, seconds_eval = time.perf_counter(), run.step, 0.0
    while run.step < recipe.last_step and not stop_requested():
        skipped = run.guard.num_skipped
        terms = run.train_step()
        if run.guard.num_skipped > skipped:
            record({"event": "not finite", **terms})
        elif run.step % 25 == 0 or run.step == recipe.last_step:
            seconds = time.perf_counter() - started - seconds_eval
            record({**terms, "pictures_per_second": (run.step - first) * recipe.batch_size / seconds})
        if run.step % recipe.eval_every == 0:
            before = time.perf_counter()
            record(run.evaluate(recipe.eval_pictures))
            run.sample_sheet()
            seconds_eval += time.perf_counter() - before
        if run.step % recipe.save_every == 0:
            run.save()
