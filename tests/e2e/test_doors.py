"""One preparation: every entry point gives a picture equal latents, bit for bit; the bundled model names it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from PIL import ImageOps

import omni
from omni.cli import chat as cli_chat
from omni.cli import generate as cli_generate
from omni.cli import inspect as cli_inspect
from omni.cli.commands import main
from omni.codecs import Codec
from omni.codecs.autoencoders import AutoencoderCodec
from omni.config import build
from omni.document import Document, Image, Role, Text
from omni.media import save_png
from omni.media.preparation import Preparation
from omni.pretrained import BUNDLED
from train.build import build_run
from train.data.latents import LatentMemo
from train.recipe import Recipe

pytestmark = pytest.mark.skipif(not (BUNDLED / "manifest.json").is_file(), reason="there is no bundled model")


@pytest.fixture(scope="module")
def cat(model: omni.Omni) -> PillowImage.Image:
    return model.generate("draw a cat").images[0]


@pytest.fixture
def command(model: omni.Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`omni ...` in an empty folder, with the loaded model."""
    monkeypatch.chdir(tmp_path)
    for module in (cli_generate, cli_chat, cli_inspect):
        monkeypatch.setattr(module, "load_model", lambda path, device="cpu", dtype="float32": model)
    return lambda *words: main(list(words))


def answer() -> str:
    """The text of the last command's reply."""
    parts = json.loads(Path("r/reply.json").read_text())["parts"]
    return "".join(part.get("text", "") for part in parts)


def strip(cat: PillowImage.Image) -> torch.Tensor:
    """192 x 64: three cats of different colours."""
    tile = torch.from_numpy(np.array(cat.convert("RGB")))
    return torch.cat([tile, tile.roll(1, -1), 255 - tile])


def train_on(path: Path, pixels: torch.Tensor, **more: Any) -> torch.Tensor:
    """The latents (16, C) of the first picture of a run's first batch."""
    save_png(pixels, path / "strip.png")
    content = [{"type": "image", "path": "strip.png"}, {"type": "text", "text": "what is this?"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "cats"}]}
    (path / "m.jsonl").write_text(json.dumps(record) + "\n")
    sizes = {"width": 32, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    recipe = {
        "max_steps": 1, "codec": str(BUNDLED / "codec"), "model": sizes, "objectives": [{"name": "next_token"}],
        "batch": {"shapes": [{"rows": 1, "budget": 96, "refine_budget": 0}]},
        "data": [{"name": "messages", "options": {"path": str(path / "m.jsonl")}}],
        "preparation": {"resize": "letterbox", "size": [64, 64]}, **more,
    }  # fmt: skip
    run = build_run(build(recipe, Recipe, "recipe"), path / "run")
    [batch] = run.next().batches
    return batch.latents[0, :][batch.is_latent[0]][:16]


def test_every_entry_point_gives_equal_latents(
    model: omni.Omni, cat: PillowImage.Image, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python API, generate, chat, inspect, training, and training with loading processes."""
    pixels = strip(cat)
    save_png(pixels, tmp_path / "strip.png")
    [[wanted]] = model.encode_media([Image(pixels)])
    assert wanted.shape == (1, 4, 4, 64)
    seen: list[torch.Tensor] = []
    encode = Codec.encode
    monkeypatch.setattr(AutoencoderCodec, "encode", lambda self, x: seen.append(encode(self, x)) or seen[-1])
    content = [{"type": "image", "path": str(tmp_path / "strip.png")}, {"type": "text", "text": "what is this?"}]
    texts = [model.generate([{"role": "user", "content": content}]).text]
    assert command("generate", "what is this?", "--image", "strip.png", "--out", "r", "--no-show") == 0
    texts.append(answer())
    monkeypatch.setattr(sys, "stdin", io.StringIO("/image strip.png\nwhat is this?\n/save c\n"))
    assert command("chat", "--no-show") == 0
    assert command("inspect", "strip.png") == 0
    assert len(seen) == 4 and texts[0] == texts[1]
    doors = [*seen, train_on(tmp_path, pixels), train_on(tmp_path, pixels, workers=1)]
    for latents in doors:
        assert torch.equal(latents.reshape(16, 64), wanted.reshape(16, 64))


@pytest.mark.parametrize("size", [(128, 128), (48, 48), (100, 75)])
def test_a_generated_cat_is_named_in_any_size(
    size: tuple[int, int], model: omni.Omni, cat: PillowImage.Image, command: Any, tmp_path: Path
) -> None:
    picture = ImageOps.fit(cat, (size[1], size[0]))  # one scale for both directions
    picture.save(tmp_path / "cat.png")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
    assert model.generate([{"role": "user", "content": content}]).text == "cat"
    assert command("generate", "what is this?", "--image", "cat.png", "--out", "r", "--no-show") == 0
    assert answer() == "cat"


def test_squeezed_pictures_give_equal_answers(model: omni.Omni, cat: PillowImage.Image, command: Any) -> None:
    """Both entry points give the same answer, right or wrong."""
    cat.resize((75, 100)).save("cat.png")
    pixels = torch.from_numpy(np.array(cat.resize((75, 100)).convert("RGB")))
    texts = model.generate(Document((Image(pixels), Text("what is this?")))).text
    assert command("generate", "what is this?", "--image", "cat.png", "--out", "r", "--no-show") == 0
    assert answer() == texts


def test_the_bundled_preparation_is_the_letterbox_it_was_trained_with(model: omni.Omni) -> None:
    assert model.preparation == Preparation(resize="letterbox", size=(64, 64))
    for size in ((1, 1), (1, 5000), (5000, 1), (64, 64)):
        picture = Image(torch.full((*size, 3), 90, dtype=torch.uint8), Role.USER)
        assert model.prepare(picture).pixels.shape == (64, 64, 3)
        assert (model.prepare(picture) is picture) == (size == (64, 64))


def test_three_pictures_of_three_sizes_cost_three_encodes(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the API and in training: no padding, and no picture is encoded twice."""
    codec = model.codec
    assert isinstance(codec, AutoencoderCodec)
    encoded: list[int] = []
    network = codec.encode_pictures
    monkeypatch.setattr(codec, "encode_pictures", lambda x: encoded.append(len(x)) or network(x))
    sizes = [Image(torch.full((16 * n, 32, 3), 40 * n, dtype=torch.uint8)) for n in (1, 2, 3)]
    monkeypatch.setattr(model, "preparation", Preparation())
    model.encode_media(sizes)
    assert sum(encoded) == 3
    encoded.clear()
    memo = LatentMemo(model.encode_media)
    assert all(torch.equal(a, b) for [a], [b] in zip(memo.encode(sizes), memo.encode(sizes[:]), strict=True))
    assert sum(encoded) == 3
