"""Registries: names, nearest names, files found without a list of imports, and entry points of installed packages."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from plugins import install
from scripted import living

import omni
from omni.codecs import codecs
from omni.data.source import SOURCES
from omni.errors import EntryPointWarning
from omni.heads.joint import JOINT_HEADS
from omni.objectives import OBJECTIVES
from omni.objectives.features import FEATURES
from omni.registry import Registry, names_in_source
from omni.samplers import GRIDS, SAMPLERS
from omni.text.tokenizer import backends

ROOT = Path(__file__).parent.parent
GROUP = "test.things"


def test_names_and_nearest_names() -> None:
    samplers: Registry[type] = Registry("sampler")

    @samplers.register("euler")
    class Euler:
        pass

    assert samplers.get("euler") is Euler and samplers.names() == ["euler"] and "euler" in samplers
    assert "eular" not in samplers
    with pytest.raises(ValueError, match="unknown sampler 'eular'; did you mean 'euler'"):
        samplers.get("eular")
    with pytest.raises(ValueError, match="known: euler"):
        samplers.get("zzz")
    with pytest.raises(ValueError, match="registered already, by .*Euler; give that of builtins.int another name"):
        samplers.register("euler")(int)


# ---- packages ------------------------------------------------------------------------------------------------------

THING = "from things import THINGS\nTHINGS.register({name!r})({name!r}.upper())\n"


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry[str]]:
    """A registry in a package `things` of the given files; names in them are in capitals."""

    def make(**files: str) -> Registry[str]:
        for folder in ("things", "things/inner"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").write_text("")
        line = f"from omni.registry import Registry\nTHINGS = Registry('thing', 'things', entry_points={GROUP!r})\n"
        (tmp_path / "things/__init__.py").write_text(line)
        for name, text in files.items():
            (tmp_path / "things" / (name.replace("__", "/") + ".py")).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for module in [name for name in sys.modules if name.partition(".")[0] == "things"]:
            monkeypatch.delitem(sys.modules, module)
        import things  # pyright: ignore

        return things.THINGS

    return make


def test_every_file_below_a_package_is_found(things: Callable[..., Registry[str]]) -> None:
    registry = things(one=THING.format(name="one"), inner__two=THING.format(name="two"))
    assert not registry._items  # nothing is imported before it is wanted
    assert registry.names() == ["one", "two"] and registry.get("two") == "TWO" and "one" in registry


def test_a_file_may_look_up_another_while_it_is_imported(things: Callable[..., Registry[str]]) -> None:
    first = "from things import THINGS\nassert THINGS.get('zebra') == 'ZEBRA'\n" + THING.format(name="ant")
    registry = things(ant=first, zebra=THING.format(name="zebra"))
    assert registry.names() == ["ant", "zebra"]


def test_a_broken_file_of_the_package_is_raised_each_time(things: Callable[..., Registry[str]]) -> None:
    registry = things(broken="import no_such_module\n", one=THING.format(name="one"))
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            registry.get("one")


@pytest.mark.parametrize(
    "registry",
    [OBJECTIVES, FEATURES, SAMPLERS, GRIDS, JOINT_HEADS, codecs, backends, SOURCES],
    ids=lambda registry: registry.kind,
)
def test_a_registry_reads_its_own_package_and_a_documented_group(registry: Registry) -> None:
    readme = (ROOT / "omni/README.md").read_text(encoding="utf-8")
    assert registry.names() and registry.packages and f"`{registry.group}`" in readme


@pytest.mark.parametrize(("registry", "variable"), [(SAMPLERS, "SAMPLERS"), (GRIDS, "GRIDS")])
def test_help_reads_the_names_without_torch(registry: Registry, variable: str) -> None:
    script = "import sys; from omni.registry import names_in_source\n"
    script += f"print(*names_in_source('omni.samplers', {variable!r})); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    ours = [name for name in registry.names() if registry.get(name).__module__.startswith("omni.")]
    assert done.stdout.split() == ours == names_in_source("omni.samplers", variable), done.stderr


# ---- installed packages --------------------------------------------------------------------------------------------


def test_a_plugin_is_imported_when_its_name_is_asked_for(things: Callable[..., Registry[str]], tmp_path: Path) -> None:
    registry = things(one=THING.format(name="one"))
    install(tmp_path, "more-things", {GROUP: {"more": "more_things"}}, {"more_things": THING.format(name="more")})
    assert registry.names() == ["more", "one"] and "more" in registry and "more_things" not in sys.modules
    assert registry.get("one") == "ONE" and "more_things" not in sys.modules
    with pytest.raises(ValueError, match="unknown thing 'mroe'; did you mean 'more'"):
        registry.get("mroe")
    assert registry.get("more") == "MORE" and registry.get("more") == "MORE"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        (THING.format(name="bad") + "1 / 0", "ZeroDivisionError: division by zero"),
        (THING.format(name="bad") + THING.format(name="worse") + "1 / 0", "ZeroDivisionError: division by zero"),
        (THING.format(name="bad") + "import sys; sys.exit('no licence')", "SystemExit: no licence"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_when_it_is_asked_for(
    things: Callable[..., Registry[str]], tmp_path: Path, text: str, message: str
) -> None:
    registry = things(one=THING.format(name="one"))
    install(tmp_path, "bad-things", {GROUP: {"bad": "bad_things"}}, {"bad_things": text})
    assert registry.get("one") == "ONE" and registry.names() == ["bad", "one"]
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            registry.get("bad")
        what = "thing 'bad' of the installed package 'bad-things' cannot be imported: "
        assert str(caught.value) == what + message
    assert registry.names() == ["bad", "one"]


def test_a_module_that_fails_leaves_nothing_behind_in_any_registry(
    things: Callable[..., Registry[str]], tmp_path: Path
) -> None:
    """The second lookup meets the first error again. Modules that it imported with success stay registered."""
    others = "from omni.registry import Registry\nOTHERS = Registry('other')\n"
    fails = "import things.one, others\n" + THING.format(name="late") + "others.OTHERS.register('x')(1)\n1 / 0\n"
    registry = things(one=THING.format(name="one"), zebra=fails)
    (tmp_path / "others.py").write_text(others)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            registry.get("one")
        assert "the file is things.zebra" in caught.value.__notes__[-1]
    assert registry._items == {"one": "ONE"}
    assert not sys.modules.pop("others").OTHERS.names()


@pytest.mark.parametrize("value", ["no module", "a.b:", ""])
def test_a_malformed_entry_point_is_named(things: Callable[..., Registry[str]], tmp_path: Path, value: str) -> None:
    registry = things(one=THING.format(name="one"))
    install(tmp_path, "odd-things", {GROUP: {"one": value, "odd": value}}, {})
    with pytest.warns(EntryPointWarning, match="package 'odd-things' offers the thing 'one' too"):
        assert registry.names() == ["odd", "one"]
    assert registry.get("one") == "ONE"
    with pytest.raises(ValueError, match="thing 'odd' of .* 'odd-things': its entry point '.*' names no module; mend"):
        registry.get("odd")


def test_a_plugin_that_registers_nothing_is_named(things: Callable[..., Registry[str]], tmp_path: Path) -> None:
    registry = things()
    install(tmp_path, "no-things", {GROUP: {"none": "no_things"}}, {"no_things": "none = 1"})
    with pytest.raises(ValueError, match="package 'no-things': no_things registers no thing of that name; register it"):
        registry.get("none")


def test_two_plugins_of_one_name_are_both_named(things: Callable[..., Registry[str]], tmp_path: Path) -> None:
    registry = things()
    for name in ("a-things", "b-things"):
        install(tmp_path, name, {GROUP: {"same": "same_things"}}, {"same_things": THING.format(name="same")})
    with pytest.raises(ValueError, match="'a-things' and .* 'b-things' both offer the thing 'same'; uninstall one"):
        registry.get("same")
    assert registry.names() == ["same"]


def test_the_packages_own_name_wins_and_the_other_is_named(
    things: Callable[..., Registry[str]], tmp_path: Path
) -> None:
    registry = things(one=THING.format(name="one"))
    files = {"first_things": THING.format(name="one"), "both_things": THING.format(name="one") + "\n"}
    install(tmp_path, "first-things", {GROUP: {"one": "first_things", "other": "both_things"}}, files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.get("one") == "ONE"
    message = "package 'first-things' offers the thing 'one' too; that of 'ONE' is used"
    with pytest.warns(EntryPointWarning, match=message) as shown:
        assert registry.names() == ["one", "other"] and "other" in registry
        with pytest.raises(ValueError, match="unknown thing"):
            registry.get("zzz")
    assert len(shown) == 1
    with pytest.raises(ValueError, match="thing 'other' of .* 'one' is registered already"):
        registry.get("other")


# ---- a sampler and a grid of an installed package, in a request ----------------------------------------------------

HALVES = """
from itertools import pairwise
from omni.samplers import GRIDS, SAMPLERS, Call, State

