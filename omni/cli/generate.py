"""`omni generate`: answer one prompt with an ordered reply of text and pictures, on the screen and in a folder.

`omni chat` also uses `load_model`, `check_text`, `show` and `write_numbered`. The engine decides everything; this file
prints its events.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from omni import media
from omni.cli.arguments import announced
from omni.cli.terminal import Printer, Protocol, detect
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.errors import DamagedError, one_line
from omni.generation.engine import Engine
from omni.generation.events import BlockDone, BlockStart, BlockStep, Event, Part, Stop, StopReason, TextDelta, TextPart
from omni.generation.reply import Reply, segments_of
from omni.generation.reply_files import check_folder, default_folder
from omni.media.preparation import target_size
from omni.model import Omni
from omni.nn.precision import require_device
from omni.pretrained import from_pretrained
from omni.safe_text import safe_text

DEFAULT_BASE = Path("omni-out")
MAX_PROMPT = 1 << 20  # characters; config.json has the longest context of a model
_CLEAR_LINE = "\r\x1b[K"


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Checks the arguments before it loads the model, and writes the reply at the end."""
    folder = Path(arguments.out) if arguments.out is not None else default_folder(DEFAULT_BASE)
    check_folder(folder, arguments.overwrite)
    prompt = read_prompt(arguments.prompt)
    system = system_of(arguments)
    pictures = [media.load_image(path) for path in arguments.image]
    engine = Engine(load_model(arguments.model, arguments.device, arguments.dtype), compile=arguments.compile)
    options = engine.resolve(arguments.options)
    attached = [image_segment(engine.model, pixels) for pixels in pictures]
    request = Document((*system, *attached, Text(prompt)))
    started = time.perf_counter()
    printer = None if arguments.json else Printer(protocol=protocol_of(arguments))
    reply = show(engine.stream(request, options), printer, request, engine.record(options))
    if arguments.out is not None:
        reply.save(folder, arguments.overwrite)
    else:
        folder = write_numbered(reply.save)
    if arguments.json:
        sys.stdout.write((folder / "reply.json").read_text(encoding="utf-8"))
        sys.stdout.flush()
    _report(reply, folder, time.perf_counter() - started)
    return 0


def write_numbered(write: Callable[[Path], Path]) -> Path:
    """`write` to the next free number of omni-out; tries the next number if another process takes it."""
    while True:
        folder = default_folder(DEFAULT_BASE)
        try:
            return write(folder)
        except (ValueError, OSError):
            if not folder.exists():
                raise


def _report(reply: Reply, folder: Path, seconds: float) -> None:
    """Print what was written, the time, and why the reply was cut off."""
    pictures = sum(not isinstance(part, TextPart) for part in reply.parts)
    files = f"{pictures} picture{'' if pictures == 1 else 's'}"
    reasons = {
        "length": "; cut off at --max-tokens, or at the model's longest context",
        "images": "; ended where the model asked for more pictures than --max-images",
    }
    cut = reasons.get(reply.stop_reason, "")
    print(f"wrote {folder / 'reply.md'}, reply.json and {files} ({seconds:.1f} s{cut})", file=sys.stderr)


# --------------------------------------------------------------------------------------------- shared with chat


def read_prompt(text: str) -> str:
    """The prompt, or standard input for "-". ValueError when it is empty or not text."""
    if text == "-":
        text = sys.stdin.read(MAX_PROMPT + 1)
    return check_text(text, "the prompt", 'write a request: omni generate "draw a red apple"')


def check_text(text: str, name: str, way_out: str) -> str:
    """Returns `text`. ValueError if it is empty, too long, or not valid UTF-8."""
    if not text.strip():
        raise ValueError(f"{name} {text!r:.60} is empty; {way_out}")
    if len(text) > MAX_PROMPT:
        raise ValueError(f"{name} is longer than {MAX_PROMPT} characters; make it shorter")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r:.60} is not valid UTF-8; check its encoding") from None
    return text


