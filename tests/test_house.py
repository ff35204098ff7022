"""House rules, checked by a parser: levels, import circles, sizes, heavy imports, keyed samples, no code from data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import omni
from omni.document import Image

ROOT = Path(__file__).parent.parent
TOPS = ("omni", "train", "eval")

# Packages and files of omni from the bottom up. A file imports from its own level and from those below; what is not
# named is a file of the folder that is.
LEVELS = (
    ("config", "registry", "rng", "errors", "document", "safe_text", "storage", "version"),
    ("checkpoint", "weights", "media", "sequence"),
    ("nn", "text", "codecs", "encoders"),
    ("heads",),
    ("objectives", "samplers"),
    (
        "heads.joint",
        *(f"generation.{name}" for name in ("grouped", "options", "events", "reply", "reply_files")),
    ),  # plain data
    ("losses", "model"),
    ("importers",),
    ("pretrained", "hf"),
    ("generation",),
    ("data",),
    ("cli", "__init__", "__main__"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
CALLABLES_ALONE = {"objectives", "samplers"}  # they see callables: nothing above level 1 but one another
GENERATE = ("omni.model", "omni.generation.engine")  # the one exception: the late import in Omni.generate

CORE = {"torch", "numpy", "einops", "safetensors", "tokenizers", "sentencepiece", "PIL", "pydantic", "pydantic_core"}
# Every other package: the one file in each of omni, train and eval that may import it, inside a function.
OPTIONAL = {
    "gguf": {"omni/importers/gguf_file.py", "eval/experiments/imports/gguf_files.py"},
    "diffusers": {"omni/codecs/upstream.py"},
    "av": {"omni/media/video.py"},
    "emoji": {"omni/data/emoji_world/names.py"},
    "flash_attn": {"omni/nn/attention/flash.py"},
    "triton": {"omni/nn/attention/jvp_triton.py"},
    "transformers": {
        "omni/hf/auto.py",
        "omni/encoders/upstream.py",
        "omni/text/convert.py",
        "eval/experiments/imports/tiny.py",
        "eval/peers.py",
        "eval/tasks/pretrained/encoders.py",
        "eval/experiments/imports/chat_families.py",
        "eval/experiments/imports/oracle.py",
        "eval/experiments/imports/rotary.py",
    },
    "huggingface_hub": {"omni/importers/places.py"},
    "jinja2": {"omni/text/template.py", "eval/experiments/imports/chats.py"},
    "transfusion_pytorch": {"eval/peers.py"},
    "pyarrow": {"eval/experiments/imports/tiny.py", "omni/data/parquet.py", "eval/experiments/cifar/pictures.py"},
    "tensorboard": {"train/metrics.py"},
    "scipy": {"omni/objectives/pairing.py"},
    "matplotlib": {"train/charts.py"},
}


AT_THE_TOP = {"omni/hf/auto.py"}  # it defines subclasses; nothing of omni imports it


def files(*tops: str) -> list[Path]:
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import, at any depth. `from a import b` gives `a.b`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno}: write absolute imports"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def late(path: Path) -> set[int]:
    """Lines inside functions or under `if TYPE_CHECKING:`, whose imports do not run with the module."""
    lines: set[int] = set()
    for node in ast.walk(tree(path)):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if deferred or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


# ------------------------------------------------------------------------------------------------ layers and circles


def module_name(path: Path) -> str:
    """omni/text/__init__.py -> omni.text."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph() -> dict[str, set[str]]:
    """Every file, with the files that it imports: at the top, late, or for types alone."""
    modules = {module_name(path): path for top in TOPS for path in files(top)}

    def file_of(dotted: str) -> str:
        return dotted if dotted in modules else dotted.rpartition(".")[0]

    found = {module: {file_of(dotted) for dotted, _ in imports(path)} for module, path in modules.items()}
    return {module: (others & modules.keys()) - {module} for module, others in found.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Files that import one another: repeatedly remove files that import no remaining file, then files that no
    remaining file imports."""
    left = {module: set(others) for module, others in edges.items()}
    for _ in range(2):
        while True:
            ends = {module for module, others in left.items() if not others & left.keys()}
            if not ends:
                break
            left = {module: others for module, others in left.items() if module not in ends}
        left = {module: {other for other in left if module in left[other]} for module in left}  # turned around
    return [sorted(left)] if left else []


def level_of(dotted: str) -> tuple[str, int]:
    """The longest name in LEVEL that a module of omni is in, and its level."""
    parts = dotted.split(".")[1:] or ["__init__"]
    names = [".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LEVEL]
    assert names, f"{dotted} has no level; add its folder to LEVELS"
    return names[0], LEVEL[names[0]]


def test_imports_go_down_the_levels() -> None:
    wrong = []
    for module, others in graph().items():
        if not module.startswith("omni"):
            continue
        mine, level = level_of(module)
        for other in (other for other in others if other.startswith("omni")):
            theirs, below = level_of(other)
            alone = mine in CALLABLES_ALONE and below > 1 and theirs not in CALLABLES_ALONE
            if (below > level or alone) and (module, other) != GENERATE:
                wrong.append(f"{module} ({mine}) imports {other} ({theirs})")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_import_circles() -> None:
    edges = {module: set(others) for module, others in graph().items()}
    assert GENERATE[1] in edges[GENERATE[0]]
    edges[GENERATE[0]].discard(GENERATE[1])
    assert not circles(edges)


def test_the_named_exception_is_late_and_in_generate() -> None:
    path = ROOT / "omni/model.py"
    lines = {line for dotted, line in imports(path) if dotted.startswith(GENERATE[1])}
    methods = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef) and n.name.startswith("generate")]
    inside = {line for n in methods for line in range(n.lineno, (n.end_lineno or 0) + 1)}
    assert lines and lines <= inside


@pytest.mark.parametrize(
    ("edges", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"x": {"a"}, "a": {"b"}, "b": {"c"}, "c": {"a", "y"}, "y": set()}, [["a", "b", "c"]]),
    ],
)
def test_circles_are_found(edges: dict[str, set[str]], found: list[list[str]]) -> None:
    assert circles(edges) == found


def test_the_library_imports_no_programs() -> None:
    """eval may use the kit of train; the programs share nothing else."""
    forbidden = {"omni": {"train", "eval", "tests"}, "train": {"eval", "tests"}, "eval": {"tests"}}
    wrong = [
        f"{name(path)}:{line} imports {dotted}"
        for top in TOPS
        for path in files(top)
        for dotted, line in imports(path)
        if dotted.split(".")[0] in forbidden[top]
    ]
    assert not wrong, "\n".join(wrong)


def unknown_names(text: str) -> list[str]:
    """Dotted names of project files in a text, such as omni.rng or train.lock.hold, that do not exist."""
    unknown = []
    for dotted in re.findall(r"(?<![\w./-])((?:omni|train|eval)(?:\.[A-Za-z]\w*)+)", text):
        parts = dotted.split(".")
        known = max(n for n in range(len(parts) + 1) if n == 0 or _is_module(ROOT.joinpath(*parts[:n])))
        rest = parts[known:]
        if len(rest) > 2 or (rest and known == 1 and rest[0] not in omni.__all__ and rest[0] != "main"):
            unknown.append(dotted)
        elif rest and known > 1:
            folder = ROOT.joinpath(*parts[:known])
            file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            if not re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")):
                unknown.append(dotted)
    return unknown


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_names_in_text_exist() -> None:
    """In docstrings, comments, messages, suites and recipes."""
    others = {"train.parquet", "train.splitlines"}  # a file of data, a variable
    groups = "grids sources joint_heads tokenizers feature_maps tasks".split()  # of entry points
    others |= {f"omni.{group}" for group in groups}
    paths = [path for path in files(*TOPS, "tests") if path != Path(__file__)]
    paths += [path for top in TOPS for path in (ROOT / top).rglob("*.toml")]
    found = [(name(path), dotted) for path in paths for dotted in unknown_names(path.read_text(encoding="utf-8"))]
    wrong = [f"{file}: {dotted}" for file, dotted in found if dotted not in others]
    assert not wrong, "\n".join(wrong)


def test_unknown_names_are_found() -> None:
    text = "omni.layout.pack, omni.sequence.layout.pack, train.lock.hold, train.lock.held_by, omni.generate, omni.Key"
    assert unknown_names(text) == ["omni.layout.pack", "train.lock.held_by", "omni.generate"]


# ------------------------------------------------------------------------------------------------ sizes


def test_the_root_has_few_files() -> None:
    assert len(list((ROOT / "omni").glob("*.py"))) <= 14


def test_files_and_functions_are_short() -> None:
    """A file has at most 450 lines; a function at most 60, nine of ten at most 20, half at most 8."""
    long = [name(path) for path in files(*TOPS) if len(path.read_text().splitlines()) > 450]
    assert not long
    lengths, longest = [], ""
    for path in files(*TOPS):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
                longest = f"{name(path)}: {node.name}" if lengths[-1] == max(lengths) else longest
    lengths.sort()
    assert lengths[-1] <= 60, longest
    assert lengths[int(0.9 * len(lengths))] <= 20 and lengths[len(lengths) // 2] <= 8


def test_readmes_are_short() -> None:
    """The README is one page; each package has its own README."""
    words = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(words.splitlines()) <= 200 and len(words.split()) <= 1800
    for package in (*TOPS, "tokenizers_cfg"):
        assert (ROOT / package / "README.md").is_file()


def test_segments_have_no_fields_of_one_corpus() -> None:
    assert {field.name for field in fields(Image)} == {"pixels", "role", "supervise"}


# ------------------------------------------------------------------------------------------------ packages


def test_heavy_packages_load_late_and_in_one_file() -> None:
    wrong = []
    for path in files(*TOPS):
        for dotted, line in imports(path):
            package = dotted.split(".")[0]
            if package in sys.stdlib_module_names or package in CORE or package in (*TOPS, "__future__"):
                continue
            where = {f for f in OPTIONAL.get(package, ()) if f.startswith(name(path).split("/")[0])}
            if name(path) not in where:
                place = ", ".join(where) or "no file; name one in OPTIONAL"
                wrong.append(f"{name(path)}:{line} imports {package}, whose place is {place}")
            elif line not in late(path) and name(path) not in AT_THE_TOP:
                wrong.append(f"{name(path)}:{line} imports {package} at the top; do it in the function that needs it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("top", TOPS)
def test_every_folder_of_code_is_a_package(top: str) -> None:
    """A folder without __init__.py would be missing from the wheel."""
    missing = {name(path.parent) for path in files(top) if not (path.parent / "__init__.py").is_file()}
    assert not missing


def test_import_omni_is_light() -> None:
    """`import omni` loads nothing; its names load torch and the core packages, and no heavy package."""
    script = (
        "import sys, omni; assert 'torch' not in sys.modules\n"
        "for n in omni.__all__: getattr(omni, n)\n"
        "print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {*OPTIONAL, "fastapi", "uvicorn", "datasets", "pandas", "scipy", "matplotlib", "huggingface_hub"}
    assert not heavy & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------ randomness

TORCH_DRAWS = set("rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial".split())
TENSOR_DRAWS = set(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ multinomial".split()
)
INIT_DRAWS = set("normal_ uniform_ trunc_normal_ xavier_normal_ xavier_uniform_ kaiming_normal_ orthogonal_".split())


def draws(path: Path) -> Iterator[tuple[int, str]]:
    """Calls that sample from, or seed, a generator without a key."""
    shared = {"np.random", "numpy.random", "torch.random"} | ({"random"} & {dotted for dotted, _ in imports(path)})
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, method = ast.unparse(node.func.value), node.func.attr
        keyed = any(keyword.arg == "generator" for keyword in node.keywords)
        seeds = method in ("manual_seed", "manual_seed_all", "seed", "set_rng_state", "fork_rng") and owner != "Key"
        of_torch = owner == "torch" and method in TORCH_DRAWS and not keyed
        of_tensor = method in TENSOR_DRAWS | (INIT_DRAWS if owner.endswith("init") else set()) and not keyed
        if seeds or of_torch or of_tensor or owner in shared:
            yield node.lineno, f"{owner}.{method}"


def test_every_sample_is_keyed() -> None:
    wrong = [
        f"{name(path)}:{line} calls {call}; draw through omni.rng.Key"
        for path in files(*TOPS)
        if name(path) != "omni/rng.py"
        for line, call in draws(path)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.randn(3)", 1),
        ("torch.randn(3, generator=key.generator())", 0),
        ("torch.manual_seed(0)", 1),
        ("torch.Generator().manual_seed(0)", 1),
        ("x.normal_()", 1),
        ("nn.init.trunc_normal_(w, std=0.02)", 1),
        ("import random\nrandom.choice(a)", 1),
        ("random = key.python()\nrandom.choice(a)", 0),
        ("np.random.default_rng(0)", 1),
        ("key.normal((3,))", 0),
    ],
)
def test_the_randomness_rule_can_fail(code: str, found: int, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(code)
    assert len(list(draws(path))) == found


# ------------------------------------------------------------------------------------------------ code from data


def hazards(path: Path) -> Iterator[tuple[int, str]]:
    for dotted, line in imports(path):
        if dotted.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve"):
            yield line, f"import {dotted}"
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "yaml.load"):
            yield node.lineno, called
        if called == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if options.get("weights_only") == "False" or "True" in map(
            options.get, ("trust_remote_code", "allow_pickle", "shell")
        ):
            yield node.lineno, f"{called} with an option that runs code from data"


def test_nothing_runs_code_from_data() -> None:
    wrong = [f"{name(path)}:{line}: {what}" for path in files(*TOPS) for line, what in hazards(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    ["import pickle", "eval('1')", "torch.load(p)", "load(p, weights_only=False)", "f(trust_remote_code=True)"],
)
def test_the_hazard_rule_can_fail(code: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(code)
    assert len(list(hazards(path))) >= 1


# ------------------------------------------------------------------------------------------------ declared, not guessed


def guesses(path: Path) -> Iterator[int]:
    """Lines that ask whether a string is part of a name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str):
            asks = any(isinstance(op, ast.In | ast.NotIn) for op in node.ops)
            if asks and any(isinstance(one, ast.Name) and one.id == "name" for one in node.comparators):
                yield node.lineno


def test_nothing_is_guessed_from_names() -> None:
    """Initial weights and optimiser groups are declared (omni.nn.declare), losses by what an objective reads, bounds of
    an autoencoder's arguments by their names."""
    others = ("omni/nn/attention/jvp.py", "omni/checkpoint.py")  # arguments of one function; characters of file names
    places = [path for path in files("omni", "train") if name(path) not in others]
    assert not [f"{name(path)}:{line}" for path in places for line in guesses(path)]
    ladder = [n for n in ast.walk(tree(ROOT / "omni/losses.py")) if isinstance(n, ast.Name) and n.id == "isinstance"]
    assert not ladder


def test_a_guess_is_found(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text('if "norm" in name:\n    pass\nif name in ("a", "b"):\n    pass\n')
    assert list(guesses(path)) == [1]
