"""The speed suite is fair: both sides of a ratio have the same dtype, mode, samples, parameters, ids and tokens.

Without the extra `peers` a small stand-in replaces the other library where only our side is tested.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eval.peers import num_parameters, transfusion_loss
from eval.suite import load_suite, main
from eval.task import TASKS, Context
from eval.tasks.speed import comparison
from eval.tasks.speed.comparison import DTYPES, Times, build_omni, num_prompt_ids, prompt_of
from eval.tasks.speed.image import ImageOptions, image_runs, num_evaluations
from eval.tasks.speed.text import SizedOptions, omni_decode, text_runs
from eval.tasks.speed.training import (
    LAYOUTS,
    TrainingOptions,
    build_models,
    num_data_tokens,
    omni_loss,
    pack_samples,
    samples_of,
    training_step,
    training_steps,
)
from omni.sequence.layout import IGNORE

SUITE = str(Path(__file__).parents[2] / "eval" / "suites" / "speed.toml")
TASK_NAMES = ("speed_training", "speed_text", "speed_prefill", "speed_batch", "speed_image")
SMALL = TrainingOptions(quick=True, batch=2, text=4, vocab_size=512)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason="needs the extra: peers")


needs_transfusion, needs_transformers = needs("transfusion_pytorch"), needs("transformers")

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv}
PRODUCTS |= {aten.linear, aten.matmul, aten.scaled_dot_product_attention}  # whole in inference mode
MOST = 0.9  # autocast leaves transfusion-pytorch's attention over layers in float32


class Products(TorchDispatchMode):
    """Counts the elements that matrix products read, by dtype: the precision that a library computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.read: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            for value in args:
                if isinstance(value, Tensor):
                    self.read[value.dtype] += value.numel()
        return func(*args, **(kwargs or {}))


def share(run: Callable[[], Any], dtype: str) -> float:
    """The share of the elements that matrix products read during `run` that have the dtype."""
    with Products() as products:
        run()
    assert products.read.total()
    return products.read[DTYPES[dtype]] / products.read.total()


