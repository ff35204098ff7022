"""The `omni` command: ordered replies, folders whole or absent, one line and exit code 2 or 4 for bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image as PillowImage

from omni import media
from omni.checkpoint import verify
from omni.cli import chat as cli_chat
from omni.cli import generate as cli_generate
from omni.cli import inspect as cli_inspect
from omni.cli.commands import build_parser, main
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Image, Role, Text
from omni.generation.contract import Check
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStart, BlockStep, ImagePart, Stop, TextDelta
from omni.generation.options import GenerationOptions
from omni.generation.reply_files import default_folder, escape_markdown
from omni.media.preparation import Limits, Preparation
from omni.pretrained import from_pretrained
from omni.text.chat import messages_to_document

RED = torch.zeros(8, 8, 3, dtype=torch.uint8)
RED[..., 0] = 200


def scripted(number: int = 2, fail_after: int | None = None) -> Callable[..., Iterator[Any]]:
    """The events of a story of `number` pictures; raises before picture `fail_after`."""

    def stream(self: Any, document: Document, options: Any) -> Iterator[Any]:
        for index in range(number):
            if index == fail_after:
                raise RuntimeError("out of luck")
            yield TextDelta("Part ")
            yield TextDelta(f"{index + 1}. \x1b[31m")
            yield BlockStart("image", index, (1, 2, 2))
            yield BlockStep(index, 1, 1, torch.zeros(4, 48))
            picture = PillowImage.fromarray(RED.numpy())
            yield BlockDone(index, ImagePart(picture, 8, 8, options.picture.steps or 8, options.seed, index, 15))
        yield TextDelta("The end.")
        yield Stop("end")

    return stream


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fake(at: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No model: the engine follows a script."""
    model = SimpleNamespace(
        codec=PixelCodec(PixelConfig(patch=4)), preparation=Preparation(), limits=Limits((4, 4), 1, 8, 8)
    )
    for module in (cli_generate, cli_chat):
        monkeypatch.setattr(module, "load_model", lambda path, device="cpu", dtype="float32": model)
        parts = {"__init__": _init, "stream": scripted(), "resolve": lambda self, options: options.resolved({})}
        parts["record"] = lambda self, options: {"options": options.flat("json"), "model": {}}
        monkeypatch.setattr(module, "Engine", type("FakeEngine", (), parts))
    return monkeypatch


def _init(self: Any, model: Any, compile: bool = False) -> None:
    self.model = model


def contents(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ------------------------------------------------------------------------------------------------ generate


def test_generate_writes_an_ordered_reply(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "tell a story", "--out", "story", "--steps", "3", "--seed", "7"]) == 0
    story = at / "story"
    verify(story)
    assert contents(story) == {"reply.md", "reply.json", "image-1.png", "image-2.png", "manifest.json"}
    data = json.loads((story / "reply.json").read_text())
    assert [part["type"] for part in data["parts"]] == ["text", "image", "text", "image", "text"]
    assert data["parts"][0]["text"] == "Part 1. \x1b[31m"
    image = {"type": "image", "path": "image-2.png", "height": 8, "width": 8}
    assert data["parts"][3] == {**image, "steps": 3, "evaluations": 15, "seed": 7, "index": 1}
    assert data["options"]["steps"] == 3 and data["stop_reason"] == "end"
    assert torch.equal(media.load_image(story / "image-1.png"), RED)
    markdown = (story / "reply.md").read_text()
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown) == ["image-1.png", "image-2.png"]
    assert markdown.index("Part 1") < markdown.index("image-1") < markdown.index("Part 2") < markdown.index("The end")
    out, err = capsys.readouterr()
    assert "\x1b" not in out and out.index("[picture 1, 8x8]") < out.index("Part 2") < out.index("The end.")
    assert "story" in err and "2 pictures" in err


def test_generate_is_reproducible_byte_for_byte(fake: Any, at: Path) -> None:
    for name in ("a", "b"):
        assert main(["generate", "a story", "--out", name]) == 0
    assert (at / "a/manifest.json").read_bytes() == (at / "b/manifest.json").read_bytes()


