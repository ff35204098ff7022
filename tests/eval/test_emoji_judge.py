"""The judge on pictures with known content: true renders, wrong ones, averaged ones, blurred ones."""

from __future__ import annotations

import pytest
import torch

from eval.metrics.emoji_judge import (
    MAX_SHARP,
    Judge,
    calibrate,
    picture_distance,
    slots_of,
    small_layouts,
)
from omni.data.emoji_world.classes import CLASSES
from omni.data.emoji_world.objects import ROW_NAMES, SCENE_NAMES
from omni.data.emoji_world.scene import BACKGROUNDS, CENTRE, PAIR_SLOTS, Scene, render, row, single, small_objects
from omni.rng import Key

NUM = 200


def pictures_of(judge: Judge, scenes: list[Scene]) -> torch.Tensor:
    return torch.stack([render(scene, judge.atlas) for scene in scenes])


def mean(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return ((first.float() + second.float()) / 2).round().to(torch.uint8)


def random_pairs(key: Key, num: int = NUM) -> list[tuple[Scene, Scene]]:
    """Two-object scenes, and the same with the objects exchanged."""
    draw = key.python()
    pairs = []
    for _ in range(num):
        names, slots, ground = draw.sample(SCENE_NAMES, 2), draw.choice(PAIR_SLOTS), draw.choice(list(BACKGROUNDS))
        pairs.append((small_objects(names, slots, ground), small_objects(names[::-1], slots, ground)))
    return pairs


def test_templates_are_the_renderer_on_every_background(judge: Judge) -> None:
    names = judge.atlas.names[::300]
    for ground in BACKGROUNDS:
        scenes = [single(name, ground) for name in names]
        found = judge.name_single(pictures_of(judge, scenes), scenes)
        assert [f.name for f in found] == list(names)
        assert max(f.distance for f in found) < 1.0  # rounding to 8 bits, and nothing else


def test_true_single_renders_are_named(judge: Judge) -> None:
    draw = Key(1).python()
    scenes = [single(draw.choice(judge.atlas.names), draw.choice(list(BACKGROUNDS))) for _ in range(NUM)]
    pictures = pictures_of(judge, scenes)
    noise = torch.randn(pictures.shape, generator=Key(2).generator()) * 10
    for shown in (pictures, (pictures + noise).clamp(0, 255).to(torch.uint8)):
        found = judge.name_single(shown, scenes)
        right = [f.name == scene.names[0] for f, scene in zip(found, scenes, strict=True)]
        assert sum(right) >= 0.99 * NUM
        assert judge.backgrounds(shown) == [scene.background for scene in scenes]
        assert sum(f.distance <= MAX_SHARP for f in found) >= 0.99 * NUM


def test_wrong_single_renders_are_wrong(judge: Judge) -> None:
    draw = Key(3).python()
    asked = [single(draw.choice(judge.atlas.names), draw.choice(list(BACKGROUNDS))) for _ in range(NUM)]
    shown = [single(draw.choice(judge.atlas.names), scene.background) for scene in asked]
    found = judge.name_single(pictures_of(judge, shown), asked)
    for f, a, s in zip(found, asked, shown, strict=True):
        assert (f.name == a.names[0]) == (a == s)


def test_means_of_members_are_hardly_ever_sharp_and_clear(judge: Judge) -> None:
    """The exceptions look like a third member: the mean of a red and a green heart is a brown one."""
    draw = Key(4).python()
    groups = [draw.sample(members, number) for members in CLASSES.values() for number in (2, 2, 2, 2, 3, 7)]
    shown = torch.stack(
        [
            torch.stack([render(single(n), judge.atlas) for n in names]).float().mean(0).to(torch.uint8)
            for names in groups
        ]
    )
    readings = judge.read(shown, [slots_of(single("cat"))] * len(groups), judge.atlas.names)
    assert sum(reading.clear and reading.worst <= MAX_SHARP for reading in readings) <= 0.03 * len(readings)
    assert sum(reading.clear for reading in readings) <= 0.08 * len(readings)


def test_scenes_are_read_and_exchanged_or_averaged_ones_are_not(judge: Judge) -> None:
    pairs = random_pairs(Key(5))
    true = pictures_of(judge, [first for first, _ in pairs])
    exchanged = pictures_of(judge, [second for _, second in pairs])
    slots = [slots_of(first) for first, _ in pairs]
    readings = judge.read(true, slots, SCENE_NAMES)
    right = [r.scene == first and r.clear for r, (first, _) in zip(readings, pairs, strict=True)]
    assert sum(right) >= 0.99 * NUM
    wrong = judge.read(exchanged, slots, SCENE_NAMES)
    assert not any(r.scene == first for r, (first, _) in zip(wrong, pairs, strict=True))
    assert all(r.scene == second for r, (_, second) in zip(wrong, pairs, strict=True))
    averaged = judge.read(torch.stack([mean(a, b) for a, b in zip(true, exchanged, strict=True)]), slots, SCENE_NAMES)
    assert sum(r.clear for r in averaged) <= 0.01 * NUM


def test_an_object_too_many_or_missing_or_another_background_is_wrong(judge: Judge) -> None:
    asked = small_objects(("cat", "dog"), PAIR_SLOTS[0], "pink")
    one = single("cat", "pink", CENTRE)
    three = small_objects(("cat", "dog", "sun"), (*PAIR_SLOTS[0], (17, 1)), "pink")
    blue = small_objects(("cat", "dog"), PAIR_SLOTS[0], "blue")
    missing = Scene("pink", asked.placements[:1])
    shown = pictures_of(judge, [asked, one, three, blue, missing])
    readings = judge.read(shown, [slots_of(asked)] * 5, SCENE_NAMES)
    assert [r.clear and r.scene == asked for r in readings] == [True, False, False, False, False]
    assert readings[3].scene == blue and readings[4].scene == missing


def test_a_pale_remainder_of_an_edit_is_found(judge: Judge) -> None:
    """A cloud on gray is 8 from its background: only its slot shows that an edit left it there."""
    before = small_objects(("cat", "cloud"), PAIR_SLOTS[0], "gray")
    after = Scene("gray", before.placements[:1])
    shown = pictures_of(judge, [before, after])
    readings = judge.shows(shown, [after] * 2, [before] * 2)
    assert [r.clear and r.scene == after for r in readings] == [False, True]
    assert [r.clear and r.scene == after for r in judge.shows(shown, [after] * 2)] == [True, True]
    moved = single("cat", "pink", PAIR_SLOTS[1][0])  # overlaps the slot it leaves: that one is not read
    [reading] = judge.shows(pictures_of(judge, [moved]), [moved], [single("cat", "pink", CENTRE)])
    assert reading.scene == moved


def test_rows_of_three_are_read(judge: Judge) -> None:
    draw = Key(6).python()
    scenes = [row(draw.sample(ROW_NAMES, 3), draw.choice(list(BACKGROUNDS))) for _ in range(60)]
    readings = judge.read(pictures_of(judge, scenes), [slots_of(s) for s in scenes], ROW_NAMES)
    assert all(r.clear and r.scene == scene for r, scene in zip(readings, scenes, strict=True))


def test_open_places_are_found(judge: Judge) -> None:
    draw = Key(7).python()
    layouts = small_layouts(2)
    for _ in range(20):
        layout, name = draw.choice(layouts), draw.choice(SCENE_NAMES)
        scene = small_objects((name, name), [slot[:2] for slot in layout], draw.choice(list(BACKGROUNDS)))
        reading = judge.read_any(render(scene, judge.atlas), layouts, SCENE_NAMES)
        assert reading.clear and reading.scene == scene


def test_calibration_follows_the_codec_up_to_its_limit(judge: Judge) -> None:
    same = calibrate(lambda x: x, judge.atlas, Key(8), num=16)
    shifted = calibrate(lambda x: (x.float() - 4).clamp(0, 255).to(torch.uint8), judge.atlas, Key(8), num=16)
    blank = calibrate(lambda x: torch.full_like(x, 128), judge.atlas, Key(8), num=16)
    assert set(same.values()) == {0.0} and set(blank.values()) == {MAX_SHARP}
    assert all(4.5 <= threshold <= 5.01 for threshold in shifted.values())


def test_skin_tones_are_told_apart_and_are_no_reason_to_be_unclear(judge: Judge) -> None:
    tones = judge.atlas.tones
    scenes = [single(name) for name in tones]
    noise = torch.randn((len(tones), 64, 64, 3), generator=Key(9).generator()) * 8
    shown = (pictures_of(judge, scenes) + noise).clamp(0, 255).to(torch.uint8)
    readings = judge.shows(shown, scenes)
    right = [r.clear and r.scene == scene for r, scene in zip(readings, scenes, strict=True)]
    assert sum(right) >= 0.99 * len(tones)


def test_distances_equal_the_direct_computation(judge: Judge) -> None:
    names = SCENE_NAMES[:7]
    picture = render(small_objects(("cat", "dog"), PAIR_SLOTS[1], "green"), judge.atlas)
    shown = pictures_of(judge, [single(name, "green", CENTRE) for name in names])
    window = shown[:, 17:47, 17:47]
    found = judge.nearest(picture[None].roll((16, 0), (1, 2)), ["green"], (17, 17, 30), names)[0]
    plain = [picture_distance(picture[1:31, 17:47], w) for w in window]
    assert found.name == names[plain.index(min(plain))]
    assert found.distance == pytest.approx(min(plain), abs=0.5)
