"""Mutation testing: checks that the tests fail for a changed operator, number, condition or literal.

    python tests/mutation/run.py --seed 1              # 60 mutants, spread over the groups of groups.toml
    python tests/mutation/run.py --check               # every file: check that the tests import the mutated copy
    python tests/mutation/run.py --seed 1 --only cache --count 20
    python tests/mutation/run.py --seed 1 --list       # the mutants alone, without a run

The mutants are cosmic-ray's (pip install cosmic-ray; in the extra `dev`), sampled by the seed: first the place, then a
mutation of that place. A change of annotations, or without effect on the source, does not count. Each mutant runs in a
copy of the working tree, without bytecode files, against the tests of its file with -x (server.py). It is killed where
they fail, or take longer than five times their unmutated time and 30 s. Exit code 0 where at least 95 % are killed or
known to be equivalent (equivalent.toml), else 1.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import difflib
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENOUGH = 0.95


class Literal(Operator):
    """Add a letter to a string or bytes literal. Docstrings, f-strings and error messages stay."""

    def mutation_positions(self, node):  # noqa: ANN001, ANN201
        if node.type == "string" and node.parent.type not in ("simple_stmt", "strings") and not _in_raise(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):  # noqa: ANN001, ANN201, ARG002
        quote = 3 if node.value.endswith(('"""', "'''")) else 1
        value = f"{node.value[:-quote]}x{node.value[-quote:]}"
        return parso.python.tree.String(value, node.start_pos, node.prefix)

    @classmethod
    def examples(cls):  # noqa: ANN206
        return ()


def _in_raise(node) -> bool:  # noqa: ANN001
    while node is not None and node.type != "raise_stmt":
        node = node.parent
    return node is not None


@dataclass(frozen=True)
class Module:
    group: str
    file: str
    tests: tuple[str, ...]
    functions: tuple[str, ...] = ()
    literals: bool = False


@dataclass
class Mutant:
    module: Module
    line: int
    operator: str
    source: str
    number: int = 0
    fate: str = ""
    seconds: float = 0.0

    def changed(self) -> tuple[str, str]:
        """The lines that differ, before and after, stripped."""
        before = (ROOT / self.module.file).read_text(encoding="utf-8").splitlines()
        lines = list(difflib.ndiff(before, self.source.splitlines()))
        return tuple(" ".join(x[2:].strip() for x in lines if x.startswith(s)).strip() for s in ("- ", "+ "))  # type: ignore


# ---- what is mutated -----------------------------------------------------------------------------------------------


def modules() -> list[Module]:
    out = []
    for entry in tomllib.loads((HERE / "groups.toml").read_text(encoding="utf-8"))["module"]:
        skipped = entry.get("except", ())
        found = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(entry["file"]))]
        if not found:
            raise SystemExit(f"groups.toml: no file {entry['file']}")
        out += [
            Module(entry["group"], name, tuple(entry["tests"]), tuple(entry.get("functions", ())),
                   entry.get("literals", False))
            for name in found if name not in skipped
        ]  # fmt: skip
    return out


class _Bare(ast.NodeTransformer):
    """Remove annotations: they are not evaluated where a file imports `annotations` from __future__."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def meaning(source: str) -> str | None:
    """None where the source does not compile."""
    try:
        compile(source, "", "exec", dont_inherit=True)
        return ast.dump(_Bare().visit(ast.parse(source)))
    except (SyntaxError, ValueError):
        return None


def spans(source: str, module: Module) -> list[range]:
    """The lines of the named functions, or all."""
    if not module.functions:
        return [range(1, source.count("\n") + 2)]
    found = {
        node.name: range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }
    missing = [name for name in module.functions if name not in found]
    if missing:
        names = ", ".join(missing)
        print(f"note: {module.file} has no function {names}; bring groups.toml up to date", file=sys.stderr)
    return [found[name] for name in module.functions if name in found]


def places(module: Module) -> dict[tuple[str, int, int], list[tuple[str, int]]]:
    """(file, line, column) -> the (operator, occurrence) pairs that mutate there."""
    source = (ROOT / module.file).read_text(encoding="utf-8")
    lines, tree = spans(source, module), get_ast(source)
    operators = {name: get_operator(name)() for name in operator_names() if not get_operator(name).arguments()}
    if module.literals:
        operators["literal"] = Literal()
    out: dict[tuple[str, int, int], list[tuple[str, int]]] = {}
    for name, operator in operators.items():
        positions = (start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node))
        for occurrence, (line, column) in enumerate(positions):
            if any(line in span for span in lines):
                out.setdefault((module.file, line, column), []).append((name, occurrence))
    return out


def draw(chosen: list[Module], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, equally many of each group, by the seed."""
    rng = random.Random(seed)
    names = sorted({module.group for module in chosen})
    rng.shuffle(names)
    out: list[Mutant] = []
    for number, name in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        pool = [(module, place, kinds) for module in chosen if module.group == name
                for place, kinds in sorted(places(module).items())]  # fmt: skip
        rng.shuffle(pool)
        out += list(_mutants(pool, rng))[:share] if len(pool) < share else _first(_mutants(pool, rng), share)
    for number, mutant in enumerate(out):
        mutant.number = number
    return out


def _first(mutants: Iterator[Mutant], share: int) -> list[Mutant]:
    return [mutant for _, mutant in zip(range(share), mutants, strict=False)]


def _mutants(pool: list, rng: random.Random) -> Iterator[Mutant]:
    for module, (_, line, _column), kinds in pool:
        name, occurrence = rng.choice(kinds)
        source = (ROOT / module.file).read_text(encoding="utf-8")
        operator = Literal() if name == "literal" else get_operator(name)()
        mutated = mutate_code(source, operator, occurrence)
        if mutated is not None and meaning(mutated) not in (None, meaning(source)):
            yield Mutant(module, line, name.removeprefix("core/"), mutated)


