"""Another tokenizer for a trained model: known ids keep their vectors, new ones start from the old ids' vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from omni.document import Document, Role, Text
from omni.model import Omni
from omni.sequence.layout import lay_rows
from omni.text.tokenizer import Tokenizer
from train.tools.retokenize import main, picture_codes, retokenize


@pytest.fixture
def model(tiny_model: Path) -> Omni:
    return omni.from_pretrained(tiny_model)


@pytest.fixture
def named(model: Omni) -> Tokenizer:
    assert model.tokenizer is not None
    return model.tokenizer.with_phrases([" red apple", "red apple", " cat"])


def test_vectors_follow_the_bytes_of_their_ids(model: Omni, named: Tokenizer) -> None:
    old, new = model.tokenizer, retokenize(model, named)
    assert old is not None and new.config.joint is None and new.config.vocab_size == named.vocab_size
    before, after = model.token.embedding.weight, new.token.embedding.weight
    assert torch.equal(after[: old.num_text], before[: old.num_text])
    assert torch.equal(after[named.num_text :], before[old.num_text :])  # control ids
    apple = named.encode(" red apple")
    assert apple == [old.num_text]
    assert torch.equal(after[apple[0]], before[old.encode(" red apple")].mean(0))
    for name, value in new.state_dict().items():
        if name != "token.embedding.weight":
            assert torch.equal(value, model.state_dict()[name]), name


def test_as_many_ids_in_another_order(model: Omni, named: Tokenizer) -> None:
    start = retokenize(model, named)
    assert model.tokenizer is not None
    other = model.tokenizer.with_phrases([" cat", " red apple", "red apple"])
    before, after = start.token.embedding.weight, retokenize(start, other).token.embedding.weight
    for phrase in named.phrases:
        assert torch.equal(after[other.encode(phrase)], before[named.encode(phrase)])


def test_a_text_without_phrases_gives_the_same_hidden_states(model: Omni, named: Tokenizer) -> None:
    document = Document((Text("the green dog", Role.USER),))

    def hidden(of: Omni) -> torch.Tensor:
        assert of.tokenizer is not None
        pad = of.tokenizer.control.pad
        return of.context(lay_rows([of.spans(document)], channels=48, pad_id=pad, copies=1, uids=[0]))[0]

    assert torch.equal(hidden(model), hidden(retokenize(model, named)))


def test_codes_determine_latents_by_a_linear_map(model: Omni, named: Tokenizer) -> None:
    """One picture less than components of the code: latents are an exact linear function of it."""
    side = 64
    width = model.config.transformer.width
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator) for _ in range(width)]
    codes = picture_codes(model, pictures).double()
    assert model.codec is not None and codes.shape == (width, width)
    latents = model.codec.encode(torch.stack(pictures)).flatten(1).double()
    centred = latents - latents.mean(0)
    found = codes @ torch.linalg.lstsq(codes, centred).solution
    assert (found - centred).abs().max() < 1e-3 * centred.abs().max()
    new = retokenize(model, named, {"red apple": pictures[0], "cat": pictures[1]})
    plain = retokenize(model, named)
    changed = (new.token.embedding.weight != plain.token.embedding.weight).any(1)
    assert sorted(changed.nonzero().flatten().tolist()) == [
        token for token in range(named.num_text) if named.decode([token]) in (" red apple", "red apple", " cat", "cat")
    ]


def test_command(model: Omni, named: Tokenizer, tiny_model: Path, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    named.save(tmp_path / "tokenizer")
    assert main([str(tmp_path / "out"), str(tiny_model), str(tmp_path / "tokenizer")]) == 0
    assert omni.from_pretrained(tmp_path / "out").tokenizer.phrases == named.phrases  # type: ignore[union-attr]
    (tmp_path / "tokenizer/damaged").mkdir()
    for name in ("", "damaged", "none"):
        path = tmp_path / "tokenizer" / name
        if name != "":
            assert main([str(tmp_path / "no"), str(tiny_model), str(path)]) in (2, 4)
        assert main([str(tmp_path / "no"), str(path), str(tmp_path / "tokenizer")]) in (2, 4)
        assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
    assert main([str(tmp_path / "no"), str(tiny_model)]) == 2
    assert main([str(tmp_path / "no"), str(tiny_model), str(tmp_path / "tokenizer"), "--pictures", "cars"]) == 2
    assert "usage" in capsys.readouterr().err and not (tmp_path / "no").exists()
