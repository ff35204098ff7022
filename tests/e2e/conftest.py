"""The bundled model, loaded once."""

from __future__ import annotations

import pytest

import omni


@pytest.fixture(scope="session")
def model() -> omni.Omni:
    return omni.from_pretrained()
