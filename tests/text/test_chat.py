"""Chat messages: every accepted format, order, inverse, and one-line errors with a way out."""

from __future__ import annotations

import base64
import itertools
import os
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest
import torch

from omni import media
from omni.document import Budget, Document, Image, Role, Text, Video
from omni.text import chat
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


def test_every_format_of_pictures(path: Path) -> None:
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


def test_load_image_is_an_argument() -> None:
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


FORBIDDEN = [
    "a.png",
    "./a.png",
    "~/a.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file:/etc/passwd",
    "file://localhost/etc/passwd",
    "C:\\a.png",
    Path("a.png"),
]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_paths_can_be_forbidden(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    for value in (str(path), path, path.as_uri(), *FORBIDDEN):
        for part in ({"type": kind, kind: value}, {"type": kind, "url": value}, {"type": kind, "path": value}):
            with pytest.raises(ValueError, match="paths are not allowed here; send a data: URL"):
                messages_to_document(user(part), allow_paths=False)
    with pytest.raises(ValueError, match="paths are not allowed here"):
        messages_to_document(user({"type": "video", "video": [str(path)]}), allow_paths=False)
    taken = {"type": "image", "url": URL}, {"type": "image", "base64": BASE64}, {"type": "image", "image": PIXELS}
    assert len(messages_to_document(user(*taken), allow_paths=False).segments) == 3


def test_paths_and_file_urls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    (path.parent / "link.png").symlink_to(path)
    (path.parent / "~odd.png").write_bytes(PNG)
    at = path.as_uri()
    urls = [at, at.replace("///", "//localhost/"), "FILE" + at[4:]]
    for name in ("a picture.png", "~/a picture.png", "link.png", "~odd.png", *urls):
        (segment,) = messages_to_document(user({"type": "image", "url": name})).segments
        assert isinstance(segment, Image) and torch.equal(segment.pixels, PIXELS), name


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(10 << 30)  # a sparse file
    cases = {
        "/dev/zero": "no regular file",
        str(tmp_path / "link.png"): "no regular file",
        str(tmp_path / "pipe.png"): "no regular file",
        str(tmp_path / "round.png"): "symbolic links",
        str(tmp_path): "Is a directory",
        str(tmp_path / "none.png"): "No such file",
        str(tmp_path / "large.png"): "is larger than max_bytes=",
        "a\0b.png": "a path has no null character",
        "file:///a%00b.png": "a path has no null character",
        "x" * 10_000: "File name too long",
        "file://other/a.png": "is on the machine 'other'; write file:///path",
        "ftp://other/a.png": "nothing is fetched",
        "HTTPS://other/a.png": "nothing is fetched",
        "s3://other/a.png": "nothing is fetched",
    }
    for kind in ("image", "video"):
        for address, message in cases.items():
            with pytest.raises(ValueError, match=message) as caught:
                messages_to_document(user({"type": kind, "url": address}))
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_engine_without_paths_rejects_them(tiny_model: Path, path: Path) -> None:
    import omni

    model = omni.from_pretrained(tiny_model)
    (path.parent / "b.png").write_bytes(media.encode_png(PIXELS[:, :4].contiguous()))  # a size for its codec
    prompt = user({"type": "image", "path": str(path.parent / "b.png")}, "what?")
    with pytest.raises(ValueError, match="message 0: picture .*: paths are not allowed here"):
        omni.Engine(model, allow_paths=False).generate(prompt, max_tokens=1)
    with pytest.raises(ValueError, match="paths are not allowed here"):
        next(omni.Engine(model, allow_paths=False).stream(prompt, max_tokens=1))
    assert omni.Engine(model).generate(prompt, max_tokens=1).parts is not None


# --------------------------------------------------------------------------------------------- bounds


def peak_of(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_data_urls_take_no_more_memory_than_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A naive decoder takes 80 times the URL's memory for percent escapes, and 10 times for white space in base64."""
    for url, num in (
        ("data:,".ljust(80_000, "%"), 80_000),
        ("data:," + "%41" * 80_000, 80_000),
        ("data:image/png;base64," + "%41" * 80_000, 80_000),
        ("data:image/png;base64," + "A\n" * 300_000, 600_000),
    ):
        part = {"type": "image", "url": url}

        def read(part: Any = part) -> None:
            with pytest.raises(ValueError, match="cannot read the picture's bytes: unknown or damaged format"):
                messages_to_document(user(part), allow_paths=False)

        assert peak_of(read) < 4 * num + 4_000_000
    monkeypatch.setattr(chat, "MAX_ESCAPES", 99)
    with pytest.raises(ValueError, match="picture has 100 percent escapes, above 99; send plain base64"):
        messages_to_document(user({"type": "image", "url": "data:," + "%41" * 100}))


def test_escapes_are_decoded_at_every_position() -> None:
    for shift in range(5):
        text = "x" * shift + "%25%e4%" * 8_000 + "%4"
        assert chat._data_url("data:," + text, "picture", 1 << 20) == unquote_to_bytes(text)
    escaped = "data:image/png," + quote(PNG)
    for url in (escaped, URL.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"), URL.replace("A", "A\r\n ")):
        (segment,) = messages_to_document(user({"type": "image", "url": url})).segments
        assert isinstance(segment, Image) and torch.equal(segment.pixels, PIXELS)


def test_encoded_media_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_BYTES", 100)
    monkeypatch.setattr(media, "MAX_CLIP_BYTES", 200)
    for kind, most in (("image", 100), ("video", 200)):
        for field, value in (
            ("url", "data:," + "a" * (most + 1)),
            ("url", "data:," + "%41" * (most + 1)),
            ("url", "data:;base64," + "A" * (most * 4 // 3 + 8)),
            ("base64", "A" * (most * 4 // 3 + 8)),
            ("base64", "A" * 100_000),
        ):
            with pytest.raises(ValueError, match="is longer than (100|200|400) bytes; make it smaller"):
                messages_to_document(user({"type": kind, field: value}))


@pytest.mark.parametrize(
    ("name", "value", "messages", "message"),
    [
        ("MAX_MESSAGES", 2, [{"role": "user", "content": "a"}] * 3, "3 messages are more than 2; split"),
        ("MAX_PARTS", 4, [{"role": "user", "content": ["a", "b"]}] * 3, "message 2: more than 4 parts"),
        ("MAX_CHARACTERS", 5, [{"role": "user", "content": "abc"}] * 2, "message 1: more than 5 characters"),
        ("MAX_SECONDS", 0, user({"type": "image", "url": URL}), "message 0: reading the media takes longer than 0"),
    ],
)
def test_requests_are_bounded(
    name: str, value: Any, messages: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, name, value)
    with pytest.raises(ValueError, match=message):
        messages_to_document(messages)


def test_media_are_bounded_over_the_whole_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = torch.stack([PIXELS, PIXELS.flip(0)])
    media.save_apng(frames, tmp_path / "a.png")
    clip = {"type": "video", "path": str(tmp_path / "a.png")}
    still = {"type": "video", "video": frames}
    for parts, bounds, message in (
        ([{"type": "image", "url": URL}] * 3, (50, 9), "message 0: more than 50 pixels in one document"),
        ([{"type": "image", "url": URL}] * 3, (99, 2), "message 0: more than 2 pictures and frames"),
        ([clip] * 2, (99, 3), "max_frames=1"),
        ([clip] * 2, (90, 9), "max_pixels=42"),
        ([still] * 2, (99, 3), "more than 3 pictures and frames"),
    ):
        monkeypatch.setattr(chat, "Budget", partial(Budget, *bounds))
        with pytest.raises(ValueError, match=message):
            messages_to_document(user(*parts))
    monkeypatch.undo()
    endless = {"type": "video", "video": itertools.repeat(PIXELS)}
    with pytest.raises(ValueError, match="a video has more than 1000 frames"):
        messages_to_document(user(endless))


def test_exported_template_has_the_order_of_compose() -> None:
    """The Jinja template is for other programs; it renders control names in the order of compose's ids."""
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
