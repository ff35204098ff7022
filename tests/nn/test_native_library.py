"""The native library: compiled once, kept for later processes, never loaded where others may have written it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni.nn import native_library
from omni.nn.native_library import COMPILERS, load_library

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of kept libraries for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield tmp_path / "omni"
    load_library.cache_clear()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The sources that were compiled. The source is one that compiles in no time."""
    names = [*(f"step_{name}" for name in native_library.STEPS), "read_float32", "read_bfloat16"]
    source = tmp_path / "stub.cpp"
    source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in names))
    monkeypatch.setattr(native_library, "SOURCE", source)
    found: list[str] = []
    run = subprocess.run

    def recorded(command: list[str], **options: Any) -> Any:
        found.extend(command[-1:] if "-o" in command else ())
        return run(command, **options)

    monkeypatch.setattr(native_library.subprocess, "run", recorded)
    return found


def load_anew() -> ctypes.CDLL:
    """As a new process does."""
    load_library.cache_clear()
    return load_library()


@needs_compiler
def test_a_library_is_compiled_once_and_kept(commands: list[str], empty_cache: Path) -> None:
    assert load_anew().read_float32 and load_anew().read_float32
    assert commands == [str(native_library.SOURCE)]
    [kept] = empty_cache.iterdir()
    assert kept.stat().st_mode & 0o077 == 0

    damaged = kept.read_bytes()[:-1]
    kept.unlink()  # this process has it mapped
    kept.write_bytes(damaged)
    load_anew()
    assert len(commands) == 2
    kept.chmod(0o722)  # others may have written it
    load_anew()
    assert len(commands) == 3 and len(list(empty_cache.iterdir())) == 1


@needs_compiler
def test_another_source_is_another_library(
    commands: list[str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load_anew()
    other = tmp_path / "other.h"
    other.write_text("// another")
    monkeypatch.setattr(native_library, "THREADS", other)
    load_anew()
    assert len(commands) == 2 and len(list(empty_cache.iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize("why", ["others may write the folder", "a file is in its place"])
def test_without_a_private_folder_nothing_is_kept(commands: list[str], empty_cache: Path, why: str) -> None:
    if why.startswith("others"):
        empty_cache.mkdir(parents=True, exist_ok=True)
        empty_cache.chmod(0o777)
    else:
        empty_cache.write_text("")
    assert load_anew().read_float32 and load_anew().read_float32
    assert len(commands) == 2
    assert empty_cache.is_file() or not os.listdir(empty_cache)


def test_compile_without_a_compiler_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* install one or leave compile out"):
        load_library()


@needs_compiler
def test_compile_error_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.cpp").write_text("int main( {\n")
    monkeypatch.setattr(native_library, "SOURCE", tmp_path / "broken.cpp")
    with pytest.raises(ValueError, match=r"could not compile broken\.cpp") as error:
        load_library()
    assert "\n" not in str(error.value)
