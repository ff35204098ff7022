"""Steps of a few text tokens as native code: native_step.cpp, compiled on demand by the machine's C++ compiler.

The cost of a token is reading the weights and launching some twenty operations per layer. Here the whole pass is one
call, and every weight is read once for all tokens. Products, activations and sums are float32.

    model       weights are read in                                   cache
    bfloat16    bfloat16                                              bfloat16
    float32     bfloat16 where all are exact in it, as in many        float32
                published checkpoints; else float32, at about half
                the speed (the log records this)

A bfloat16 model is computed more exactly than by the layers of nn.layer, which round after every operation. Products
compiled by torch.compile reached about half of this speed.

Serves text on the CPU: decoded ids of many requests, drafts to verify, short prompts, each history with its own LoRA or
without. Passes with latents or placeholders, and long ones, run the layers of nn.layer. The weights are copied at
construction, in panels of 32 rows; those of LoRAs in float32. Every sum has one order for any number of tokens, so a
token gets the same bits beside any others.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from omni.nn.layer import Layer, LayerSpec
from omni.nn.lora import PARTS, Lora
from omni.nn.native_library import LowRank, Pass, load_library
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
DTYPES = (torch.float32, torch.bfloat16)
PANEL = 32  # rows of a weight side by side, as in native_step.cpp
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
        if output_weight.device.type != "cpu" or output_weight.dtype not in DTYPES:
            raise ValueError(
                f"compile=True serves float32 and bfloat16 on the CPU, this model is {output_weight.dtype} on "
                f"{output_weight.device}; load it with dtype=torch.float32, or leave compile out"
            )
        library, self.dtype = load_library(), output_weight.dtype
        layers: list[Layer] = [block.text for block in transformer.blocks]  # type: ignore[misc]
        matrices = [getattr(w, part).weight for w in layers for part in PARTS] + [output_weight]
        self.stored = torch.bfloat16 if all(map(is_exact_in_bf16, matrices)) else torch.float32
        if self.stored == torch.float32:
            _log.info("compiled step: some weights are not exact in bfloat16; reading float32, at about half the speed")
        stored, kept = (str(dtype).removeprefix("torch.") for dtype in (self.stored, self.dtype))
        self._step, self._read = getattr(library, f"step_{stored}_{kept}"), getattr(library, f"read_{stored}")
        of_heads = ("q_norm", "k_norm") if self.c.qk_norm == "head" else ()
        names = ("attention_norm", *of_heads, "mlp_norm")
        norms = [{name: getattr(w, name).weight.detach().float().clone() for name in names} for w in layers]
        self.norms = [*norms, {"": transformer.norm.weight.detach().float().clone()}]
        self.copies = [pack(m.detach().to(self.stored)) for m in matrices]  # `pointers` point into these
        self.num_ids = len(output_weight)
        c, at = self.c, range(0, 4 * self.c.depth, 4)
        in_order: list[int | None] = []
        for i, own in zip(at, norms, strict=True):
            found = [own.get(name) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")]
            in_order += [None if tensor is None else tensor.data_ptr() for tensor in (*found, *self.copies[i : i + 4])]
        self.pointers = (ctypes.c_void_p * len(in_order))(*in_order)
        self.sizes = (ctypes.c_int64 * 6)(c.width, c.depth, c.num_heads, c.num_kv_heads, c.head_dim, c.hidden)
        self.table: Tensor | None = None
        self.loras = {name: number for number, name in enumerate(transformer.loras)}
        self.adapters = [pair for lora in transformer.loras.values() for pair in adapters_of(lora, c.depth)]  # type: ignore[arg-type]
        self.low_ranks = (LowRank * len(self.adapters))(*map(low_rank, self.adapters))

    def __call__(self, h: Tensor, positions: Sequence[int], runs: Runs) -> Tensor:
        """Hidden states (N, W), normalised, of text at `positions` in causal runs: h (N, W). Both have the dtype of the
        model. Writes the slots of the runs; commits nothing."""
        pool = runs.pool
        if h.dtype != self.dtype or pool.k.dtype != self.dtype:
            raise ValueError(
                f"this compiled step serves {self.dtype}; the model is {h.dtype} now, its cache {pool.k.dtype}: make a "
                "new engine"
            )
        x = h.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        rotary = self.rotary(max(positions) + 1)[:, list(positions)].contiguous()
        first = [run.history.start for run in runs.runs for _ in range(run.num)]
        at = [run.at + k for run in runs.runs for k in range(run.num)]
        indices = torch.tensor([first, at])
        flat = [number for group in self.groups(runs) for number in group]
        groups = (ctypes.c_int64 * len(flat))(*flat)
        self._step(self.sizes, self.pointers, self.norms[-1][""].data_ptr(), ctypes.byref(Pass(
            x.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), pool.k.data_ptr(), pool.v.data_ptr(),
            pool.k.shape[2], indices[0].data_ptr(), indices[1].data_ptr(), len(h), ctypes.addressof(self.low_ranks),
            ctypes.addressof(groups), len(groups) // 3, torch.get_num_threads(), self.c.norm_eps,
        )))  # fmt: skip
        return x.to(self.dtype)

    def groups(self, runs: Runs) -> Iterator[tuple[int, int, int]]:
        """(number of the LoRA, first token, tokens) of neighbouring runs with one LoRA."""
        first = 0
        for name, neighbours in groupby(runs.runs, lambda run: run.lora):
            num = sum(run.num for run in neighbours)
            if name is not None:
                yield self.loras[name], first, num
            first += num

    def read(self, hidden: Tensor, num: int | None = None) -> Tensor:
        """Logits (N, V), float32, before any cap; of the first `num` ids alone, where it is given."""
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
    return weight.dtype == torch.bfloat16 or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)


def pack(weight: Tensor) -> Tensor:
    """Panels (panels, n, 32) of a weight (rows, n), as native_step.cpp reads them, filled up with zeros: 32 rows side
    by side. In bfloat16 row j and row 16 + j of a panel are neighbours; in float32 the rows are in order."""
    filled = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % PANEL))
    halves = filled.view(-1, 2, PANEL // 2, weight.shape[1])
    return halves.permute((0, 3, 2, 1) if weight.dtype == torch.bfloat16 else (0, 3, 1, 2)).contiguous()


Adapter = tuple[Tensor, Tensor]  # packed float32 A (rank, in) and B (out, rank) of one projection


def adapters_of(lora: Lora, depth: int) -> list[Adapter | None]:
    """For each projection of each layer the sum of its targets as one pair: their A one below the other, their B side
    by side, in the rows of each target."""
    found: list[Adapter | None] = []
    for index in map(str, range(depth)):
        targets = list(lora.layers[index].items()) if index in lora.layers else []  # type: ignore[operator]
        for part in PARTS:
            own = [(*lora.rows[name][1:], pair) for name, pair in targets if lora.rows[name][0] == part]
            if not own:
                found.append(None)
                continue
            down = torch.cat([pair.down.weight.detach().float() for _, _, pair in own])
            rank = lora.spec.rank
            up = down.new_zeros(lora.sizes[part], len(down))
            for number, (first, last, pair) in enumerate(own):
                up[first:last, number * rank : (number + 1) * rank] = pair.up.weight.detach().float() * lora.spec.factor
            found.append((pack(down), pack(up)))
    return found


def low_rank(adapter: Adapter | None) -> LowRank:
    """Pointers into an adapter."""
    if adapter is None:
        return LowRank(None, None, 0)
    down, up = adapter
    return LowRank(down.data_ptr(), up.data_ptr(), up.shape[1])
