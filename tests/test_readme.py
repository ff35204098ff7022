"""What the README promises: its commands parse, its paths and names exist, its Python runs, the wheel is right."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from omni.cli.commands import parse
from omni.pretrained import BUNDLED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]

needs_bundled = pytest.mark.skipif(not (BUNDLED / "manifest.json").is_file(), reason="there is no bundled model yet")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [part.strip() for block in blocks("bash") for line in block.splitlines() for part in line.split("&&")]


@pytest.mark.parametrize("command", commands())
def test_commands_are_right(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "omni":
        parse(words[1:])
    elif words[:2] == ["python", "-m"]:
        module, file = words[2], words[3]
        assert (ROOT / file).is_file() or file.startswith("runs/")  # what a command above it makes
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (
            ROOT / module / "__main__.py"
        ).is_file()
    elif words[:2] == ["pip", "install"]:
        extras = re.search(r"\[(.*)\]", words[-1])
        assert not extras or set(extras[1].split(",")) <= set(EXTRAS)
    else:
        assert words == ["pytest"]


def test_the_training_sequence_makes_what_it_takes() -> None:
    """Each command of "Train your own" finds the models, tokenizers and codecs that earlier ones have made."""
    made: set[str] = set()
    sequence = re.search(r"```bash\n(.*?)```", README.partition("## Train your own")[2], re.DOTALL)
    assert sequence
    for line in sequence[1].splitlines():
        words = shlex.split(line)
        if words[0] == "omni":
            assert words[words.index("--model") + 1] in made
            continue
        module, arguments = words[2], words[3:]
        changes = dict(word.split("=", 1) for word in arguments if "=" in word and "/" in word.split("=", 1)[1])
        if module == "train.tools.average":
            assert {word.rpartition("=")[0] for word in arguments[1:]} <= made, line
            made.add(arguments[0])
        elif module == "train.tools.retokenize":
            assert set(arguments[1:3]) <= made, line
            made.add(arguments[0])
        else:
            recipe = {**tomllib.loads((ROOT / arguments[0]).read_text()), **changes}
            taken = {recipe[name] for name in ("init_from", "tokenizer", "codec") if isinstance(recipe.get(name), str)}
            assert taken <= made, (line, taken - made)
            out = recipe["out"] if module == "train.tools.tokenizer" else f"runs/{Path(arguments[0]).stem}"
            made.add(out if module == "train.tools.tokenizer" else f"{out}/{'codec' if 'kind' in recipe else 'model'}")
    assert made


def test_ci_reads_two_commands() -> None:
    """.ci/run takes both from the README by these marks."""
    for name in ("one", "two"):
        assert len(re.findall(rf"^<!-- ci: {name} -->\n```bash\n(.+)\n```$", README, re.MULTILINE)) == 1
        assert f"from_readme {name}" in (ROOT / ".ci/run").read_text()


def test_every_path_exists() -> None:
    paths = re.findall(r"`((?:omni|train|eval|tests|tokenizers_cfg|\.ci)/[\w./]+)`", README)
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert len(paths) > 20 and not missing


def test_where_is_names_what_is_there() -> None:
    rows = re.findall(r"`([\w./]+\.py)`: ((?:`\w+`(?:, |; its slow twin: )?)+)", README)
    assert len(rows) >= 15
    for path, names in rows:
        tree = ast.parse((ROOT / path).read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        wanted = set(re.findall(r"`(\w+)`", names))
        assert wanted <= defined, f"{path} defines no {wanted - defined}"


def test_extras_are_all_told() -> None:
    told = re.findall(r"^\| `(\w+)` \|", README.partition("## Extras")[2], re.MULTILINE)
    assert sorted(told) == sorted(EXTRAS)


def test_messages_name_the_distribution_and_a_real_extra() -> None:
    """`pip install 'NAME[extra]'` in an error must install this package, and not a stranger's of a similar name."""
    wrong = []
    for top in ("omni", "train", "eval"):
        for path in (ROOT / top).rglob("*.py"):
            for name, extra in re.findall(r"pip install ['\"]([\w.-]+)\[(\w+)\]", path.read_text(encoding="utf-8")):
                if name not in (PROJECT["project"]["name"], ".") or extra not in EXTRAS:
                    wrong.append(f"{path.relative_to(ROOT)}: {name}[{extra}]")
    assert not wrong


@needs_bundled
@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "apple.png").is_file()


def test_no_machine_is_named() -> None:
    for name in ("README.md", "pyproject.toml", ".ci/run", ".gitignore"):
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
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert here <= names, here - names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
@needs_bundled
def test_command_one_in_a_fresh_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    environment = {**os.environ, "PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    install, _, generate = blocks("bash")[0].rpartition("&&")
    subprocess.run(install, shell=True, check=True, cwd=ROOT, env=environment)
    subprocess.run(generate, shell=True, check=True, cwd=tmp_path, env=environment, timeout=60)
    assert len(list((tmp_path / "omni-out/001").glob("image-*.png"))) == 3
