"""Registries: open tables of named things, such as samplers. A new thing is one file that registers itself.

A registry finds things in three places:

    its packages       the first lookup or listing imports every module below them, so no list of imports exists
    entry points       a group of installed packages: the name on the left, the module that registers it on the right.
                       Listing reads the names alone; a plug-in is imported when its name is asked for
    register           whatever code imports by itself, such as a script

Names of the own packages win over entry points. What a module registers before it fails is dropped, in every registry,
so that the next lookup meets the same error. This file makes no registry and does not import torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

from omni.config import nearest
from omni.errors import EntryPointWarning, one_line

T = TypeVar("T")
U = TypeVar("U", bound=Any)


class Registry(Generic[T]):
    """Named things of one kind, found in `packages` (dotted names) and in the entry points of a group.

    Example:
        >>> samplers = Registry("sampler")
        >>> @samplers.register("euler")
        ... def euler(): ...
        >>> samplers.names()
        ['euler']
    """

    _all: ClassVar[WeakSet[Registry]] = WeakSet()

    def __init__(self, kind: str, *packages: str, entry_points: str | None = None) -> None:
        self.kind, self.packages, self.group = kind, packages, entry_points
        self._items: dict[str, Any] = {}
        self._modules: dict[str, str | None] = {}  # of each name: the module that registered it
        self._reported: set[metadata.EntryPoint] = set()
        self._imported = False
        self._all.add(self)

    def register(self, name: str) -> Callable[[U], U]:
        """Decorator that adds the class or function under `name`. Raises ValueError if the name is taken, or has other
        characters than lower-case letters, digits and underscores."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"{self.kind} {name!r}: a name has lower-case letters, digits and underscores; rename it")

        def add(item: U) -> U:
            if name in self._items:
                taken = f"{self.kind} {name!r} is registered already, by {_where_defined(self._items[name])}"
                raise ValueError(f"{taken}; give that of {_where_defined(item)} another name")
            self._items[name], self._modules[name] = item, _running_module()
            return item

        return add

    def get(self, name: str) -> T:
        """The thing registered under `name`. Raises ValueError with the nearest name, or all of them; where two
        installed packages offer the name; and where the one that does cannot be imported."""
        self._import_packages()
        if name not in self._items and (found := self._entry_points().get(name)):
            self._import_plugin(name, found)
        if name in self._items:
            return self._items[name]
        known = self.names()
        raise ValueError(f"unknown {self.kind} {name!r}{nearest(str(name), known) or _hint_of_known_names(known)}")

    def names(self) -> list[str]:
        """All names, sorted; those of installed packages too, none of which is imported for it."""
        self._import_packages()
        return sorted(self._items.keys() | self._entry_points().keys())

    def __contains__(self, name: object) -> bool:
        self._import_packages()
        return name in self._items or name in self._entry_points()

    def _import_packages(self) -> None:
        """Import every module of the packages, once. What a module raises is raised here."""
        if self._imported:
            return
        for package in self.packages:
            path = importlib.import_module(package).__path__
            for module in pkgutil.walk_packages(path, f"{package}."):
                if module.name.endswith(".__main__"):
                    continue
                try:
                    importlib.import_module(module.name)
                except Exception as error:
                    self._drop_unfinished()
                    error.add_note(f"(while looking for every {self.kind}: the file is {module.name})")
                    raise
        self._imported = True

    def _drop_unfinished(self) -> None:
        """Drop what modules that failed have registered anywhere: Python has removed them from sys.modules."""
        for registry in self._all:
            for name, module in list(registry._modules.items()):
                if module is not None and module not in sys.modules:
                    registry._modules.pop(name)
                    registry._items.pop(name, None)

    def _entry_points(self) -> dict[str, list[metadata.EntryPoint]]:
        """The entry points of the group, by name. Warns, once, of each whose name is taken by a module of ours."""
        found: dict[str, list[metadata.EntryPoint]] = {}
        for point in metadata.entry_points(group=self.group) if self.group else ():
            if point.name not in self._items:
                found.setdefault(point.name, []).append(point)
            elif _module_of(point) not in sys.modules and point not in self._reported:
                self._reported.add(point)
                offered = f"{_owner(point)} offers the {self.kind} {point.name!r} too"
                used = f"that of {_where_defined(self._items[point.name])} is used"
                warnings.warn(f"{offered}; {used}", EntryPointWarning, stacklevel=3)
        return found

    def _import_plugin(self, name: str, points: list[metadata.EntryPoint]) -> None:
        """Import the module of an entry point, which registers `name`. ValueError in one line where it does not."""
        if len(points) > 1:
            owners = " and ".join(sorted(map(_owner, points)))
            raise ValueError(f"{owners} both offer the {self.kind} {name!r}; uninstall one")
        [point] = points
        what = f"{self.kind} {name!r} of {_owner(point)}"
        if _module_of(point) is None:
            raise ValueError(f"{what}: its entry point {point.value!r} names no module; mend the package, or remove it")
        try:
            point.load()
        except (Exception, SystemExit) as error:  # code of another package may raise anything
            self._drop_unfinished()
            raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {one_line(error)}") from error
        if name not in self._items:
            raise ValueError(f"{what}: {point.module} registers no {self.kind} of that name; register it there")


def names_in_source(package: str, registry: str) -> list[str]:
    """The names that the files of a package register with a decorator, read from the files: for `--help`, which must
    not import torch. registry: the name of its variable. Names of installed packages are not among them."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    decorator = re.compile(rf"""^@{registry}\.register\(["'](\w+)["'][,)]""", re.MULTILINE)
    return sorted(name for text in texts for name in decorator.findall(text))


def _running_module() -> str | None:
    """The imported module whose top level runs now, the innermost; None for a script's own code."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    name = None if frame is None else frame.f_globals.get("__name__")
    return name if frame and name in sys.modules and vars(sys.modules[name]) is frame.f_globals else None


def _module_of(point: metadata.EntryPoint) -> str | None:
    """The module of an entry point; None if it is malformed."""
    match = point.pattern.match(point.value)
    return match and match.group("module")


def _owner(point: metadata.EntryPoint) -> str:
    """The installed package of an entry point, in words."""
    name = point.dist.name if point.dist else point.value
    return f"the installed package {name!r}"


def _where_defined(item: Any) -> str:
    """Where a registered class or function is defined."""
    module, name = getattr(item, "__module__", None), getattr(item, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(item)


def _hint_of_known_names(names: list[str]) -> str:
    """The text `; known: ...` for an unknown name."""
    return f"; known: {', '.join(names) or 'none'}"
