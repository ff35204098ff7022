"""A tiny recipe (text, pictures and clips on exact pixels); a step takes a few hundredths of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omni.config import load_toml
from omni.data.emoji import EmojiWorldSource
from train.build import build_run
from train.loop import Run
from train.recipe import Recipe

TINY = """
seed = 3
max_steps = 20
codec = { kind = "pixels", patch = 16, frames_per_chunk = 2 }
ema_decay = 0.9

[model]
width = 32
depth = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16

[batch]
shapes = [{ rows = 2, budget = 96, refine_budget = 64 }, { rows = 1, budget = 256, refine_budget = 192 }]
copies = 2
trim = 0.5

[drop]
text = 0.1
images = 0.1
all = 0.1

[optimiser]
warmup_steps = 5

[[data]]
name = "emoji_world"
weight = 3.0

[[data]]
name = "moving_emoji"
options = { num_frames = 4 }

[[objectives]]
name = "next_token"

[[objectives]]
name = "flow_matching"

[[objectives]]
name = "mean_flow"

[report]
save_steps = 1000
"""


_fingerprints: dict[tuple[str, int], str] = {}


@pytest.fixture
def known_fingerprints() -> Iterator[None]:
    """Compute the fingerprint of the emoji world once per options and seed: it renders 256 documents (0.5 s).

    Tests of the fingerprint itself do not use this fixture.
    """
    compute = EmojiWorldSource.fingerprint

    def fingerprint(source: EmojiWorldSource) -> str:
        key = (source.options.model_dump_json(), source.world.seed)
        if key not in _fingerprints:
            _fingerprints[key] = compute(source)
        return _fingerprints[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmojiWorldSource, "fingerprint", fingerprint)
        yield


@pytest.fixture
def recipe_file(tmp_path: Path, known_fingerprints: None) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def make_run(recipe_file: Path, tmp_path: Path) -> Callable[..., Run]:
    def make(*overrides: str, out: str = "run") -> Run:
        return build_run(load_toml(recipe_file, overrides, Recipe), tmp_path / out)

    return make
