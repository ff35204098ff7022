"""torch.compile for training, applied from outside: the model's code knows nothing of it.

One compiled function serves all layers (weights are its inputs), and another all layers with their tangents; shapes are
static, so batches must have fixed shapes. Compiling costs minutes on a small CPU and saves a fifth of each step there;
the last bits of the losses change. Modules in evaluation mode keep the plain code. Needs a C++ compiler at run time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from omni.nn.transformer import Block, Transformer

MAX_VARIANTS = 64  # two streams, every shape, and the growing list of keys that each layer of the context appends to


def compile_blocks(transformer: Transformer) -> None:
    """Replace the training forward of every block. Raises ValueError when there is no C++ compiler."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise ValueError("compile=true needs a C++ compiler (such as g++); install one or leave it false")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)  # type: ignore[attr-defined]
    for plain in (Block.layer, Block.dual):
        compiled = torch.compile(plain, dynamic=False)
        for block in transformer.blocks:
            setattr(block, plain.__name__, partial(_choose, compiled, plain, block))


def _choose(compiled: Callable, plain: Callable, block: nn.Module, *arguments: Any, **options: Any) -> Any:
    function = compiled if block.training else plain
    return function(block, *arguments, **options)
