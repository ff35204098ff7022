"""The READMEs: commands parse, paths, links and names exist, Python runs, figures are in eval/results.

The root README has limits of lines, words and figures. The diagram of the packages in omni/README.md is compared with
the imports of the code. The wheel and the first command run in a fresh environment (slow).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

from eval.suite import load_suite, suite_path
from omni.cli.commands import parse
from omni.cli.options import flag_of
from omni.codecs import codecs
from omni.config import load_toml
from omni.data import emoji, files, parquet  # noqa: F401  (sources register themselves)
from omni.data.source import SOURCES
from omni.generation.options import GenerationOptions
from omni.heads.joint import JOINT_HEADS
from omni.objectives import OBJECTIVES
from omni.samplers import GRIDS, SAMPLERS
from train.codec.loop import CodecRecipe
from train.recipe import Recipe
from train.tools.tokenizer import TokenizerRecipe

ROOT = Path(__file__).parent.parent
NAMES = (
    "README.md",
    "omni/README.md",
    "omni/importers/README.md",
    "train/README.md",
    "eval/README.md",
    "tokenizers_cfg/README.md",
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES if (ROOT / name).is_file()}
README = TEXTS["README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
MOST_LINES, MOST_WORDS, MOST_FIGURES = 200, 1800, 12

needs_bundled = pytest.mark.skipif(
    not (ROOT / "omni/bundled/manifest.json").is_file(), reason="there is no bundled model yet"
)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def code(text: str) -> list[str]:
    """Inline code, also over two lines."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def commands() -> list[str]:
    """Lines of bash blocks, and inline code that is a command."""
    found = []
    for text in TEXTS.values():
        lines = [line for block in blocks(text, "bash") for line in block.replace("&&", "\n").splitlines()]
        inline = [span for span in code(text) if span.startswith(("omni ", "python -m ", "pip install "))]
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")] + inline
    return list(dict.fromkeys(found))


def is_there(path: str) -> bool:
    return (ROOT / path).exists() or path.startswith("runs/")


@pytest.mark.parametrize("command", commands())
def test_commands_are_right(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "omni":
        parse(words[1:])
    elif words[:2] == ["python", "-m"]:
        _check_module(words[2])
        _check_arguments(words[2], words[3:])
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[-1])
        assert not extras or set(extras[1].split(",")) <= set(EXTRAS)
    else:
        assert words[0] == "python" and is_there(words[1]) or words[:2] == ["pytest", "-n"]


def _check_module(module: str) -> None:
    place = ROOT / module.replace(".", "/")
    assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()


def _check_arguments(module: str, arguments: list[str]) -> None:
    """Parse a program's file with its overrides, like the program; names in capitals are placeholders."""
    given = [word for word in arguments if not word.startswith("--")]
    changes = [word for word in given if "=" in word and "device=" not in word]  # no GPU here
    paths = [word for word in given if "=" not in word]
    if not paths or re.match(r"[A-Z]{2}", paths[0]):
        return
    if module == "eval":
        load_suite(suite_path(paths[0]), changes)
    elif module == "train":
        kind = tomllib.loads((ROOT / paths[0]).read_text(encoding="utf-8")).get("kind", "model")
        if kind in ("model", "codec"):  # else a list of stages
            load_toml(ROOT / paths[0], changes, CodecRecipe if kind == "codec" else Recipe)
    elif module == "train.tools.tokenizer":
        load_toml(ROOT / paths[0], changes, TokenizerRecipe)
    else:
        assert is_there(paths[0])


def test_ci_reads_two_commands() -> None:
    """.ci/run reads both from the README by these marks."""
    for name in ("one", "two"):
        assert len(re.findall(rf"^<!-- ci: {name} -->\n```bash\n(.+)\n```$", README, re.MULTILINE)) == 1
        assert f"from_readme {name}" in (ROOT / ".ci/run").read_text()


