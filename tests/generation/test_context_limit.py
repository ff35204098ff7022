"""The longest context: checked before any pass and during a reply; a warning at 90 %."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest
import torch
from scripted import force, living
from torch import Tensor

from omni.cli.commands import main
from omni.config import load_json
from omni.document import Document, Image, Role, Text, Video
from omni.generation.engine import Engine
from omni.generation.events import BlockStart, Stop
from omni.model import Omni, OmniConfig
from omni.nn.cache import History
from omni.pretrained import BUNDLED
from omni.sequence.context_limit import ContextWarning
from omni.sequence.layout import context_length
from omni.text import load_tokenizer
from omni.text.compose import prompt_length

PICTURE = torch.zeros(8, 8, 3, dtype=torch.uint8)  # 4 latents of the tiny model's codec


def limited(directory: Path, limit: int) -> Omni:
    model = living(directory)
    model.config = model.config.model_copy(update={"max_context": limit})
    return model


def length(model: Omni, prompt: str) -> int:
    return context_length(model.spans(Document((Text(prompt),)), True))


def letters(model: Omni, num: int) -> list[int]:
    assert model.tokenizer is not None
    return model.tokenizer.encode("a" * num)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every history, after each append."""
    seen: list[int] = []
    commit = History.commit

    def committed(history: History, *arguments) -> None:  # noqa: ANN002
        commit(history, *arguments)
        seen.append(history.length)

    monkeypatch.setattr(History, "commit", committed)
    return seen


