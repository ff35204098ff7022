"""Options: bounds in the fields, the same at every door; flags made from the fields."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from omni.cli import options as cli_options
from omni.cli.commands import build_parser, parse
from omni.errors import RetiredKeyWarning
from omni.generation.options import (
    MAX_STEPS,
    GenerationOptions,
    PictureOptions,
    SpeculativeOptions,
    TextOptions,
    check_defaults,
)
from omni.registry import names_in_source
from omni.samplers import GRIDS, SAMPLERS
from omni.samplers.verification import VERIFICATIONS
from train.recipe import Recipe, without_retired

WRONG: list[tuple[str, Any, str]] = [
    ("steps", 10**9, "steps = 1000000000: must be a whole number from 1 to 1000; or leave it out"),
    ("steps", 0, "from 1 to 1000"),
    ("steps", True, "steps = True: must be a whole number"),
    ("steps", "8", "steps = '8': must be a whole number"),
    ("steps", 8.0, "steps = 8.0: must be a whole number"),
    ("steps", 10**5000, "steps = a number of 16610 bits: must be a whole number"),
    ("max_tokens", 10**12, "must be a whole number from 1 to 1000000; 256 is usual"),
    ("max_tokens", 0, "from 1 to 1000000"),
    ("grid", [0.5] * 10**6, "has 1000000 times; give at most 1001"),
    ("grid", (1.0, float("nan"), 0.0), "or a list of times such as"),
    ("grid", (1.0, 0.5), "must go from noise"),
    ("grid", (), "must go from noise"),
    ("grid", 3, "must be the name of a grid"),
    ("grid", "unifrom", "did you mean 'uniform'"),
    ("stop", ("",), "would end every reply at once"),
    ("stop", ("a",) * 17, "has 17 texts; give at most 16"),
    ("stop", "a" * 257, "longer than 256 characters"),
    ("stop", 3, "must be a text or a list of texts"),
    ("stop", (b"a",), "must be a text or a list of texts"),
    ("stop", "\udce9", "not valid Unicode"),
    ("max_images", -1, "must be a whole number from 0 to 1000"),
    ("guidance", 1e38, "must be a number from 0 to 100"),
    ("guidance", 10**400, "guidance = a number of 1329 bits: must be a number from 0 to 100"),
    ("guidance", "2", "guidance = '2': must be a number"),
    ("guidance", False, "guidance = False: must be a number"),
    ("image_size", (0, 0), "must be (height, width) in pixels, each a whole number from 1 to 8192"),
    ("image_size", (-8, 8), "each a whole number from 1 to 8192"),
    ("image_size", (10**9, 8), "each a whole number from 1 to 8192"),
    ("image_size", (8.0, 8), "each a whole number from 1 to 8192"),
    ("image_size", (8, 8, 3), "must be (height, width)"),
    ("image_size", "64x64", "must be (height, width)"),
    ("temperature", 1e-300, "must be 0 (greedy), or from 0.001 to 100"),
    ("temperature", -1, "must be a number from 0 to 100"),
    ("top_p", 0, "must be a number from 1e-06 to 1"),
    ("seed", 2**70, "from 0 to 9223372036854775807"),
    ("seed", -1, "from 0 to 9223372036854775807"),
    ("force_image", "yes", "must be true or false"),
    ("sampler", "eulr", "did you mean 'euler'"),
    ("verify", "rejectoin", "did you mean 'rejection'"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=[f"{n}-{m[-20:]}" for n, _, m in WRONG])
def test_a_value_out_of_bounds_is_one_line(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        GenerationOptions(**{name: value})
    line = str(caught.value)
    assert line.startswith(f"GenerationOptions: {name} = ") and message in line
    assert "\n" not in line and len(line) < 500


FRACTIONS = [
    n for n, f in GenerationOptions.fields_by_key().items() if float in {f.annotation, *get_args(f.annotation)}
]


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_option_takes_what_is_not_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = -?(nan|inf)"):
        GenerationOptions(**{name: value})


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown key 'stpes'; did you mean 'steps'"):
        GenerationOptions(stpes=3)


def test_what_people_write_is_taken() -> None:
    assert GenerationOptions(stop="dog").stop == ("dog",) and GenerationOptions(stop=["a", "b"]).stop == ("a", "b")
    given: dict[str, Any] = {"steps": np.int64(4), "guidance": torch.tensor(2.0), "image_size": [8, 16]}
    plain = GenerationOptions(**given, grid=np.array([1, 0.5, 0])).picture
    assert (plain.steps, plain.guidance, plain.image_size, plain.grid) == (4, 2.0, (8, 16), (1.0, 0.5, 0.0))
    assert GenerationOptions(max_tokens=None, stop=None, top_p=None) == GenerationOptions()
    assert GenerationOptions(temperature=0).resolved({}).text.temperature == 0.0
    many = GenerationOptions(grid=tuple(1 - n / MAX_STEPS for n in range(MAX_STEPS + 1))).resolved({}).picture
    assert many.steps == MAX_STEPS and len(many.times()) == MAX_STEPS + 1


def test_no_seed_is_a_fresh_one_which_is_recorded() -> None:
    seeds = {GenerationOptions(seed=None).resolved({}).seed for _ in range(3)}
    assert len(seeds) == 3 and all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
    resolved = GenerationOptions(seed=None).resolved({})
    assert resolved.resolved({}) == resolved


def test_options_survive_json() -> None:
    resolved = GenerationOptions(grid=(1.0, 0.4, 0.0), stop="x", image_size=(8, 8)).resolved({})
    assert GenerationOptions.model_validate_json(resolved.model_dump_json()) == resolved
    assert GenerationOptions.model_validate(resolved.model_dump(mode="json")) == resolved
    assert GenerationOptions(**resolved.flat("json")) == GenerationOptions(**resolved.flat()) == resolved
    schema = GenerationOptions.model_json_schema()
    json.dumps(schema)
    steps = schema["$defs"]["PictureOptions"]["properties"]["steps"]
    assert steps["anyOf"][0] == {"maximum": 1000, "minimum": 1, "type": "integer"}
    assert schema["properties"]["max_images"]["description"]


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_an_option_may_be_given_flat_or_in_its_group() -> None:
    flat = GenerationOptions(steps=4, temperature=0.5, verify="coupled", seed=1)
    nested = {"picture": {"steps": 4}, "text": {"temperature": 0.5}, "speculative": {"verify": "coupled"}}
    assert GenerationOptions(**nested, seed=1) == flat == GenerationOptions.model_validate({**nested, "seed": 1})
    assert (
        GenerationOptions(picture=PictureOptions(steps=4), text={"temperature": 0.5}, verify="coupled", seed=1) == flat
    )
    mixed = GenerationOptions(steps=4, picture={"sampler": "heun", "guidance": None}, guidance=2.0)
    assert (mixed.picture.steps, mixed.picture.sampler, mixed.picture.guidance) == (4, "heun", 2.0)
    assert flat.changed({"picture": {"steps": 2}, "top_p": 0.5}) == GenerationOptions(
        steps=2, temperature=0.5, top_p=0.5, verify="coupled", seed=1
    )
    assert flat.model_copy(update={"steps": 2}).picture.steps == 2
    assert check_defaults({"picture": {"steps": 4}, "temperature": 1.0}) == {"temperature": 1.0, "steps": 4}


def test_names_are_unique_over_the_groups() -> None:
    own = [name for name in GenerationOptions.model_fields if name not in GenerationOptions.groups()]
    names = [*own, *(name for group in GenerationOptions.groups().values() for name in group.model_fields)]
    assert len(set(names)) == len(names) == len(GenerationOptions.fields_by_key()) > 20
    assert not set(names) & GenerationOptions.groups().keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 4, "picture": {"steps": 4}}, "steps is given twice, as steps and as picture.steps; leave one out"),
        ({"steps": 4, "picture": PictureOptions(steps=8)}, "steps is given twice"),
        ({"picture": {"steps": 0}}, ": steps = 0: must be a whole number from 1 to 1000"),
        ({"picture": {"stpes": 4}}, "unknown key 'picture.stpes'; did you mean 'steps'"),
        ({"picture": {"temperature": 1.0}}, "unknown key 'picture.temperature'; did you mean 'text.temperature'"),
        ({"pictures": {"steps": 4}}, "unknown key 'pictures'; did you mean 'picture'"),
        ({"picture": 3}, "picture = 3"),
        ({"told_guidance": 2.0, "guidance_embedding": 2.0}, "are both given; told_guidance is the old name"),
        ({"picture": None}, "^GenerationOptions: picture = None must be PictureOptions or a table; or leave it out"),
        ({"picture": TextOptions()}, r"picture = TextOptions\(.* must be PictureOptions or a table"),
        ({"verify": "greedy", "temperature": 1.0}, "^GenerationOptions: verify = 'greedy' has no meaning at temp"),
        ({"gamma": 0.5, "sampler": "euler"}, "^GenerationOptions: gamma = 0.5 means nothing to the sampler"),
        ({"recycle": True, "sweeps": 2}, "^GenerationOptions: recycle has no effect"),
    ],
)
def test_errors_name_the_flat_key(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**given)


def test_the_old_name_is_read_with_a_warning() -> None:
    wanted = GenerationOptions(guidance_embedding=2.0)
    for given in ({"told_guidance": 2.0}, {"picture": {"told_guidance": 2.0}}):
        with pytest.warns(RetiredKeyWarning, match="^told_guidance is called guidance_embedding now; rename it$"):
            assert GenerationOptions(**given) == wanted
    with pytest.warns(RetiredKeyWarning, match="^here: told_guidance is called"):
        assert check_defaults({"told_guidance": 2.0}, "here") == {"guidance_embedding": 2.0}
    with pytest.warns(RetiredKeyWarning):
        assert parse(["generate", "--told-guidance", "2", "draw"]).options == wanted
    with pytest.warns(RetiredKeyWarning, match=r"\[generation\]: told_guidance"):
        assert Recipe._can_be_generated({"told_guidance": 2.0}) == {"guidance_embedding": 2.0}
    saved = without_retired({"generation": {"told_guidance": 2.0}})  # a resume sees no change
    assert saved == {"generation": {"guidance_embedding": 2.0}}


def test_an_old_name_that_is_none_is_not_given(recwarn: pytest.WarningsRecorder) -> None:
    wanted = GenerationOptions(guidance_embedding=3.0)
    for given in ({"told_guidance": None, "guidance_embedding": 3.0}, {"guidance_embedding": 3.0}):
        assert GenerationOptions(**given) == GenerationOptions(picture=given) == wanted
    assert not recwarn.list
    with pytest.warns(RetiredKeyWarning):
        assert GenerationOptions(told_guidance=3.0, guidance_embedding=None) == wanted


def test_a_changed_copy_of_a_group_is_checked() -> None:
    options = PictureOptions(steps=3)
    changed = options.model_copy(update={"guidance": 2.0})
    assert changed == PictureOptions(steps=3, guidance=2.0) and changed.model_fields_set == {"steps", "guidance"}
    assert options.model_copy() == options and options.model_copy(update={"steps": None}) == PictureOptions()
    with pytest.raises(ValueError, match="^PictureOptions: unknown key 'stepz'; did you mean 'steps'"):
        options.model_copy(update={"stepz": 4})
    with pytest.raises(ValueError, match="^TextOptions: top_p = 7: must be a number from 1e-06 to 1"):
        TextOptions(temperature=1.0).model_copy(update={"top_p": 7})


@pytest.mark.parametrize(
    ("given", "gamma", "start_time"),
    [
        ({}, 0.2, 0.9),
        ({"sampler": "gamma", "grid": "uniform"}, 0.2, 0.9),
        ({"sampler": "euler"}, None, 0.9),
        ({"sampler": "euler", "grid": "edm"}, None, None),
        ({"grid": "edm"}, 0.2, None),
        ({"gamma": 0.7}, 0.7, 0.9),
    ],
)
def test_naming_the_models_own_sampler_and_grid_changes_nothing(
    given: dict[str, Any], gamma: float | None, start_time: float | None
) -> None:
    """Another sampler drops the model's gamma, and another grid its start."""
    defaults = {"sampler": "gamma", "gamma": 0.2, "grid": "uniform", "start_time": 0.9}
    found = GenerationOptions(**given).resolved(defaults).picture
    assert (found.gamma, found.start_time) == (gamma, start_time)
    assert GenerationOptions(**given).resolved({"sampler": "gamma"}).picture.gamma == (
        given.get("gamma", 0.5) if given.get("sampler") != "euler" else None
    )


