"""`omni chat`: a conversation with history, attached pictures and changeable settings.

Lines are messages; lines that begin with / are commands (`commands`). A line that fails prints one line on the error
stream, and the conversation continues; from a pipe the exit code is then 2. At a terminal Ctrl-C stops a reply; at an
idle prompt the first Ctrl-C prints how to end, the second ends. An unsaved conversation at a terminal is always written
to omni-out at its end.
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
from omni.cli.commands import complain, message_of
from omni.cli.generate import (
    MAX_PROMPT,
    check_text,
    image_segment,
    load_model,
    protocol_of,
    show,
    system_of,
    write_numbered,
)
from omni.cli.options import DEFAULT, FIELDS, changed_by, chat_options, flag_of
from omni.cli.terminal import Printer
from omni.config import nearest
from omni.document import Document, Image, Role, Segment, Text
from omni.errors import MISTAKE, is_mistake
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.generation.reply_files import check_folder, write_chat

NUM_SEEDS = 2**63  # seeds are below it


def commands() -> dict[str, tuple[str, str]]:
    """Name -> (what follows it, what it does); everyday options have one each."""
    options = {
        "/" + flag_of(name).removeprefix("--"): (str(extra["metavar"] or "on|off"), FIELDS[name].description or "")
        for name in chat_options()
        if isinstance(extra := FIELDS[name].json_schema_extra, dict)
    }
    return {
        "/image": ("FILE", "attach a picture to the next message"),
        "/system": ("TEXT", "instructions before the conversation, from the next message on; none: remove them"),
        **options,
        "/save": ("DIR", "write the conversation: chat.md, chat.json and the pictures"),
        "/reset": ("", "forget the conversation; the settings stay"),
        "/help": ("", "this list"),
        "/quit": ("", "end (so does end of input, Ctrl-D)"),
    }


def run(arguments: argparse.Namespace) -> int:
    """Run the command: read lines until /quit or the end of input."""
    printer = Printer(protocol=protocol_of(arguments))
    interactive = sys.stdin.isatty()
    system = system_of(arguments)
    engine = Engine(load_model(arguments.model, arguments.device, arguments.dtype), compile=arguments.compile)
    engine.resolve(arguments.options)
    if interactive:
        _enable_line_editing()
        printer.line("Ask for text and pictures. /help lists the commands, /quit ends.")
    chat = Chat(engine, arguments.options, printer, system)
    try:
        failed = _converse(chat, _terminal_lines(printer) if interactive else _piped_lines(), interactive)
    finally:
        if interactive and chat.unsaved:
            _save_at_the_end(chat)
    return MISTAKE if failed and not interactive else 0


def _converse(chat: Chat, lines: Iterator[tuple[int, str]], interactive: bool) -> bool:
    """Handle every line; returns whether one failed."""
    failed = False
    for number, line in lines:
        try:
            if not chat.handle_line(line):
                break
        except Exception as error:
            if not is_mistake(error) or isinstance(error, BrokenPipeError):
                raise
            failed = True
            chat.printer.fresh_line()
            complain(message_of(error) if interactive else f"line {number}: {message_of(error)}", MISTAKE)
        except KeyboardInterrupt:
            if not interactive:
                raise
            chat.printer.line("(interrupted; the message was not sent)")
    return failed


def _piped_lines() -> Iterator[tuple[int, str]]:
    """Numbered lines of standard input. A line that is too long is truncated; `check_text` then rejects it."""
    number = 0
    while line := sys.stdin.readline(MAX_PROMPT + 2):
        number += 1
        rest = line
        while rest and not rest.endswith("\n"):
            rest = sys.stdin.readline(MAX_PROMPT)
        yield number, line.rstrip("\n")


def _terminal_lines(printer: Printer) -> Iterator[tuple[int, str]]:
    """Numbered lines of a terminal. The second Ctrl-C in a row ends them, as does the end of input."""
    interrupted = False
    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            printer.line()
            return
        except KeyboardInterrupt:
            printer.line()
            if interrupted:
                return
            interrupted = True
            printer.line("(Ctrl-C once more, Ctrl-D or /quit ends; /save DIR writes the conversation)")
            continue
        interrupted = False
        number += 1
        yield number, line


def _save_at_the_end(chat: Chat) -> None:
    """Write the conversation to the next free folder of omni-out, and print its place."""
    try:
        folder = write_numbered(chat.write)
    except (ValueError, OSError) as error:
        complain(f"the conversation was not saved: {message_of(error)}", MISTAKE)
    else:
        print(f"the conversation is in {folder / 'chat.md'}", file=sys.stderr)


def _enable_line_editing() -> None:
    """Arrow keys and history, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