@SAMPLERS.register("halves_sampler", reads="velocity")
def halves_sampler(start, times, noise=None):
    x, steps = start, len(times) - 1
    for n, (t, s) in enumerate(pairwise(times), 1):
        m = (t + s) / 2
        half = x + (m - t) * (yield Call(x, t, t))
        x = x + (s - t) * (yield Call(half, m, m))
        yield State(n, steps, s, x)

@GRIDS.register("thirds")
def thirds(steps=3, start=None):
    return [1.0, 0.6, 0.3, 0.0]
"""


def test_a_request_names_the_sampler_of_an_installed_package(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {"omni.samplers": {"halves_sampler": "halves"}, "omni.grids": {"thirds": "halves"}}
    install(tmp_path, "omni-halves", points, {"halves": HALVES})
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (SAMPLERS, GRIDS):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    model = living(tiny_model)
    picture = {"force_image": True, "image_size": (8, 8), "max_tokens": 1, "max_images": 1}
    with pytest.raises(ValueError, match="sampler = 'hlaves_sampler': unknown sampler .* mean 'halves_sampler'"):
        model.generate("x", sampler="hlaves_sampler", **picture)
    reply = model.generate("x", sampler="halves_sampler", grid="thirds", **picture)
    assert isinstance(reply, omni.Reply) and reply.evaluations == 6 and len(reply.images) == 1
