"""What a checkout answers to the golden requests, and what it loses in twenty steps of training.

    python tests/golden/record.py OUT.json [--dtype float64] [--losses]
    python tests/golden/record.py tests/golden/golden.json --losses --sheet     the committed file, made anew

Only names that users have are used here, so that this file runs on other commits too (see compare.py). Pictures are
zlib-compressed raw bytes in the JSON or, with --sheet, tiles of one PNG beside it, in the order of the answers.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from cases import ALONE, BATCH, Request
from PIL import Image

import omni

HERE = Path(__file__).resolve().parent


def messages_of(request: Request) -> list[dict[str, Any]]:
    """Its messages, with the pictures of `given/` in them."""

    def content(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {"type": "image", "image": Image.open(HERE / "given" / f"{part['image']}.png").convert("RGB")}

    return [{**m, "content": [content(part) for part in m["content"]]} for m in request.messages]


class IdsRecorder:
    """Stands in for `Tokenizer.stream`: the streams of text ids of a reply, and what went into each."""

    def __init__(self, model: omni.Omni) -> None:
        self.new, self.ids = model.tokenizer.stream, []
        model.tokenizer.stream = self  # type: ignore[union-attr]

    def __call__(self) -> Any:
        stream, mine = self.new(), []
        push = stream.push

        def recorded(token: int) -> str:
            mine.append(int(token))
            return push(token)

        stream.push = recorded
        self.ids.append(mine)
        return stream

    def take(self) -> list[list[int]]:
        """The ids of each text since the last call."""
        found, self.ids = [ids for ids in self.ids if ids], []
        return found


def packed(image: Image.Image) -> dict[str, Any]:
    return {"size": list(image.size), "zlib": base64.b64encode(zlib.compress(image.tobytes())).decode()}


def unpacked(picture: dict[str, Any]) -> Image.Image:
    return Image.frombytes("RGB", picture["size"], zlib.decompress(base64.b64decode(picture["zlib"])))


def sheet(pictures: list[dict[str, Any]], tile: int = 64, columns: int = 8) -> Image.Image:
    """All pictures, none larger than a tile, at the upper left of their tiles, row by row."""
    out = Image.new("RGB", (columns * tile, math.ceil(len(pictures) / columns) * tile))
    for number, picture in enumerate(pictures):
        out.paste(unpacked(picture), (number % columns * tile, number // columns * tile))
    return out


def answer(reply: omni.Reply) -> dict[str, Any]:
    parts = [getattr(part, "text", "") for part in reply.parts]
    rounds = [[d.drafted, d.accepted if hasattr(d, "accepted") else d.kept, d.passes] for d in reply.drafts]
    images = [packed(image) for image in reply.images]
    made = {"stop": reply.stop_reason, "evaluations": reply.evaluations, "rounds": rounds}
    return {"parts": parts, **made, "images": images}


def answers(dtype: torch.dtype) -> dict[str, Any]:
    """By the name of the request; the ids of the batch are together, in the order of their texts."""
    model = omni.from_pretrained(dtype=dtype)
    recorder, found = IdsRecorder(model), {}
    for request in ALONE:
        reply = model.generate(messages_of(request), **request.options)
        found[request.name] = {**answer(reply), "ids": recorder.take()}
    options = [omni.GenerationOptions(**request.options) for request in BATCH]
    replies = model.generate_batch([messages_of(request) for request in BATCH], options)
    for request, reply in zip(BATCH, replies, strict=True):
        found[request.name] = answer(reply)
    found["batch"] = {"ids": recorder.take()}
    return found


def losses() -> list[float]:
    """Of twenty steps of the smoke recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "train", "train/recipes/smoke.toml", "--out", f"{folder}/run"]
        subprocess.run([*command, "report.log_steps=1", "autocast=none"], check=True, capture_output=True)
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def record(dtype: torch.dtype, with_losses: bool) -> dict[str, Any]:
    return {"answers": answers(dtype), "losses": losses() if with_losses else []}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--losses", action="store_true", help="twenty steps of training too")
    parser.add_argument("--sheet", action="store_true", help="pictures as a PNG beside the file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = record(getattr(torch, arguments.dtype), arguments.losses)
    if arguments.sheet:
        pictures = [picture for one in found["answers"].values() for picture in one.get("images", [])]
        sheet(pictures).save(arguments.out.with_suffix(".png"), optimize=True)
        for picture in pictures:
            del picture["zlib"]
    else:
        found["code"] = str(Path(omni.__file__).resolve().parent)
    arguments.out.write_text(json.dumps(found, indent=1 if arguments.sheet else None) + "\n")


if __name__ == "__main__":
    main()