def test_naming_the_models_own_times_changes_nothing() -> None:
    defaults = {"grid": [1, 0.58, 0]}
    plain, named = (GenerationOptions(**given).resolved(defaults) for given in ({}, {"grid": (1.0, 0.58, 0.0)}))
    assert plain == named and named.picture.steps == 2
    with pytest.raises(ValueError, match="has 2 steps, got steps = 4"):
        GenerationOptions(grid=(1.0, 0.58, 0.0), steps=4).resolved(defaults)
    assert GenerationOptions(steps=4).resolved(defaults).picture.grid == "uniform"


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        ({"steps": 0}, "here: steps = 0: must be a whole number from 1 to 1000"),
        ({"steps": "4"}, "here: steps = '4': must be a whole number"),
        ({"guidance": 1e38}, "here: guidance = 1e\\+38"),
        ({"temperature": float("nan")}, "here: temperature = nan"),
        ({"stpes": 4}, "here: 'stpes' is no default .*did you mean 'steps'"),
        ({"max_tokens": 4}, "here: 'max_tokens' is no default .*give it with each request"),
        ({"gamma": 0.5, "sampler": "euler"}, "here: gamma = 0.5 means nothing to the sampler 'euler'"),
        ([1], "here: must be a table of options, got a list"),
    ],
)
def test_defaults_have_the_same_bounds(defaults: Any, message: str) -> None:
    for check in (lambda: check_defaults(defaults, "here"), lambda: GenerationOptions().resolved(defaults, "here")):
        with pytest.raises(ValueError, match=message):
            check()