# ---- running -------------------------------------------------------------------------------------------------------


def copy_tree(target: Path) -> None:
    """The files of the working tree that git does not ignore: no bytecode, no outputs."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


class Worker:
    """A copy of the tree and a process that runs pytest in it (see server.py)."""

    def __init__(self, folder: Path, python: str) -> None:
        self.tree, self.log = folder / "tree", folder / "log"
        copy_tree(self.tree)
        variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [python, str(HERE / "server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder, env=variables, text=True,
        )  # fmt: skip

    def run(self, tests: tuple[str, ...], timeout: float) -> tuple[int | None, float]:
        """(exit code or None after the timeout, seconds) of the tests in the current tree."""
        arguments = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
        request = {"tree": str(self.tree), "arguments": arguments, "timeout": timeout, "log": str(self.log)}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        # pytest's internal error, no tests, the server's own; 4 is a named test whose file could not be imported
        if answer["code"] in (3, 5, 70):
            raise SystemExit(f"{self.output()}\nthe tests did not run: {' '.join(tests)}")
        return answer["code"], answer["seconds"]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    def unmutated(self, tests: tuple[str, ...]) -> float:
        """Seconds of the unmutated tests, which must pass."""
        code, seconds = self.run(tests, 900)
        if code != 0:
            raise SystemExit(f"{self.output()}\nthe tests fail without any mutant: {' '.join(tests)}")
        print(f"{seconds:6.1f} s unmutated: {' '.join(tests)}", flush=True)
        return seconds

    def mutated(self, mutant: Mutant, timeout: float) -> Mutant:
        path = self.tree / mutant.module.file
        original = path.read_bytes()
        try:
            path.write_text(mutant.source, encoding="utf-8")
            code, mutant.seconds = self.run(mutant.module.tests, timeout)
        finally:
            path.write_bytes(original)
        mutant.fate = {0: "survived", None: "timeout"}.get(code, "killed")
        print(f"{mutant.fate:8} {mutant.seconds:6.1f} s  {mutant.number:3} {title(mutant)}", flush=True)
        return mutant


def title(mutant: Mutant) -> str:
    return f"{mutant.module.group}: {mutant.module.file}:{mutant.line} {mutant.operator}"


def run_all(mutants: list[Mutant], jobs: int, python: str) -> list[Mutant]:
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        idle: queue.Queue[Worker] = queue.Queue()
        for number in range(jobs):
            idle.put(Worker(Path(folder) / str(number), python))

        def lent(do: Callable[[Worker], Any]) -> Any:
            worker = idle.get()
            try:
                return do(worker)
            finally:
                idle.put(worker)

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            suites = list(dict.fromkeys(mutant.module.tests for mutant in mutants))
            times = dict(zip(suites, pool.map(lambda t: lent(lambda w: w.unmutated(t)), suites), strict=True))
            limit = {tests: 30 + 5 * seconds for tests, seconds in times.items()}
            done = list(pool.map(lambda m: lent(lambda w: w.mutated(m, limit[m.module.tests])), mutants))
        while not idle.empty():
            server = idle.get().server
            server.communicate()  # the end of its requests ends it
        return done


def check(chosen: list[Module]) -> list[Mutant]:
    """One mutant for every file; it raises on import."""
    out = []
    for module in {m.file + str(m.tests): m for m in chosen}.values():
        source = (ROOT / module.file).read_text(encoding="utf-8") + "\nraise RuntimeError('the mutant is imported')\n"
        out.append(Mutant(module, source.count("\n"), "raise at import", source, len(out)))
    return out


def report(mutants: list[Mutant]) -> bool:
    """Print the survivors; return whether enough are killed."""
    known = tomllib.loads((HERE / "equivalent.toml").read_text(encoding="utf-8")).get("mutant", [])
    reasons = {(entry["file"], entry["before"], entry["after"]): entry["why"] for entry in known}
    lost = 0
    for mutant in (m for m in mutants if m.fate == "survived"):
        before, after = mutant.changed()
        why = reasons.get((mutant.module.file, before, after))
        lost += why is None
        print(f"\n{mutant.number} {title(mutant)}\n  - {before}\n  + {after}\n  " + (why or "SURVIVED"))
    killed = sum(m.fate != "survived" for m in mutants)
    late, known_ones = sum(m.fate == "timeout" for m in mutants), len(mutants) - killed - lost
    print(
        f"\n{len(mutants)} mutants: {killed} killed ({late} by the time limit), {known_ones} equivalent,"
        f" {lost} survived; {killed / len(mutants):.1%} killed, {1 - lost / len(mutants):.1%} with the equivalent ones"
    )
    return lost <= (1 - ENOUGH) * len(mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--only", help="one group, or several with commas between")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, one thread each")
    parser.add_argument("--python", default=sys.executable, help="runs the tests; needs no cosmic-ray")
    parser.add_argument("--check", action="store_true", help="one mutant for every file, which raises at import")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = [m for m in modules() if not options.only or m.group in options.only.split(",")]
    if not chosen:
        parser.error(f"no group {options.only!r}; the groups: {', '.join(dict.fromkeys(m.group for m in modules()))}")
    mutants = check(chosen) if options.check else draw(chosen, options.count, options.seed)
    if options.list:
        for mutant in mutants:
            print(mutant.number, title(mutant), *mutant.changed(), sep="\n    ")
        return 0
    begun = time.monotonic()
    good = report(run_all(mutants, options.jobs, options.python))
    print(f"{time.monotonic() - begun:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
