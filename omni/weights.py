"""Module weights from the tensors of a file: modules are built without memory of their own, then filled, strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from omni.errors import DamagedError, in_range


class _WithoutInitialisation(TorchFunctionMode):
    """Skips random initialisation; a file's weights replace it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0]
        return kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)


@contextmanager
def unallocated() -> Iterator[None]:
    """Modules built inside use no memory and no time for initialisation; `load_weights` fills them. So a configuration
    of absurd sizes fails in the comparison of shapes, not by exhausting memory."""
    with torch.device("meta"), _WithoutInitialisation():
        yield


def stays_finite(dtype: torch.dtype, value: torch.Tensor) -> bool:
    """Whether finite values stay finite in another floating dtype."""
    if not value.is_floating_point() or torch.finfo(dtype).max >= torch.finfo(value.dtype).max or not value.numel():
        return True
    return in_range(value, torch.finfo(dtype).max)


def load_weights(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str, copy: bool = True) -> None:
    """Set the weights of a module, unallocated or not, in its own dtypes. Strict: each must be present with its shape
    and kind, floating or not, and no other. Else DamagedError naming `source` and the first wrong weight.

    copy: False lets an unallocated module own the given tensors where they have its dtype.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        raise DamagedError(
            f"{source}: missing weights {missing[:3]}, unknown weights {unknown[:3]}; they do not match the "
            "configuration, config.json"
        )
    for name, value in tensors.items():
        wanted = own[name]
        if value.shape != wanted.shape:
            raise DamagedError(
                f"{source}: {name} has shape {tuple(value.shape)}, config.json needs {tuple(wanted.shape)}"
            )
        if value.is_complex() or value.is_floating_point() != wanted.is_floating_point():
            raise DamagedError(f"{source}: {name} has dtype {value.dtype}, which does not convert to {wanted.dtype}")
        if not stays_finite(wanted.dtype, value):
            raise DamagedError(f"{source}: {name} has values out of the range of {wanted.dtype}; use smaller weights")
    if any(value.is_meta for value in own.values()):
        copies = {name: value.to(own[name].dtype, copy=copy) for name, value in tensors.items()}
        module.load_state_dict(copies, assign=True)
    else:
        module.load_state_dict(dict(tensors))


# The text path: what a published language model has. Ids that it does not have are in tables of their own.
TEXT_PATH = ("token.embedding.", "token.unembedding.", "transformer.norm.")


def is_text_path(name: str) -> bool:
    """Whether a weight is of the text path: the published tables, the final norm, the layers' text weights."""
    return name.startswith(TEXT_PATH) or (name.startswith("transformer.blocks.") and name.split(".")[3] == "text")


class TextBase(Protocol):
    """The language model beside which a model is published without its text path: omni.importers.base.Base."""

    def without_text_path(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that the language model does not give. ValueError where the text path differs from it."""
        ...

    def reduced(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """The files of a model directory without what the language model gives."""
        ...
