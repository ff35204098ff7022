"""Every test can fail: it asserts something, directly or in a function of its own file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ASSERTING = ("pytest.raises", "pytest.warns", "pytest.fail", "assert_close", "assert_allclose", "assert_array_equal")


def asserts(function: ast.AST) -> bool:
    """Whether it has an `assert` or a call that raises. Constant asserts (`assert True`) do not count."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(ASSERTING):
            return True
    return False


def without_assertion(source: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    good = {function.name for function in functions if asserts(function)}
    found = []
    for function in functions:
        calls = {ast.unparse(n.func).split(".")[-1] for n in ast.walk(function) if isinstance(n, ast.Call)}
        if function.name.startswith("test_") and function.name not in good and not calls & good:
            found.append(function.name)
    return found


def test_every_test_asserts_something() -> None:
    found = {f"{path.relative_to(TESTS)}::{name}" for path in sorted(TESTS.rglob("test_*.py"))
             for name in without_assertion(path.read_text(encoding="utf-8"))}  # fmt: skip
    assert not found, f"these tests cannot fail: {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("run()", True),
        ("assert True", True),
        ("def inner():\n        return 1", True),
        ("helper()", True),
        ("assert run()", False),
        ("with pytest.raises(ValueError): run()", False),
        ("torch.testing.assert_close(1, 1)", False),
        ("check()", False),
        ("for x in (1, 2): self.check(x)", False),
    ],
)
def test_the_scan_can_fail(body: str, found: bool) -> None:
    source = f"def check():\n    assert run()\n\ndef helper():\n    run()\n\ndef test_it():\n    {body}\n"
    assert without_assertion(source) == (["test_it"] if found else [])
