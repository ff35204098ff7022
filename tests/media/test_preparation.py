"""Preparation: sizes, pixels and frames of each rule; prepared media do not change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import follow

import omni
from omni.config import build
from omni.document import Document, Image, Role, Text, Video
from omni.generation import steps
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.media.preparation import Limits, Preparation, letterbox, prepare, prepare_clip, prepare_picture, target_size
from omni.rng import Key

LIMITS = Limits((16, 16), 2, 8, 8)
BUCKETS = Preparation()
STRIDE = Preparation(resize="stride")
LETTERBOX = Preparation(resize="letterbox", size=(64, 64))
CROP = Preparation(resize="crop", size=(64, 64))
RULES = [BUCKETS, STRIDE, LETTERBOX, CROP, Preparation(max_latents=12), Preparation(colour="grey")]


def noise(*shape: int, key: int = 0) -> torch.Tensor:
    return (Key(key).uniform((*shape, 3)) * 255).byte()


def ramp(height: int, width: int) -> torch.Tensor:
    """Red is the row and green the column, in hundredths of the side."""
    rows = torch.arange(height).add(0.5).div(height).mul(100).round()[:, None].expand(height, width)
    columns = torch.arange(width).add(0.5).div(width).mul(100).round()[None].expand(height, width)
    return torch.stack([rows, columns, torch.zeros(height, width)], -1).byte()


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((64, 64), (64, 64)), ((16, 128), (16, 128)), ((128, 128), (128, 128)), ((96, 48), (96, 48)),  # on the stride
        ((60, 68), (64, 64)), ((100, 75), (112, 80)), ((1000, 1000), (128, 128)), ((3000, 1500), (128, 64)),
        ((1, 1), (16, 16)), ((1, 5000), (16, 128)), ((5000, 1), (128, 16)), ((1200, 1600), (96, 128)),
    ],
)  # fmt: skip
def test_buckets(given: tuple[int, int], size: tuple[int, int]) -> None:
    assert target_size(*given, BUCKETS, LIMITS) == size


@pytest.mark.parametrize(
    ("given", "size"),
    [((60, 70), (64, 64)), ((8, 200), (16, 128)), ((100, 75), (96, 80)), ((1, 1), (16, 16)), ((96, 48), (96, 48))],
)
def test_the_nearest_stride(given: tuple[int, int], size: tuple[int, int]) -> None:
    assert target_size(*given, STRIDE, LIMITS) == size


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 64), st.integers(1, 4096), st.integers(1, 32))
@settings(max_examples=60)
def test_every_size_gets_a_size_within_the_budget(
    height: int, width: int, max_grid: int, budget: int, stride: int
) -> None:
    limits, preparation = Limits((stride, stride), 1, max_grid, 8), Preparation(max_latents=budget)
    size = target_size(height, width, preparation, limits)
    h, w = size[0] // stride, size[1] // stride
    assert (h * stride, w * stride) == size
    assert 1 <= h <= max_grid and 1 <= w <= max_grid and h * w <= budget
    assert target_size(*size, preparation, limits) == size
    on_stride = height % stride == width % stride == 0
    inside = max(height, width) <= max_grid * stride and height * width <= budget * stride**2
    if on_stride and inside:
        assert size == (height, width)
    near = math.sqrt(height * width) / stride >= 8  # enough latents for an aspect within a sixteenth
    if near and budget >= 64 and max_grid >= 16 and 0.5 <= height / width <= 2:
        assert abs(math.log(h / w / (height / width))) < 0.08


@pytest.mark.parametrize("preparation", RULES, ids=repr)
@pytest.mark.parametrize(
    "size", [(64, 64), (1, 1), (1, 700), (700, 1), (33, 50), (128, 200), (100, 75), (128, 128), (17, 16)]
)
def test_preparation_is_idempotent(preparation: Preparation, size: tuple[int, int]) -> None:
    picture = Image(noise(*size))
    once = prepare(picture, preparation, LIMITS)
    assert once.pixels.shape[:2] == target_size(*size, preparation, LIMITS)
    assert prepare(once, preparation, LIMITS) is once
    if size == once.pixels.shape[:2] and preparation.colour == "rgb":
        assert once is picture


def test_letterbox_keeps_the_picture_and_repeats_edges() -> None:
    wide = noise(32, 64)
    found = prepare_picture(wide, LETTERBOX, LIMITS)
    assert torch.equal(found[16:48], wide)
    assert torch.equal(found[:16], wide[:1].expand(16, -1, -1)) and torch.equal(
        found[48:], wide[-1:].expand(16, -1, -1)
    )
    whole = prepare_picture(ramp(192, 64), LETTERBOX, LIMITS)
    assert whole[0, 32, 0] <= 2 and whole[-1, 32, 0] >= 98  # rows from the first to the last
    assert torch.equal(whole, letterbox(ramp(192, 64), (64, 64)))


def test_crop_keeps_the_middle() -> None:
    found = prepare_picture(ramp(192, 64), CROP, LIMITS)
    assert abs(int(found[0, 0, 0]) - 33) <= 1 and abs(int(found[-1, 0, 0]) - 67) <= 1
    assert found[32, 0, 1] <= 2 and found[32, -1, 1] >= 98


@pytest.mark.parametrize("size", [(100, 75), (300, 200), (47, 61), (1000, 777), (60, 68)])
def test_buckets_keep_the_aspect(size: tuple[int, int]) -> None:
    """Rows and columns have one scale: the ramps show the remaining part of each side."""
    found = prepare_picture(ramp(*size), BUCKETS, LIMITS)
    height, width = found.shape[:2]
    rows, columns = (int(found[-1, 0, 0] - found[0, 0, 0]) * size[0], int(found[0, -1, 1] - found[0, 0, 1]) * size[1])
    assert abs(math.log(rows / (height - 1) / (columns / (width - 1)))) < 0.06
    assert min(rows / size[0], columns / size[1]) >= 85  # at most an eighth is cropped


def test_a_strip_beyond_the_buckets_is_padded_not_cropped() -> None:
    found = prepare_picture(ramp(600, 20), BUCKETS, LIMITS)
    assert found.shape == (128, 16, 3) and found[0, 8, 0] <= 2 and found[-1, 8, 0] >= 98


def test_grey_is_luma() -> None:
    grey = prepare_picture(torch.tensor([[[255, 0, 0], [0, 255, 0]]]).byte().expand(16, 2, 3).repeat(1, 8, 1),
                           Preparation(colour="grey"), LIMITS)  # fmt: skip
    assert grey[0, :2].tolist() == [[76, 76, 76], [150, 150, 150]]


# ------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize(
    ("rule", "frames", "fps", "kept", "rate"),
    [
        ({}, 5, 8.0, [0, 1, 2, 3, 4, 4], 8.0),
        ({"tail": "cut"}, 5, 8.0, [0, 1, 2, 3], 8.0),
        ({"tail": "cut"}, 1, 8.0, [0, 0], 8.0),
        ({}, 1, 8.0, [0, 0], 8.0),
        ({}, 4, 8.0, [0, 1, 2, 3], 8.0),
        ({"fps": 8.0}, 10, 24.0, [0, 3, 6, 9], 8.0),
        ({"fps": 8.0}, 10, 10.0, [0, 1, 2, 3, 5, 6, 7, 8], 8.0),
        ({"fps": 8.0}, 4, 6.0, [0, 1, 2, 3], 6.0),
        ({"max_frames": 4}, 99, 8.0, [0, 1, 2, 3], 8.0),
        ({"max_frames": 3}, 99, 8.0, [0, 1], 8.0),
        ({"max_frames": 1}, 3, 8.0, [0, 1], 8.0),
    ],
)
def test_clips_fill_their_chunks(rule: dict[str, Any], frames: int, fps: float, kept: list[int], rate: float) -> None:
    clip = Video(torch.arange(frames).byte()[:, None, None, None].expand(frames, 32, 48, 3).contiguous(), fps)
    once = prepare(clip, build(rule, Preparation, "test"), LIMITS)
    assert once.frames[:, 0, 0, 0].tolist() == kept and once.fps == rate
    assert prepare(once, build(rule, Preparation, "test"), LIMITS) is once


def test_frames_are_resized_like_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.media import preparation as module

    clip = noise(5, 33, 90)
    frames, _ = prepare_clip(clip, 8.0, LETTERBOX, LIMITS)
    assert torch.equal(frames[:5], torch.stack([prepare_picture(frame, LETTERBOX, LIMITS) for frame in clip]))
    monkeypatch.setattr(module, "RESIZE_PIXELS", 33 * 90 * 2)  # two frames together
    assert torch.equal(prepare_clip(clip, 8.0, LETTERBOX, LIMITS)[0], frames)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"resize": "letterbox"}, "needs size"),
        ({"size": [64, 64]}, r"size = \[64, 64\] has no effect with resize = 'buckets'"),
        ({"resize": "stride", "max_latents": 4}, "max_latents = 4 has no effect"),
        ({"resize": "crop", "size": [0, 64]}, "positive"),
        ({"resize": "bucket"}, "resize"),
        ({"tail": "drop"}, "tail"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"max_frames": 0}, "max_frames"),
        ({"side": 64}, "unknown key 'side'; did you mean 'size'"),
    ],
)
def test_impossible_preparations_are_named(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(rule, Preparation, "preparation.json")
    assert "\n" not in str(caught.value)


def test_media_beyond_the_limits_are_named() -> None:
    for size in ((60, 64), (64, 144)):
        with pytest.raises(ValueError, match=rf"size {size[0]} x {size[1]} .*stride 16 x 16, and at most 128 x 128"):
            target_size(9, 9, Preparation(resize="crop", size=size), LIMITS)
    with pytest.raises(ValueError, match="17 frames makes 9 chunks of 2 .*at most 8 .*cut it to 16 frames"):
        prepare_clip(noise(17, 16, 16), 8.0, BUCKETS, LIMITS)
    for wrong in (torch.zeros(4, 4, 3), torch.zeros(0, 4, 3, dtype=torch.uint8), noise(2, 4, 4)):
        with pytest.raises(ValueError, match="uint8"):
            prepare_picture(wrong, BUCKETS, LIMITS)
    with pytest.raises(ValueError, match="nan frames per second"):
        prepare_clip(noise(2, 16, 16), float("nan"), Preparation(fps=8), LIMITS)


# ------------------------------------------------------------------------------------------------ models


def test_a_model_keeps_its_preparation(tiny_model: Path, tmp_path: Path) -> None:
    model = omni.from_pretrained(tiny_model)
    assert model.preparation == Preparation()
    model.preparation = Preparation(resize="crop", size=(8, 16), tail="cut")
    assert omni.from_pretrained(model.save_pretrained(tmp_path / "m")).preparation == model.preparation


@pytest.mark.parametrize(("old", "new"), [({}, Preparation()), ({"picture_size": [8, 16]}, (8, 16))])
def test_models_without_the_file_load(tiny_model: Path, tmp_path: Path, old: dict[str, Any], new: Any) -> None:
    model = omni.from_pretrained(tiny_model)
    model.defaults = {"steps": 3, **old}
    folder = model.save_pretrained(tmp_path / "m")
    (folder / "preparation.json").unlink()
    manifest = folder / "manifest.json"
    files = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != manifest
    }
    from omni.checkpoint import publish

    loaded = omni.from_pretrained(publish(folder, files, replace=True))
    assert loaded.defaults == {"steps": 3}
    assert loaded.preparation == (Preparation(resize="letterbox", size=new) if isinstance(new, tuple) else new)


def test_documents_of_any_size_compose_and_keep_their_pixels(tiny_model: Path) -> None:
    """Spans have prepared blocks; the reply's document has the given pixels."""
    model = omni.from_pretrained(tiny_model)
    picture, clip = Image(noise(9, 13)), Video(noise(3, 5, 21), role=Role.USER)
    prompt = Document((picture, clip, Text("what?")))
    grids = [span.grid for span in model.spans(prompt) if hasattr(span, "grid")]  # type: ignore[union-attr]
    assert grids == [(1, 2, 3), *[(1, 1, 4)] * 3]
    reply = model.generate(prompt, max_tokens=1, max_images=1)
    assert reply.document.segments[:3] == prompt.segments
    with pytest.raises(ValueError, match="9 chunks of 1 frames, and this model takes at most 8"):
        model.generate(Document((Video(noise(9, 8, 8)),)))


