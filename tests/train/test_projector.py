"""First weights of a projector: pictures that are near to their captions, and nothing else that moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from eval.experiments.imports.tiny import COLOURS
from eval.experiments.imports.training import imported, recipe_of, run_of
from omni.data.source import CorruptRecord
from omni.document import Document, Image, Role, Text
from train import stages
from train.tools import projector
from train.tools.projector import ProjectorConfig, begin, captioned, main, pairs, share_nearest

RED = torch.full((8, 8, 3), 200, dtype=torch.uint8)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(tmp_path_factory.mktemp("decoder"))


def coloured(number: int) -> Document:
    """A picture of one colour, in one of three shades, and a letter for the colour."""
    letter, colour = "abcd"[number // 2 % 4], list(COLOURS.values())[number // 2 % 4]
    pixels = (torch.tensor(colour) + number % 3 * 5).to(torch.uint8).expand(8, 16, 3)
    return Document((Image(pixels.clone(), Role.USER), Text(letter, Role.ASSISTANT, supervise=True)))


def test_pictures_begin_near_their_captions(decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["heads.flow.clean_width=32", "preparation.size=[8, 16]"]
    run = run_of(recipe_of("frozen_expert", decoder, own, None), tmp_path / "run")

    def document(number: int) -> Document:
        if number == 3:
            raise CorruptRecord("a damaged picture")
        return coloured(number)

    monkeypatch.setattr(run.loader, "document", document)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    at_first = share_nearest(run.model, *pairs(run.model, list(captioned(map(coloured, range(200)), None))))
    reached = begin(run, ProjectorConfig(documents=200, steps=200, batch=32))
    assert at_first < 0.7 and reached == 1.0, (at_first, reached)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"flow.clean{part}" for part in (".weight", ".bias", "_first.weight", "_first.bias")}


def test_a_short_caption_is_filled_with_its_end(decoder: Path, tmp_path: Path) -> None:
    run = run_of(recipe_of("frozen_expert", decoder, [], None), tmp_path / "run")
    picture = Image(torch.zeros(32, 32, 3, dtype=torch.uint8), Role.USER)
    latents, wanted, captions = pairs(run.model, [(picture, "a cat"), (picture, "a very long caption " * 9)])
    assert run.model.tokenizer is not None
    ids = run.model.tokenizer.encode(" a cat.")
    table = run.model.token.embed(torch.tensor([ids]))[0].float()
    assert latents.shape == (2, 16, 192) and wanted.shape == (2, 16, table.shape[1]) and captions[0] == "a cat"
    assert torch.equal(wanted[0, : len(ids)], table) and torch.equal(
        wanted[0, len(ids) :], table[-1:].expand(16 - len(ids), -1)
    )


def test_which_documents_have_a_caption() -> None:
    picture, other = Image(RED, Role.USER), Image(RED, Role.ASSISTANT)
    ask, said = Text("what is this?", Role.USER), Text("A cat.", Role.ASSISTANT, supervise=True)
    documents = [
        Document((picture, ask, said), {"name": "cat"}), Document((ask, said), {"name": "no picture"}),
        Document((picture, other, said), {"name": "two pictures"}), Document((picture, ask), {}),
    ]  # fmt: skip
    assert list(captioned(iter(documents), "name")) == [(picture, "cat")]
    assert list(captioned(iter(documents), None)) == [(picture, "A cat")]


def test_the_command_and_its_errors(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of("frozen_expert", decoder, [], None)
    monkeypatch.setattr(projector, "load_recipe", lambda path, overrides: recipe)
    out = tmp_path / "out"
    assert main(["x.toml", str(out), "--documents", "40", "--steps", "2"]) == 0
    assert "of held-out pictures are nearest to their own caption" in capsys.readouterr().err
    bias = omni.from_pretrained(out).flow
    assert bias is not None and bool(bias.clean.bias.any())
    assert main(["x.toml", str(out), "--documents", "20", "--caption", "title"]) == 2
    assert "documents have one picture and a caption under 'title' of their meta" in capsys.readouterr().err


def test_a_stage_begins_a_projector(decoder: Path, tmp_path: Path) -> None:
    table = recipe_of("frozen_expert", decoder, [], None).model_dump(mode="json", exclude_none=True)
    one = {"name": "projector", "projector": {"documents": 40, "steps": 3}}
    config = stages.StagesConfig.model_validate({"base": table, "stages": [one, {"name": "after"}]})
    first, after = planned = stages.plan(config, "x", tmp_path)
    assert first.kind == "projector" and str(after.settings.init_from) == str(first.product)  # type: ignore[union-attr]
    assert stages.check(first) == "to be made, checked" and stages.run_stage(first) == 0 and first.finished
    stages.check_finished(planned)
    assert stages.check(after) == "to be made, checked"
    other = {**one, "projector": {"documents": 40, "steps": 4}}
    changed = stages.StagesConfig.model_validate({"base": table, "stages": [other]})
    with pytest.raises(ValueError, match="stage 'projector': .*recipe.projector.steps was 3, now 4"):
        stages.check_finished(stages.plan(changed, "x", tmp_path))
    with pytest.raises(ValueError, match="projector has no effect on average; leave it out"):
        stages.StageConfig.model_validate({**one, "average": {"a": 1.0}})
