"""The tasks with a real engine and a tiny untrained model: everything runs and scores 0."""

from __future__ import annotations

from typing import Any

import pytest

from eval.metrics.emoji_judge import Judge
from eval.task import TASKS, Context
from omni.codecs import PixelCodec, PixelConfig
from omni.heads import FlowHeadConfig
from omni.heads.joint import JointConfig
from omni.model import Omni, OmniConfig
from omni.nn.transformer import TransformerConfig
from omni.rng import Key
from omni.text.bpe import BPETokenizer


@pytest.fixture(scope="module")
def context(judge: Judge) -> Context:
    """An untrained model with 4 x 4 latents of exact pixels for a picture of 64 x 64."""
    tokenizer = BPETokenizer.train(["emoji"], 256)
    transformer = TransformerConfig(width=32, depth=2, num_heads=2, num_kv_heads=1, head_dim=16)
    config = OmniConfig(
        transformer=transformer, flow=FlowHeadConfig(channels=768), vocab_size=tokenizer.vocab_size,
        joint=JointConfig(head="product", length=4),
    )  # fmt: skip
    model = Omni(config, Key(0)).eval()
    model.tokenizer, model.codec = tokenizer, PixelCodec(PixelConfig(patch=16))
    context = Context(shared={"atlas": judge.atlas, "judge": judge})
    context.__dict__["model"] = model
    return context


def run(context: Context, name: str, **options: Any) -> dict[str, float]:
    task = TASKS.get(name)
    return {m.name: m.value for m in task.run(context, task.options(**options)).measures}


@pytest.mark.parametrize("name", ["draw", "scenes", "edits", "chat_edits", "naming", "describe", "story", "questions"])
def test_an_untrained_model_scores_0(context: Context, name: str) -> None:
    assert run(context, name, requests=3, steps=1, batch=2)["right" if name != "story" else "in_place"] == 0


def test_open_and_when_to_draw_run(context: Context) -> None:
    values = run(context, "open", requests=2, draws=3, steps=1)
    assert values["right_and_sharp"] == 0 and values["coverage"] == 0
    assert 0 <= run(context, "when_to_draw", requests=4, steps=1)["right"] <= 100


def test_speculative_text_equals_autoregressive_decoding(context: Context) -> None:
    """Of an untrained head hardly any token is accepted."""
    values = run(context, "text_blocks", requests=4, repeats=1)
    assert values["identical"] == 100
    assert 0 <= values["accepted"] <= values["drafted"] <= 4 and values["emitted"] > 0
    assert values["speedup"] > 0 and values["speedup_whole"] > 0


def test_the_contract_holds(context: Context) -> None:
    values = run(context, "contract")
    assert values["largest_difference"] <= 1e-10 and values["rounding"] <= 2e-5 and values["text_bits"] == 0


def test_the_exact_codec_is_exact(context: Context) -> None:
    values = run(context, "codec", pictures=8)
    assert values["psnr"] == 100 and values["sharp_threshold"] == 0