def system_of(arguments: argparse.Namespace) -> tuple[Text, ...]:
    """The segment of --system, if given."""
    if arguments.system is None:
        return ()
    return (Text(check_text(arguments.system, "--system", "leave it out"), Role.SYSTEM),)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """How pictures are shown: by --show and --no-show, else by the terminal."""
    return "none" if arguments.no_show else detect(sys.stdout, force=arguments.show)


def load_model(path: str | None, device: str = "cpu", dtype: str = "float32") -> Any:
    """The model at `path`, or the bundled model. dtype: of the weights, as torch names it. Unusable files raise
    DamagedError (exit code 4)."""
    require_device(device)
    try:
        with announced(f"the model {path or 'bundled with omni'}"):
            model = from_pretrained(path, device=device, dtype=getattr(torch, dtype), report=_say)
    except DamagedError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedError(one_line(error)) from error
    except (LookupError, TypeError, AttributeError) as error:  # valid digests, but not a model of Omni
        raise DamagedError(f"{path or 'the bundled model'}: {type(error).__name__}: {one_line(error)}") from error
    if model.codec is not None:
        model.codec.announce = announced
    return model


def _say(line: str) -> None:
    """A line on the error stream: which language model is read."""
    print(safe_text(line), file=sys.stderr, flush=True)


def image_segment(model: Omni, pixels: torch.Tensor) -> Image:
    """The picture as a segment; prints the size if preparation resizes it. ValueError without a codec."""
    if model.codec is None:
        raise ValueError("this model has no codec for pictures; leave --image out")
    height, width = pixels.shape[:2]
    size = target_size(height, width, model.preparation, model.limits)
    if size != (height, width):
        print(f"a picture of {height}x{width} is resized to {size[0]}x{size[1]}", file=sys.stderr)
    return Image(pixels)


def show(events: Iterable[Event], printer: Printer | None, request: Document, record: Mapping[str, Any]) -> Reply:
    """Consume the events of the reply to `request`, print each at once (unless `printer` is None), and return the
    reply. record: see Engine.record."""
    parts: list[Part] = []
    stop_reason: StopReason = "end"
    progress = _Progress(enabled=printer is not None and sys.stderr.isatty())
    for event in events:
        match event:
            case TextDelta(text=text):
                last = parts[-1] if parts else None
                if isinstance(last, TextPart):
                    parts[-1] = TextPart(last.text + text)
                else:
                    parts.append(TextPart(text))
                if printer:
                    printer.text(text)
            case BlockStart(kind=kind):
                if printer:
                    printer.fresh_line()  # the progress line overwrites its line
                progress.start(f"drawing {'a clip' if kind == 'video' else 'a picture'}")
            case BlockStep(step=step, steps=steps, block=block):
                progress.step(step, steps, block)
            case BlockDone(part=part):
                progress.clear()
                parts.append(part)
                if printer:
                    _print_media(printer, segments_of([part])[0], part.index + 1)
            case Stop(reason=reason):
                stop_reason = reason
    if printer:
        printer.fresh_line()
    return Reply(parts, Document((*request.segments, *segments_of(parts))), stop_reason, record=record)


def _print_media(printer: Printer, segment: Segment, number: int) -> None:
    """Show the picture if the stream can, else print a line in its place."""
    if printer.protocol == "none":
        height, width = (segment.pixels if isinstance(segment, Image) else segment.frames).shape[-3:-1]  # type: ignore[union-attr]
        printer.line(f"[{'picture' if isinstance(segment, Image) else 'clip'} {number}, {height}x{width}]")
    elif isinstance(segment, Image):
        printer.picture(segment.pixels)
    elif isinstance(segment, Video):
        printer.picture(torch.cat(list(segment.frames[:: max(1, len(segment.frames) // 4)]), dim=1))  # a film strip


class _Progress:
    """A progress line on the error stream, cleared when the picture is complete."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.label = enabled, ""

    def start(self, label: str) -> None:
        self.label = label

    def step(self, step: int, steps: int, block: int) -> None:
        """block: of a clip, from 0; several may be under way."""
        if self.enabled:
            where = f", block {block + 1}" if block else ""
            print(f"{_CLEAR_LINE}{self.label}{where}: {step}/{steps}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.enabled:
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)
