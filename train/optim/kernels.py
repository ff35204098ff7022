"""Muon on convolution kernels, each seen as an (outputs, window x inputs) matrix; AdamW on the rest.

The matrices are views of the kernels, which have to be channels-last in memory, so Muon updates them in place.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from train.optim.muon import Muon
from train.optim.optimiser import Optimiser


class KernelOptimiser(Optimiser):
    """Of a module in channels-last memory. Both parts come with rate 1: `step` is given the rate itself.

    weight_decay: of the kernels alone.
    """

    def __init__(self, module: nn.Module, weight_decay: float, clip: float = 1.0) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        self.kernels, others = [p for p in trained if p.ndim == 4], [p for p in trained if p.ndim != 4]
        self.matrices = [_matrix(p.detach()) for p in self.kernels]
        muon = Muon(self.matrices, 1.0, weight_decay)
        adam = torch.optim.AdamW(others, 1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        super().__init__({"muon": muon, "adam": adam}, parameters=trained, clip=clip)

    def step(self, factor: float, left_out: Tensor | None = None) -> None:
        """One update. The gradients of kernels reach Muon as matrices."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            assert kernel.grad is not None and matrix.data_ptr() == kernel.data_ptr(), "a kernel was moved"
            matrix.grad = _matrix(kernel.grad)
        super().step(factor, left_out)


def _matrix(kernel: Tensor) -> Tensor:
    """(outputs, inputs, rows, columns) -> (outputs, rows * columns * inputs): a view of a channels-last kernel."""
    return rearrange(kernel, "o i h w -> o (h w i)")
