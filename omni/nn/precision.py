"""The available devices, and whether bfloat16 is fast on one. On a CPU without bfloat16 instructions, bfloat16 products
are about a hundred times slower than float32 ones."""

from __future__ import annotations

from functools import cache

import torch


@cache
def fast_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether matrix products in bfloat16 are at least as fast as in float32 on this device."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def require_device(name: str) -> str:
    """`name`, if torch can compute on it. Else ValueError with the available devices."""
    try:
        there = torch.empty(0, device=name).device.type != "meta"  # the meta device computes nothing
    except Exception:  # torch raises many types, with pages of text
        there = False
    if not there:
        raise ValueError(f"device {name!r:.60} is not available; use {' or '.join(devices())}") from None
    return name


def devices() -> list[str]:
    """The devices that torch can compute on."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*found, "mps"] if torch.backends.mps.is_available() else found