class Chat:
    """The conversation so far. A message that fails or is interrupted does not change it."""

    def __init__(
        self, engine: Engine, options: GenerationOptions, printer: Printer, system: tuple[Text, ...] = ()
    ) -> None:
        self.engine, self.options, self.printer, self.system = engine, options, printer, system
        self.history: tuple[Segment, ...] = ()
        self.extras: tuple[dict[str, Any], ...] = ()  # for each segment of the history: steps, seed, ...
        self.num_replies = 0
        self.unsaved = False
        self.attached: tuple[Image, ...] = ()
        self.record: dict[str, Any] = {}  # the record of the last reply
        self.known = commands()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._attach,
            "/system": self._set_system,
            **{"/" + flag_of(name).removeprefix("--"): self._option_command(name) for name in chat_options()},
            "/save": self._save,
            "/reset": self._reset,
            "/help": self._help,
        }

    def handle_line(self, line: str) -> bool:
        """Handle one line; returns False for /quit. Raises ValueError for an invalid command."""
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name not in self._commands:
            raise ValueError(f"unknown command {name!r:.60}{nearest(name, self.known) or '; /help lists them'}")
        self._commands[name](rest.strip())
        return True

    def _ask(self, text: str) -> None:
        """Generate a reply. Each reply has its own seed, so that "draw another one" gives another picture."""
        check_text(text, "the message", "write something")
        request = (*self.history, *self.attached, Text(text))
        options = self.engine.resolve(self.options)
        assert options.seed is not None
        options = options.changed({"seed": (options.seed + self.num_replies) % NUM_SEEDS})
        record = self.engine.record(options)
        document = Document((*self.system, *request))
        reply = show(self.engine.stream(document, options), self.printer, document, record)
        if not reply.parts:
            why = ": the model began a picture beyond --max-images" if reply.stop_reason == "images" else ""
            self.printer.line(f"(the reply is empty{why})")
        asked = ({},) * (len(request) - len(self.history))
        made = reply.document.segments[len(document.segments) :]
        self.history, self.attached = (*request, *made), ()
        self.extras = (*self.extras, *asked, *(part.made_by() for part in reply.parts))
        self.num_replies += 1
        self.record, self.unsaved = record, True

    def _attach(self, rest: str) -> None:
        """/image FILE: attach a picture to the next message."""
        path = os.path.expanduser(_single_word(rest, "/image FILE"))
        self.attached += (image_segment(self.engine.model, media.load_image(path)),)
        height, width = self.attached[-1].pixels.shape[:2]
        self.printer.line(f"attached {path}, {height}x{width}; it goes with the next message")

    def _set_system(self, rest: str) -> None:
        """/system TEXT: set the system text; none: remove it."""
        self.system = (Text(check_text(rest, "/system", "write something"), Role.SYSTEM),) if rest else ()
        self.printer.line("system text set" if rest else "no system text")

    def _option_command(self, name: str) -> Callable[[str], None]:
        """The command that sets the option `name`."""

        def change(rest: str) -> None:
            usage, _ = self.known[command]
            words = _words(rest)
            if len(words) != 1 and name != "stop":
                raise ValueError(f"usage: {command} {usage}, or {command} {DEFAULT}")
            options = changed_by(self.options, name, words, command)
            self.engine.resolve(options)
            self.options = options
            self.printer.line(f"{name} = {options.flat()[name]}")

        command = "/" + flag_of(name).removeprefix("--")
        return change

    def _save(self, rest: str) -> None:
        """/save DIR."""
        folder = Path(os.path.expanduser(_single_word(rest, "/save DIR")))
        self.write(folder)
        self.printer.line(f"wrote {folder / 'chat.md'} and chat.json")

    def write(self, folder: Path) -> Path:
        """Write the conversation as a folder. ValueError if it is empty, or the folder cannot be made."""
        if not self.history:
            raise ValueError("nothing to save yet; write a message first")
        check_folder(folder, overwrite=False, name="/save", way_out="")
        document = Document((*self.system, *self.history))
        extras = (*({},) * len(self.system), *self.extras)
        write_chat(folder, document, extras, self.record, replace=folder.exists())
        self.unsaved = False
        return folder

    def _reset(self, rest: str) -> None:
        """/reset: empty the history and the attachments. Settings and system text stay."""
        self.history, self.extras, self.attached, self.num_replies = (), (), (), 0
        self.unsaved = False
        self.printer.line("forgotten")

    def _help(self, rest: str) -> None:
        """/help: list the commands."""
        width = max(len(f"{name} {usage}") for name, (usage, _) in self.known.items())
        for name, (usage, about) in self.known.items():
            self.printer.line(f"{f'{name} {usage}':<{width}}  {about}")
        self.printer.line(f"{DEFAULT} in the place of a value goes back to the model's own choice.")


def _words(rest: str) -> list[str]:
    """The words of a line, split as a shell splits them. ValueError for an open quotation."""
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise ValueError(f"{rest!r:.60}: {str(error).lower()}; close the quotation") from None


def _single_word(rest: str, usage: str) -> str:
    """The only word of `rest`. ValueError with the usage for none or several."""
    words = _words(rest)
    if len(words) != 1:
        raise ValueError(f"usage: {usage}" + ('; put quotes around "a name with spaces"' if len(words) > 1 else ""))
    return words[0]
