"""`omni generate | chat | inspect | verify | doctor`: arguments in, one command run, every error one line.

Exit codes: 0 done; 1 a check did not hold, or a bug; 2 bad usage or bad input; 4 damaged or missing model files;
130 interrupted. OMNI_DEBUG=1 shows tracebacks. The commands themselves are in cli_*.py and load when called.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

import omni
from omni.command import MISTAKE, announced, is_mistake, one_line

DAMAGED, INTERRUPTED, CLOSED_PIPE = 4, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. `argv` defaults to the process's arguments."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else list(argv))
        module, function = arguments.run.split(":")
        with announced("the libraries", only_to_terminals=True):
            command = getattr(import_module(module), function)
        return command(arguments)
    except SystemExit as stop:  # argparse: --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit is silent
        return CLOSED_PIPE
    except Exception as error:
        if os.environ.get("OMNI_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(_told(error), _exit_code(error))


def _exit_code(error: Exception) -> int:
    if any(base.__name__ == "DamagedError" for base in type(error).__mro__):  # by name: telling must not import torch
        return DAMAGED
    return MISTAKE if is_mistake(error) else 1


def _told(error: Exception) -> str:
    if is_mistake(error):
        return one_line(error)
    return f"this is a bug: {type(error).__name__}: {one_line(error)}; OMNI_DEBUG=1 shows where"


def _fail(message: str, code: int) -> int:
    from omni.terminal import safe_text

    line = f"omni: error: {safe_text(message)}\n" if code != INTERRUPTED else f"omni: {message}\n"
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding))
    return code


# --------------------------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """One-line errors with a way out, no guessed abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        command = self.prog.replace("__main__.py", "omni")
        raise ValueError(f"{message}; see `{command} --help`")


