"""The autoencoder classes of diffusers, without what `import diffusers` drags in beside them.

A diffusers class brings transformers, scipy, torch._dynamo and every other model's file along: several seconds for one
network. Here the same files are run as a package of another name, `_omni_diffusers`: of most subpackages the modules
that are asked for alone, and placeholders instead of two that an autoencoder only mentions (mixins for loading single
files, schedulers). The package diffusers itself is neither imported nor touched.

Where the program has imported diffusers already its own class is taken, and so it is where anything here goes wrong.
tests/codecs/test_upstream.py compares the two. Nothing downloads: `from_pretrained` is the whole package's affair.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MODULES = {
    "AutoencoderKL": "autoencoder_kl",
    "AutoencoderKLFlux2": "autoencoder_kl_flux2",
    "AutoencoderTiny": "autoencoder_tiny",
    "AutoencoderDC": "autoencoder_dc",
    "AutoencoderKLWan": "autoencoder_kl_wan",
    "AutoencoderKLQwenImage": "autoencoder_kl_qwenimage",
    "AutoencoderKLCogVideoX": "autoencoder_kl_cogvideox",
    "AutoencoderKLHunyuanVideo": "autoencoder_kl_hunyuan_video",
    "AutoencoderKLHunyuanVideo15": "autoencoder_kl_hunyuanvideo15",
}
PACKAGE = "_omni_diffusers"
# Subpackages of diffusers: replaced by placeholders; imported without running their __init__.
PLACEHOLDERS = ("loaders", "schedulers")
WITHOUT_INIT = ("hooks", "models", "models.autoencoders", "models.transformers", "models.unets", "quantizers")
_log = logging.getLogger("omni")
_lock = threading.Lock()


def is_installed() -> bool:
    """Whether there is a diffusers to import. Imports nothing."""
    return importlib.util.find_spec("diffusers") is not None


def diffusers_class(name: str) -> Any:
    """A class of MODULES. ImportError names the extra that brings it."""
    if not is_installed():
        raise ImportError(f"{name} needs diffusers: pip install 'omni-flow[vae]'")
    if "diffusers" not in sys.modules:
        try:
            with _lock:
                return _import_alone(name)
        except Exception as error:
            _log.info("%s is imported with all of diffusers: %s: %s", name, type(error).__name__, error)
    return whole_class(name)


def whole_class(name: str) -> Any:
    """The class as `import diffusers` gives it, which can also read and convert checkpoints of its own."""
    try:
        return getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        raise ImportError(f"{name} needs diffusers, which cannot be imported ({error})") from error
    except AttributeError:
        raise ImportError(f"the installed diffusers has no {name}: pip install -U 'omni-flow[vae]'") from None


def _import_alone(name: str) -> Any:
    """The class, from the package under its other name, without the rest of diffusers."""
    source = importlib.util.find_spec("diffusers")
    assert source is not None and source.origin and source.submodule_search_locations
    before = set(sys.modules)
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder)), None)
    if finder is None:  # it stays: diffusers also imports inside functions
        finder = _Finder(list(source.submodule_search_locations))
        sys.meta_path.insert(0, finder)
    finder.thread = threading.get_ident()
    try:
        if PACKAGE not in sys.modules:
            spec = importlib.util.spec_from_file_location(
                PACKAGE, source.origin, submodule_search_locations=finder.folders
            )
            assert spec is not None and spec.loader is not None
            package = importlib.util.module_from_spec(spec)
            sys.modules[PACKAGE] = package
            spec.loader.exec_module(package)
        return getattr(importlib.import_module(f"{PACKAGE}.models.autoencoders.{MODULES[name]}"), name)
    except BaseException:
        for module in [m for m in sys.modules if m.partition(".")[0] == PACKAGE and m not in before]:
            del sys.modules[module]
        raise
    finally:
        finder.thread = None


class _Finder(MetaPathFinder):
    """Placeholders, and packages without their `__init__`, in PACKAGE alone. diffusers does without torch._dynamo where
    its import fails; so it does, in the one thread that imports a class of it."""

    def __init__(self, folders: list[str]) -> None:
        self.folders, self.thread = folders, None

    folders: list[str]
    thread: int | None

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if fullname == "torch._dynamo" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{fullname} is left out for now", name=fullname)
        top, _, inside = fullname.partition(".")
        if top != PACKAGE:
            return None
        if inside.partition(".")[0] in PLACEHOLDERS:
            return ModuleSpec(fullname, _Placeholders(), is_package=True)
        if inside in WITHOUT_INIT:
            spec = ModuleSpec(fullname, _Placeholders(), is_package=True)
            spec.submodule_search_locations = ["/".join([folder, *inside.split(".")]) for folder in self.folders]
            return spec
        if inside == "utils.import_utils" and (spec := PathFinder.find_spec(fullname, path)) and spec.origin:
            spec.loader = _WithoutAccelerate(fullname, spec.origin)
            return spec
        return None


class _WithoutAccelerate(SourceFileLoader):
    """Loads the file in which diffusers looks for other packages; it then does without accelerate, which brings hooks
    for offloading weights and takes a second to import."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, "_accelerate_available"):
            vars(module)["_accelerate_available"] = False


class _Placeholders(Loader):
    """Loads a module that has any name, as a class that may be inherited from and not be used."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Placeholder(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def new(cls: type, *args: Any, **kwargs: Any) -> Any:
            if cls is made:
                raise RuntimeError(f"{self.__name__}.{name} is left out; see {__name__}")
            return object.__new__(cls)

        made = type(name, (), {"__new__": new})
        setattr(self, name, made)
        return made
