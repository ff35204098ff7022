"""`omni generate | chat | import | export | inspect | verify | doctor`: parse arguments and run one command; an error
is one line.

Exit codes: 0 done; 1 a failed check, or a bug; 2 bad usage or bad input; 4 damaged or missing model files;
130 interrupted. OMNI_DEBUG=1 shows tracebacks. Each command is a file in this folder, imported when it runs.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from omni.cli.arguments import Parser, announced, warnings_in_lines
from omni.errors import exit_code_of, is_mistake, one_line
from omni.version import VERSION

INTERRUPTED, CLOSED_PIPE = 130, 141  # exit codes
_MODEL = "a model directory, or smol"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to the process's arguments."""
    _complete_streams()
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()  # raises here, not at exit, for a full disk or a closed pipe
        return code
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _stop_writing()
        return CLOSED_PIPE
    except Exception as error:
        if os.environ.get("OMNI_DEBUG", "0") not in ("", "0"):
            raise
        if isinstance(error, OSError) and error.filename is None:
            _stop_writing()  # standard output may have failed
        return complain(message_of(error), exit_code_of(error))


def _run(argv: list[str]) -> int:
    """Parse the arguments and run the command; return its exit code."""
    try:
        with warnings_in_lines():
            arguments = parse(argv)
    except SystemExit as stop:  # argparse: --help and --version
        return int(stop.code or 0)
    if arguments.command is None:
        build_parser().print_help()
        return 0
    module, function = arguments.run.split(":")
    with announced("the libraries", only_to_terminals=True):
        command = getattr(import_module(module), function)
    with warnings_in_lines():
        return command(arguments)


def _complete_streams() -> None:
    """Replace closed streams by empty ones. Read invalid text as surrogates; the command rejects it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _stop_writing() -> None:
    """Discard further standard output, so that the flush at exit does not fail."""
    if sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message_of(error: Exception) -> str:
    """The text of an error, in one line."""
    if is_mistake(error):
        return one_line(error)
    return f"this is a bug: {type(error).__name__}: {one_line(error)}; OMNI_DEBUG=1 shows where"


def complain(message: str, code: int) -> int:
    """One line on the error stream; returns `code`."""
    from omni.safe_text import safe_text

    line = f"omni: error: {safe_text(message)}\n" if code != INTERRUPTED else f"omni: {message}\n"
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding))
    return code


# --------------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. For `generate` and `chat`, `options` is the GenerationOptions of the flags."""
    from omni.cli.options import options_of

    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}; {_hint_for_unknown(parser, arguments.command, unknown[0])}")
    if arguments.command == "generate" and arguments.prompt is None:
        raise ValueError('the prompt is missing; write a request: omni generate "draw a red apple"')
    if arguments.command in ("generate", "chat"):
        arguments.options = options_of(arguments)
    return arguments


def _hint_for_unknown(parser: argparse.ArgumentParser, command: str | None, unknown: str) -> str:
    """The way out in the error for an unknown argument."""
    options = sorted({flag for sub in _subparsers(parser, command) for flag in sub._option_string_actions})
    if unknown in options:
        return "options come before --"
    near = difflib.get_close_matches(unknown.partition("=")[0], options, n=1)
    if near:
        return f"did you mean {near[0]}?"
    if command == "generate" and not unknown.startswith("-"):
        return "put quotes around the prompt"
    if command == "generate":
        return "see `omni generate --help`; a prompt that begins with - comes after --"
    return f"see `omni {command} --help`" if command else "see `omni --help`"


