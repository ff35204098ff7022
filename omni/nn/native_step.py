"""Steps of a few text tokens as native code: native_step.cpp, compiled on demand by the machine's C++ compiler.

The cost of a token is reading the weights and launching some twenty operations per layer. Here the whole pass is one
call, and every weight is read once for all tokens. Where every weight is exact in bfloat16, as in a published
checkpoint, a bfloat16 copy is read: half the bytes, no loss. Products, activations and sums stay float32. Other weights
are read in float32; the log records this. Products compiled by torch.compile reached about half of this speed.

Serves text in float32 on the CPU: decoded ids of many requests, and drafts to verify. Passes with latents or
placeholders, and long ones, run the layers of nn.layer. The weights are copied at construction, in panels of 32 rows.
Every sum has one order for any number of tokens, so a token gets the same bits beside any others.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from omni.nn.layer import Layer, LayerSpec
from omni.nn.runs import Runs
from omni.nn.transformer import Transformer
from omni.sequence.positions import rotary_table

# The native code takes these fields as arguments (sizes, norm_eps) or tables (rotary positions). Of all other fields it
# serves the default only, except those of the refine stream, which it does not run, and layers without QK-norm.
ARGUMENTS = {"width", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "norm_eps", "rope_base", "rotary"}
NATIVE = {
    name: ("head", "none") if name == "qk_norm" else (field.default,)
    for name, field in LayerSpec.model_fields.items()
    if name not in ARGUMENTS | {"time", "modulation_eps"}
}
SOURCE = Path(__file__).with_name("native_step.cpp")
PANEL = 32  # rows of a weight side by side, as in native_step.cpp
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd")
THREADS = ("-fopenmp",)  # omitted if the compiler has no OpenMP; the step then uses one thread
_log = logging.getLogger("omni")


class CompiledStep:
    """A few text tokens, of one or many histories, in one call. Raises ValueError without a compiler, or for a model
    that the native code does not serve."""

    def __init__(self, transformer: Transformer, output_weight: Tensor) -> None:
        self.c = transformer.c
        for name, served in NATIVE.items():
            if (value := getattr(self.c, name)) not in served:
                known = " or ".join(map(repr, served))
                raise ValueError(
                    f"compile=True supports layers with {name} = {known} only, this model has {value!r}; "
                    "leave compile out"
                )
        if output_weight.device.type != "cpu" or output_weight.dtype != torch.float32:
            raise ValueError(
                f"compile=True serves float32 on the CPU, this model is {output_weight.dtype} on "
                f"{output_weight.device}; load it with dtype=torch.float32, or leave compile out"
            )
        library = load_library()
        layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        matrices = [m.weight for w in layers for m in (w.qkv, w.out, w.gate_up, w.down)] + [output_weight]
        self.dtype = torch.bfloat16 if all(map(is_exact_in_bf16, matrices)) else torch.float32
        if self.dtype == torch.float32:
            _log.info("compiled step: some weights are not exact in bfloat16; reading float32, at about half the speed")
        name = str(self.dtype).removeprefix("torch.")
        self._step, self._read = getattr(library, f"step_{name}"), getattr(library, f"read_{name}")
        of_heads = ("q_norm", "k_norm") if self.c.qk_norm == "head" else ()
        names = ("attention_norm", *of_heads, "mlp_norm")
        norms = [{name: getattr(w, name).weight.detach().float().clone() for name in names} for w in layers]
        self.norms = [*norms, {"": transformer.norm.weight.detach().float().clone()}]
        self.copies = [pack(m.detach().to(self.dtype)) for m in matrices]  # `pointers` point into these
        self.num_ids = len(output_weight)
        c, at = self.c, range(0, 4 * self.c.depth, 4)
        in_order: list[int | None] = []
        for i, own in zip(at, norms, strict=True):
            found = [own.get(name) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")]
            in_order += [None if tensor is None else tensor.data_ptr() for tensor in (*found, *self.copies[i : i + 4])]
        self.pointers = (ctypes.c_void_p * len(in_order))(*in_order)
        self.sizes = (ctypes.c_int64 * 6)(c.width, c.depth, c.num_heads, c.num_kv_heads, c.head_dim, c.hidden)
        self.table: Tensor | None = None

    def __call__(self, h: Tensor, positions: Sequence[int], runs: Runs) -> Tensor:
        """Hidden states (N, W), normalised, of text at `positions` in causal runs: h (N, W) float32. Writes the slots
        of the runs; commits nothing."""
        h, pool = h.clone(memory_format=torch.contiguous_format), runs.pool
        if h.dtype != torch.float32 or pool.k.dtype != torch.float32:
            raise ValueError(
                f"compile=True serves float32; the model is {h.dtype} now, its cache {pool.k.dtype}: make a new engine"
            )
        rotary = self.rotary(max(positions) + 1)[:, list(positions)].contiguous()
        first = [run.history.start for run in runs.runs for _ in range(run.num)]
        at = [run.at + k for run in runs.runs for k in range(run.num)]
        indices = torch.tensor([first, at])
        self._step(
            self.sizes, self.pointers, self.norms[-1][""].data_ptr(), h.data_ptr(), rotary[0].data_ptr(),
            rotary[1].data_ptr(), pool.k.data_ptr(), pool.v.data_ptr(), pool.k.shape[2], indices[0].data_ptr(),
            indices[1].data_ptr(), len(h), self.c.norm_eps, torch.get_num_threads(),
        )  # fmt: skip
        return h

    def read(self, hidden: Tensor, num: int | None = None) -> Tensor:
        """Logits (N, V) before any cap; of the first `num` ids alone, where it is given."""
        hidden = hidden.float().contiguous()
        logits = hidden.new_empty(len(hidden), self.num_ids if num is None else min(num, self.num_ids))
        size = *logits.shape, hidden.shape[1]
        self._read(self.copies[-1].data_ptr(), hidden.data_ptr(), logits.data_ptr(), *size, torch.get_num_threads())
        return logits

    def rotary(self, num: int) -> Tensor:
        """(2, at least num, D): cos, and sin; rotation is x cos + roll(x, D/2) sin."""
        if self.table is None or self.table.shape[1] < num:
            every = torch.arange(1 << max(8, num.bit_length()))[None, :, None].expand(1, -1, 3)
            table = rotary_table(every, self.c.head_dim, self.c.rope_base, torch.float32, self.c.rotary)
            self.table = torch.cat(table)[:, 0]
        return self.table


def is_exact_in_bf16(weight: Tensor) -> bool:
    return torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def pack(weight: Tensor) -> Tensor:
    """Panels (panels, n, 32) of a weight (rows, n), as native_step.cpp reads them, filled up with zeros: 32 rows side
    by side. In bfloat16 row j and row 16 + j of a panel are neighbours; in float32 the rows are in order."""
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    halves = filled.view(-1, 2, PANEL // 2, weight.shape[1])
    return halves.permute((0, 3, 2, 1) if weight.dtype == torch.bfloat16 else (0, 3, 1, 2)).contiguous()


@cache
def load_library() -> ctypes.CDLL:
    """Compile native_step.cpp (a second or two, once per process) and load it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise ValueError(
            f"compile=True needs a C++ compiler ({', '.join(COMPILERS)}); install one or leave compile out"
        )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "native_step.so"
        for flags in ((*FLAGS, *THREADS), FLAGS):
            done = subprocess.run([compiler, *flags, "-o", target, SOURCE], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"{compiler} could not compile {SOURCE.name}: {last}; leave compile out")
        library = ctypes.CDLL(str(target))
    pointer, count, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    for name in ("float32", "bfloat16"):
        step, read = getattr(library, f"step_{name}"), getattr(library, f"read_{name}")
        step.argtypes = [*[pointer] * 8, count, pointer, pointer, count, real, threads]
        read.argtypes = [*[pointer] * 3, count, count, count, threads]
        step.restype = read.restype = None
    return library
