"""One run per output directory, one process per run; leftovers of a killed save are removed, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from omni import checkpoint
from omni.checkpoint import publish, remove_leftovers, save_tensors, verify
from train.__main__ import main
from train.lock import hold

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


def in_a_fork(work: Callable[[], object]) -> int:
    """The `waitpid` status of a forked process that does the work and ends, also where the work kills it."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_run_raises_and_names_the_holder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with hold(out):
        with (
            pytest.raises(ValueError, match=rf"'.*out' is in use by process {os.getpid()} on .+; wait for it"),
            hold(out),
        ):
            pass
        assert in_a_fork(lambda: hold(out).__enter__()) == 1 << 8  # nor by another process
    with hold(out):
        pass


@pytest.mark.parametrize("kind", ["model", "codec"])
def test_a_second_run_of_either_kind_exits_2(
    kind: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file if kind == "model" else RECIPES / "bundled/codec.toml"
    with hold(tmp_path / "out"):
        before = names(tmp_path / "out")
        assert main([str(recipe), "--out", str(tmp_path / "out")]) == 2
        output = capsys.readouterr().err
        assert "is in use by process" in output and output.count("\n") == 1
        assert names(tmp_path / "out") == before


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    def held_until_killed() -> None:
        with hold(tmp_path):
            die()

    assert in_a_fork(held_until_killed) == signal.SIGKILL
    assert "process" in (tmp_path / ".lock").read_text()  # the file stays, and locks nothing
    with hold(tmp_path):
        pass


def test_a_forked_loader_that_outlives_a_killed_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    ready, stop = os.pipe(), os.pipe()

    def held_until_killed() -> None:
        with hold(tmp_path):
            if not os.fork():
                os.close(stop[1])
                os.write(ready[1], b"r")
                os.read(stop[0], 1)  # until the test closes it
                os._exit(0)
            os.read(ready[0], 1)
            die()

    assert in_a_fork(held_until_killed) == signal.SIGKILL
    with hold(tmp_path):
        os.close(stop[1])


@pytest.mark.parametrize("kind", ["model", "codec"])
def test_several_processes_raise(
    kind: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = recipe_file if kind == "model" else RECIPES / "bundled/codec.toml"
    assert main([str(recipe), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err
    assert "WORLD_SIZE = 2" in output and "without torchrun" in output and output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_created_by_a_failed_command_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mistake"), hold(tmp_path / "out"):
        raise ValueError("mistake")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mistake"), hold(tmp_path / "mine"):
        raise ValueError("mistake")
    assert (tmp_path / "mine").is_dir()


# ---- leftovers of killed saves -------------------------------------------------------------------------------------


def killed_at(call: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces folder/step-00000002, published before, in a process that is killed at the n-th call of a function."""
    module, name, number = {
        "write": (checkpoint, "_write_content", 2),
        "manifest": (checkpoint, "_render_manifest", 1),
        "aside": (checkpoint.os, "rename", 2),
        "removal": (checkpoint.shutil, "rmtree", 1),
    }[call]
    real, count = getattr(module, name), iter(range(1, 100))

    def work(*arguments: object, **options: object) -> object:
        if next(count) == number:
            die()
        return real(*arguments, **options)

    def replace() -> None:
        monkeypatch.setattr(module, name, work)
        publish(folder / "step-00000002", {"a": "new", "b": "new"}, replace=True)

    assert in_a_fork(replace) == signal.SIGKILL


@pytest.mark.parametrize(
    ("call", "left", "content"),
    [("write", 1, "old"), ("manifest", 1, "old"), ("aside", 2, "old"), ("removal", 1, "new")],
)
def test_leftovers_of_a_killed_save_are_cleared_and_nothing_is_lost(
    call: str, left: int, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / "state"
    publish(folder / "step-00000001", {"a": "one"})
    publish(folder / "step-00000002", {"a": "old", "b": "old"})
    (folder / ".notes.txt").write_text("mine")
    killed_at(call, folder, monkeypatch)
    assert len([name for name in names(folder) if name.startswith(".step-")]) == left
    assert (folder / "step-00000002").exists() is (call != "aside")
    with hold(tmp_path / "out"):
        assert names(folder) == [".notes.txt", "step-00000001", "step-00000002"]
    assert verify(folder / "step-00000002") and (folder / "step-00000002" / "a").read_text() == content


def test_the_newer_of_two_leftovers_is_restored(tmp_path: Path) -> None:
    for number, name in enumerate(("old-00000000", "old-11111111", "old-00000002")):
        aside = tmp_path / f".model.{name}"
        aside.mkdir()
        (aside / "a").write_text(name)
        os.utime(aside, (number if number < 2 else 0.5, number if number < 2 else 0.5))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "a").read_text() == "old-11111111"


def test_half_written_files_are_removed_and_links_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model.tmp-0123abcd").symlink_to(precious)
    (out / ".keep.tmp-mine").write_text("another's name")

    def half() -> None:
        monkeypatch.setattr(checkpoint.os, "replace", lambda *_: die())
        save_tensors(out / "state.safetensors", {})

    assert in_a_fork(half) == signal.SIGKILL and len(names(out)) == 3
    remove_leftovers(out)
    assert names(out) == [".keep.tmp-mine"] and (precious / "a").read_text() == "mine"
    remove_leftovers(tmp_path / "nowhere")