def test_a_recipe_and_a_model_have_the_same_bounds(tiny_model: Path, tmp_path: Path) -> None:
    import omni

    with pytest.raises(ValueError, match=r"\[generation\]: steps = 1000000000: must be a whole number from 1 to 1000"):
        Recipe._can_be_generated({"steps": 10**9})
    model = omni.from_pretrained(tiny_model)
    model.defaults = {"steps": 10**9}
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="generation.json: steps = 1000000000: must be a whole number from 1 to 1000"):
        omni.from_pretrained(tmp_path / "model")


# ---- flags ---------------------------------------------------------------------------------------------------------


def sub_parser(command: str) -> Any:
    [group] = [action for action in build_parser()._actions if hasattr(action, "choices") and action.choices]
    return group.choices[command]  # type: ignore[index]


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_field_has_one_flag_and_every_group_a_title(command: str) -> None:
    parser = sub_parser(command)
    destinations = [action.dest for action in parser._actions]
    assert all(destinations.count(name) == 1 for name in GenerationOptions.fields_by_key())
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    assert set(groups["the whole request"]) >= {"seed", "max_tokens", "max_images", "stop", "force_image", "system"}
    assert groups["text"] == ["temperature", "top_p", "top_k"]
    assert groups["pictures and clips"] == list(PictureOptions.model_fields)
    assert groups["speculative decoding"] == list(SpeculativeOptions.model_fields)


