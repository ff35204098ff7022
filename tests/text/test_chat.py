"""Chat messages: every accepted shape, order kept, inverse, and one-line errors that say what to do."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch

from omni import media
from omni.document import Document, Image, Role, Text, Video
from omni.text.chat import document_to_messages, messages_to_document

PIXELS = torch.arange(4 * 6 * 3, dtype=torch.uint8).reshape(4, 6, 3)
PNG = media.encode_png(PIXELS)
BASE64 = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{BASE64}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(PNG)
    return path


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_plain_text() -> None:
    document = messages_to_document(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "draw <|image|>"},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        ],
        supervise=True,
    )
    expected = (Text("Be brief.", Role.SYSTEM), Text("draw <|image|>"), Text("no", Role.ASSISTANT, True))
    assert document.segments == expected
    assert messages_to_document("hello").segments == (Text("hello"),)
    assert messages_to_document([{"role": "developer", "content": "x"}]).segments[0].role is Role.SYSTEM


def test_every_picture_shape(path: Path) -> None:
    pil = media.to_pil(PIXELS)
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": str(path)}},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "input_image", "image_url": URL},
        {"type": "image", "image": pil},
        {"type": "image", "image": PIXELS},
        {"type": "image", "image": PIXELS.numpy()},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": path},
        {"type": "image", "url": URL},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": URL},
        {"type": "image", "base64": BASE64.replace("+", "-").replace("/", "_").rstrip("=")},
        {"type": "image", "image": PNG},
    ]
    document = messages_to_document(user(*parts))
    assert len(document.segments) == len(parts)
    for segment in document.segments:
        assert isinstance(segment, Image) and torch.equal(segment.pixels, PIXELS)


def test_order_is_kept(path: Path) -> None:
    picture = {"type": "image", "path": str(path)}
    content = ["a", picture, {"type": "input_text", "text": "b"}, picture]
    document = messages_to_document([{"role": "user", "content": content}, {"role": "assistant", "content": "c"}])
    assert [type(s).__name__ for s in document.segments] == ["Text", "Image", "Text", "Image", "Text"]


def test_videos(tmp_path: Path) -> None:
    frames = torch.stack([PIXELS, PIXELS.flip(0), PIXELS.flip(1)])
    media.save_apng(frames, tmp_path / "clip.png", fps=10)
    parts = (
        {"type": "video", "video": frames, "fps": 4},
        {"type": "video", "video": [media.to_pil(frame) for frame in frames]},
        {"type": "video", "video": str(tmp_path / "clip.png")},
        {"type": "video_url", "video_url": {"url": str(tmp_path / "clip.png")}},
    )
    segments = messages_to_document(user(*parts)).segments
    assert all(isinstance(s, Video) and torch.equal(s.frames, frames) for s in segments)
    assert [s.fps for s in segments if isinstance(s, Video)] == [4.0, 8.0, pytest.approx(10.0), pytest.approx(10.0)]


def test_inverse() -> None:
    segments = (Text("draw"), Text("ok ", Role.ASSISTANT), Image(PIXELS, Role.ASSISTANT), Text("done", Role.ASSISTANT))
    messages = document_to_messages(Document((*segments, Video(PIXELS[None], 4.0))))
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [p["type"] for p in messages[1]["content"]] == ["text", "image", "text"]
    again = messages_to_document(messages).segments
    assert again[:2] == segments[:2] and isinstance(again[2], Image) and torch.equal(again[2].pixels, PIXELS)
    assert isinstance(again[4], Video) and again[4].fps == 4.0


def test_load_image_is_the_callers() -> None:
    seen: list[Any] = []

    def load(source: Any) -> torch.Tensor:
        seen.append(source)
        return PIXELS

    messages_to_document(user({"type": "image", "url": URL}, {"type": "image", "path": "x.png"}), load)
    assert seen == [PNG, "x.png"]


ERRORS: list[tuple[Any, str]] = [
    ([], "messages is empty; give"),
    (b"x", "must be a str or a list"),
    ({"role": "user"}, "must be a str or a list"),
    (["hi"], "message 0: a message is a mapping"),
    ([{"role": "usr", "content": "x"}], "unknown role 'usr'; did you mean 'user'"),
    ([{"role": "tool", "content": "x"}], "unknown role 'tool'; use system, user or assistant"),
    ([{"content": "x"}], "unknown role None"),
    ([{"role": "user"}], "content of the user must be"),
    ([{"role": "user", "content": ""}], "content '' is empty; write or attach"),
    ("  \n", "is empty; write or attach"),
    (user(), "is empty"),
    (user({"type": "text"}), "needs a str under 'text', got None"),
    (user({"type": "txt", "text": "x"}), "unknown part type 'txt'; did you mean 'text'"),
    (user({"type": "audio"}), "unknown part type 'audio'"),
    (user(3), "a content part is a mapping"),
    (user({"type": "image"}), "needs one of the keys image"),
    (user({"type": "image", "path": "a", "url": "b"}), "it has"),
    (user({"type": "image_url", "image_url": {"uri": "x"}}), "needs a 'url'"),
    (user({"type": "image", "url": "https://x.org/a"}), "'https://x.org/a': nothing is fetched.*download it first"),
    (user({"type": "image", "path": "/nowhere/a.png"}), "'/nowhere/a.png': No such file"),
    (user({"type": "image", "path": ""}), "address is empty"),
    (user({"type": "image", "url": "data:image/png;base64"}), "no comma"),
    (user({"type": "image", "url": "data:image/png;base64,@@@@"}), "base64 of a picture is malformed"),
    (user({"type": "image", "url": "data:image/png;base64,AAAA"}), "cannot read the picture's bytes"),
    (user({"type": "image", "image": 3}), "a picture is a path, bytes, a PIL image or an array, got int"),
    (user({"type": "image", "image": torch.zeros(3, 4, 4)}), r"can be \(H, W, C\) or \(C, H, W\); give it as uint8"),
    (user({"type": "video", "video": []}), "frames need one common shape"),
    (user({"type": "video", "video": PIXELS[None], "fps": 0}), "fps must be a number above 0, got 0"),
]


@pytest.mark.parametrize(("messages", "message"), ERRORS)
def test_errors(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        messages_to_document(messages)
    assert "\n" not in str(caught.value)


def test_paths_can_be_forbidden(path: Path) -> None:
    for value in (str(path), path, path.as_uri()):
        with pytest.raises(ValueError, match="paths are not allowed here"):
            messages_to_document(user({"type": "image", "image": value}), allow_paths=False)
    assert len(messages_to_document(user({"type": "image", "url": URL}), allow_paths=False).segments) == 1


def test_exported_template_has_the_order_of_compose() -> None:
    """The Jinja template is for other programs; its spellings stand in the order in which compose puts the ids."""
    jinja2 = pytest.importorskip("jinja2")
    source = (Path(__file__).parents[2] / "tokenizers_cfg" / "chat_template.jinja").read_text()
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": ["a", {"type": "image", "url": URL}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "d\n"}]},
    ]
    text = jinja2.Template(source).render(messages=messages, add_generation_prompt=True)
    turns = "<|system|>s<|end|>", "<|user|>a<|image|><|media_end|>bc<|end|>", "<|assistant|>d\n<|end|><|assistant|>"
    assert text == "<|begin|>" + "".join(turns)
