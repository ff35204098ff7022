"""Document JSON: lossless; invalid files raise one line of error and allocate no memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.data.files import DocumentLines, MessageLines
from omni.document import Document, Image, Role, Text, Video
from omni.rng import Key

PIXELS = torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3)
WHOLE = Document(
    (
        Text("draw <|image|>\ud800"),
        Image(PIXELS[0], Role.ASSISTANT, True),
        Video(PIXELS, 12.5, Role.SYSTEM),
    ),
    {"id": [1, None, {"a": 2.5}]},
)


def packed(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw)).decode()


def document(**changes: Any) -> str:
    """A Document of one picture with changed keys; a change to ... removes the key."""
    picture = {"type": "image", "shape": [1, 1, 3], "zlib": packed(b"abc"), "role": "user", "supervise": False}
    picture = {key: value for key, value in {**picture, **changes}.items() if value is not ...}
    return json.dumps({"segments": [picture]})


def error(text: str, **bounds: int) -> str:
    """The error's line. The call allocates less than 2 MB."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            Document.from_json(text, **bounds)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert type(caught.value) is ValueError and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def test_round_trip() -> None:
    again = Document.from_json(WHOLE.to_json())
    assert again.meta == WHOLE.meta and again.to_json() == WHOLE.to_json()
    text, image, clip = again.segments
    assert text == WHOLE.segments[0]
    assert isinstance(image, Image) and torch.equal(image.pixels, PIXELS[0])
    assert isinstance(clip, Video) and torch.equal(clip.frames, PIXELS) and clip.fps == 12.5


@pytest.mark.parametrize(
    "shape",
    [
        [-1, 1, 3],
        [0, 1, 3],
        [1, 1],
        [1, 1, 4],
        [1, 1, 1, 3],
        [1.0, 1, 3],
        [True, 1, 3],
        ["1", 1, 3],
        "113",
        None,
        3,
        {},
    ],
)
def test_invalid_shapes_of_pictures(shape: Any) -> None:
    assert "segment 0: shape must be [height, width, 3] of whole numbers above 0, got " in error(document(shape=shape))


def test_invalid_shapes_allocate_nothing() -> None:
    assert "do not match their shape" in error(document(shape=[5000, 9000, 3]))
    assert "more than 200000000 pixels in one document" in error(document(shape=[20_000, 10_001, 3]))
    assert "more than 200000000 pixels" in error(document(shape=[10**4000, 1, 3]))
    bomb = packed(bytes(50_000_000))  # 65 kB of JSON
    assert "do not match their shape [2, 2, 3]" in error(document(shape=[2, 2, 3], zlib=bomb))
    assert "more than 999 pixels" in error(document(shape=[1000, 1, 3], zlib=bomb), max_pixels=999)
    clip = {"type": "video", "fps": 8, "shape": [10_001, 1, 1, 3]}
    assert "more than 10000 pictures and frames" in error(document(**clip))
    assert Document.from_json(document(shape=[1000, 1, 3], zlib=packed(bytes(3000))), max_pixels=1000)


def test_bounds_apply_to_the_whole_document() -> None:
    text = Document((WHOLE.segments[1], *WHOLE.segments[1:])).to_json()  # two pictures; two frames
    assert len(Document.from_json(text, max_pixels=4 * 24, max_frames=4).segments) == 3
    assert "segment 2: more than 95 pixels" in error(text, max_pixels=95)
    assert "segment 2: more than 3 pictures and frames" in error(text, max_frames=3)
    assert f"more than {len(text) - 1} bytes" in error(text, max_bytes=len(text) - 1)