class StandIn(nn.Module):
    """Accepts samples as transfusion-pytorch does."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(comparison.CHANNELS, 32)

    def forward(self, samples: Sequence[Sequence[Tensor]]) -> Tensor:
        latents = [part for sample in samples for part in sample if part.is_floating_point()]
        return self.read(torch.stack(latents)).float().square().mean()


def tiny_models(options: TrainingOptions = SMALL) -> dict[tuple[str, str], nn.Module]:
    return {("omni", "eager"): build_omni(Context(), "tiny", 512), ("transfusion", "eager"): StandIn()}


# ---- both sides in one dtype -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_training_steps_compute_in_the_dtype_of_their_row(dtype: str) -> None:
    samples = samples_of(Context(), "interleaved", SMALL)
    steps = training_steps(Context(), tiny_models(), samples, dtype)
    assert set(steps) == {"omni eager", "transfusion eager"}
    assert {name: share(step, dtype) for name, step in steps.items()} == dict.fromkeys(steps, 1.0)


def test_the_dtype_rule_can_fail() -> None:
    """A peer that runs in float32 in a bfloat16 row."""
    peer = StandIn()
    samples = samples_of(Context(), "text_image", SMALL)
    assert share(training_step(peer, transfusion_loss(peer, samples), "float32"), "bf16") == 0.0


@needs_transfusion
@pytest.mark.parametrize("dtype", DTYPES)
def test_transfusion_trains_in_the_dtype_of_its_row(dtype: str) -> None:
    models = build_models(Context(), "tiny", SMALL)
    steps = training_steps(Context(), models, samples_of(Context(), "interleaved", SMALL), dtype)
    assert all(share(step, dtype) > MOST for step in steps.values())


@needs_transfusion
@pytest.mark.parametrize("dtype", DTYPES)
def test_pictures_are_drawn_in_the_dtype_of_their_row(dtype: str) -> None:
    options = ImageOptions(quick=True, steps=2, vocab_size=512)
    models = build_models(Context(), "tiny", SMALL)
    runs = image_runs(models["omni", "eager"], {"eager": models["transfusion", "eager"]}, options, dtype)  # type: ignore[arg-type]
    assert {name.split(",")[0] for name in runs} == {"omni", "eager euler", "eager midpoint"}
    assert {name for name, run in runs.items() if share(run, dtype) < MOST} == set()


@needs_transformers
@pytest.mark.parametrize("dtype", DTYPES)
def test_text_is_decoded_in_the_dtype_of_its_row(dtype: str) -> None:
    runs = text_runs(Context(), "tiny", SizedOptions(quick=True, vocab_size=512), dtype)
    assert set(runs) == {"omni eager", "transformers dynamic", "transformers static"}
    assert {name for name, run in runs.items() if share(run, dtype) < MOST} == set()


# ---- both sides do the same work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_data_token_is_trained_once(layout: str) -> None:
    model = build_omni(Context(), "tiny", 512)
    samples = samples_of(Context(), layout, SMALL)
    batch = pack_samples(model, samples)
    ids = sum(len(part) for sample in samples for part in sample if not part.is_floating_point())
    of_data = (batch.target != IGNORE) & (batch.target < 256)
    assert int(of_data.sum()) == ids and batch.num_refine == sum(map(num_data_tokens, samples)) - ids
    assert int((batch.context.document < 0).sum()) == int((batch.item < 0).sum()) == 0  # no padding
    assert bool(batch.is_latent.any()) == (layout == "interleaved")  # a last picture alone is not in the context


@needs_transfusion
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transfusion_trains_the_same_tokens(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = build_models(Context(), "tiny", SMALL)
    theirs: Any = models["transfusion", "eager"]
    samples = samples_of(Context(), layout, SMALL)
    labels: list[Tensor] = []
    plain = torch.nn.functional.nll_loss

    def noting(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        labels.append(target)
        return plain(logits, target, **options)

    monkeypatch.setattr("transfusion_pytorch.transfusion.F.nll_loss", noting)
    latents: list[int] = []
    handle = theirs.get_modality_info(0).model_to_latent.register_forward_hook(
        lambda _, __, out: latents.append(out.shape[:-1].numel())
    )
    theirs.prob_uncond = 0.0  # no text is dropped
    transfusion_loss(theirs, samples)()
    handle.remove()
    ids = sum(len(part) for sample in samples for part in sample if not part.is_floating_point())
    batch = pack_samples(models["omni", "eager"], samples)  # type: ignore[arg-type]
    assert sum(latents) == batch.num_refine
    assert int((labels[0] != theirs.ignore_index).sum()) >= ids  # its own control ids too


@needs_transfusion
def test_the_two_models_are_of_one_size() -> None:
    models = build_models(Context(), "8m", TrainingOptions(compiled=False))
    ours, theirs = (num_parameters(models[library, "eager"]) for library in ("omni", "transfusion"))
    assert abs(theirs / ours - 1) < 0.03


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_stated_numbers_of_ids_are_prefilled_and_emitted(prompts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_omni(Context(), "tiny", 512, pictures=False).eval()
    seen: list[torch.Size] = []
    embed = model.embed_context
    monkeypatch.setattr(model, "embed_context", lambda ids, *rest: (seen.append(ids.shape), embed(ids, *rest))[1])
    steps: list[torch.Size] = []
    step = model.token.embed
    monkeypatch.setattr(model.token, "embed", lambda ids: (steps.append(ids.shape), step(ids))[1])
    omni_decode(model, [prompt_of(20)] * prompts, num_new=5)()
    num = num_prompt_ids(model, prompt_of(20))
    assert seen == steps == [(1, prompts * num), *[(1, prompts)] * 4]  # the prompts, 4 ids; the last is read by nothing
    assert num >= 20


@needs_transfusion
def test_both_sample_with_the_stated_number_of_evaluations() -> None:
    options = ImageOptions(quick=True, steps=3, vocab_size=512)
    models = build_models(Context(), "tiny", SMALL)
    theirs = models["transfusion", "eager"]
    runs = image_runs(models["omni", "eager"], {"eager": theirs}, options, "float32")  # type: ignore[arg-type]
    assert {num_evaluations(theirs, run) for name, run in runs.items() if "euler" in name} == {3}
    assert {num_evaluations(theirs, run) for name, run in runs.items() if "midpoint" in name} == {6}


def test_our_loss_is_the_mean_over_supervised_positions() -> None:
    model = build_omni(Context(), "tiny", 512)
    loss = omni_loss(model, samples_of(Context(), "text_image", SMALL), Context())()
    assert loss.requires_grad and 4 < float(loss.detach()) < 10  # log(512) of text and about 2 of latents


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_a_ratio_uses_their_fastest_setting_and_names_it() -> None:
    times = Times({"ours": [1.0, 2.0, 9.0], "slow": [8.0], "fast": [3.0, 5.0, 4.0]}, "a machine")
    measure = times.ratio("row", ["slow", "fast", "absent"], "ours")
    assert measure.value == 2.0
    assert measure.note == "fast 4000.0 ms (3000.0-5000.0), ours 2000.0 ms (1000.0-9000.0); 3 run(s); a machine"
    assert math.isnan(times.ratio("row", ["absent", "fast"], "ours").value)  # compiled, and it does not compile
    assert math.isnan(times.ratio("row", ["fast"], "absent").value)


def test_every_ratio_has_both_sides_as_rows() -> None:
    for name in TASK_NAMES:
        rows = set(TASKS.get(name).rows)
        assert {dtype for dtype in DTYPES if any(f"_{dtype}" in row for row in rows)} == set(DTYPES)
        assert any(row.startswith("ratio_") for row in rows) and any(row.startswith("parameters_") for row in rows)
    training = set(TASKS.get("speed_training").rows)
    for layout in LAYOUTS:
        ends = {f"{layout}_{dtype}_{mode}" for dtype in DTYPES for mode in ("eager", "compiled")}
        assert {f"{side}_{end}" for side in ("ratio", "omni", "transfusion") for end in ends} <= training
    assert load_suite(SUITE, []).speed_training.bars.keys() & {  # type: ignore[attr-defined]
        f"ratio_interleaved_{dtype}_{mode}" for dtype in DTYPES for mode in ("eager", "compiled")
    }


def test_slow_bfloat16_is_not_measured_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "fast_bf16", lambda: False)
    assert TrainingOptions().dtypes == ("float32",)
    assert TrainingOptions(slow_bf16=True).dtypes == TrainingOptions(quick=True).dtypes == ("float32", "bf16")
    assert "not measured" in comparison.notes_of(TrainingOptions())[-1]
    monkeypatch.setattr(comparison, "fast_bf16", lambda: True)
    assert TrainingOptions().dtypes == ("float32", "bf16") and comparison.notes_of(TrainingOptions()) == []


@pytest.mark.parametrize("name", TASK_NAMES)
def test_without_the_extra_one_line_is_printed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for package in ("transfusion_pytorch", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main([SUITE, f"tasks={name}", f"{name}.quick=true"]) == 2
    error = capsys.readouterr().err.strip()
    assert "pip install 'omni-flow[peers]'" in error and len(error.splitlines()) == 1


def test_an_unknown_size_raises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SUITE, "tasks=speed_text", 'speed_text.sizes=["9m"]']) == 2
    assert "9m" in capsys.readouterr().err


@pytest.mark.slow
@needs_transfusion
@needs_transformers
@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_task_runs_and_its_rows_are_complete(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    main([SUITE, f"tasks={name}", f"{name}.quick=true", "--json", "rows.json"])
    rows = {row["name"].partition(".")[2]: row for row in json.loads(Path("rows.json").read_text())}
    options = TASKS.get(name).options(quick=True)
    absent = {row for row in TASKS.get(name).rows_of(options) if row not in rows}
    assert all(row.endswith(("_8m", "_90m")) for row in absent)
    for short, row in rows.items():
        if short.endswith(("_8m", "_90m")) or "compiled" in short:  # a bar of a size, or a mode, that quick leaves out
            assert row["value"] is None, short
        else:
            assert row["value"] > 0, short
            assert "parameters" in short or "positions" in short or "1 thread(s)" in row["note"], short
