"""The golden file: ids in float64, pictures within 1/255, losses in float32 within 1e-4 relative, on every machine.

Between two commits on one machine compare.py compares to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compare
import pytest
import record
import torch
from cases import REQUESTS
from PIL import Image, ImageChops

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((HERE / "golden.json").read_text())


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return record.answers(torch.float64)


def without_images(answers: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: v for k, v in one.items() if k != "images"} for name, one in answers.items()}


def test_ids_and_texts(golden: dict[str, Any], found: dict[str, Any]) -> None:
    assert len(REQUESTS) == 50
    assert without_images(found) == without_images(golden["answers"])


def test_pictures(golden: dict[str, Any], found: dict[str, Any]) -> None:
    pictures = [picture for one in found.values() for picture in one.get("images", [])]
    sizes = [picture["size"] for one in golden["answers"].values() for picture in one.get("images", [])]
    assert [picture["size"] for picture in pictures] == sizes and len(sizes) >= 40
    stored = Image.open(HERE / "golden.png").convert("RGB")
    worst = ImageChops.difference(record.sheet(pictures), stored).getextrema()
    assert max(high for _, high in worst) <= 1  # type: ignore[operator]


def test_losses(golden: dict[str, Any]) -> None:
    assert len(golden["losses"]) == 20
    assert record.losses() == pytest.approx(golden["losses"], rel=1e-4)


def test_differences_are_found(golden: dict[str, Any]) -> None:
    other = json.loads(json.dumps(golden))
    assert not list(compare.differences(golden, other))
    other["answers"]["hello"]["ids"][0][0] += 1
    other["losses"][3] += 1e-7
    lines = list(compare.differences(golden, other))
    assert lines[0] == "hello: ids" and lines[1].startswith("losses") and len(lines) == 2
