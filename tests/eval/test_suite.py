"""A suite with toy tasks: exit codes, JSON keys, bars, HTML escapes, errors that name the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plugins import install

from eval.suite import COLUMNS, format_value, load_suite, main, row_command
from eval.task import TASKS, Bar, Context, Curve, Measure, Outcome, Panel, TaskOptions, task


class ToyOptions(TaskOptions):
    value: float = 90.0
    broken: bool = False


@task("toy", ToyOptions, rows=("right", "speed"))
def toy(context: Context, options: ToyOptions) -> Outcome:
    """A toy."""
    if options.broken:
        raise RuntimeError("a bug, not a usage error")
    picture = torch.full((4, 4, 3), 200, dtype=torch.uint8)
    panels = [
        Panel("fine", (picture,), (picture,), right=True),
        Panel("<script>alert('x')</script> & co", (picture,), (), note="<b>", right=False),
    ]
    curve = Curve("a < b", "x", "y", {"line": [(0.0, 0.0), (1.0, 2.0)], "empty": []})
    return Outcome([Measure("right", options.value, "%"), Measure("speed", 2.5, "x")], panels, [curve], ["a note"])


@pytest.fixture
def suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toys.toml"
    path.write_text('title = "Toys <1>"\ntasks = ["toy"]\n[toy.bars]\nright = ">= 80"\n', encoding="utf-8")
    return "toys.toml"


def test_exit_0_with_table_json_and_report(suite_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([suite_file, "--json", "out/rows.json", "--html", "report.html", "toy.value=81"]) == 0
    rows = json.loads(Path("out/rows.json").read_text())
    assert [tuple(row) for row in rows] == [COLUMNS, COLUMNS]
    assert rows[0] == {
        "name": "toy.right", "value": 81.0, "unit": "%", "bar": ">= 80", "holds": True,
        "command": "python -m eval toys.toml tasks=toy toy.value=81",
    }  # fmt: skip
    assert rows[1]["bar"] is None and rows[1]["holds"] is True
    printed = capsys.readouterr().out
    assert "toy.right" in printed and "command" in printed and "every bar holds" in printed
    html = Path("report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "a &lt; b" in html and "Toys &lt;1&gt;" in html
    assert html.count("data:image/png;base64,") == 3 and "<svg" in html
    assert html.index("&lt;script&gt;") < html.index("fine"), "failures come first"
    assert "http://" not in html and "https://" not in html


def test_exit_1_when_a_bar_does_not_hold(suite_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([suite_file, "toy.value=79.9", "--json", "rows.json"]) == 1
    assert json.loads(Path("rows.json").read_text())[0]["holds"] is False
    assert "toy.right" in capsys.readouterr().out.splitlines()[-1]
    assert Path("runs/eval/toys.html").is_file()


def test_nan_holds_no_bar_and_is_null(suite_file: str) -> None:
    Path("nan.json").unlink(missing_ok=True)
    TASKS._items.pop("nothing", None)

    @task("nothing", TaskOptions, rows=("right",))
    def nothing(context: Context, options: TaskOptions) -> Outcome:
        """Zero examples."""
        return Outcome([Measure("right", float("nan"), "%")])

    try:
        assert main([suite_file, "tasks=nothing", 'nothing.bars.right=">= 0"', "--json", "nan.json"]) == 1
        row = json.loads(Path("nan.json").read_text())[0]
        assert row["value"] is None and row["holds"] is False
    finally:
        TASKS._items.pop("nothing")


def test_a_bar_on_a_missing_row_does_not_hold(suite_file: str) -> None:
    TASKS._items.pop("half", None)

    @task("half", TaskOptions, rows=("right", "sometimes"))
    def half(context: Context, options: TaskOptions) -> Outcome:
        """Gives one of its two rows."""
        return Outcome([Measure("right", 50.0, "%")])

    try:
        assert main([suite_file, "tasks=half", 'half.bars.sometimes=">= 0"', "--json", "half.json"]) == 1
        rows = {row["name"]: row for row in json.loads(Path("half.json").read_text())}
        assert rows["half.right"]["value"] == 50 and rows["half.right"]["holds"]
        assert rows["half.sometimes"]["value"] is None and not rows["half.sometimes"]["holds"]
    finally:
        TASKS._items.pop("half")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.toml"], "missing.toml"),
        (["toys.toml", "toy.valu=1"], "did you mean 'value'"),
        (["toys.toml", "tasks=toi"], "did you mean 'toy'"),
        (["toys.toml", 'toy.bars.rigth=">= 1"'], "did you mean 'right'"),
        (["toys.toml", "toy.bars.right=95"], "95"),
        (["toys.toml", 'toy.bars.right="about 95"'], "about 95"),
        (["toys.toml", "threads=0"], "threads"),
        ([], "no suite given"),
    ],
)
def test_exit_2_names_the_remedy(
    suite_file: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json", "rows.json"] if arguments else []) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not Path("rows.json").exists() and not Path("runs").exists()


def test_exit_2_when_the_json_cannot_be_written(suite_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("occupied").write_text("a file")
    assert main([suite_file, "--json", "occupied/rows.json"]) == 2
    assert "occupied" in capsys.readouterr().err


def test_exit_3_when_a_task_crashes(suite_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([suite_file, "toy.broken=true", "--json", "rows.json"]) == 3
    assert "a bug" in capsys.readouterr().err and not Path("rows.json").exists()


def test_several_tasks_by_name_and_the_row_command(suite_file: str) -> None:
    assert load_suite(suite_file, ["tasks=toy, toy"]).tasks == ("toy", "toy")
    command = row_command("a b.toml", ["tasks=toy,draw", "seed=1", "draw.steps=2", "toy.value=3"], "toy")
    assert command == "python -m eval 'a b.toml' tasks=toy seed=1 toy.value=3"


@pytest.mark.parametrize("text", [">= 95", "<=1e-5", "== 0", "> -2.5", "< 3"])
def test_bars_parse(text: str) -> None:
    bar = Bar.parse(text)
    assert not bar.holds(float("nan"))
    assert bar.holds(bar.bound) == ("=" in bar.relation)


def test_values_have_three_or_four_digits() -> None:
    assert [format_value(v) for v in (None, 95.0, 3.14159, 1e-7, 0.0)] == ["nan", "95", "3.14", "1e-07", "0"]


def test_every_committed_suite_is_valid(tmp_path: Path) -> None:
    """Each has its command and known tasks, and raises with one key misspelt."""
    suites = sorted((Path(__file__).parents[2] / "eval" / "suites").glob("*.toml"))
    assert len(suites) >= 10
    for path in suites:
        text = path.read_text(encoding="utf-8")
        suite = load_suite(path, [])
        assert suite.title and suite.tasks and set(suite.tasks) <= set(TASKS.names()), path
        assert f"python -m eval eval/suites/{path.name}" in text, path
        wrong = tmp_path / path.name
        wrong.write_text(text.replace("\ntasks =", "\ntask =", 1), encoding="utf-8")
        with pytest.raises(ValueError, match="unknown key 'task'; did you mean 'tasks'"):
            load_suite(wrong, [])


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in TASKS.names())


def test_a_task_of_a_package_that_cannot_be_imported_is_said_where_it_is_wanted(
    suite_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "bad-tasks", {"omni.tasks": {"bad": "bad_tasks"}}, {"bad_tasks": "import no_such_module"})
    monkeypatch.syspath_prepend(tmp_path)
    assert main([suite_file, "bad.anything=1", "--json", "rows.json"]) == 0
    assert main(["--list"]) == 0
    what = "task 'bad' of the installed package 'bad-tasks' cannot be imported: ModuleNotFoundError"
    assert f"bad: {what}" in capsys.readouterr().out
    assert main([suite_file, "tasks=bad"]) == 2
    assert what in capsys.readouterr().err