def test_a_picture_takes_memory_once() -> None:
    """The tensor shares the decompressed bytes; their growth may add a third."""
    text = document(shape=[1000, 1000, 3], zlib=packed(bytes(3_000_000)))
    tracemalloc.start()
    Document.from_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 3_000_000 <= peak < 5_500_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'the Document' is not valid JSON"),
        ("{", "'the Document' is not valid JSON"),
        ("[]", "the Document must be a mapping, got list"),
        ("null", "the Document must be a mapping, got NoneType"),
        ("{}", "the Document has no key 'segments'; Document.to_json"),
        ('{"segments": {}}', "segments of the Document must be a list, got dict"),
        ('{"segments": [], "meta": []}', "meta of the Document must be a mapping, got list"),
        ('{"segments": [], "metta": {}}', "unknown key 'metta'; did you mean 'meta'?"),
        ('{"segments": [3]}', "segment 0: it must be a mapping, got int"),
        ('{"segments": [{}]}', "unknown segment type None; known: text, image, video"),
        ('{"segments": [{"type": []}]}', "unknown segment type []"),
        (document(type="audio"), "unknown segment type 'audio'"),
        (document(role=...), "it has no key 'role'"),
        (document(zlib=...), "it has no key 'zlib'"),
        (document(type="video"), "it has no key 'fps'"),
        (document(role="usr"), "unknown role 'usr'; did you mean 'user'?"),
        (document(role=[]), "unknown role []"),
        (document(supervise=1), "supervise must be true or false, got 1"),
        (document(fps=8), "it has the unknown key 'fps'"),
        (document(type="text", shape=..., zlib=..., text=3), "Text.text must be a str, got int"),
        (document(type="video", fps=0, shape=[1, 1, 1, 3]), "fps must be a number above 0, got 0"),
        (document(type="video", fps=float("nan"), shape=[1, 1, 1, 3]), "fps must be a number above 0, got nan"),
        (document(type="video", fps="8", shape=[1, 1, 1, 3]), "fps must be a number above 0, got '8'"),
        (document(zlib=3), "zlib must be a str of base64, got int"),
        (document(zlib="@@@@"), "zlib is not base64 of zlib data"),
        (document(zlib="\u00e9"), "zlib is not base64 of zlib data"),
        (document(zlib="AAAA"), "zlib is not base64 of zlib data"),
        (document(zlib=packed(b"ab")), "media bytes do not match their shape [1, 1, 3]"),
        (document(zlib=packed(b"abcd")), "media bytes do not match their shape [1, 1, 3]"),
        (document(choices=[]), "unknown key 'choices'"),
        ("[" * 100_000, "'the Document' nests lists or tables more than"),
        ('{"a":' * 100_000, "'the Document' nests lists or tables more than"),
    ],
)
def test_other_input_raises_one_line(text: str, message: str) -> None:
    assert message in error(text)


def test_too_many_values_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.document.MAX_JSON_VALUES", 1000)
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("it was parsed"))
    assert "more than 1000 JSON values" in error('{"meta":' + "[],[]," * 400)


@pytest.mark.parametrize("kind", [DocumentLines, MessageLines])
def test_lines_of_data_are_bounded(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = WHOLE.to_json() if kind is DocumentLines else json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    long = line[:-1] + " " * (3 << 20) + "}"
    (tmp_path / "d.jsonl").write_text(f"{line}\n\n{long}\n  \n" + "[" * 100_000 + f"\n{line}")
    source = kind(kind.Options(path=tmp_path / "d.jsonl"), Key(0))
    assert source.num_records == 4
    assert source.record(3).to_json() == source.record(0).to_json() == source.record(1).to_json()
    monkeypatch.setattr("omni.data.files.MAX_JSON_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"d\.jsonl record 2 has more than 1048576 bytes; split it"):
        source.record(1)
    with pytest.raises(ValueError, match="nests lists or tables"):
        source.record(2)


def test_rates_of_clips() -> None:
    for fps in (0, -1, float("nan"), float("inf"), True, "8", None, 1e-9):
        with pytest.raises(ValueError, match=r"Video.fps must be a number above 0, got .*; give one from 0.001"):
            Video(PIXELS, fps)  # type: ignore[arg-type]
    assert Video(PIXELS, 8).fps == 8.0 and isinstance(Video(PIXELS, 8).fps, float)
