"""torch.compile for training, applied from outside: the model's code does not depend on it.

One compiled function serves all layers (weights are inputs); another serves all layers with tangents. Shapes are
static: batches must have fixed shapes. On a small CPU, compiling takes minutes and saves a fifth of each step. The last
bits of the losses change. Modules in evaluation mode run the eager code. Needs a C++ compiler at run time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from omni.nn.transformer import Block, Transformer, TransformerConfig

MAX_VARIANTS = 64  # two streams, every shape, and a key list that grows with each context layer


def require_compilable(config: TransformerConfig) -> None:
    """ValueError for layers that torch.compile would cut into pieces."""
    if config.latent_weights == "separate":  # the number of rows of each set of weights depends on the data
        raise ValueError(
            "compile=true does not support latent_weights = 'separate'; set compile=false, or latent_weights = 'refine'"
        )
    if config.attention == "flash":  # the lengths of its calls depend on the data
        raise ValueError("compile=true does not support attention = 'flash'; set compile=false, or attention = 'flex'")


def compile_blocks(transformer: Transformer) -> None:
    """Compile the training forward of every layer. Raises ValueError without a C++ compiler, and as
    `require_compilable`."""
    require_compilable(transformer.c)
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise ValueError("compile=true needs a C++ compiler (such as g++); install one, or set compile=false")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)  # type: ignore[attr-defined]
    for plain in (Block.layer, Block.dual):
        compiled = torch.compile(plain, dynamic=False)
        for block in transformer.blocks:
            setattr(block, plain.__name__, partial(_run_compiled_in_training, compiled, plain, block))


def _run_compiled_in_training(
    compiled: Callable, plain: Callable, block: nn.Module, *arguments: Any, **options: Any
) -> Any:
    """The compiled function in training mode, else the plain one."""
    function = compiled if block.training else plain
    return function(block, *arguments, **options)