def _subparsers(parser: argparse.ArgumentParser, command: str | None) -> list[argparse.ArgumentParser]:
    """The parsers of a command; of all commands for None."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [sub for group in groups for name, sub in group.choices.items() if command in (None, name)]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="omni", description="Chat in which text and pictures alternate, from one transformer.")
    parser.add_argument("--version", action="version", version=f"omni {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_generate(commands)
    _add_chat(commands)
    _add_import(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_doctor(commands)
    return parser


def _add_generate(commands: Any) -> None:
    from omni.cli.options import add_options

    sub = commands.add_parser(
        "generate",
        help="answer one prompt with text and pictures",
        usage='omni generate [OPTION ...] "PROMPT"',
        description="Answer one prompt. The reply streams to the terminal and is written as a folder: reply.md, "
        "reply.json and the pictures. What is not given is the model's own choice.",
    )
    sub.add_argument(
        "prompt", nargs="?", help="what you want; - reads it from standard input; a prompt like -x comes after --"
    )
    whole = add_options(sub)
    whole.add_argument("--image", action="append", default=[], metavar="FILE", help="attach a picture (repeatable)")
    _add_system(whole)
    _add_model(sub)
    place = sub.add_argument_group("where the reply goes")
    place.add_argument("--out", metavar="DIR", help="where to write the reply (default: omni-out/001, 002, ...)")
    place.add_argument("--overwrite", action="store_true", help="replace an existing DIR that holds a reply")
    place.add_argument("--json", action="store_true", help="print reply.json, and nothing else, to standard output")
    _add_show(place)
    sub.set_defaults(run="omni.cli.generate:run")


def _add_chat(commands: Any) -> None:
    from omni.cli.options import add_options

    sub = commands.add_parser(
        "chat",
        help="a conversation with history and attached pictures",
        usage="omni chat [OPTION ...]",
        description="A conversation. Lines are messages; /help lists the commands. At a terminal, a conversation "
        "that was not saved is written to omni-out when it ends. From a pipe, a line that fails is reported and the "
        "next one is read; the exit code is then 2.",
    )
    _add_system(add_options(sub))
    _add_model(sub)
    _add_show(sub.add_argument_group("what is shown"))
    sub.set_defaults(run="omni.cli.chat:run")


def _add_import(commands: Any) -> None:
    sub = commands.add_parser(
        "import",
        help="write a published language model as a model directory",
        description="Read a published decoder (Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, OLMo 2, Phi-3: a folder "
        "with config.json and safetensors files, a GGUF file, an installed package that holds one, or a repository of "
        "the hub) and write a model directory with the same text logits. What is not known is refused by name: see "
        "omni inspect PATH.",
    )
    sub.add_argument("path", help="folder, GGUF file, installed package, or repository of the hub")
    sub.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")
    sub.add_argument("--codec", metavar="DIR", help="a codec; the model then has a flow head with new weights")
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16", "keep"), default="keep", help="of the weights (default: as they are)"
    )
    sub.add_argument("--context", type=int, metavar="N", help="longest context (default: that of the published model)")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing model directory DIR")
    sub.set_defaults(run="omni.cli.import_model:run")


def _add_export(commands: Any) -> None:
    sub = commands.add_parser(
        "export",
        help="write a model as a folder for the Hugging Face hub",
        description="Write a model directory with a model card, for omni.from_pretrained and transformers' AutoModel. "
        "--text: the text path alone, as the published class that it was imported from.",
    )
    sub.add_argument("model", metavar="MODEL", help="a model directory")
    sub.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    sub.add_argument("--text", action="store_true", help="the text path alone, for AutoModelForCausalLM")
    sub.add_argument("--name", metavar="NAME", help="on the card (default: the folder's)")
    sub.add_argument("--license", metavar="ID", help="on the card, such as apache-2.0")
    sub.set_defaults(run="omni.cli.export_model:run")


def _add_inspect(commands: Any) -> None:
    sub = commands.add_parser(
        "inspect",
        help="show what a file or folder is and what it contains",
        description="Describe a model, a published decoder to import, a training checkpoint, a tokenizer, a codec, a "
        "reply, a picture or a Document (JSON, with its packed layout).",
    )
    sub.add_argument("path", nargs="?", help="a file or folder (default: the bundled model)")
    sub.add_argument("--model", metavar="DIR", help="whose tokenizer and codec lay out a picture or Document")
    sub.set_defaults(run="omni.cli.inspect:run")


def _add_verify(commands: Any) -> None:
    sub = commands.add_parser(
        "verify",
        help="check that cached, uncached and training passes agree",
        description="Run the equality contract on a model: cached = uncached = training forward. Exits 1 if not.",
    )
    sub.add_argument("model", nargs="?", metavar="MODEL", help=f"{_MODEL} (default: the bundled model)")
    sub.add_argument("--model", dest="named", metavar="MODEL", help="the same")
    _add_device(sub)
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")
    sub.set_defaults(run="omni.cli.verify:run")


def _add_doctor(commands: Any) -> None:
    sub = commands.add_parser("doctor", help="versions, extras, font, devices and the bundled model's digests")
    sub.add_argument("--font", metavar="FILE", help="an emoji font to check, instead of the installed ones")
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")
    sub.set_defaults(run="omni.cli.doctor:run")


def _add_device(sub: Any) -> None:
    sub.add_argument("--device", default="cpu", metavar="NAME", help="what computes: cpu (default), cuda, cuda:1")


def _add_system(group: Any) -> None:
    group.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")


def _add_model(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("the model")
    group.add_argument("--model", metavar="DIR", help=f"{_MODEL} (default: the bundled model)")
    _add_device(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights and the computation "
        "(default: float32); bfloat16 takes half the memory, and less time where the processor has it",
    )
    group.add_argument("--compile", action="store_true", help="text several times faster; needs a C++ compiler")


def _add_show(group: Any) -> None:
    show = group.add_mutually_exclusive_group()
    show.add_argument("--show", action="store_true", help="show pictures as half blocks even where no terminal is seen")
    show.add_argument("--no-show", action="store_true", help="show no pictures in the terminal")