def test_the_root_readme_is_short() -> None:
    figures = README.partition("## Results")[2].partition("\n## ")[0].count("`python -m ")
    assert len(README.splitlines()) <= MOST_LINES and len(README.split()) <= MOST_WORDS
    assert 0 < figures <= MOST_FIGURES


# ---- paths, links, names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_exists(name: str) -> None:
    spans = [word.strip(".,;:") for span in code(TEXTS[name]) for word in span.split()]
    paths = [word for word in spans if re.fullmatch(r"(?:omni|train|eval|tests|tokenizers_cfg|\.ci)/[\w./-]*", word)]
    missing = {path for path in paths if not is_there(path)}
    assert paths and not missing


def heading_names(text: str) -> set[str]:
    """Anchors of the headings, as they are on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_exists(name: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_blocks(TEXTS[name])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        relative = place.relative_to(ROOT).as_posix()
        assert is_there(relative), target
        assert not anchor or anchor in heading_names(place.read_text(encoding="utf-8")), target


@cache
def names_in(path: str) -> set[str]:
    """The names that a file defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("name", TEXTS)
def test_files_define_the_names_beside_them(name: str) -> None:
    """`a/file.py`: `one`, `two`"""
    rows = re.findall(r"`([\w./]+\.py)`:\s+((?:`\w+`(?:,\s+|; its slow twin:\s+)?)+)", TEXTS[name])
    assert len(rows) >= {"README.md": 10, "omni/README.md": 50}.get(name, 0)
    for path, wanted in rows:
        missing = set(re.findall(r"`(\w+)`", wanted)) - names_in(path)
        assert not missing, f"{path} defines no {missing}"


# ---- tables -------------------------------------------------------------------------------------------------------


def test_the_tour_names_what_is_registered() -> None:
    """In the first column of its tables. A new file needs no line there."""
    registries = (OBJECTIVES, SAMPLERS, GRIDS, JOINT_HEADS, codecs, SOURCES)
    chosen = TEXTS["omni/README.md"].partition("## What can be chosen")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.+?) \|", chosen, re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(names) > 20 and all(any(name in registry for registry in registries) for name in names)


def test_the_tour_has_every_option_and_flag() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(--[\w-]+)", TEXTS["omni/README.md"], re.MULTILINE)
    assert dict(rows) == {name: flag_of(name) for name in GenerationOptions.fields_by_key()}


def test_extras_are_all_listed() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", TEXTS["omni/README.md"].partition("## Extras")[2], re.MULTILINE)
    assert sorted(listed) == sorted(EXTRAS)


def test_suites_are_all_listed() -> None:
    listed = re.findall(r"^\| `(eval/suites/\w+\.toml)` \|", TEXTS["eval/README.md"], re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "eval/suites").glob("*.toml"))