def test_reduced_histories_have_the_latents_of_the_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second picture of a reply, with guidance, after a picture whose size is not the preparation's."""
    model = omni.from_pretrained(tiny_model)
    model.preparation = Preparation(resize="letterbox", size=(16, 16))
    engine = Engine(model)
    appended: dict[Any, list[torch.Tensor]] = {}  # by the history: the latents in the order in which it read them
    run_context = steps.run_context

    def watched(model: Any, appends: Any, *rest: Any) -> Any:
        for one in appends:
            appended.setdefault(one.history, []).extend(z for z in one.laid.latents if z is not None)
        return run_context(model, appends, *rest)

    monkeypatch.setattr(steps, "run_context", watched)
    control = engine.control
    # An image_size is forced: both of its ids count as tokens.
    sizes = [control.size(2), control.size(3)]
    follow(engine, lambda request: [control.image, *sizes, control.image, *sizes, control.end])
    options = GenerationOptions(steps=1, image_size=(8, 12), image_guidance=2.0, guidance=3.0)
    reply = engine.generate(Document((Image(noise(40, 20)), Text("draw two"))), options)
    assert [(p.width, p.height) for p in reply.images] == [(12, 8), (12, 8)]
    [own] = [latents for latents in appended.values() if len(latents) == 16 + 6 + 6]
    reduced = [latents for latents in appended.values() if len(latents) == 16 + 6]  # without text, for the second
    assert len(reduced) == 1 and len(appended) == 3
    assert torch.equal(torch.stack(reduced[0]), torch.stack(own[:22]))
