"""`omni chat`: a conversation with history, attached pictures and settings that can be changed on the way.

Lines are messages; lines that begin with / are commands (COMMANDS). The same from a pipe, where errors end the run
with exit code 2; at a terminal they are said and the conversation goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omni import media
from omni.cli_generate import attach, load_model, options_of, protocol_of, record, show
from omni.config import build, nearest
from omni.document import Document, Image, Segment, Text
from omni.engine import Engine
from omni.reply import GenerationOptions
from omni.reply_files import check_folder, write_chat
from omni.terminal import Printer

COMMANDS = {
    "/image": "FILE   attach a picture to the next message",
    "/steps": "N      passes spent on each picture",
    "/seed": "S       what all draws depend on",
    "/guidance": "W   how strongly pictures follow the text; 1 is off",
    "/save": "DIR     write the conversation: chat.md, chat.json and the pictures",
    "/reset": "       forget the conversation",
    "/help": "        this list",
    "/quit": "        end (so does end of input)",
}


def run(arguments: argparse.Namespace) -> int:
    """The command: read lines until /quit or the end of input."""
    options = options_of(arguments)
    printer = Printer(protocol=protocol_of(arguments))
    interactive = sys.stdin.isatty()
    engine = Engine(load_model(arguments.model, arguments.device), compile=arguments.compile)
    if interactive:
        _enable_line_editing()
        printer.line("Ask for text and pictures. /help lists the commands, /quit ends.")
    chat = Chat(engine, options, printer, arguments.model)
    for line in _lines(interactive):
        try:
            if not chat.take(line):
                break
        except (ValueError, OSError) as error:
            if not interactive:
                raise
            printer.line(f"error: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            printer.line("(interrupted; the message was not sent)")
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if not interactive and not line:
            return
        yield line.rstrip("\n")


def _enable_line_editing() -> None:
    """Arrow keys and history, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


class Chat:
    """The conversation so far. A message that fails or is interrupted leaves it as it was."""

    def __init__(self, engine: Engine, options: GenerationOptions, printer: Printer, model_path: str | None) -> None:
        self.engine, self.options, self.printer, self.model_path = engine, options, printer, model_path
        self.history: tuple[Segment, ...] = ()
        self.extras: tuple[dict[str, Any], ...] = ()  # for each segment of the history: how it was made
        self.num_replies = 0
        self.attached: tuple[Image, ...] = ()
        self._commands: dict[str, Callable[[list[str]], Any]] = {
            "/image": self._attach,
            "/steps": lambda words: self._set("steps", int, words),
            "/seed": lambda words: self._set("seed", int, words),
            "/guidance": lambda words: self._set("guidance", float, words),
            "/save": self._save,
            "/reset": self._reset,
            "/help": lambda words: self.printer.line("\n".join(f"{n} {text}" for n, text in COMMANDS.items())),
        }

    def take(self, line: str) -> bool:
        """Handle one line; False when it says to end. Raises ValueError for a command that cannot be done."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._say(line)
            return True
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name not in self._commands:
            raise ValueError(f"unknown command {name!r}{nearest(name, COMMANDS) or '; /help lists them'}")
        self._commands[name](_words(rest))
        return True

    def _say(self, text: str) -> None:
        """Each reply has a seed of its own, so that "draw another one" is another one."""
        request = (*self.history, *self.attached, Text(text))
        options = self.options.model_copy(update={"seed": self.options.seed + self.num_replies})
        answer = show(self.engine.stream(Document(request), options), self.printer)
        if not answer.segments:
            why = ": it asked for a picture beyond --max-images" if answer.stop_reason == "images" else ""
            self.printer.line(f"(the reply is empty{why})")
        asked = ({},) * (len(request) - len(self.history))
        self.history, self.attached = (*request, *answer.segments), ()
        self.extras = (*self.extras, *asked, *answer.extras)
        self.num_replies += 1

    def _attach(self, words: list[str]) -> None:
        path = os.path.expanduser(_one(words, "/image FILE"))
        self.attached += (attach(self.engine.model, media.load_image(path)),)
        height, width = self.attached[-1].pixels.shape[:2]
        self.printer.line(f"attached {path}, {height}x{width}; it goes with the next message")

    def _set(self, name: str, parse: Callable[[str], Any], words: list[str]) -> None:
        word = _one(words, f"/{name} {'N' if parse is int else 'W'}")
        try:
            value = parse(word)
        except ValueError:
            raise ValueError(f"/{name} {word}: give a number") from None
        options = build({**self.options.model_dump(), name: value}, GenerationOptions, f"/{name} {word}")
        self.engine.resolve(options)
        self.options = options
        self.printer.line(f"{name} = {value}")

    def _save(self, words: list[str]) -> None:
        folder = Path(os.path.expanduser(_one(words, "/save DIR")))
        if not self.history:
            raise ValueError("nothing to save yet; say something first")
        check_folder(folder, overwrite=False, name="/save")
        made_by = record(self.engine, self.options, self.model_path)
        write_chat(folder, Document(self.history), self.extras, made_by, replace=folder.exists())
        self.printer.line(f"wrote {folder / 'chat.md'} and chat.json")

    def _reset(self, words: list[str]) -> None:
        self.history, self.extras, self.attached, self.num_replies = (), (), (), 0
        self.printer.line("forgotten")


def _words(rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"{rest!r}: {str(error).lower()}; close the quotation") from None


def _one(words: list[str], usage: str) -> str:
    if len(words) != 1:
        raise ValueError(f"usage: {usage}" + ('; put quotes around "a name with spaces"' if len(words) > 1 else ""))
    return words[0]
