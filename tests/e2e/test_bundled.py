"""The bundled model end to end: it loads, passes the contract check, and answers with the right pictures in order."""

from __future__ import annotations

import pytest
import torch

import omni
from eval.metrics.emoji_judge import Judge
from omni.data.emoji_world import Atlas
from omni.data.emoji_world.documents import EmojiWorld, prompt_of
from omni.data.emoji_world.scene import Scene, single
from omni.document import Text
from omni.generation.contract import verify
from omni.generation.events import ImagePart, TextPart
from omni.generation.options import GenerationOptions
from omni.pretrained import BUNDLED
from omni.sequence.layout import LatentSpan

pytestmark = pytest.mark.skipif(not (BUNDLED / "manifest.json").is_file(), reason="there is no bundled model")


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas()


def test_contract(model: omni.Omni) -> None:
    """In float64 to 1e-10 on every processor; in float32 relative to the largest logit, 12."""
    bars = {"absolute": 1e-10, "of the largest": 2e-5, "entries": 0}
    for check in verify(model):
        assert check.holds and check.bar == bars[check.unit], check


def test_pictures_match_their_requests(model: omni.Omni, atlas: Atlas) -> None:
    """At least 7 of 8 common emoji are their own nearest neighbour among all names of the vocabulary."""
    names = ["red apple", "cat", "pizza", "banana", "rocket", "guitar", "dog", "sunflower"]
    replies = model.generate_batch([f"draw a {name}" for name in names], GenerationOptions(), seeds=range(8))
    pictures = torch.stack([reply.document.images()[-1].pixels for reply in replies])
    found = Judge(atlas).name_single(pictures, [single(name, "white") for name in names])
    assert sum(f.name == name for f, name in zip(found, names, strict=True)) >= 7


def test_a_story_alternates_text_and_pictures(model: omni.Omni) -> None:
    reply = model.generate("tell a story in 3 pictures about a cat", seed=0)
    assert [type(part) for part in reply.parts] == [TextPart, ImagePart] * 3
    assert all(part.text.strip() for part in reply.parts if isinstance(part, TextPart))


def test_text_questions_get_text(model: omni.Omni) -> None:
    for question in ("hello", "is a red apple a fruit?"):
        reply = model.generate(question)
        assert reply.text and not reply.images


def test_a_generated_picture_is_named_correctly(model: omni.Omni) -> None:
    """Generate a picture, attach it, ask for its name: both directions of the model agree."""
    picture = model.generate("draw a red apple", seed=1).images[0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}]
    assert model.generate([{"role": "user", "content": content}]).text == "red apple"


def test_codec_keeps_scenes_above_30_db(model: omni.Omni, atlas: Atlas) -> None:
    from omni.codecs.codec import psnr
    from omni.data.emoji_world import random_scene, render
    from omni.rng import Key

    scenes: list[Scene] = [random_scene(Key(1).fold("bundled", n), atlas, "heldout") for n in range(48)]
    pixels = torch.stack([render(scene, atlas) for scene in scenes])
    assert model.codec is not None
    restored = model.codec.decode(model.codec.encode(pixels))
    assert float(psnr(pixels, restored).mean()) >= 30


def test_held_out_documents_fit_the_trained_layout(model: omni.Omni, atlas: Atlas) -> None:
    """Every held-out request composes, with its pictures as blocks of 4 x 4 latents."""
    world = EmojiWorld(atlas, split="heldout")
    for index in range(24):
        document = prompt_of(world.document(index))
        spans = model.spans(document, generation_prompt=True)
        assert all(span.grid == (1, 4, 4) for span in spans if isinstance(span, LatentSpan))
        assert any(isinstance(s, Text) and s.text for s in document.segments)
