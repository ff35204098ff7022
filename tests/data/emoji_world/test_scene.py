"""The font, the vocabulary and rendered scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omni.data.emoji_world import (
    BACKGROUNDS,
    CLASSES,
    ROW_NAMES,
    SCENE_NAMES,
    Atlas,
    Placement,
    Scene,
    find_font,
    random_scene,
    render,
)
from omni.data.emoji_world.atlas import vocabulary
from omni.data.emoji_world.names import TONES
from omni.data.emoji_world.scene import BIG_AT, counted, pair_is_heldout, row, scene_is_heldout, single, tone_is_heldout
from omni.data.emoji_world.vocabulary import LANGUAGES, MIN_DISTANCE
from omni.rng import Key


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas()


def test_a_missing_font_names_the_searched_files_and_the_way_out(tmp_path: Path) -> None:
    for call in (lambda: find_font(tmp_path / "none.ttf"), lambda: find_font(folders=(tmp_path,))):
        with pytest.raises(ValueError, match=r"name a font file") as caught:
            call()
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=r"NotoColorEmoji.*apt install"):
        find_font(folders=(tmp_path,))


def test_a_file_that_is_no_font(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    with pytest.raises(ValueError, match=r"broken\.ttf.*name a font file"):
        Atlas(tmp_path / "broken.ttf")


def test_vocabulary_is_large_unique_and_holds_every_used_name(atlas: Atlas) -> None:
    names = vocabulary()["names"]
    assert len(names) == len(set(names.values())) >= 1500
    assert list(names) == sorted(names) == list(atlas.names)
    used = {*SCENE_NAMES, *ROW_NAMES, *(m for members in CLASSES.values() for m in members), *atlas.tone_bases}
    assert used <= set(names)
    assert set(ROW_NAMES) <= set(SCENE_NAMES) and len(ROW_NAMES) == 40 and len(SCENE_NAMES) >= 120
    assert all(8 <= len(members) <= 40 and len(set(members)) == len(members) for members in CLASSES.values())
    assert len(atlas.tones) == len(TONES) * len(atlas.tone_bases) and not set(atlas.tones) & set(names)
    for language in LANGUAGES:
        assert set(vocabulary()["translations"][language]) == set(SCENE_NAMES)


def test_names_in_other_languages(atlas: Atlas) -> None:
    assert atlas.name_in("red apple", "en") == "red apple"
    assert atlas.name_in("red apple", "fr") == "pomme rouge" and atlas.name_in("cat", "es") == "gato"
    with pytest.raises(ValueError, match="did you mean 'red apple'"):
        atlas.char("red appel")


def test_no_two_pictures_are_nearly_equal(atlas: Atlas) -> None:
    """On white, at 32 pixels: the rule of the vocabulary (with the Debian Noto font)."""
    if "NotoColorEmoji" not in atlas.font_path.name:
        pytest.skip("the vocabulary was chosen with Noto Color Emoji")
    scenes = [Scene("white", (Placement(name, 0, 0, 32),)) for name in atlas.names]
    flat = torch.stack([render(scene, atlas, side=32) for scene in scenes]).flatten(1).double()
    squares = (flat**2).sum(1)
    distance = squares[:, None] + squares - 2 * flat @ flat.T
    distance.fill_diagonal_(torch.inf)
    # a margin: other versions of the font differ slightly, and integer blending rounds
    assert float((distance.min() / flat.shape[1]).sqrt()) > MIN_DISTANCE - 2


def test_sprite_shape_content_and_freshness(atlas: Atlas) -> None:
    sprite = atlas.sprite("red apple", 60)
    assert sprite.shape == (60, 60, 4) and sprite.dtype == torch.uint8
    assert sprite[..., 3].amax() == 255 and sprite[0, 0, 3] == 0
    sprite.zero_()
    assert atlas.sprite("red apple", 60).any()
    with pytest.raises(ValueError, match="at least 1 pixel"):
        atlas.sprite("red apple", 0)


def test_render_blends_exactly_and_stays_inside(atlas: Atlas) -> None:
    picture = render(single("red apple", "blue"), atlas).numpy().astype(np.float64)
    sprite = atlas.sprite("red apple", 60).numpy().astype(np.float64)
    alpha = sprite[..., 3:] / 255
    expected = np.full((64, 64, 3), BACKGROUNDS["blue"], dtype=np.float64)
    x, y = BIG_AT
    expected[y : y + 60, x : x + 60] = sprite[..., :3] * alpha + expected[y : y + 60, x : x + 60] * (1 - alpha)
    assert np.abs(picture - expected).max() <= 0.5 + 1e-9
    with pytest.raises(ValueError, match="does not fit"):
        render(Scene("white", (Placement("cat", 10, 10, 60),)), atlas)
    with pytest.raises(ValueError, match="unknown background"):
        Scene("mauve")


def test_scene_json_and_hash(atlas: Atlas) -> None:
    for scene in (single("cat", "pink"), row(("cat", "dog", "pig")), counted("star", 4)):
        back = Scene.from_json(json.loads(json.dumps(scene.to_json())))
        assert back == scene and hash(back) == hash(scene) and torch.equal(render(back, atlas), render(scene, atlas))


def test_random_scenes_are_keyed_fit_and_respect_the_split(atlas: Atlas) -> None:
    seen = set()
    for i in range(400):
        scene = random_scene(Key(3).fold(i), atlas)
        assert scene == random_scene(Key(3).fold(i), atlas) and not scene_is_heldout(scene)
        assert not any(tone_is_heldout(name) for name in scene.names if name in atlas.tones)
        assert render(scene, atlas).shape == (64, 64, 3)
        seen.add((len(scene.placements), scene.placements[0].size))
    assert seen == {(1, 60), (1, 30), (2, 30), (3, 30), (4, 30), (3, 20)}
    heldout = [random_scene(Key(3).fold(i), atlas, "heldout") for i in range(200)]
    assert all(scene_is_heldout(scene) for scene in heldout if len(set(scene.names)) > 1)
    with pytest.raises(ValueError, match="unknown split"):
        random_scene(Key(0), atlas, "test")


def test_a_tenth_of_pairs_is_heldout_in_both_orders() -> None:
    pairs = [(a, b) for i, a in enumerate(SCENE_NAMES) for b in SCENE_NAMES[:i]]
    assert 0.08 < sum(pair_is_heldout(a, b) for a, b in pairs) / len(pairs) < 0.12
    assert all(pair_is_heldout(a, b) == pair_is_heldout(b, a) for a, b in pairs[:500])
    assert not any(pair_is_heldout(a, a) for a in SCENE_NAMES)
