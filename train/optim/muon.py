"""Muon (Jordan et al. 2024): momentum whose direction is orthogonalised by a Newton-Schulz iteration.

Same update as torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"` (arXiv 2502.16982), which iterates in bfloat16
only: a CPU without bfloat16 instructions does that a hundred times slower than in float32. Here the iteration runs in
the precision that the machine multiplies fast, and matrices of one shape share its products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from omni.nn.precision import fast_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic; singular values end in about (0.7, 1.2)
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. The update has the RMS of AdamW's at the same `lr`.

    Args:
        params: 2-D weights (out, in). ValueError for any other.
        dtype: of the iteration; None: bfloat16 where the device multiplies it fast, else float32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices only, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter with a gradient. Matrices of one shape are orthogonalised together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.device), []).append(p)
            for (shape, device), members in by_shape.items():
                directions = orthogonalise(
                    torch.stack([self._momentum(p, group["momentum"]) for p in members]),
                    self.dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32),
                )
                scale = 0.2 * math.sqrt(max(shape))
                for p, direction in zip(members, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction.to(p.dtype), alpha=-group["lr"] * scale)
        return loss

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """The Nesterov average of the gradients; updates the buffer."""
        assert p.grad is not None
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum_buffer"]
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, rows, columns) -> the same shape, in `dtype`: near U V^T of each matrix U S V^T, rows and columns any."""
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).to(dtype).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
