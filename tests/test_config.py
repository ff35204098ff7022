"""Configuration: sources named in errors, nearest keys, literal overrides, canonical identity, registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from omni.config import Frozen, build, canonical_json, digest, load_json, load_toml, parse_json, parse_toml


class Optimiser(Frozen):
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


class NextToken(Frozen):
    name: Literal["next_token"] = "next_token"
    weight: float = 1.0


class Flow(Frozen):
    name: Literal["flow"] = "flow"
    copies: int = 4


class Recipe(Frozen):
    steps: int = Field(gt=0)
    title: str = ""
    optimiser: Optimiser = Optimiser()
    objectives: tuple[Annotated[NextToken | Flow, Field(discriminator="name")], ...] = ()


TOML = 'steps = 10\n[optimiser]\nlearning_rate = 1\n[[objectives]]\nname = "flow"\ncopies = 2\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    return path


def _error(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_toml(path, overrides, Recipe)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_are_literals_else_text(recipe: Path) -> None:
    overrides = ["steps=20", "optimiser.betas=[0.5, 0.6]", "title=a/b c", "objectives.0.copies = 7", "steps=21"]
    config = load_toml(recipe, overrides, Recipe)
    assert (config.steps, config.title, config.optimiser.betas) == (21, "a/b c", (0.5, 0.6))
    assert config.objectives == (Flow(copies=7),)
    assert load_toml(recipe, ["title=8"], Recipe).title == "8"
    assert load_toml(recipe, ["title=__import__('os')"], Recipe).title == "__import__('os')"
    assert load_toml(recipe, ['title="x"'], Recipe).title == "x"
    assert load_toml(recipe, ["title="], Recipe).title == ""


def test_unknown_keys_name_their_source_and_the_nearest_key(recipe: Path) -> None:
    assert _error(recipe, "stepz=3") == "override 'stepz=3': unknown key 'stepz'; did you mean 'steps'?"
    assert "'learning_rate'" in _error(recipe, "optimiser.learning_rat=1")
    assert "did you mean 'optimiser.learning_rate'" in _error(recipe, "learning_rate=1")
    assert "did you mean 'copies'" in _error(recipe, "objectives.0.copeis=1")
    recipe.write_text(TOML.replace("learning_rate", "lerning_rate"))
    message = _error(recipe)
    assert str(recipe) in message and "'optimiser.lerning_rate'" in message and "'learning_rate'" in message
    recipe.write_text("steps = 1\nzzzz = 2\n")
    assert "known keys: objectives, optimiser, steps, title" in _error(recipe)


def test_bad_values_name_key_and_value(recipe: Path) -> None:
    message = _error(recipe, "steps=0")
    assert "steps = 0" in message and "override 'steps=0'" in message and "greater than 0" in message
    assert "learning_rate = 'fast'" in _error(recipe, "optimiser.learning_rate=fast")
    assert "finite" in _error(recipe, "optimiser.learning_rate=nan")
    assert "'steps' is missing" in _error(_write(recipe, 'title = "a"'))


def test_malformed_input(recipe: Path) -> None:
    assert "not of the form" in _error(recipe, "steps")
    assert "not a table" in _error(recipe, "steps.deep=1")
    assert "not an index" in _error(recipe, "objectives.9.copies=1")
    assert "not valid TOML" in _error(_write(recipe, "steps = "))
    assert "did you mean 'recipe.toml'" in _error(recipe.with_name("recipes.toml"))
    assert "cannot read" in _error(recipe.parent)


def test_json_and_plain_data(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = build({"steps": 3, "objectives": [{"name": "next_token"}]}, Recipe, "here")
    path.write_text(canonical_json(config))
    assert load_json(path, Recipe) == config
    with pytest.raises(ValueError, match="here: unknown key 'step'; did you mean 'steps'"):
        build({"step": 3}, Recipe, "here")


def test_frozen_and_digest(recipe: Path) -> None:
    config = load_toml(recipe, [], Recipe)
    with pytest.raises(ValueError):
        config.steps = 3  # type: ignore[misc]
    assert hash(config) == hash(load_toml(recipe, [], Recipe))
    assert digest(config) == digest(load_toml(recipe, ["steps=10"], Recipe)) != digest(Recipe(steps=11))
    assert canonical_json({"b": 1, "a": [1.5]}) == '{"a":[1.5],"b":1}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


DEEP = {
    "toml": [
        *("a = " + "[" * 100_000, "a = " + "[" * 70 + "]" * 70),
        *("a" + ".a" * 20_000 + " = 1", "[a" + ".a" * 20_000 + "]"),
    ],
    "json": ["[" * 100_000, '{"a":' * 100_000, "[" * 70 + "]" * 70],
}
OVERRIDES = ["a" + ".a" * 100 + "=1", "title=" + "[" * 5000, "title=" + "[" * 100 + "]" * 100, "9" * 9000 + "=1"]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in DEEP.items() for text in texts])
def test_deep_nesting_is_one_line(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / f"recipe.{kind}"
    path.write_text(text)
    with pytest.raises(ValueError, match="64") as error:
        load_toml(path, [], Recipe) if kind == "toml" else load_json(path, Recipe)
    assert "recipe" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("override", OVERRIDES)
def test_deep_overrides_are_one_line(override: str) -> None:
    with pytest.raises(ValueError) as error:
        build({"steps": 1}, Recipe, "recipe", [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_shallow_nesting_is_read() -> None:
    assert parse_json("[" * 64 + "]" * 64, "x") and parse_toml("a = '" + "b." * 500 + "'\n# " + "." * 500, "x")
    assert parse_toml("[a.b]\nc.d = {e.f = 1.5}", "x") == {"a": {"b": {"c": {"d": {"e": {"f": 1.5}}}}}}
    for data in (b"\xff", b"", b"9" * 5000):
        with pytest.raises(ValueError, match="'x' is not valid JSON"):
            parse_json(data, "x")


def test_endless_files_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text("steps = 1\n" + "#" * 100)
    monkeypatch.setattr("omni.config.MAX_FILE_BYTES", 50)
    with pytest.raises(ValueError, match="has more than 50 bytes"):
        load_toml(tmp_path / "a.toml", [], Recipe)