def _number(parse: Callable[[str], Any], low: float, high: float, way_out: str) -> Callable[[str], Any]:
    """An argparse type: a finite number in [low, high]; the error names the value and `way_out`."""

    def read(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also refuses NaN
            kind = "a whole number" if parse is int else "a number"
            bounds = f"from {low:g} to {high:g}" if high < 2**31 - 1 else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be {kind} {bounds}; {way_out}")
        return value

    return read


def _size(text: str) -> tuple[int, int]:
    """HxW in pixels."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and 0 < int(height) < 2**31 and 0 < int(width) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels; for example 64x64")
    return int(height), int(width)


def _grid(text: str) -> str | tuple[float, ...]:
    """A name, or times separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if "," in text else text
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of times; for example 1,0.58,0") from None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        options = sorted({flag for sub in _subparsers(parser) for flag in sub._option_string_actions})
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see `omni {arguments.command} --help`"
        raise ValueError(f"unknown argument {unknown[0]!r}; {hint}")
    return arguments


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [sub for group in groups for sub in group.choices.values()]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="omni", description="Chat in which text and pictures alternate, from one transformer.")
    parser.add_argument("--version", action="version", version=f"omni {omni.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands)
    _add_chat(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_doctor(commands)
    return parser


def _add_generate(commands: Any) -> None:
    sub = commands.add_parser(
        "generate",
        help="answer one prompt with text and pictures",
        description="Answer one prompt. The reply streams to the terminal and is written as a folder: reply.md, "
        "reply.json and the pictures.",
    )
    sub.add_argument("prompt", help="what you want; - reads it from standard input")
    sub.add_argument("--image", action="append", default=[], metavar="FILE", help="attach a picture (repeatable)")
    _add_model(sub)
    _add_sampling(sub)
    sub.add_argument("--out", metavar="DIR", help="where to write the reply (default: omni-out/001, 002, ...)")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing DIR that holds a reply")
    sub.add_argument("--json", action="store_true", help="print reply.json, and nothing else, to standard output")
    _add_show(sub)
    sub.set_defaults(run="omni.cli_generate:run")


def _add_chat(commands: Any) -> None:
    sub = commands.add_parser(
        "chat",
        help="a conversation with history and attached pictures",
        description="A conversation. Lines are messages; /help lists the commands. Also reads a pipe.",
    )
    _add_model(sub)
    _add_sampling(sub)
    _add_show(sub)
    sub.set_defaults(run="omni.cli_chat:run")


def _add_inspect(commands: Any) -> None:
    sub = commands.add_parser(
        "inspect",
        help="say what a file or folder is and what is in it",
        description="Describe a model, a training checkpoint, a tokenizer, a codec, a reply, a picture or a Document "
        "(JSON, with its packed layout).",
    )
    sub.add_argument("path", nargs="?", help="a file or folder (default: the bundled model)")
    sub.add_argument("--model", metavar="DIR", help="whose tokenizer and codec lay out a picture or Document")
    sub.set_defaults(run="omni.cli_inspect:run")


def _add_verify(commands: Any) -> None:
    sub = commands.add_parser(
        "verify",
        help="check that cached, uncached and training passes agree",
        description="Run the equality contract on a model: cached = uncached = training forward. Exits 1 if not.",
    )
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a model directory (default: the bundled model)")
    _add_device(sub)
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")
    sub.set_defaults(run="omni.cli_verify:run")


def _add_doctor(commands: Any) -> None:
    sub = commands.add_parser("doctor", help="versions, extras, font, devices and the bundled model's digests")
    sub.add_argument("--font", metavar="FILE", help="an emoji font to check, instead of the installed ones")
    sub.add_argument("--json", action="store_true", help="print the rows as JSON")
    sub.set_defaults(run="omni.cli_doctor:run")


def _add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="cpu", metavar="NAME", help="what computes: cpu (default), cuda, cuda:1")


def _add_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--model", metavar="DIR", help="a model directory (default: the bundled model)")
    _add_device(sub)
    sub.add_argument("--compile", action="store_true", help="text several times faster; needs a C++ compiler")


def _add_show(sub: argparse.ArgumentParser) -> None:
    show = sub.add_mutually_exclusive_group()
    show.add_argument("--show", action="store_true", help="show pictures as half blocks even where no terminal is seen")
    show.add_argument("--no-show", action="store_true", help="show no pictures in the terminal")


def _add_sampling(sub: argparse.ArgumentParser) -> None:
    """Unset options are left out of GenerationOptions: the model's own generation.json decides then."""
    whole, real = int, float
    steps = _number(whole, 1, 1000, "more steps draw more exactly, 8 is usual")
    seed = _number(whole, 0, 2**63 - 1, "the same seed gives the same reply")
    guidance = _number(real, 0, 100, "1 switches guidance off")
    sub.add_argument("--steps", type=steps, metavar="N", help="passes spent on each picture")
    sub.add_argument("--sampler", metavar="NAME", help="euler, ddim, heun, flow_map, restart or gamma")
    share = _number(real, 0, 1, "0 adds no noise, 1 is restart")
    sub.add_argument("--gamma", type=share, metavar="G", help="how much noise the sampler gamma adds again, 0 to 1")
    sub.add_argument(
        "--grid", type=_grid, metavar="NAME", help="uniform, edm, midpoint, or the times themselves: 1,0.58,0"
    )
    first = _number(real, 1e-6, 1, "1 is noise, and the usual start")
    sub.add_argument("--start-time", type=first, metavar="T", help="where the first jump starts; 1 is noise")
    shift = _number(real, 1e-3, 1000, "1 leaves the times where they are")
    sub.add_argument("--shift", type=shift, metavar="K", help="warp of the times; above 1 lingers at noise")
    sub.add_argument("--seed", type=seed, metavar="S", help="what all draws depend on (default 0)")
    sub.add_argument("--guidance", type=guidance, metavar="W", help="how strongly pictures follow the text; 1 is off")
    sub.add_argument(
        "--image-guidance", type=guidance, metavar="W", help="how strongly they follow earlier pictures; 1 is off"
    )
    told = _number(real, 1e-3, 100, "1 is a network trained without guidance in it")
    sub.add_argument(
        "--told-guidance", type=told, metavar="W", help="the guidance that a network trained with it inside is told"
    )
    together = _number(whole, 1, 64, "1 is plain decoding")
    sub.add_argument(
        "--tokens-per-pass", type=together, metavar="K", help="text tokens drafted in one pass, by a model that can"
    )
    verify = ("coupled", "rejection", "block", "greedy", "none")
    sub.add_argument("--verify", choices=verify, help="what becomes of drafts; none keeps them as they are (lossy)")
    sweeps = _number(whole, 0, 64, "0 takes drafts as the head makes them")
    sub.add_argument("--sweeps", type=sweeps, metavar="N", help="passes that redraw a draft before it is judged")
    sub.add_argument(
        "--recycle", action="store_true", default=None, help="judge the rest of a draft that fell before drafting again"
    )
    sub.add_argument("--adaptive", action="store_true", default=None, help="drafts as long as the last ones stood")
    temperature = _number(real, 0, 100, "0 always takes the likeliest token")
    sub.add_argument("--temperature", type=temperature, metavar="T", help="of text; 0 is greedy")
    top_p = _number(real, 1e-6, 1, "1 keeps every token")
    sub.add_argument("--top-p", type=top_p, metavar="P", help="keep the likeliest tokens whose sum reaches P")
    tokens = _number(whole, 1, 2**31 - 1, "it bounds the text of one reply")
    sub.add_argument("--max-tokens", type=tokens, metavar="N", help="bound on the reply's text tokens")
    images = _number(whole, 0, 10_000, "it bounds the pictures of one reply")
    sub.add_argument("--max-images", type=images, metavar="N", help="bound on the reply's pictures")
    sub.add_argument("--force-image", action="store_true", default=None, help="begin the reply with a picture")
    sub.add_argument("--size", type=_size, metavar="HxW", help="pixels of every picture, instead of the model's choice")
