"""Short training runs on imported language models: the two example recipes, and a frozen text path beside each set of
weights for latents."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omni
from eval.experiments.imports.tiny import write_captioned, write_decoder
from eval.tasks.pretrained.encoders import write_checkpoint as write_tower
from omni.generation.context import append_of, run_context
from omni.generation.contract import EXACT, verify
from omni.importers.decoders import import_decoder
from omni.model import Omni
from omni.nn.cache import History
from omni.sequence.layout import TokenSpan
from train.build import build_run
from train.loop import Run, train_step
from train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "train/recipes/examples/pretrained"
EXPERT = {"latent_weights": "refine", "expert": {"width": 48, "mlp_width": 96, "layers": [0, 2]}}
LORA = [{"name": "pictures", "rank": 4}]
WEIGHT_SETS: Mapping[str, Mapping[str, Any]] = {  # name -> changes of [model]
    "shared": {"latent_weights": "shared"},
    "separate": {"latent_weights": "separate"},
    "refine": {"latent_weights": "refine"},
    "expert": EXPERT,
    "lora": {"latent_weights": "separate", "loras": LORA},
}


def imported(folder: Path, family: str = "qwen3", **settings: Any) -> Path:
    """A tiny published model, and the directory of its import."""
    out = folder / f"{family}-imported"
    if not out.is_dir():
        import_decoder(write_decoder(folder / family, family, **settings), out)
    return out


def recipe_of(name: str, folder: Path, overrides: Sequence[str], data: str | None) -> Recipe:
    """An example recipe on a tiny decoder, and on `data`, a parquet file of captioned pictures (None: squares)."""
    if data is None:
        path = folder / "squares.parquet"
        data = str(path if path.is_file() else write_captioned(path))
    own = [f"decoder={folder}", f"data.0.options.path={data}", "autocast=none", "report.save_steps=100000"]
    return load_recipe(RECIPES / f"{name}.toml", [*own, *overrides])


def run_of(recipe: Recipe, out: Path) -> Run:
    with contextlib.redirect_stderr(io.StringIO()):  # the list of new weights
        return build_run(recipe, out)


def losses_of(run: Run, steps: int) -> list[float]:
    """The losses of the first steps of a run."""
    return [float(train_step(run, run.next())["loss"]) for _ in range(steps)]


@torch.no_grad()
def text_logits(model: Omni, texts: Sequence[str], lora: str | None = None) -> list[Tensor]:
    """Logits of published ids (n, V) after every id of some texts, in one pass each; as they are, with new ids cut."""
    found = []
    assert model.tokenizer is not None
    for text in texts:
        ids = model.tokenizer.encode(text)
        history = History(model.transformer.new_pool(), lora)
        [hidden], _ = run_context(model, [append_of(history, [TokenSpan(ids, [False] * len(ids))], 0)])
        found.append(model.token.read(hidden)[:, : model.config.vocab_size - model.config.new_rows])
    return found


def frozen_rows(folder: Path, steps: int = 20, data: str | None = None) -> dict[str, tuple[float, float]]:
    """For each set of weights: the entries of text logits that differ after the steps (LoRA off), in percent, and the
    fall of the loss."""
    decoder, texts = imported(folder), ("what is this?", "draw a red square on blue, please", "x")
    wanted = text_logits(omni.from_pretrained(decoder), texts)
    rows = {}
    for name, settings in WEIGHT_SETS.items():
        recipe = recipe_of("frozen_expert", decoder, [], data)
        changes: dict[str, Any] = {"expert": None, "loras": [], **settings}
        table = recipe.model_dump(mode="json")
        table["model"] |= changes
        table |= {"lora": "pictures" if changes["loras"] else None}
        run = run_of(Recipe.model_validate(table), folder / "run")
        losses = losses_of(run, steps)
        found = text_logits(run.model.eval(), texts)
        differ = sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
        rows[name] = 100 * differ / sum(one.numel() for one in wanted), sum(losses[:5]) - sum(losses[-5:])
    return rows


@dataclass(frozen=True)
class ExampleRun:
    """A recipe of RECIPES, and the tiny models that it runs on."""

    recipe: str
    family: str
    has_encoder: bool = False


RECIPES_RUN = {
    "qwen3_expert": ExampleRun("frozen_expert", "qwen3"),
    "llama_lora_siglip": ExampleRun("lora_separate_siglip", "llama", has_encoder=True),
}


@dataclass(frozen=True)
class RecipeRow:
    """losses: of every step. start, end: means of the first and the last five. contract: the largest difference of the
    equality contract in float64, in the published model."""

    losses: Sequence[float]
    contract: float

    @property
    def start(self) -> float:
        return sum(self.losses[:5]) / 5

    @property
    def end(self) -> float:
        return sum(self.losses[-5:]) / 5


def recipe_row(name: str, folder: Path, steps: int, data: str | None) -> RecipeRow:
    """Run an example recipe, publish the model, load it, and check the contract on it."""
    example = RECIPES_RUN[name]
    decoder = imported(folder, example.family)
    overrides = [f"max_steps={steps}"]
    if example.has_encoder:
        write_tower("siglip", folder / "siglip")
        overrides.append(f"encoder={folder / 'siglip'}")
    run = run_of(recipe_of(example.recipe, decoder, overrides, data), folder / "run")
    losses = losses_of(run, steps)
    saved = run.model.save_pretrained(folder / "model", dtype=torch.float32)
    exact = [check for check in verify(omni.from_pretrained(saved)) if check.bar == EXACT]
    return RecipeRow(losses, max(check.value for check in exact))
