"""The house rules that a parser can hold: layers, heavy imports, keyed randomness, nothing that runs code from data."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("omni", "train", "eval")

LEVELS = {
    0: {"config", "rng", "document", "command", "context", "finite"},
    1: {
        *("layout", "mask", "positions", "media", "preparation", "checkpoint", "terminal", "weights"),
        *("guidance", "placeholders", "pick", "terms"),
    },
    2: {"nn", "text", "codecs", "heads", "emoji_world"},
    3: {"objectives", "samplers", "heads.joint"},
    4: {
        *("model", "joint", "prefill", "row", "refinement", "drafting", "blockwise", "engine", "verify"),
        *("options", "reply", "reply_files"),
    },
    5: {"serve", "hf", "cli", "doctor", "__init__", "__main__"},
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names}
# Imports inside one level: the bottom is one currency; a layout has a mask, cells, placeholders; a head is of layers;
# a joint-token head has its own loss and sampling, and may take them from objectives and samplers of flow maps;
# a tokenizer trains on the emoji world; the engine drives the model, whose `generate` is a door to the engine.
PEERS = {
    ("layout", "mask"),
    ("weights", "checkpoint"),
    ("placeholders", "layout"),
    ("heads", "nn"),
    *(("heads.joint", name) for name in ("heads", "nn", "objectives", "samplers")),
    ("text", "emoji_world"),
    ("model", "joint"),
    ("joint", "model"),
    ("engine", "model"),
    *(("engine", name) for name in ("row", "refinement", "blockwise")),
    *(("refinement", name) for name in ("engine", "row", "prefill", "reply")),
    ("row", "reply"),
    ("blockwise", "row"),
    *(("blockwise", name) for name in ("engine", "drafting", "prefill", "reply")),
    *(("drafting", name) for name in ("joint", "model", "prefill")),
    ("engine", "reply"),
    ("engine", "options"),
    ("model", "options"),
    ("reply", "options"),
    ("reply", "reply_files"),
    ("engine", "prefill"),
    ("prefill", "model"),
    ("model", "reply"),
    ("verify", "prefill"),
    ("model", "engine"),
    ("verify", "joint"),
    ("verify", "drafting"),
    ("verify", "model"),
    ("verify", "engine"),
    *((a, b) for level in (0, 5) for a in LEVELS[level] for b in LEVELS[level]),
}

CORE = {"torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "PIL", "pydantic", "pydantic_core"}
# Every other package: the one file in each of omni, train and eval that may import it, inside a function.
OPTIONAL = {
    "diffusers": {"omni/codecs/upstream.py"},
    "av": {"omni/media/video.py"},
    "emoji": {"omni/data/emoji_world/names.py"},
    "flash_attn": {"omni/nn/attention/backends.py"},
    "triton": {"omni/nn/attention/jvp_triton.py"},
    "transformers": {"omni/hf.py", "eval/peers.py"},
    "transfusion_pytorch": {"eval/peers.py"},
    "pyarrow": {"omni/data/parquet.py", "eval/experiments/cifar/pictures.py"},
    "tensorboard": {"train/metrics.py"},
    "scipy": {"omni/objectives/pairing.py"},
}


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


def module_of(path: Path) -> str:
    """The name in LEVEL: `omni/text/chat.py` -> text, `omni/cli/chat.py` -> cli."""
    return level_name(path.relative_to(ROOT / "omni").with_suffix("").parts)


def level_name(parts: tuple[str, ...]) -> str:
    """Of a module below omni, ("heads", "joint", "base"), or of a name in it."""
    if ".".join(parts[:2]) in LEVEL:
        return ".".join(parts[:2])
    return "cli" if parts[0].startswith("cli_") else parts[0]


def test_every_module_has_a_level() -> None:
    unknown = {module_of(path) for path in files("omni")} - set(LEVEL)
    assert not unknown, f"add {sorted(unknown)} to LEVELS in {name(Path(__file__))}"


def test_layers_import_downwards() -> None:
    wrong = []
    for path in files("omni"):
        mine = module_of(path)
        for dotted, line in imports(path):
            parts = dotted.split(".")
            if parts[0] != "omni" or len(parts) < 2 or level_name(tuple(parts[1:])) == mine:
                continue
            other = level_name(tuple(parts[1:]))
            if other not in LEVEL:  # a name of omni/__init__, which is above everything but the command line
                other = "__init__"
            limit = 1 if LEVEL[mine] == 3 else LEVEL[mine] - 1  # objectives and samplers see callables, no layer
            if LEVEL[other] > limit and (mine, other) not in PEERS:
                wrong.append(f"{name(path)}:{line} imports omni.{other}")
    assert not wrong, "\n".join(wrong)


def test_the_library_knows_no_programs_and_they_not_each_other() -> None:
    forbidden = {"omni": {"train", "eval", "tests"}, "train": {"eval", "tests"}, "eval": {"train", "tests"}}
    wrong = [
        f"{name(path)}:{line} imports {dotted}"
        for top in TOPS
        for path in files(top)
        for dotted, line in imports(path)
        if dotted.split(".")[0] in forbidden[top]
    ]
    assert not wrong, "\n".join(wrong)


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
            elif line not in late(path):
                wrong.append(f"{name(path)}:{line} imports {package} at the top; do it in the function that needs it")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("top", TOPS)
def test_every_folder_of_code_is_a_package(top: str) -> None:
    """A folder without __init__.py would be missing from the wheel."""
    missing = {name(path.parent) for path in files(top) if not (path.parent / "__init__.py").is_file()}
    assert not missing


def test_import_omni_is_light() -> None:
    """`import omni` loads nothing; its names load torch and the core packages, and none of the heavy ones."""
    script = (
        "import sys, omni; assert 'torch' not in sys.modules\n"
        "for n in omni.__all__: getattr(omni, n)\n"
        "print(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {*OPTIONAL, "fastapi", "uvicorn", "datasets", "pandas", "scipy", "matplotlib", "einops", "huggingface_hub"}
    assert not heavy & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------ randomness

TORCH_DRAWS = set("rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial".split())
TENSOR_DRAWS = set(
    "normal_ uniform_ random_ bernoulli_ exponential_ geometric_ cauchy_ log_normal_ multinomial".split()
)
INIT_DRAWS = set("normal_ uniform_ trunc_normal_ xavier_normal_ xavier_uniform_ kaiming_normal_ orthogonal_".split())


def draws(path: Path) -> Iterator[tuple[int, str]]:
    """Calls that draw from, or seed, state that no key controls."""
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


def test_every_draw_is_keyed() -> None:
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