def test_help_tells_the_bounds_of_the_fields_and_every_name() -> None:
    shown = " ".join(sub_parser("generate").format_help().split())
    for words in ("(from 1 to 1000)", "(from 0 to 1000; default 16)", "1 keeps all (from 1e-06 to 1)"):
        assert words in shown
    for names in (SAMPLERS.names(), GRIDS.names()):
        assert f"({', '.join(names)})" in shown
    verifications = SpeculativeOptions.model_fields["verify"].description or ""
    assert all(re.search(rf"\b{name}\b", verifications) for name in VERIFICATIONS)


def test_names_of_registries_are_read_without_torch() -> None:
    assert names_in_source("omni.samplers", "SAMPLERS") == SAMPLERS.names()
    assert names_in_source("omni.samplers", "GRIDS") == GRIDS.names()
    program = (
        "import sys; from omni.cli.commands import build_parser; build_parser(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_flags_become_options() -> None:
    words = "--steps 3 --seed random --guidance 2 --size 8x16 --temperature 0.5 --max-tokens 9 --max-images 0 --stop a"
    more = ["--stop", "b c", "--force-image", "--grid", "edm", "--top-p", "0.5", "--tokens-per-pass", "4", "--recycle"]
    options = parse(["generate", *words.split(), *more, "draw"]).options
    assert options == GenerationOptions(
        steps=3, seed=None, guidance=2.0, image_size=(8, 16), temperature=0.5, max_tokens=9, max_images=0,
        stop=("a", "b c"), force_image=True, grid="edm", top_p=0.5, tokens_per_pass=4, recycle=True,
    )  # fmt: skip
    assert parse(["chat"]).options == GenerationOptions()
    assert cli_options.flag_of("image_size") == "--size" and cli_options.flag_of("max_tokens") == "--max-tokens"


@pytest.mark.parametrize("prompt", ["-5 apples", "-h what", "-help me draw", "--steps is what?", "- a list"])
def test_a_prompt_may_begin_with_a_dash(prompt: str) -> None:
    assert parse(["generate", prompt, "--steps", "2"]).prompt == prompt
    assert parse(["generate", "--steps", "2", "--", prompt]).prompt == prompt
    assert parse(["generate", "--", "--steps"]).prompt == "--steps"
