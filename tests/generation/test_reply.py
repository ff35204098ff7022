"""Replies as messages, files, Markdown and HTML; their text is escaped."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

import omni
from omni import media
from omni.checkpoint import verify
from omni.document import Document, Image, Role, Text, Video
from omni.generation.events import ImagePart, TextPart, VideoPart
from omni.generation.reply import Reply, segments_of
from omni.generation.reply_files import read_messages
from omni.rng import Key
from omni.text.chat import messages_to_document

FRAMES = torch.arange(3 * 8 * 8 * 3, dtype=torch.uint8).reshape(3, 8, 8, 3)


def drawn(index: int = 0) -> ImagePart:
    pixels = (Key(index).uniform((8, 16, 3)) * 255).to(torch.uint8)
    return ImagePart(PILImage.fromarray(pixels.numpy()), 8, 16, 4, 7, index, 4)


def reply_of(*parts: Any, **more: Any) -> Reply:
    return Reply(list(parts), Document((Text("tell"), *segments_of(parts))), "end", **more)


STORY = reply_of(TextPart("A cat ran."), drawn(), TextPart("Then it slept."), drawn(1), VideoPart(FRAMES, 5.0, 4, 7, 2))


@pytest.mark.parametrize(
    ("texts", "joined"),
    [(["ran.", "Then"], "ran. Then"), (["ran. ", "Then"], "ran. Then"), (["ran.", "\nThen"], "ran.\nThen"),
     (["a", "", "b"], "a b"), (["", "b"], "b"), ([], ""), (["a"], "a")],
)  # fmt: skip
def test_texts_of_two_parts_are_separated(texts: list[str], joined: str) -> None:
    parts: list[Any] = []
    for text in texts:
        parts += [TextPart(text), drawn()]
    assert reply_of(*parts).text == joined


def same(one: Document, two: Document) -> bool:
    def key(segment: Any) -> Any:
        if isinstance(segment, Text):
            return segment.role, segment.text
        pixels = segment.pixels if isinstance(segment, Image) else segment.frames
        return segment.role, getattr(segment, "fps", None), pixels.tolist()

    return [key(segment) for segment in one.segments] == [key(segment) for segment in two.segments]


@pytest.mark.parametrize("allow_paths", [True, False])
def test_a_reply_is_a_message(allow_paths: bool) -> None:
    asked = {"role": "user", "content": "tell"}
    assert STORY.message["role"] == "assistant"
    again = messages_to_document([asked, STORY.message], allow_paths=allow_paths)
    assert same(again, STORY.document)
    parts = {"role": "assistant", "content": STORY.parts}
    assert same(messages_to_document([asked, parts], allow_paths=allow_paths), STORY.document)
    one = messages_to_document([{"role": "user", "content": STORY.parts[1]}])
    assert isinstance(one.segments[0], Image) and one.segments[0].role is Role.USER


def test_an_empty_reply_can_be_a_message() -> None:
    asked = {"role": "user", "content": "tell"}
    assert len(messages_to_document([asked, reply_of().message, asked]).segments) == 2
    with pytest.raises(ValueError, match="is empty"):
        messages_to_document([asked, reply_of().message], supervise=True)  # no supervised segment


def test_generation_continues_from_a_reply(tiny_model: Path) -> None:
    model = omni.from_pretrained(tiny_model)
    budget: dict[str, Any] = {"steps": 1, "max_tokens": 4, "max_images": 1, "image_size": (8, 8), "stop": "dog"}
    first = model.generate("draw a cat", force_image=True, seed=None, **budget)
    messages = [{"role": "user", "content": "draw a cat"}, first.message, {"role": "user", "content": "again"}]
    by_message = model.generate(messages, **budget)
    by_document = model.generate(Document((*first.document.segments, Text("again"))), **budget)
    assert by_message.text == by_document.text
    assert [image.tobytes() for image in by_message.images] == [image.tobytes() for image in by_document.images]
    options = first.record["options"]
    assert options["stop"] == ["dog"] and 0 <= options["seed"] < 2**63
    again = model.generate("draw a cat", force_image=True, seed=options["seed"], **budget)
    assert again.images[0].tobytes() == first.images[0].tobytes()  # the recorded seed reproduces it
    assert first.record["model"]["path"] == str(tiny_model) and len(first.record["model"]["digest"]) == 32


def test_a_reply_is_saved_like_by_the_command_line(tmp_path: Path) -> None:
    reply = reply_of(*STORY.parts, record={"options": {"seed": 7}, "model": {"path": "m"}, "versions": {}})
    assert reply.save(tmp_path / "r") == tmp_path / "r"
    verify(tmp_path / "r")
    data = json.loads((tmp_path / "r/reply.json").read_text())
    assert data["stop_reason"] == "end" and data["options"] == {"seed": 7} and data["model"] == {"path": "m"}
    assert data["parts"][1] == {
        "type": "image", "path": "image-1.png", "height": 8, "width": 16,
        "steps": 4, "evaluations": 4, "seed": 7, "index": 0,
    }  # fmt: skip
    assert same(messages_to_document(read_messages(tmp_path / "r/reply.json", data)), reply.document)
    with pytest.raises(ValueError, match="is not empty; name another folder or pass overwrite=True"):
        reply.save(str(tmp_path / "r"))
    reply_of(TextPart("b")).save(tmp_path / "r", overwrite=True)
    assert not (tmp_path / "r/image-1.png").exists()
    (tmp_path / "r/mine").write_text("mine")
    with pytest.raises(ValueError, match="'mine', which no reply holds"):
        reply.save(tmp_path / "r", overwrite=True)


def test_a_reply_that_continues_a_turn_of_the_assistant_is_saved(tmp_path: Path) -> None:
    given = (Text("tell"), Text("Once", Role.ASSISTANT))
    Reply([TextPart(" upon")], Document((*given, *segments_of([TextPart(" upon")]))), "end").save(tmp_path / "r")
    data = json.loads((tmp_path / "r/reply.json").read_text())
    assert [part["text"] for part in data["parts"]] == [" upon"] and len(data["request"]) == 2


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "", "a/b.png", None, 3])
def test_a_file_outside_the_folder_is_not_read(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="beside its JSON"):
        read_messages(tmp_path / "reply.json", {"parts": [{"type": "image", "path": name}]})


@pytest.mark.parametrize(
    "data", [{}, {"messages": 3}, {"messages": [3]}, {"parts": [3]}, {"parts": None}, {"messages": []}]
)
def test_other_json_is_no_reply(data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no reply and no conversation"):
        read_messages(tmp_path / "reply.json", data)


HOSTILE = '</p><script>alert(1)</script><img src=x onerror=alert(1)> & "q" \x1b[31m \u202e ![x](http://a/b.png) <!--'


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_html_shows_the_parts_in_order_without_active_content() -> None:
    reply = reply_of(TextPart(HOSTILE), *STORY.parts)
    for text in (reply._repr_html_(), reply.to_html()):
        found = Tags(text)
        assert not {tag for tag, _ in found.tags} - {
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "div",
            "p",
            "img",
        }
        pictures = [attributes for tag, attributes in found.tags if tag == "img"]
        assert all(set(a) == {"src", "alt", "width", "height", "style"} for a in pictures)
        assert [a["alt"] for a in pictures] == ["image 1", "image 2", "clip 1"]
        assert "<script>alert(1)</script>" in found.shown and "\x1b" not in text and "\u202e" not in text
        bodies = [str(a["src"]).removeprefix("data:image/png;base64,") for a in pictures]
        import base64

        pixels = media.load_image(base64.b64decode(bodies[0], validate=True))
        assert torch.equal(pixels, media.load_image(STORY.images[0]))
        frames, fps = media.load_video(base64.b64decode(bodies[2], validate=True))
        assert torch.equal(frames, FRAMES) and abs(fps - 5) < 0.1
        assert text.index("A cat ran.") < text.index(bodies[0]) < text.index("Then it slept.") < text.index(bodies[1])
    page = reply.to_html()
    assert (
        page.startswith("<!doctype html>")
        and 'charset="utf-8"' in page
        and "http:" not in page.replace("http://a/b.png", "")
    )


def test_markdown_embeds_the_pictures() -> None:
    text = reply_of(TextPart(HOSTILE), *STORY.parts).to_markdown()
    pictures = re.findall(r"(?<!\\)!\[([^]]*)\]\((data:image/png;base64,[\w+/=]+)\)", text)
    assert [name for name, _ in pictures] == ["image 1", "image 2", "clip 1"]
    assert (
        "<script" not in text
        and "\\[x](http" in text
        and text.index("ran.") < text.index("base64") < text.index("slept")
    )


def test_representations_are_short_and_hold_no_numbers() -> None:
    large = VideoPart(torch.zeros(9, 64, 64, 3, dtype=torch.uint8), 8.0, 1, 0, 0)
    reply = reply_of(TextPart("word " * 1000), drawn(), large, *[TextPart("x")] * 20)
    shown = repr(reply)
    assert (
        "<image 8x16>" in shown
        and "<clip of 9 frames>" in shown
        and "15 more" in shown
        and "stop_reason='end'" in shown
    )
    assert len(shown) < 300
    for one in (reply, large, Image(torch.zeros(8, 8, 3, dtype=torch.uint8)), Video(large.frames), reply.document):
        assert "tensor" not in repr(one) and "\n" not in repr(one)
