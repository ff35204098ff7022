"""Heads beside an imported decoder: no QK-norm, tied embeddings, ids of its own and new ones; drafts of few ids, by the
last layers. Replies equal those of autoregressive decoding, eager in float64 and by native code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import omni
from eval.experiments.imports.training import imported
from omni.generation.engine import Engine
from omni.generation.options import GenerationOptions
from omni.heads.joint import JointConfig
from omni.model import Omni
from omni.nn.native_library import COMPILERS
from omni.rng import Key

HEADS = {
    "product": {"reads_first": True},
    "sequential": {"expansion": 1},
    "masked": {"trains": "drafts", "reads_start": True},
    "push_forward": {"reads_start": True},
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("decoder"), "llama", tie_word_embeddings=True)


def with_random_head(decoder: Path, head: str, vocabulary: int | None = 90) -> Omni:
    """The imported decoder with a head whose weights are all random. Its first ids are likely, so that some drafts are
    accepted."""
    plain = omni.from_pretrained(decoder)
    joint = JointConfig(head=head, length=4, depth=2, adapter_rank=2, vocabulary=vocabulary, options=HEADS[head])
    model = Omni(plain.config.model_copy(update={"joint": joint}), Key(0)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    model.tokenizer = plain.tokenizer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("joint."):
                parameter.copy_(Key(1).fold(name).normal(tuple(parameter.shape)) * 0.05)
        model.token.embedding.weight[64:72] *= 6
    assert model.config.new_rows and model.config.tied_embeddings and model.transformer.c.qk_norm == "none"
    return model


def check(engine: Engine, temperature: float) -> int:
    """Equal texts, alone and together; one pass a round. The number of accepted tokens."""
    options = GenerationOptions(temperature=temperature, max_tokens=24, tokens_per_pass=4)
    plain = [engine.generate("say", options.changed({"seed": seed, "tokens_per_pass": 1})) for seed in range(4)]
    drafted = [engine.generate("say", options.changed({"seed": seed})) for seed in range(4)]
    together = engine.generate_batch(["say"] * 4, options, seeds=range(4))
    assert [reply.text for reply in plain] == [reply.text for reply in drafted] == [reply.text for reply in together]
    rounds = [one for reply in drafted for one in reply.drafts[1:]]
    assert rounds and all(one.passes == 1 and one.drafted <= 3 for one in rounds)
    return sum(one.accepted for one in rounds)


@pytest.mark.parametrize("head", HEADS)
def test_replies_equal_autoregressive_decoding_in_float64(decoder: Path, head: str) -> None:
    engine = Engine(with_random_head(decoder, head).double())
    accepted = [check(engine, temperature) for temperature in (0.0, 1.0)]
    assert sum(accepted) > 0 or head == "push_forward", accepted  # its random map from noise is never right


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler")
@pytest.mark.parametrize("head", HEADS)
def test_replies_equal_autoregressive_decoding_in_native_code(decoder: Path, head: str) -> None:
    model = with_random_head(decoder, head).bfloat16().float()
    for temperature in (0.0, 1.0):
        check(Engine(model, compile=True), temperature)


@pytest.mark.parametrize("head", ["product", "sequential", "masked"])
def test_a_draft_has_probability_zero_beyond_its_ids(decoder: Path, head: str) -> None:
    """Verification by rejection runs over all ids, the drafted ones are the first."""
    engine = Engine(with_random_head(decoder, head).double())
    reply = engine.generate("say", temperature=1.0, max_tokens=16, tokens_per_pass=4, verify="rejection", seed=1)
    assert len(reply.drafts) > 1


def test_more_ids_than_the_model_has_raise(decoder: Path) -> None:
    with pytest.raises(ValueError, match=r"joint.vocabulary = 9000 exceeds the \d+ ids of the model; use fewer"):
        with_random_head(decoder, "product", 9000)
