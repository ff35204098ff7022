"""`omni generate`: one prompt in, an ordered reply of text and pictures out, on the screen and in a folder.

`load_model`, `options_of`, `show` and `record` are shared with `omni chat`. The engine decides everything; this file
passes its events on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import omni
from omni import media
from omni.checkpoint import MANIFEST, DamagedError
from omni.command import announced
from omni.config import build
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.engine import Engine
from omni.model import BUNDLED, from_pretrained
from omni.nn.precision import require_device
from omni.reply import BlockDone, BlockStart, BlockStep, Event, GenerationOptions, ImagePart, Stop, TextDelta
from omni.reply_files import check_folder, default_folder, write_reply
from omni.terminal import Printer, Protocol, detect

DEFAULT_BASE = Path("omni-out")
_CLEAR_LINE = "\r\x1b[K"


def run(arguments: argparse.Namespace) -> int:
    """The command. Everything that can be refused is refused before the model is loaded, and written at the end."""
    folder = Path(arguments.out) if arguments.out is not None else default_folder(DEFAULT_BASE)
    check_folder(folder, arguments.overwrite)
    options = options_of(arguments)
    prompt = read_prompt(arguments.prompt)
    pictures = [media.load_image(path) for path in arguments.image]
    engine = Engine(load_model(arguments.model, arguments.device), compile=arguments.compile)
    attached = [Image(fit_picture(engine.model, pixels)) for pixels in pictures]
    request = Document((*attached, Text(prompt)))
    started = time.perf_counter()
    printer = Printer(protocol="none" if arguments.json else protocol_of(arguments))
    answer = show(engine.stream(request, options), None if arguments.json else printer)
    exchange = Document((*request.segments, *answer.segments))
    made_by = {"stop_reason": answer.stop_reason, **record(engine, options, arguments.model)}
    if arguments.out is not None:
        check_folder(folder, arguments.overwrite)  # again: the reply took a while
        write_reply(folder, exchange, answer.extras, made_by, replace=folder.exists())
    else:
        folder = _write_numbered(exchange, answer.extras, made_by)
    if arguments.json:
        sys.stdout.write((folder / "reply.json").read_text(encoding="utf-8"))
        sys.stdout.flush()
    _say_done(answer, folder, time.perf_counter() - started)
    return 0


def _write_numbered(exchange: Document, extras: list[dict[str, Any]], made_by: dict[str, Any]) -> Path:
    """The next free number, also when another process takes the one that was free a moment ago."""
    while True:
        folder = default_folder(DEFAULT_BASE)
        try:
            return write_reply(folder, exchange, extras, made_by)
        except (ValueError, OSError):
            if not folder.exists():
                raise


def _say_done(answer: Answer, folder: Path, seconds: float) -> None:
    pictures = sum(not isinstance(segment, Text) for segment in answer.segments)
    files = f"{pictures} picture{'' if pictures == 1 else 's'}"
    cut = "; cut off at --max-tokens" if answer.stop_reason == "length" else ""
    print(f"wrote {folder / 'reply.md'}, reply.json and {files} ({seconds:.1f} s{cut})", file=sys.stderr)


# --------------------------------------------------------------------------------------------- shared with chat


def read_prompt(text: str) -> str:
    """The prompt, or standard input for "-". ValueError when it is empty or not text."""
    if text == "-":
        text = sys.stdin.read()
    if not text.strip():
        raise ValueError(f'the prompt {text!r} is empty; say what you want: omni generate "draw a red apple"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!r:.60} is not valid UTF-8; check the terminal's encoding") from None
    return text


def options_of(arguments: argparse.Namespace) -> GenerationOptions:
    """The options that were given; the rest keep their defaults."""
    given = {name: getattr(arguments, name, None) for name in GenerationOptions.model_fields}
    given["image_size"] = arguments.size
    return build({n: value for n, value in given.items() if value is not None}, GenerationOptions, "command line")


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    return "none" if arguments.no_show else detect(sys.stdout, force=arguments.show)


def load_model(path: str | None, device: str = "cpu") -> Any:
    """The model at `path`, or the bundled one. Whatever is wrong with its files is a DamagedError (exit code 4)."""
    require_device(device)
    try:
        with announced(f"the model {path or 'bundled with omni'}"):
            model = from_pretrained(path, device=device)
    except DamagedError:
        raise
    except (ValueError, OSError) as error:
        raise DamagedError(str(error)) from error
    if model.codec is not None:
        model.codec.announce = announced
    return model


def fit_picture(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """`pixels` (H, W, 3) as the model can take them: resized, and said so, unless they fit already.

    The size is the model's "picture_size" (generation.json: [height, width]), else the nearest it can encode.
    """
    codec, size = model.codec, model.defaults.get("picture_size")
    if codec is None:
        raise ValueError("this model has no codec for pictures; leave --image out")
    if size is None:
        limit = model.config.max_grid
        scale = min(
            1.0, *(limit * step / side for side, step in zip(pixels.shape, codec.spec.stride[1:], strict=False))
        )
        grid = (round(side * scale / step) for side, step in zip(pixels.shape, codec.spec.stride[1:], strict=False))
        size = [min(max(count, 1), limit) * step for count, step in zip(grid, codec.spec.stride[1:], strict=True)]
    height, width = pixels.shape[:2]
    if [height, width] == list(size):
        return pixels
    print(f"a picture of {height}x{width} was resized to {size[0]}x{size[1]}", file=sys.stderr)
    return codec.fit(pixels, (size[0], size[1]))


def record(engine: Engine, options: GenerationOptions, path: str | None) -> dict[str, Any]:
    """What made a reply, as JSON values: the same command gives the same record, byte for byte."""
    manifest = (BUNDLED if path is None else Path(path)) / MANIFEST
    digest = hashlib.blake2b(manifest.read_bytes(), digest_size=16).hexdigest() if manifest.is_file() else None
    return {
        "options": engine.resolve(options).model_dump(mode="json"),
        "model": {"path": path or "bundled", "digest": digest},
        "versions": {"omni": omni.__version__, "torch": torch.__version__},
    }


@dataclass
class Answer:
    """A reply put together from its events: segments in order, and for each what is known of how it was made."""

    segments: list[Segment] = field(default_factory=list)
    extras: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str = "end"

    def add_text(self, text: str) -> None:
        last = self.segments[-1] if self.segments else None
        if isinstance(last, Text):
            self.segments[-1] = Text(last.text + text, Role.ASSISTANT)
        else:
            self.segments.append(Text(text, Role.ASSISTANT))
            self.extras.append({})


def show(events: Iterable[Event], printer: Printer | None) -> Answer:
    """Consume the events of one reply, print them as they come (unless `printer` is None), and return the reply."""
    answer = Answer()
    progress = _Progress(enabled=printer is not None and sys.stderr.isatty())
    for event in events:
        match event:
            case TextDelta(text=text):
                answer.add_text(text)
                if printer:
                    printer.text(text)
            case BlockStart(kind=kind):
                if printer:
                    printer.fresh_line()  # the progress line wipes what it is on
                progress.start(f"drawing {'a clip' if kind == 'video' else 'a picture'}")
            case BlockStep(step=step, steps=steps):
                progress.step(step, steps)
            case BlockDone(part=part):
                progress.clear()
                _add_media(answer, part)
                if printer:
                    _print_media(printer, answer.segments[-1], part.index + 1)
            case Stop(reason=reason):
                answer.stop_reason = reason
    if printer:
        printer.fresh_line()
    return answer


def _add_media(answer: Answer, part: Any) -> None:
    if isinstance(part, ImagePart):
        answer.segments.append(Image(media.load_image(part.image), Role.ASSISTANT))
    else:
        answer.segments.append(Video(part.frames, part.fps, Role.ASSISTANT))
    made = {"steps": part.steps, "evaluations": part.evaluations, "seed": part.seed, "index": part.index}
    answer.extras.append(made)


def _print_media(printer: Printer, segment: Segment, number: int) -> None:
    """The picture where the stream can show one, else a line that says where it stands."""
    if printer.protocol == "none":
        height, width = (segment.pixels if isinstance(segment, Image) else segment.frames).shape[-3:-1]  # type: ignore[union-attr]
        printer.line(f"[{'picture' if isinstance(segment, Image) else 'clip'} {number}, {height}x{width}]")
    elif isinstance(segment, Image):
        printer.picture(segment.pixels)
    elif isinstance(segment, Video):
        printer.picture(torch.cat(list(segment.frames[:: max(1, len(segment.frames) // 4)]), dim=1))  # a film strip


class _Progress:
    """One line on the error stream that is wiped when the picture is there."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.label = enabled, ""

    def start(self, label: str) -> None:
        self.label = label

    def step(self, step: int, steps: int) -> None:
        if self.enabled:
            print(f"{_CLEAR_LINE}{self.label}: {step}/{steps}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.enabled:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
