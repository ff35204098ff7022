"""Invariants of every refactoring: stored models, initial weights, the purposes of keys.

tests/e2e/test_bundled.py has the equality contract, tests/train/test_resume.py exact resume, and tests/golden answers
and losses.
"""

from __future__ import annotations

import ast
import json
import warnings
from pathlib import Path

import pytest
from torch import nn

import omni.nn.declare
from omni.checkpoint import publish
from omni.config import build
from omni.errors import RetiredKeyWarning
from omni.media.preparation import Preparation
from omni.model import Omni, OmniConfig
from omni.nn.declare import Declared
from omni.pretrained import BUNDLED
from omni.rng import Key

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
FORMAT_1 = """{
  "transformer": {
    "width": 256, "depth": 8, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "mlp_width": null,
    "rope_base": 10000.0, "norm_eps": 1e-6, "latent_weights": "refine", "modulation_eps": 1.0, "attention": null,
    "tangents": "forward", "tangent_step": null
  },
  "flow": {
    "channels": 64, "time_scale": 1.0, "max_frequency": 16.0, "num_frequencies": 32, "parametrisation": "velocity",
    "scale_input": false, "min_time": 0.05
  },
  "vocab_size": 5123, "tied_embeddings": true, "logit_cap": 12.0, "sampler": "flow_map", "max_grid": 8,
  "max_chunks": 8,
  "joint": {"head": "sequential", "length": 8, "adapter_rank": 32, "depth": null, "options": {"expansion": 1}}
}
"""
GENERATION_1 = '{"steps": 4, "picture_size": [64, 64], "told_guidance": 2.0}\n'

needs_bundled = pytest.mark.skipif(not (BUNDLED / "manifest.json").is_file(), reason="there is no bundled model")


@needs_bundled
def test_a_model_directory_of_format_1_loads(tmp_path: Path) -> None:
    """Without a preparation and a longest context, with the size of pictures and an old name among the defaults."""
    kept = [path for path in sorted(BUNDLED.rglob("*")) if path.suffix == ".safetensors" or path.parent != BUNDLED]
    files = {path.relative_to(BUNDLED).as_posix(): path.read_bytes() for path in kept if path.is_file()}
    publish(tmp_path / "old", {**files, "config.json": FORMAT_1, "generation.json": GENERATION_1})
    with pytest.warns(RetiredKeyWarning, match="old/generation.json: told_guidance is called guidance_embedding now"):
        old = omni.from_pretrained(tmp_path / "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetiredKeyWarning)
        model = omni.from_pretrained()
    assert old.preparation == Preparation(resize="letterbox", size=(64, 64)) == model.preparation
    assert old.config.model_copy(update={"max_context": 512}) == model.config
    assert {**old.defaults, "tokens_per_pass": 8} == model.defaults  # which format 1 did not name
    assert old.state_dict().keys() == model.state_dict().keys()
    assert old.generate("is a red apple a fruit?").text == model.generate("is a red apple a fruit?").text


def test_initial_weights_are_unchanged() -> None:
    """The first values of every weight and its sum of magnitudes equal those of format 1."""
    check_initial_weights(Key(5))


def check_initial_weights(key: Key) -> None:
    stored = json.loads((GOLDEN / "initial.json").read_text())
    model = Omni(build(stored["config"], OmniConfig, "initial.json"), key)
    found = dict(model.named_parameters())
    assert found.keys() == stored["weights"].keys()
    for name, (*first, total) in stored["weights"].items():
        weight = found[name].detach().double().flatten()
        assert weight[: len(first)].tolist() == pytest.approx(first, abs=2e-6), name
        assert float(weight.abs().sum()) == pytest.approx(total, rel=1e-5, abs=1e-4), name


def purposes(path: Path) -> set[str]:
    """The strings that a file folds into keys, or hands to functions that do."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("fold", "uniform_I", "noise", "keys_I"):
                found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def test_purposes_of_keys_are_unchanged() -> None:
    """A renamed purpose changes the samples of every seed. Add new purposes to the file."""
    stored = set((GOLDEN / "purposes.txt").read_text().splitlines())
    found = set().union(*(purposes(path) for top in ("omni", "train") for path in (ROOT / top).rglob("*.py")))
    assert found == stored


def test_a_changed_key_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of initial weights fails with another seed, and where the purpose of one weight has another name."""
    with pytest.raises(AssertionError, match="token|transformer"):
        check_initial_weights(Key(6))
    plain = omni.nn.declare.fill

    def renamed(parameter: nn.Parameter, declared: Declared, key: Key, name: str) -> None:
        plain(parameter, declared, key.fold("again") if name == "flow.noisy.weight" else key, name)

    monkeypatch.setattr(omni.nn.declare, "fill", renamed)
    with pytest.raises(AssertionError, match="flow.noisy.weight"):
        check_initial_weights(Key(5))
