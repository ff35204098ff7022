"""Heads beside a frozen language model: its own continuations as data, models of text alone, the shipped stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from eval.experiments.imports.training import imported
from omni.document import Document, Role, Text
from train.__main__ import main
from train.recipe import load_recipe
from train.tools import continuations

ROOT = Path(__file__).parents[2]
TEXT = "\n".join(f"line {n} : the cat sat on a mat , and then it slept for {n} days" for n in range(12))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("decoder"), "llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_continuations_are_keyed_and_learnt(decoder: Path, text: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{name}.jsonl" for name in ("a", "b", "other")]
    for out, seed in zip(outs, "001", strict=True):
        own = ["--num", "5", "--tokens", "6", "--opening", "4", "--min-words", "8", "--batch", "3", "--seed", seed]
        assert continuations.main([str(decoder), str(out), "--text", str(text), *own]) == 0
    one, two, other = (out.read_text(encoding="utf-8") for out in outs)
    assert one == two != other
    documents = [Document.from_json(line) for line in one.splitlines()]
    assert 1 <= len(documents) <= 5
    for document in documents:
        asked, reply = document.segments
        assert isinstance(asked, Text) and asked.text.startswith(f"{continuations.REQUEST}\n\nline ")
        assert reply.supervise and not asked.supervise and document.meta["temperature"] == 1.0


def test_the_shipped_stages_train_each_head_alone(decoder: Path, text: Path, tmp_path: Path) -> None:
    """Every stage of the recipe on a tiny decoder: the decoder's weights stay, rounded to bfloat16; the heads draft."""
    line = Document((Text("go on"), Text("on and on it goes", Role.ASSISTANT, supervise=True))).to_json()
    (tmp_path / "own.jsonl").write_text(line + "\n")
    own = {
        "decoder": decoder, "init_from": decoder, "max_steps": 2, "heads.joint.depth": 2, "heads.joint.vocabulary": 128,
        "objectives.0.options.blocks": 4, "data.0.options.path": tmp_path / "own.jsonl", "autocast": "none",
        "data.1.options.path": tmp_path / "own.jsonl", "data.2.options.path": text, "data.2.options.min_words": 8,
        "data.2.options.opening": 4,
    }  # fmt: skip
    given = [f"changes.{name}={value}" for name, value in own.items()]
    assert main([str(ROOT / "train/recipes/smol/drafts.toml"), *given, "--out", str(tmp_path / "out")]) == 0
    plain = omni.from_pretrained(decoder).state_dict()
    for head in ("product", "sequential", "masked", "push_forward"):
        model = omni.from_pretrained(tmp_path / "out" / head / "model")
        found = model.state_dict()
        assert all(torch.equal(found[name], value.bfloat16().float()) for name, value in plain.items())
        assert model.codec is None and model.flow is None and model.joint is not None
        reply = model.generate("go on", tokens_per_pass=4, max_tokens=12)
        assert reply.text == model.generate("go on", tokens_per_pass=1, max_tokens=12).text and reply.drafts


def test_a_model_of_text_alone_takes_no_settings_of_pictures(decoder: Path) -> None:
    own = [f"decoder={decoder}", "data.0.options.path=x.parquet", "codec=none"]
    path = ROOT / "train/recipes/examples/pretrained/frozen_expert.toml"
    assert load_recipe(path, own).codec == "none"
    for wrong in ("codec_options.tile=4", "workers=2"):
        with pytest.raises(ValueError, match=f"{wrong.split('.')[0].split('=')[0]} has no effect with codec"):
            load_recipe(path, [*own, wrong])