def test_generate_json_is_the_only_output(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a story", "--json"]) == 0
    out = capsys.readouterr().out
    assert out == (at / "omni-out/001/reply.json").read_text() and json.loads(out)["parts"]


def test_generate_shows_pictures_where_forced(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a story", "--show"]) == 0
    out = capsys.readouterr().out
    assert out.count("38;2;200;0;0;48;2;200;0;0") == 2 * 4 and "\x1b[31m" not in out


def test_default_folders_are_numbered(fake: Any, at: Path) -> None:
    assert main(["generate", "one"]) == main(["generate", "two"]) == 0
    assert {"omni-out/001", "omni-out/002"} <= contents(at)
    assert default_folder(at / "omni-out").name == "003"
    (at / "omni-out" / "notes").mkdir()
    assert default_folder(at / "omni-out").name == "003"


def test_a_taken_number_is_skipped(fake: Any, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process publishes 001 between the check and the write."""
    (at / "omni-out/001").mkdir(parents=True)
    (at / "omni-out/001/theirs").write_text("x")
    answers = iter([at / "omni-out/001", at / "omni-out/001", at / "omni-out/002"])
    monkeypatch.setattr(cli_generate, "default_folder", lambda base: next(answers))
    monkeypatch.setattr(cli_generate, "check_folder", lambda *a, **k: None)
    assert main(["generate", "one"]) == 0
    assert (at / "omni-out/001/theirs").is_file() and (at / "omni-out/002/reply.md").is_file()


def test_an_attached_picture_is_kept_beside_the_reply(fake: Any, at: Path) -> None:
    media.save_png(RED, at / "mine.png")
    assert main(["generate", "what is this?", "--image", "mine.png", "--out", "r"]) == 0
    request = json.loads((at / "r/reply.json").read_text())["request"]
    assert [part["type"] for part in request[0]["content"]] == ["image", "text"]
    assert torch.equal(media.load_image(at / "r" / request[0]["content"][0]["path"]), RED)


@pytest.mark.parametrize(
    ("size", "read", "rule"),
    [((8, 12), (8, 12), {}), ((9, 13), (8, 12), {}), ((100, 300), (12, 32), {"resize": "stride"}), ((1, 1), (4, 4), {}),
     ((100, 50), (16, 16), {"resize": "letterbox", "size": (16, 16)})],
)  # fmt: skip
def test_a_picture_is_attached_unchanged_and_its_size_printed(
    size: Any, read: Any, rule: Any, fake: Any, at: Path
) -> None:
    pixels, output = torch.full((*size, 3), 9, dtype=torch.uint8), io.StringIO()
    model = cli_generate.load_model(None)
    fake.setattr(model, "preparation", Preparation(**rule))
    fake.setattr(sys, "stderr", output)
    assert cli_generate.image_segment(model, pixels).pixels is pixels
    named = f"a picture of {size[0]}x{size[1]} is resized to {read[0]}x{read[1]}\n"
    assert output.getvalue() == ("" if size == read else named)


def test_a_prompt_from_standard_input(fake: Any, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("draw a cat\n"))
    assert main(["generate", "-", "--out", "r"]) == 0
    assert json.loads((at / "r/reply.json").read_text())["request"][0]["content"][0]["text"] == "draw a cat\n"


@pytest.mark.parametrize(
    ("stdin", "named"),
    [(None, "the prompt '' is empty"), (b"", "the prompt '' is empty"), (b"\x7fELF\xff\x00", "is not valid UTF-8"),
     (b"x" * (cli_generate.MAX_PROMPT + 5), "the prompt is longer than 1048576 characters")],
    ids=["closed", "empty", "binary", "long"],
)  # fmt: skip
def test_invalid_standard_input(stdin: bytes | None, named: str, fake: Any, at: Path, capsys: Any) -> None:
    stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    fake.setattr(sys, "stdin", stream)
    assert main(["generate", "-"]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1 and contents(at) == set()


def test_closed_standard_output_is_no_error(fake: Any, at: Path) -> None:
    fake.setattr(sys, "stdout", None)
    assert main(["generate", "a story", "--out", "r"]) == 0 and (at / "r/reply.md").is_file()


def test_system_and_stop_reach_the_engine(fake: Any, at: Path) -> None:
    seen: list[tuple[Document, Any]] = []

    def stream(self: Any, document: Document, options: Any) -> Iterator[Any]:
        seen.append((document, options))
        return scripted(0)(self, document, options)

    fake.setattr(cli_generate.Engine, "stream", stream)
    assert main(["generate", "hi", "--system", "be brief", "--stop", "a", "--stop", "b c", "--out", "r"]) == 0
    [(document, options)] = seen
    assert document.segments == (Text("be brief", Role.SYSTEM), Text("hi")) and options.stop == ("a", "b c")
    data = json.loads((at / "r/reply.json").read_text())
    assert [message["role"] for message in data["request"]] == ["system", "user"]
    assert data["options"]["stop"] == ["a", "b c"]


def test_a_random_seed_is_recorded(fake: Any, at: Path) -> None:
    for name in ("a", "b"):
        assert main(["generate", "hi", "--seed", "random", "--out", name]) == 0
    first, second = (json.loads((at / name / "reply.json").read_text()) for name in ("a", "b"))
    assert first["options"]["seed"] != second["options"]["seed"]
    assert first["parts"][1]["seed"] == first["options"]["seed"]


def test_an_impossible_folder_raises_before_any_work(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.setattr(cli_generate, "load_model", lambda *arguments: pytest.fail("loaded the model"))
    (at / "f").write_text("mine")
    (at / "link").symlink_to("nowhere")
    for folder, message in (
        ("link", "'link' is a broken link"),
        (".", "'.'"), ("f/r", "'f' is a file"), ("..", "'..'"), ("new/" + "a" * 300, "File name too long"),
        ("a" * 250, "File name too long"), ("/proc/new/r", "cannot be written"),
    ):  # fmt: skip
        assert main(["generate", "x", "--out", folder]) == 2
        assert message in capsys.readouterr().err
    assert contents(at) == {"f", "link"}
    (at / "omni-out").write_text("mine")
    assert main(["generate", "x"]) == 2
    assert "'omni-out' is a file" in capsys.readouterr().err


def test_a_full_disk_raises_before_any_work(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    fake.setattr(cli_generate, "load_model", lambda *arguments: pytest.fail("loaded the model"))
    fake.setattr(Path, "write_bytes", full)
    assert main(["generate", "x", "--out", "r"]) == 2
    assert "--out 'r' cannot be written: No space left on device" in capsys.readouterr().err


class Terminal(io.StringIO):
    """A stream whose `isatty` is True."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_does_not_erase_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams on one screen: the text's line ends before the progress line clears its line."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    events = scripted(1)(None, None, GenerationOptions(steps=1, seed=0))
    cli_generate.show(events, cli_generate.Printer(screen, "none"), Document((Text("x"),)), {})
    written = screen.getvalue()
    assert "drawing a picture: 1/1" in written
    assert written[: written.index("\r")].endswith("\n")


def test_overwrite_replaces_a_reply_and_nothing_else(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "one", "--out", "r"]) == 0
    before = (at / "r/manifest.json").read_bytes()
    assert main(["generate", "two", "--out", "r"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (at / "r/manifest.json").read_bytes() == before
    assert main(["generate", "two", "--out", "r", "--overwrite"]) == 0
    assert (at / "r/manifest.json").read_bytes() != before
    (at / "r/thesis.tex").write_text("years of work")
    assert main(["generate", "three", "--out", "r", "--overwrite"]) == 2
    assert "thesis.tex" in capsys.readouterr().err and (at / "r/thesis.tex").is_file()


def test_a_failure_in_the_middle_leaves_nothing(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.setattr(cli_generate.Engine, "stream", scripted(fail_after=1))
    assert main(["generate", "a story", "--out", "r"]) == 1
    assert contents(at) == set()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError" in err and "OMNI_DEBUG=1" in err


def test_an_interrupt_leaves_nothing(fake: Any, at: Path) -> None:
    def interrupted(self: Any, document: Document, options: Any) -> Iterator[Any]:
        yield TextDelta("Once")
        raise KeyboardInterrupt

    fake.setattr(cli_generate.Engine, "stream", interrupted)
    assert main(["generate", "a story", "--out", "r"]) == 130
    assert contents(at) == set()


def test_a_full_disk_leaves_nothing(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "image-2.png")

    fake.setattr(media, "save_png", full)
    assert main(["generate", "a story", "--out", "r"]) == 2
    assert contents(at) == set() and "No space left" in capsys.readouterr().err


def test_debug_shows_the_traceback(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_DEBUG", "1")
    with pytest.raises(ValueError, match="empty"):
        main(["generate", ""])


# ------------------------------------------------------------------------------------------------ bad input


def huge_png(path: Path) -> None:
    """A PNG of 50,000 x 50,000 pixels by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    idat = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + idat + chunk(b"IEND", b""))


BAD = [
    (["generate", ""], 2, "empty"),
    (["generate", " \n"], 2, "empty"),
    (
        ["generate", "x", "--steps", "0"],
        2,
        "--steps: steps = 0: must be a whole number from 1 to 1000; or leave it out",
    ),
    (["generate", "x", "--steps", "1000000000"], 2, "from 1 to 1000"),
    (["generate", "x", "--steps", "many"], 2, "steps = 'many': must be a whole number from 1 to 1000"),
    (["generate", "x", "--steps", "9" * 5000], 2, "must be a whole number from 1 to 1000"),
    (["generate", "x", "--guidance", "nan"], 2, "guidance = nan: must be a finite number from 0 to 100"),
    (["generate", "x", "--guidance", "1e38"], 2, "guidance = 1e+38"),
    (["generate", "x", "--temperature", "-1"], 2, "temperature = -1.0: must be a number from 0 to 100"),
    (["generate", "x", "--temperature", "1e-300"], 2, "must be 0 (greedy), or from 0.001 to 100"),
    (["generate", "x", "--top-p", "0"], 2, "top_p = 0.0"),
    (["generate", "x", "--seed", "-3"], 2, "seed = -3"),
    (["generate", "x", "--seed", str(2**70)], 2, "from 0 to 9223372036854775807"),
    (["generate", "x", "--max-tokens", "1000000000000"], 2, "from 1 to 1000000"),
    (["generate", "x", "--max-images", "-1"], 2, "max_images = -1"),
    (["generate", "x", "--stop", ""], 2, "an empty text would end every reply at once"),
    (["generate", "x", *["--stop", "y"] * 17], 2, "has 17 texts; give at most 16"),
    (["generate", "x", "--system", " "], 2, "--system ' ' is empty"),
    (["generate", "x", "--size", "64"], 2, "--size: image_size"),
    (["generate", "x", "--size", "0x64"], 2, "image_size = (0, 64): must be (height, width) in pixels"),
    (["generate", "x", "--size", "9" * 5000 + "x8"], 2, "must be (height, width) in pixels"),
    (["generate", "draw", "a", "cat"], 2, "put quotes around the prompt"),
    (["generate", "-draw"], 2, "a prompt that begins with - comes after --"),
    (["generate", "x", "--device", "mps"], 2, "device 'mps' is not available; use cpu"),
    (["generate", "x", "--device", "cuda:9"], 2, "device 'cuda:9' is not available; use cpu"),
    (["generate", "x", "--device", "nonsense"], 2, "device 'nonsense' is not available; use cpu"),
    (["generate", "x", "--device", "meta"], 2, "device 'meta' is not available"),
    (["generate", "x", "--device", ""], 2, "device '' is not available"),
    (["generate", "x", "--out", "a" * 300], 2, "File name too long"),
    (["generate", "x", "--out", "/proc/here"], 2, "'/proc/here' cannot be written"),
    (["inspect", "deep.json"], 2, "deep.json' is no Document"),
    (["inspect", "negative.json"], 2, "negative.json' is no Document"),
    (["inspect", "huge.json"], 2, "huge.json' is no Document"),
    (["inspect", "list.json"], 2, "list.json' is no Document"),
    (["inspect", "outside.json"], 2, "beside its JSON"),
    (["inspect", "pipe.json"], 2, "neither a folder nor a regular file"),
    (["doctor", "--font", "red.png"], 2, "red.png' is not a font"),
    (["generate", "x", "--image", "none.png"], 2, "none.png"),
    (["generate", "x", "--image", "text.png"], 2, "text.png"),
    (["generate", "x", "--image", "huge.png"], 2, "huge.png"),
    (["generate", "x", "--image", "folder"], 2, "folder"),
    (["generate", "x", "--out", "text.png"], 2, "text.png"),
    (["generate", "x", "--out", "folder"], 2, "folder"),
    (["generate", "x", "--stpes", "3"], 2, "did you mean --steps"),
    (["generate"], 2, "prompt"),
    (["genrate", "x"], 2, "genrate"),
    (["generate", "x", "--model", "nowhere"], 4, "nowhere"),
    (["generate", "x", "--model", "folder"], 4, "folder"),
    (["chat", "--model", "nowhere"], 4, "nowhere"),
    (["inspect", "nowhere"], 2, "nowhere"),
    (["inspect", "text.txt"], 2, "text.txt"),
    (["inspect", "folder"], 2, "folder"),
    (["inspect", "bad.json"], 2, "bad.json"),
    (["doctor", "--font", "none.ttf"], 2, "none.ttf"),
    (["verify", "nowhere"], 4, "nowhere"),
]


@pytest.mark.parametrize(("argv", "code", "named"), BAD, ids=[" ".join(argv)[:40] for argv, _, _ in BAD])
def test_bad_input_is_one_line(argv: list[str], code: int, named: str, at: Path, capsys: Any) -> None:
    (at / "folder").mkdir()
    (at / "folder/something").write_text("mine")
    (at / "text.png").write_text("not a picture")
    (at / "text.txt").write_text("text")
    (at / "bad.json").write_text("{}")
    (at / "deep.json").write_text("[" * 100_000)
    (at / "list.json").write_text("[1]")
    for name, shape in (("negative", [-1, 8, 3]), ("huge", [10**6, 10**6, 3])):
        picture = {"type": "image", "role": "user", "supervise": False, "shape": shape, "zlib": "eJwDAAAAAAE="}
        (at / f"{name}.json").write_text(json.dumps({"segments": [picture]}))
    outside = {"format": 1, "request": [], "parts": [{"type": "image", "path": "../red.png"}]}
    (at / "outside.json").write_text(json.dumps(outside))
    os.mkfifo(at / "pipe.json")
    media.save_png(RED, at / "red.png")
    huge_png(at / "huge.png")
    before = contents(at)
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("omni: error: ") and err.count("\n") == 1 and named in err, err
    assert "Traceback" not in err and "bug" not in err
    assert contents(at) == before


def test_a_prompt_that_is_not_utf8(at: Path, capsys: Any) -> None:
    assert main(["generate", "caf\udce9"]) == 2
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/tokenizer.json", "manifest.json"])
def test_one_flipped_bit_is_code_4(name: str, at: Path, tiny_model: Path, capsys: Any) -> None:
    shutil.copytree(tiny_model, at / "model")
    data = bytearray((at / "model" / name).read_bytes())
    data[len(data) // 2] ^= 4
    (at / "model" / name).write_bytes(data)
    before = contents(at)
    for argv in (["generate", "draw a cat", "--model", "model"], ["inspect", "model"], ["verify", "model"]):
        assert main(argv) == 4
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and Path(name).name in err
    assert contents(at) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "codec/config.json"])
def test_a_missing_file_is_code_4(name: str, at: Path, tiny_model: Path, capsys: Any) -> None:
    shutil.copytree(tiny_model, at / "model")
    (at / "model" / name).unlink()
    before = contents(at)
    assert main(["generate", "draw a cat", "--model", "model"]) == 4
    assert name in capsys.readouterr().err and contents(at) == before


def test_errors_print_no_control_characters(at: Path, capsys: Any) -> None:
    assert main(["generate", "x", "--image", "\x1b]0;owned\x07.png"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\x07" not in err


# ------------------------------------------------------------------------------------------------ with a real model


def test_generate_with_a_real_model(tiny_model: Path, at: Path) -> None:
    argv = ["generate", "draw a cat", "--model", str(tiny_model), "--force-image", "--size", "8x8"]
    assert main([*argv, "--steps", "2", "--max-tokens", "5", "--max-images", "1", "--out", "r"]) == 0
    data = json.loads((at / "r/reply.json").read_text())
    assert data["parts"][0]["type"] == "image" and data["parts"][0]["height"] == 8
    assert re.fullmatch("[0-9a-f]{32}", data["model"]["digest"])


def test_a_size_beyond_the_model_raises(tiny_model: Path, at: Path, capsys: Any) -> None:
    for size in ("9x8", "4096x8"):
        argv = ["generate", "x", "--model", str(tiny_model), "--force-image", "--size", size, "--out", "r"]
        assert main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1 and not (at / "r").exists()


def test_a_pipe_that_closes_is_silent(tiny_model: Path, at: Path) -> None:
    command = f"{sys.executable} -m omni inspect {tiny_model}/model.safetensors | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.stderr == "" and done.returncode in (0, 141)


# ------------------------------------------------------------------------------------------------ chat


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *argv])


def test_chat_expands_the_home_folder(fake: Any, at: Path) -> None:
    (at / "home").mkdir()
    media.save_png(RED, at / "home/red.png")
    fake.setenv("HOME", str(at / "home"))
    assert chat("/image ~/red.png\nhello\n/save ~/talk\n", fake) == 0
    assert (at / "home/talk/chat.json").is_file() and not (at / "~").exists()


def test_chat_reports_a_bad_number_in_one_line(fake: Any, at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("/guidance nan\n", fake) == 2
    output = capsys.readouterr().err
    assert output == (
        "omni: error: line 1: /guidance: guidance = nan: must be a finite number from 0 to 100; or leave it out\n"
    )


def test_chat_keeps_its_history(fake: Any, at: Path, capsys: Any) -> None:
    media.save_png(RED, at / "a b.png")
    seen: list[tuple[Document, Any]] = []

    def stream(self: Any, document: Document, options: Any) -> Iterator[Any]:
        seen.append((document, options))
        return scripted(1)(self, document, options)

    fake.setattr(cli_chat.Engine, "stream", stream)
    lines = '/image "a b.png"\nwhat is this?\n\n/steps 3\nand now?\n/save c\n/reset\nhello\n/quit\nnever\n'
    assert chat(lines, fake, "--seed", "5") == 0
    kinds = [[type(segment).__name__ for segment in document.segments] for document, _ in seen]
    assert kinds == [["Image", "Text"], ["Image", "Text", "Text", "Image", "Text", "Text"], ["Text"]]
    assert [(options.seed, options.picture.steps) for _, options in seen] == [(5, 8), (6, 3), (5, 3)]
    verify(at / "c")
    data = json.loads((at / "c/chat.json").read_text())
    assert [message["role"] for message in data["messages"]] == ["user", "assistant"] * 2
    os.chdir(at / "c")
    again = messages_to_document(data["messages"])
    saved = seen[1][0].segments
    for old, new in zip(saved, again.segments, strict=False):
        assert old.role == new.role
        if isinstance(old, Text) and isinstance(new, Text):
            assert old.text == new.text
        if isinstance(old, Image) and isinstance(new, Image):
            assert torch.equal(old.pixels, new.pixels)


@pytest.mark.parametrize(
    ("line", "named"),
    [("/image none.png", "none.png"), ("/steps 0", "steps = 0: must be a whole number from 1 to 1000"),
     ("/steps", "usage: /steps N"), ("/stpes 3", "did you mean '/steps'?"), ("/save x", "nothing to save"),
     ("/image 'a", "quotation"), ("/guidance high", "guidance = 'high'"), ("/seed 1.5", "seed = '1.5'"),
     ("/size 0x8", "image_size = (0, 8)"), ("/stop ''", "end every reply"), ("/force-image maybe", "true or false"),
     ("caf\udce9", "not valid UTF-8"), ("x" * (cli_generate.MAX_PROMPT + 9), "longer than")],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_chat_from_a_pipe_continues_after_an_error(line: str, named: str, fake: Any, at: Path, capsys: Any) -> None:
    assert chat(f"{line}\nhello\n/save c\n", fake) == 2
    out, err = capsys.readouterr()
    assert err.startswith("omni: error: line 1: ") and named in err and err.count("\n") == 1
    assert "The end." in out and contents(at) >= {"c", "c/chat.json"}


def test_chat_settings_are_the_flags(fake: Any, at: Path, capsys: Any) -> None:
    seen: list[tuple[Document, Any]] = []

    def stream(self: Any, document: Document, options: Any) -> Iterator[Any]:
        seen.append((document, options))
        return scripted(0)(self, document, options)

    fake.setattr(cli_chat.Engine, "stream", stream)
    lines = (
        '/system be brief\n/stop "the end" cat\n/size 8x16\n/max-tokens 9\n/force-image on\none\n'
        "/system\n/stop\n/size default\n/force-image off\n/seed random\ntwo\nthree\n/save c\n"
    )
    assert chat(lines, fake, "--max-images", "2") == 0
    (first, options), (second, later), (_, last) = seen
    assert first.segments[0] == Text("be brief", Role.SYSTEM) and len(first.segments) == 2
    assert options.stop == ("the end", "cat") and options.picture.image_size == (8, 16)
    assert (options.max_tokens, options.force_image, options.max_images) == (9, True, 2)
    assert [type(segment) for segment in second.segments] == [Text, Text, Text] and later.stop == ()
    assert later.picture.image_size is None and not later.force_image
    assert later.seed != last.seed and later.seed > 1000
    assert json.loads((at / "c/chat.json").read_text())["options"]["seed"] == last.seed


def terminal(fake: Any, *replies: Any) -> int:
    """A chat at a terminal: `input` returns `replies` in order, and raises those that are exceptions."""
    waiting = iter(replies)

    def ask(_: str) -> str:
        reply = next(waiting)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    fake.setattr(sys, "stdin", Terminal())
    fake.setattr("builtins.input", ask)
    return main(["chat"])


def test_interactive_chat_continues_after_an_error(fake: Any, at: Path, capsys: Any) -> None:
    assert terminal(fake, "/image none.png", "/help", "hello", EOFError()) == 0
    out, err = capsys.readouterr()
    assert "error: cannot read picture 'none.png'" in err and "/save" in out and "The end." in out


def test_one_interrupt_at_an_idle_prompt_loses_nothing(fake: Any, at: Path, capsys: Any) -> None:
    interrupt = KeyboardInterrupt()
    assert terminal(fake, "one", interrupt, "two", interrupt, "/save c", "/quit") == 0
    assert capsys.readouterr().out.count("Ctrl-C once more") == 2
    data = json.loads((at / "c/chat.json").read_text())
    assert [message["role"] for message in data["messages"]] == ["user", "assistant"] * 2
    assert not (at / "omni-out").exists()  # it was saved already


@pytest.mark.parametrize("end", [["/quit"], [EOFError()], [KeyboardInterrupt(), KeyboardInterrupt()]])
def test_an_unsaved_conversation_is_saved_at_the_end(end: list[Any], fake: Any, at: Path, capsys: Any) -> None:
    assert terminal(fake, "one", *end) == 0
    verify(at / "omni-out/001")
    assert (at / "omni-out/001/chat.json").is_file() and "omni-out/001" in capsys.readouterr().err


def test_a_bug_does_not_lose_the_conversation(fake: Any, at: Path) -> None:
    streams = iter([scripted(1), scripted(fail_after=0)])
    fake.setattr(cli_chat.Engine, "stream", lambda self, *arguments: next(streams)(self, *arguments))
    assert terminal(fake, "one", "two") == 1
    assert len(json.loads((at / "omni-out/001/chat.json").read_text())["messages"]) == 2


def test_out_of_memory_is_one_line_and_the_chat_continues(fake: Any, at: Path, capsys: Any) -> None:
    def full(*_: Any) -> Iterator[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 TiB")

    streams = iter([full, scripted(0)])
    fake.setattr(cli_chat.Engine, "stream", lambda self, *arguments: next(streams)(self, *arguments))
    assert chat("one\ntwo\n", fake) == 2
    out, err = capsys.readouterr()
    assert "out of memory: use less" in err and err.count("\n") == 1 and "The end." in out


@pytest.mark.parametrize("command", [["generate", "draw a cat", "--out", "r"], ["chat"]])
def test_the_type_of_the_weights_can_be_chosen(
    command: list[str], tiny_model: Path, at: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    loaded = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(from_pretrained(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(cli_generate, "from_pretrained", load)
    monkeypatch.setattr(sys, "stdin", io.StringIO("draw a cat\n"))
    assert main([*command, "--model", str(tiny_model), "--dtype", "bfloat16", "--max-tokens", "4"]) == 0
    assert {p.dtype for model in loaded for p in model.parameters()} == {torch.bfloat16}
    assert main([*command, "--dtype", "int8"]) == 2 and "bfloat16" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ inspect, doctor


def test_inspect_a_model(tiny_model: Path, at: Path, capsys: Any) -> None:
    assert main(["inspect", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    model = cli_generate.load_model(str(tiny_model))
    assert "a model" in out and f"{sum(p.numel() for p in model.parameters()):,} numbers" in out
    assert "256 text ids, then 73 control ids" in out


def test_inspect_a_picture_and_a_document(tiny_model: Path, at: Path, capsys: Any) -> None:
    media.save_png(RED, at / "a.png")
    assert main(["inspect", "a.png", "--model", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    assert "8 x 8 pixels" in out and "2 x 2 = 4 latents" in out and "inf dB" in out
    document = Document((Text("hi \x1b"), Image(RED, Role.ASSISTANT, True), Text("yes", Role.ASSISTANT, True)))
    (at / "d.json").write_text(document.to_json())
    assert main(["inspect", "d.json", "--model", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    engine = Engine(cli_generate.load_model(str(tiny_model)))
    num_positions = sum(
        len(span.latents) if hasattr(span, "latents") else len(span.ids) for span in engine.model.spans(document)
    )
    rows = [line for line in out.splitlines() if re.match(r"\d", line)]
    assert re.match(rf"(\d+-)?{num_positions - 1} ", rows[-1])  # the last position of the sequence
    assert any("latents" in row and "refined" in row and "1 x 2 x 2" in row for row in rows) and "\x1b" not in out


def test_inspect_other_folders(tiny_model: Path, fake: Any, at: Path, capsys: Any) -> None:
    assert main(["inspect", str(tiny_model / "tokenizer")]) == 0
    assert main(["generate", "a story", "--out", "r"]) == 0
    assert main(["inspect", "r"]) == 0
    out = capsys.readouterr().out
    assert "a tokenizer" in out and "a reply, every byte as published" in out


def test_inspect_reads_what_omni_wrote(tiny_model: Path, fake: Any, at: Path, capsys: Any) -> None:
    assert main(["generate", "a story", "--out", "r"]) == 0
    assert chat("hello\n/save c\n", fake) == 0
    capsys.readouterr()
    for path, what in (("r/reply.json", "a reply of 6 segments"), ("c/chat.json", "a conversation of 6 segments")):
        assert main(["inspect", path, "--model", str(tiny_model)]) == 0
        out = capsys.readouterr().out
        assert what in out and out.count("assistant: a picture") == 2 and out.count("1 x 2 x 2") == 2
    (at / "r/image-2.png").unlink()
    assert main(["inspect", "r/reply.json", "--model", str(tiny_model)]) == 2
    assert "image-2.png" in capsys.readouterr().err


def test_inspect_searches_a_bounded_part_of_a_large_folder(at: Path, capsys: Any) -> None:
    (at / "large/a/b").mkdir(parents=True)
    (at / "large/a/b/manifest.json").write_text("{}")
    assert main(["inspect", "large"]) == 2
    assert "did you mean 'large/a/b'?" in capsys.readouterr().err
    (at / "large/a/loop").symlink_to(at / "large")
    assert cli_inspect.published_below(at / "large", 100) == [at / "large/a/b"]
    for number in range(50):
        (at / f"large/{number}").mkdir()
    assert cli_inspect.published_below(at / "large", 20) == []  # 50 entries come before it


def test_doctor_renders_with_the_given_font(at: Path, capsys: Any) -> None:
    media.save_png(RED, at / "apple.png")
    (at / "empty.ttf").write_bytes(b"")
    for name in ("apple.png", "empty.ttf"):
        assert main(["doctor", "--font", name]) == 2
        err = capsys.readouterr().err
        assert f"'{name}' is not a font" in err and err.count("\n") == 1


def test_doctor_requires_colours(at: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = iter(range(2, 99))

    def grey(self: Any, character: str) -> PillowImage.Image:
        return PillowImage.new("RGBA", (next(shapes), 4), (90, 90, 90, 255))

    monkeypatch.setattr("omni.data.emoji_world.atlas.Glyphs._open", lambda self: None)
    monkeypatch.setattr("omni.data.emoji_world.atlas.Glyphs.picture", grey)
    (at / "grey.ttf").write_bytes(b"x")
    assert main(["doctor", "--font", "grey.ttf"]) == 2
    assert "has emoji without colours" in capsys.readouterr().err


def test_doctor_names_what_is_missing(at: Path, capsys: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.cli.doctor.BUNDLED", tiny_model)
    code = main(["doctor", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["torch"]["value"].startswith(torch.__version__) and rows["bundled model"]["state"] == "ok"
    assert code == int(any(row["state"] == "bad" for row in rows.values()))
    monkeypatch.setattr("omni.cli.doctor.BUNDLED", at)
    assert main(["doctor"]) == 1
    assert re.search(r"bundled model +bad", capsys.readouterr().out)


def test_doctor_reads_extras_from_the_metadata(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, capsys: Any) -> None:
    required = ["numpy>=1", "nothing-such>=2 ; extra == 'video'", 'pillow>=11; extra == "vae"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    monkeypatch.setattr("omni.cli.doctor.BUNDLED", tiny_model)
    assert main(["doctor", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["core packages"]["value"] == "numpy" and rows["extra vae"]["state"] == "ok"
    assert rows["extra video"]["state"] == "absent" and "pip install 'omni-flow[video]'" in rows["extra video"]["value"]


# ------------------------------------------------------------------------------------------------ the rest


def test_help_and_version_need_no_torch() -> None:
    for argument in ("--help", "--version"):
        script = f"import sys, omni.cli.commands; print(omni.cli.commands.main([{argument!r}]), 'torch' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 0 and done.stdout.endswith("0 False\n"), done.stderr


def test_bare_omni_is_its_help(capsys: Any) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: omni") and "generate" in out and err == ""


def test_help_into_a_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} -m omni generate --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr == "" and done.returncode in (0, 141)


def test_every_command_has_help() -> None:
    text = build_parser().format_help()
    for command in ("generate", "chat", "inspect", "verify", "doctor"):
        assert command in text
        assert main([command, "--help"]) == 0


@pytest.mark.parametrize(
    "text", ["![x](http://a/b.png)", "<script>", "[a](b)", "```\ncode", "# no title\n---\n1. one", "~~~", "a\\[b](c)"]
)
def test_markdown_of_a_reply_is_inert(text: str) -> None:
    escaped = escape_markdown(text)
    assert not re.search(r"(?<!\\)(\\\\)*[`\[~<]", escaped)
    assert not re.search(r"(?m)^\s*(#|-|=|\d+\.)", escaped)


def test_verify_prints_the_contract(tiny_model: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["verify", str(tiny_model)]) == 0
    assert "cached = uncached" in capsys.readouterr().out
    broken = [Check("cached = uncached", 0.5, 1e-5), Check("another", 0.0, 0.0)]
    monkeypatch.setattr("omni.cli.verify.verify", lambda model: broken)
    assert main(["verify", str(tiny_model), "--json"]) == 1
    assert [row["holds"] for row in json.loads(capsys.readouterr().out)] == [False, True]