@cache
def stored_values() -> dict[str, set[str]]:
    """Values of every task in eval/results, as a README writes them."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "eval/results").glob("*.json"):
        for row in json.loads(path.read_text()):
            if row["value"] is not None:
                values = found.setdefault(row["name"].partition(".")[0], set())
                values |= {format(row["value"], spec) for spec in (".1f", ".2f", ".1e", ".0f")}
    return found


@pytest.mark.parametrize("name", ["README.md", "eval/README.md"])
def test_figures_equal_the_results(name: str) -> None:
    """| what | value | bar | `command` |"""
    rows = re.findall(r"^\| .+? \| (.+?) \| .*? ?\| `python -m eval (.+?)` \|$", TEXTS[name], re.MULTILINE)
    assert len(rows) >= 10
    for value, command in rows:
        [task] = re.findall(r"tasks=(\w+)", command) or [Path(command.split()[0]).stem]
        wrong = set(re.findall(r"\d+\.\d+(?:e-\d+)?", value)) - stored_values()[task]
        assert not wrong, (value, command)


# ---- the drawing of the packages ----------------------------------------------------------------------------------


def drawing() -> dict[str, tuple[int, str]]:
    """For each package or file in a bracket: its line in the diagram, from the bottom, and the bracket."""
    part = TEXTS["omni/README.md"].partition("## Packages")[2]
    lines = [line for line in blocks(part, "")[0].splitlines() if "[" in line]
    found = {}
    for level, line in enumerate(reversed(lines)):
        for bracket in re.findall(r"\[(.+?)\]", line):
            package, colon, names = bracket.rpartition(":")
            for name in names.split():
                found[f"{package}.{name}" if colon else name] = (level, bracket)
    return found


def box_of(module: str, boxes: dict[str, tuple[int, str]]) -> str | None:
    """The longest name in the diagram that contains a module of omni, "generation.options" before "generation"."""
    parts = module.split(".")[1:]
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in boxes), None)


def crossings(boxes: dict[str, tuple[int, str]]) -> set[str]:
    """Imports at any depth that go up, or sideways between two brackets."""
    wrong = set()
    for path in sorted((ROOT / "omni").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        mine = box_of(module, boxes)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("omni."):
                continue
            for alias in node.names:
                other = box_of(f"{node.module}.{alias.name}", boxes)
                if mine and other and boxes[mine] != boxes[other] and boxes[other][0] >= boxes[mine][0]:
                    wrong.add(f"{module} -> {other}")
    return wrong


def test_the_diagram_has_every_package() -> None:
    here = {p.stem for p in (ROOT / "omni").glob("*.py") if not p.stem.startswith("__")}
    here |= {p.parent.name for p in (ROOT / "omni").glob("*/__init__.py")}
    assert here == {box for box in drawing() if "." not in box}


def test_imports_go_down_the_diagram() -> None:
    boxes = drawing()
    assert crossings(boxes) == {"omni.model -> generation"}  # Omni.generate, when it is called
    assert crossings({**boxes, "rng": (max(boxes.values())[0] + 1, "rng")})  # the check can fail


# ---- Python -------------------------------------------------------------------------------------------------------


@needs_bundled
@pytest.mark.parametrize("python", blocks(README, "python"))
def test_python_runs(python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(python, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "apple.png").is_file()


@pytest.mark.parametrize("python", [block for name in NAMES[1:] for block in blocks(TEXTS.get(name, ""), "python")])
def test_python_of_packages_runs(python: str, tmp_path: Path) -> None:
    """In its own process, because examples register classes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the project's files ------------------------------------------------------------------------------------------


def test_messages_name_the_distribution_and_a_real_extra() -> None:
    """`pip install 'NAME[extra]'` in an error must name this package, not another package of a similar name."""
    wrong = []
    for top in ("omni", "train", "eval"):
        for path in (ROOT / top).rglob("*.py"):
            for name, extra in re.findall(r"pip install ['\"]([\w.-]+)\[(\w+)\]", path.read_text(encoding="utf-8")):
                if name not in (PROJECT["project"]["name"], ".") or extra not in EXTRAS:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}[{extra}]")
    assert not wrong


def test_no_machine_is_named() -> None:
    for name in (*TEXTS, "pyproject.toml", ".ci/run", ".gitignore"):
        assert not re.search(r"/(work|home|root|opt)/", (ROOT / name).read_text()), name


@pytest.mark.slow
def test_the_wheel_holds_omni_and_its_data(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for part in ("omni", "pyproject.toml", "README.md", "LICENSE"):  # a copy: building leaves files behind
        (shutil.copytree if part == "omni" else shutil.copy)(ROOT / part, tmp_path / "source" / part)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(tmp_path / "source")], check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {
        "omni",
        PROJECT["project"]["name"].replace("-", "_"),
    }
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "omni").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.name != "README.md"
    }
    assert here <= names, here - names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@needs_bundled
def test_command_one_in_a_fresh_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {**os.environ, "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    install, _, generate = blocks(README, "bash")[0].rpartition("&&")
    subprocess.run(install, shell=True, check=True, cwd=ROOT, env=environment)
    subprocess.run(generate, shell=True, check=True, cwd=tmp_path, env=environment, timeout=60)
    assert len(list((tmp_path / "omni-out/001").glob("image-*.png"))) == 3
