"""Gradients through the tangent with sharded, checkpointed layers: two processes (gloo) equal one process.

This file is also the program of each process: python test_tangent_fsdp.py RANK WORLD_SIZE FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from layouts import CHANNELS, PAD, random_spans, small_model
from torch.utils.checkpoint import checkpoint

from omni.model import Omni
from omni.nn.transformer import Block
from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.layout import Shape, pack

ROOT = Path(__file__).parents[2]
NUM_DOCUMENTS = 4


def backward(model: Omni, averages: Omni, uids: list[int], share: float) -> None:
    """Gradients of terminal velocity and MeanFlow on the given documents, divided by the count of all of them."""
    spans = [random_spans(Key(n).fold("sharded"), 4) for n in uids]
    [batch], used = pack(
        spans, [Shape(2, 300, 300)], channels=CHANNELS, pad_id=PAD, copies=2, uids=uids, fixed_shape=False
    )
    assert used == len(uids) and batch.num_items > 0
    batch = replace(batch, latents=batch.latents.double(), refine_latents=batch.refine_latents.double())
    objectives = [build_objective("terminal_velocity"), build_objective("mean_flow", power=0.0)]
    terms = model(batch, objectives, Key(5), averages)
    (torch.stack([term.sum for term in terms.values()]).sum() * share).backward()


def models() -> tuple[Omni, Omni]:
    return small_model(dtype=torch.float64).train(), small_model(seed=1, dtype=torch.float64).requires_grad_(False)


def worker(rank: int, world_size: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = dist.init_device_mesh("cpu", (world_size,))
    model, averages = models()
    for block in model.transformer.blocks:
        assert isinstance(block, Block)
        block.forward = partial(checkpoint, partial(Block.forward, block), use_reentrant=False)  # type: ignore[method-assign]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    backward(model, averages, list(range(rank, NUM_DOCUMENTS, world_size)), world_size)  # gradients are averaged
    full = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}  # type: ignore[union-attr]
    if rank == 0:
        torch.save(full, folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_sharded_processes_equal_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    model, averages = models()
    backward(model, averages, list(range(NUM_DOCUMENTS)), 1.0)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) < 1e-6 * max(float(gradient.abs().max()), 1e-3 * scale), name


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
