"""Parts of chat messages: every accepted key, type and scheme, and rejected ones."""

from __future__ import annotations

import base64
import time
from collections import UserDict
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from omni import media
from omni.document import Document, Image, Role, Text, Video
from omni.generation.events import TextPart
from omni.text.chat import _base64, _PartReader, document_to_messages, messages_to_document

PIXELS = torch.arange(4 * 6 * 3, dtype=torch.uint8).reshape(4, 6, 3)
FRAMES = torch.stack([PIXELS, PIXELS.flip(0)])
PNG = media.encode_png(PIXELS)
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGE_TYPES, VIDEO_TYPES = ("image", "image_url", "input_image"), ("video", "video_url", "input_video")


class Loaders:
    """Loaders that record their arguments and return one known picture or clip."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def image(self, source: Any) -> torch.Tensor:
        self.seen.append(source)
        return PIXELS if isinstance(source, str | bytes | PIL.Image.Image) else torch.as_tensor(source)

    def video(self, source: Any, fps: float | None = None, **bounds: Any) -> tuple[torch.Tensor, float]:
        self.seen.append((source, fps))
        return FRAMES, 12.0

    def read(self, *parts: Any, **options: Any) -> tuple[Any, ...]:
        content = [{"role": "user", "content": list(parts)}]
        return messages_to_document(content, self.image, load_video=self.video, **options).segments


@pytest.fixture
def loaders() -> Loaders:
    return Loaders()


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_types_of_text(kind: str) -> None:
    message = {"role": "user", "content": {"type": kind, "text": "hi"}}  # one part without a list, too
    assert messages_to_document([message]).segments == (Text("hi"),)
    for wrong in (3, None):
        with pytest.raises(ValueError, match=f"part of type '{kind}' needs a str under 'text', got {wrong}"):
            messages_to_document([{"role": "user", "content": [{"type": kind, "text": wrong}]}])


@pytest.mark.parametrize("kind", [*IMAGE_TYPES, *VIDEO_TYPES])
def test_every_type_takes_every_key_of_its_medium(loaders: Loaders, kind: str) -> None:
    own = ("image", "image_url") if kind in IMAGE_TYPES else ("video", "video_url")
    kinds: Any = Image if kind in IMAGE_TYPES else Video
    for key in (*own, "url", "path"):
        for value in ("x.png", {"url": "x.png"}, {"url": "x.png", "detail": "low"}):
            [segment] = loaders.read({"type": kind, key: value})
            assert isinstance(segment, kinds) and loaders.seen.pop() in ("x.png", ("x.png", None))
    loaders.read({"type": kind, "base64": base64.b64encode(PNG).decode()}, {"type": kind, "base64": DATA})
    assert [seen if kind in IMAGE_TYPES else seen[0] for seen in loaders.seen] == [PNG, PNG]
    others = ("video", "video_url") if kind in IMAGE_TYPES else ("image", "image_url")
    for part in ({others[0]: "x"}, {others[1]: "x"}, {"path": None}, {}):
        with pytest.raises(ValueError, match=f"part of type '{kind}' needs one of the keys {own[0]}, .*it has none"):
            loaders.read({"type": kind, **part})
    with pytest.raises(ValueError, match=r"it has \['url', 'path'\]"):
        loaders.read({"type": kind, "path": "a", "url": "b"})
    with pytest.raises(ValueError, match=r"'path' of a part needs a 'url', got the keys \['detail', 'uri'\]"):
        loaders.read({"type": kind, "path": {"uri": "x", "detail": "low"}})


def test_unknown_types_name_the_known_ones() -> None:
    known = "text, input_text, output_text, image, image_url, input_image, video, video_url, input_video$"
    with pytest.raises(ValueError, match=f"unknown part type 'zzz'; known types: {known}"):
        messages_to_document([{"role": "user", "content": [{"type": "zzz"}]}])


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "HTTP", "HTTPS"])
def test_nothing_is_fetched(loaders: Loaders, scheme: str) -> None:
    for kind, word in (("image", "picture"), ("video", "video")):
        with pytest.raises(ValueError, match=f"{word} '{scheme}://a.org/b.png': nothing is fetched"):
            loaders.read({"type": kind, "url": f"{scheme}://a.org/b.png"})
    assert not loaders.seen


def test_addresses_become_paths_and_bytes(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value, wanted in (
        ("file:///tmp/a%20b.png", "/tmp/a b.png"),
        ("~/a.png", "/home/me/a.png"),
        ("a%20b.png", "a%20b.png"),
        (Path("dir/a.png"), "dir/a.png"),
        (DATA, PNG),
        (DATA.replace("data:", "DATA:").replace("base64", "BASE64"), PNG),
        ("data:,a%20b", b"a b"),
        ("data:image/png;base64," + base64.b64encode(b"\xfb\xff\xfe").decode(), b"\xfb\xff\xfe"),
        ("data:image/png;base64,-__-", b"\xfb\xff\xfe"),  # the alphabet of URLs
        ("data:image/png;base64,YW%20Jj%0AZA%3D%3D", b"abcd"),
        ("data:image/png;base64,YW Jj\nZA", b"abcd"),
        (PNG, PNG),
    ):
        loaders.read({"type": "image", "image": value})
        assert loaders.seen.pop() == wanted
    for empty in ("", "  "):
        with pytest.raises(ValueError, match="the picture's address is empty; give a path or a data: URL"):
            loaders.read({"type": "image", "url": empty})
    with pytest.raises(ValueError, match=r"the base64 of a picture is malformed: '\*{30}'\.\.\.; encode the file"):
        loaders.read({"type": "image", "url": "data:image/png;base64," + "*" * 40})
    with pytest.raises(ValueError, match=r"the base64 of a picture is malformed: 'YW\*J'\.\.\."):
        loaders.read({"type": "image", "url": "data:image/png;base64,YW*J"})


def test_without_paths_only_inline_media_are_read(loaders: Loaders) -> None:
    for value in ("a.png", "~/a.png", "file:///a.png", Path("a.png"), "datum:x"):
        for kind in ("image", "video"):
            with pytest.raises(ValueError, match="paths are not allowed here; send a data: URL"):
                loaders.read({"type": kind, "path": value}, allow_paths=False)
    loaders.read({"type": "image", "url": DATA}, {"type": "image", "image": PNG}, allow_paths=False)
    assert loaders.seen == [PNG, PNG]


def test_frames_have_a_rate_and_one_shape(loaders: Loaders) -> None:
    given: list[Any] = [FRAMES, list(FRAMES), [frame.numpy() for frame in FRAMES], iter([PNG, PNG]), "a.mp4"]
    clips = loaders.read(*({"type": "video", "video": value} for value in given))
    assert [clip.fps for clip in clips] == [8.0, 8.0, 8.0, 8.0, 12.0]
    assert all(isinstance(clip, Video) and clip.frames.shape == FRAMES.shape for clip in clips)
    assert torch.equal(clips[0].frames, FRAMES) and torch.equal(clips[1].frames, FRAMES)
    assert loaders.seen[-1] == ("a.mp4", None)
    rated = loaders.read(*({"type": "video", "video": value, "fps": 0.5} for value in (FRAMES, list(FRAMES), "a.mp4")))
    assert [clip.fps for clip in rated] == [0.5, 0.5, 12.0] and loaders.seen[-1] == ("a.mp4", 0.5)
    for fps in (0, -1, True, "8", float("nan")):
        with pytest.raises(ValueError, match="fps must be a number above 0, got"):
            loaders.read({"type": "video", "video": FRAMES, "fps": fps})
    with pytest.raises(ValueError, match=r"need one common shape, got .*\(2, 6, 3\)"):
        loaders.read({"type": "video", "video": [PIXELS, PIXELS[:2]]})
    with pytest.raises(ValueError, match="need one common shape, got no frame"):
        loaders.read({"type": "video", "video": []})


def test_arrays_and_pictures_are_passed_unchanged(loaders: Loaders) -> None:
    parts = [{"type": "image", "image": value} for value in (PIXELS, PIXELS.numpy(), media.to_pil(PIXELS))]
    for segment in messages_to_document([{"role": "user", "content": parts}]).segments:
        assert isinstance(segment, Image) and torch.equal(segment.pixels, PIXELS)
    pil = media.to_pil(PIXELS)
    loaders.read({"type": "image", "image": pil})
    assert loaders.seen[-1] is pil


def test_media_that_are_too_long_raise_before_decoding(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_BYTES", 100)
    monkeypatch.setattr(media, "MAX_CLIP_BYTES", 200)
    for kind, limit in (("image", 100), ("video", 200)):
        loaders.read({"type": kind, "url": "data:," + "%41" * limit})
        coded = base64.b64encode(b"A" * limit).decode()
        loaders.read({"type": kind, "url": f"data:;base64,{coded}"}, {"type": kind, "base64": coded})
        whole = [b"A" * limit] * 3
        assert loaders.seen[-3:] == (whole if kind == "image" else [(data, None) for data in whole])
        for value in ("data:," + "%41" * (limit + 1), "data:;base64," + "QUFB" * (limit // 2 + 1)):
            with pytest.raises(ValueError, match=r"is longer than \d+ bytes; make it smaller"):
                loaders.read({"type": kind, "url": value})
    with pytest.raises(ValueError, match=r"is longer than \d+ bytes; make it smaller"):
        loaders.read({"type": "video", "base64": "QUFB" * 101})


def test_objects_with_content_are_parts() -> None:
    """Like the parts of a reply. A mapping is already a part, whatever attributes it has."""
    part = TextPart("hello")
    [segment] = messages_to_document([{"role": "assistant", "content": [part]}]).segments
    assert segment == Text("hello", Role.ASSISTANT)
    plain = UserDict({"type": "text", "text": "a"})
    plain.content = lambda: {"type": "text", "text": "b"}  # type: ignore[attr-defined]
    assert messages_to_document([{"role": "user", "content": [plain]}]).segments == (Text("a"),)


def test_roles_and_supervision() -> None:
    messages = [{"role": role, "content": role} for role in ("system", "developer", "user", "assistant")]
    roles = [Role.SYSTEM, Role.SYSTEM, Role.USER, Role.ASSISTANT]
    for supervise in (True, False):
        parts = messages_to_document(messages, supervise=supervise).segments
        assert [(p.role, p.supervise) for p in parts] == [(r, supervise and r is Role.ASSISTANT) for r in roles]
    picture = {"type": "image", "image": PIXELS}, {"type": "video", "video": FRAMES}
    parts = messages_to_document([{"role": "assistant", "content": list(picture)}], supervise=True).segments
    assert all(part.supervise and part.role is Role.ASSISTANT for part in parts)


def test_empty_texts_are_removed_beside_other_parts() -> None:
    picture = {"type": "image", "image": PIXELS}
    parts = messages_to_document([{"role": "user", "content": ["", picture, " ", ""]}]).segments
    assert [type(part).__name__ for part in parts] == ["Image", "Text"] and parts[1] == Text(" ")
    with pytest.raises(ValueError, match=r"message 1: the system's content \[' ', ''\] is empty"):
        messages_to_document([{"role": "user", "content": "a"}, {"role": "system", "content": [" ", ""]}])


def test_messages_of_a_document_by_hand() -> None:
    document = Document((Text("a"), Text("b"), Image(PIXELS), Text("c"), Video(FRAMES, 4.0, Role.ASSISTANT)))
    first, second = document_to_messages(document)
    assert first["role"] == "user" and second["role"] == "assistant"
    text, picture, end = first["content"]
    assert (text, end) == ({"type": "text", "text": "ab"}, {"type": "text", "text": "c"})
    assert picture["type"] == "image" and picture["image"].size == (6, 4) and set(picture) == {"type", "image"}
    [clip] = second["content"]
    assert clip["type"] == "video" and clip["fps"] == 4.0 and [f.size for f in clip["video"]] == [(6, 4)] * 2


def test_base64_keeps_every_character() -> None:
    """White space is removed, + and / may be - and _; every other character is kept or raises."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    plain = base64.b64decode(alphabet)
    for text in (alphabet, alphabet.replace("+", "-").replace("/", "_"), " \t\n\r\v\f".join(alphabet)):
        assert _base64(text, "picture", 1000) == plain
    with pytest.raises(ValueError, match="is longer than 40 bytes"):
        _base64("%41" * 400, "picture", 40)


def test_reading_within_the_time_limit_succeeds(loaders: Loaders) -> None:
    reader = _PartReader(loaders.image, loaders.video, True)
    reader._end = time.monotonic() + 0.5
    assert 0 < reader._seconds_left() <= 0.5
    reader._end = time.monotonic()
    with pytest.raises(ValueError, match="takes longer than"):
        reader._seconds_left()
