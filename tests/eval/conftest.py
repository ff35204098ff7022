"""One atlas and one judge for all tests of eval: building the templates takes seconds and some 100 MB."""

from __future__ import annotations

import pytest

from eval.metrics.emoji_judge import Judge
from omni.data.emoji_world import Atlas


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge(Atlas())
