"""Logits of imported decoders against the classes of transformers, in float64 and float32.

Each model is computed three ways: as training does (packed), in one pass after nothing, of documents of unequal length
together; and cached, one id at a time, in passes that the documents share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import omni
from eval.experiments.imports.oracle import logits_of, published
from omni.generation.context import append_of, run_context
from omni.generation.contract import training_prefix
from omni.importers.decoders import NEW_ROWS, import_decoder
from omni.model import Omni
from omni.nn.cache import History
from omni.sequence.layout import TokenSpan

IDS = [3, 17, 42, 5, 9, 88, 61, 2, 2, 30, 11, 64, 7, 95, 1, 50, 23, 77, 8, 33]
DOCUMENTS = IDS, IDS[5:12], IDS[2:4]  # the longest first
LONG = {"short_factor": [1.0, 1.2, 1.5, 1.5, 2.0, 2.0], "long_factor": [2.0, 3.0, 3.5, 5.0, 7.0, 9.0]}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}


class Case(NamedTuple):
    """A published model. context: that it is imported for. shortest: documents with fewer ids are not compared, as the
    published frequencies depend on the length of the pass."""

    family: str
    settings: dict[str, Any]
    context: int | None = None
    shortest: int = 1


CASES: dict[str, Case] = {
    "llama": Case("llama", {}),
    "llama, biases": Case("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3 positions": Case(
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "linear positions": Case(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 99.0, "factor": 4.0}}
    ),
    "yarn positions": Case(
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                             "original_max_position_embeddings": 16}},
    ),
    "dynamic positions": Case(
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
         "max_position_embeddings": 16},
        context=len(IDS), shortest=len(IDS),
    ),
    "mistral": Case("mistral", {"sliding_window": None}),
    "mistral, window": Case("mistral", {"sliding_window": 4}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {"attention_bias": True}),
    "gemma2": Case("gemma2", {"sliding_window": 4, "query_pre_attn_scalar": 24}),
    "gemma3": Case(
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "rope_parameters": {**LOCAL, "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}},
    ),
    "olmo2": Case("olmo2", {}),
    "phi3": Case("phi3", {"sliding_window": 6}),
    "phi3, longrope": Case(
        "phi3",
        {"hidden_size": 64, "original_max_position_embeddings": 16, "max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LONG}},
        shortest=17,
    ),
    "phi3, longrope, short": Case(
        "phi3",
        {"hidden_size": 64, "original_max_position_embeddings": 32, "max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **LONG}},
        context=32,
    ),
}  # fmt: skip


def differences(case: Case, folder: Path, max_shard_size: str = "20KB") -> dict[str, float]:
    """{"float64", "float32"}: see `worst`. The checkpoint is written to the folder, in shards of that size."""
    theirs = published(case.family, **case.settings)
    theirs.save_pretrained(folder / "published", max_shard_size=max_shard_size)
    out = import_decoder(folder / "published", folder / "model", with_tokenizer=False, context=case.context)
    return differences_of(out, theirs, case.shortest)


def differences_of(out: Path, theirs: Any, shortest: int = 1) -> dict[str, float]:
    """The same, of the model directory `out` of the published model `theirs`. shortest: see Case."""
    compared = [ids for ids in DOCUMENTS if len(ids) >= shortest]
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        wanted = logits_of(theirs, compared, is_wide=dtype == torch.float64)
        found[name] = worst(omni.from_pretrained(out, dtype=dtype), wanted)
    return found


@torch.no_grad()
def worst(model: Omni, wanted: Sequence[Tensor]) -> float:
    """The largest difference of the logits of the first documents, computed in each way, to those wanted: see `far`."""
    ways = ([training_prefix(model, [text(ids)]) for ids in DOCUMENTS], prefilled(model), cached(model))
    return largest(far(ours, theirs) for found in ways for ours, theirs in zip(found, wanted, strict=False))


def largest(values: Iterable[float]) -> float:
    """The largest of the values; NaN where one is, and of none."""
    return float(torch.tensor(list(values) or [math.nan], dtype=torch.float64).max())


def far(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of the published ids' logits (n, V), relative to the largest logit."""
    assert found.shape == (len(wanted), wanted.shape[1] + NEW_ROWS), found.shape
    return float((found[:, : wanted.shape[1]] - wanted).abs().max() / wanted.abs().max())


def text(ids: Sequence[int]) -> TokenSpan:
    return TokenSpan(list(ids), [False] * len(ids))


def prefilled(model: Omni) -> list[Tensor]:
    """Logits (n, V) of each document, all read in one pass."""
    pool = model.transformer.new_pool()
    hidden, _ = run_context(model, [append_of(History(pool), [text(ids)], 0) for ids in DOCUMENTS])
    return [model.token.read(states) for states in hidden]


def cached(model: Omni) -> list[Tensor]:
    """Logits (n, V) of each document, of one id at a time, in passes that the documents share."""
    pool = model.transformer.new_pool()
    histories, found = [History(pool) for _ in DOCUMENTS], [[] for _ in DOCUMENTS]
    for step in range(max(map(len, DOCUMENTS))):
        rows = [row for row, document in enumerate(DOCUMENTS) if step < len(document)]
        hidden, _ = run_context(model, [append_of(histories[r], [text([DOCUMENTS[r][step]])], 0) for r in rows])
        for row, states in zip(rows, hidden, strict=True):
            found[row].append(model.token.read(states[-1]))
    return [torch.stack(one) for one in found]