def no_pass(model: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> Tensor:
        raise AssertionError("a pass was made")

    monkeypatch.setattr(model.transformer, "extend", refuse)
    monkeypatch.setattr(model.codec, "encode", refuse)


def test_a_long_prompt_raises_before_any_pass(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    model = limited(tiny_model, 4096)
    no_pass(model, monkeypatch)
    prompt, started = "draw a cat " * 3334, time.process_time()
    messages = [{"role": "user", "content": prompt}]
    doors = [
        lambda: model.generate(prompt),
        lambda: model.generate(messages),
        lambda: list(Engine(model).stream(prompt)),
        lambda: model.generate_batch(["short", prompt]),
        lambda: model.generate(Document((Text("a"), Text("b", Role.ASSISTANT), Text(prompt)))),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=r"the prompt has 36,\d\d\d positions, .*longest context is 4,096.*/reset"):
            door()
    assert time.process_time() - started < 2


def test_media_count_before_they_are_encoded(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    """A picture of 2 x 2 latents is 8 positions, a clip of 3 chunks of them 18."""
    model = limited(tiny_model, 2000)
    no_pass(model, monkeypatch)
    with pytest.raises(ValueError, match=f"the prompt has {5 + 300 * 8:,} positions"):
        model.generate(Document((*[Image(PICTURE)] * 300, Text("?"))))
    clip = Video(PICTURE.expand(3, 8, 8, 3), 8.0)
    with pytest.raises(ValueError, match=f"the prompt has {5 + 200 * 18:,} positions"):
        model.generate(Document((*[clip] * 200, Text("?"))))


def test_the_longest_prompt_leaves_one_token(tiny_model) -> None:  # noqa: ANN001
    n = length(living(tiny_model), "hello")
    model = limited(tiny_model, n + 5)  # a configuration allows no limit below 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        with pytest.raises(ValueError, match=f"the prompt has {n + 5} positions"):
            model.generate("hello" + "!" * 5)
        reply = force(model, letters(model, 50)).generate("hello!!!!")
        assert reply.text == "a" and reply.stop_reason == "length"


def test_a_reply_ends_at_the_limit(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    """Each request of a batch ends at its own limit; the cache never exceeds the limit."""
    model = limited(tiny_model, 40)
    seen = watch(monkeypatch)
    prompts = ["hello", "what?", "a longer prompt than the others"]
    engine = force(model, letters(model, 80))
    with pytest.warns(ContextWarning, match=r"holds 4\d|holds 3\d"):
        replies = engine.generate_batch(prompts)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.stop_reason == "length" and len(reply.text) == 40 - length(model, prompt)
    assert max(seen) <= 40


def test_a_picture_without_room_is_not_started(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    c = Engine(living(tiny_model)).control
    script = [c.image, c.size(2), c.size(2), *letters(living(tiny_model), 1), c.end]
    n = length(living(tiny_model), "draw")
    for limit in range(n + 1, n + 12):
        model = limited(tiny_model, limit)
        seen = watch(monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)
            events = list(force(model, script).stream("draw", steps=1))
        begun = any(isinstance(event, BlockStart) for event in events)
        assert begun == (limit > n + 8)  # header, latents and media_end, and one more position
        assert events[-1] == Stop("end" if limit > n + 9 else "length")
        assert max(seen) <= limit


def test_a_forced_picture_without_room_raises(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    n = length(living(tiny_model), "draw")
    model = limited(tiny_model, n + 8)
    no_pass(model, monkeypatch)
    with pytest.raises(ValueError, match=f"the prompt and the picture that is forced have {n + 8} positions"):
        model.generate("draw", force_image=True, image_size=(8, 8))
    tight = limited(tiny_model, n + 5)
    with pytest.raises(ValueError, match=f"picture that is forced have {n + 5} positions"):
        tight.generate("draw", force_image=True)


def test_guidance_stays_within_the_context(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    model = limited(tiny_model, length(living(tiny_model), "draw it") + 9)
    seen = watch(monkeypatch)
    with pytest.warns(ContextWarning):
        reply = model.generate(
            "draw it", force_image=True, image_size=(8, 8), steps=1, guidance=3.0, image_guidance=2.0, max_images=1
        )
    assert len(reply.images) == 1 and max(seen) <= model.config.max_context


def test_a_warning_at_ninety_percent(tiny_model) -> None:  # noqa: ANN001
    """One warning per reply: for the prompt before the reply, else for the context at its end."""
    model = limited(tiny_model, 100)
    start = length(model, "")
    for num, limit in ((89, 1), (90, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            force(model, letters(model, 9)).generate("x" * (num - start), max_tokens=limit)
        assert [str(w.message)[:45] for w in caught] == ["the context holds 90 positions of at most 100"]
        assert caught[0].category is ContextWarning
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("x" * (88 - start), max_tokens=1)


def test_the_command_line_prints_the_warning_in_one_line(
    tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: ANN001
) -> None:  # fmt: skip
    model = limited(tiny_model, 60)
    model.save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--no-show", "--max-images", "0", "--out"]
    assert main(["generate", "x" * 50, *common, str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("omni: warning: the context holds 54 positions of at most 60;")
    assert not any("ContextWarning" in line for line in lines)
    assert json.loads((tmp_path / "a/reply.json").read_text())["stop_reason"] in ("length", "images", "end")
    assert main(["generate", "x" * 100, *common, str(tmp_path / "b")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("omni: error: the prompt has 104 positions, and this model's longest context is 60")
    assert not (tmp_path / "b").exists()


def test_the_bundled_context_holds_a_conversation_with_pictures() -> None:
    """Ten requests, each answered with a sentence and a picture of 4 x 4 latents."""
    config, tokenizer = load_json(BUNDLED / "config.json", OmniConfig), load_tokenizer(BUNDLED / "tokenizer")
    picture = Image(torch.zeros(64, 64, 3, dtype=torch.uint8), Role.ASSISTANT)
    turn = (Text("draw a cat to the left of a banana"), Text("Here you are: ", Role.ASSISTANT), picture)
    document = Document((*turn * 10, Text("and a dog")))
    assert 300 < prompt_length(document, tokenizer, lambda segment: 16, config.max_context) < 0.9 * config.max_context


def test_a_configuration_without_a_limit_loads(tiny_model, tmp_path: Path) -> None:  # noqa: ANN001
    data = json.loads((tiny_model / "config.json").read_text())
    assert data.pop("max_context") == 4096  # the default of a new model
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_json(tmp_path / "config.json", OmniConfig).max_context == 4096
    (tmp_path / "config.json").write_text(json.dumps({**data, "max_context": 0}))
    with pytest.raises(ValueError, match="max_context = 0"):
        load_json(tmp_path / "config.json", OmniConfig)
