"""Native steps of a few tokens against the layers of nn.layer; and the native step's refusals."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from histories import histories_of, read, text
from layouts import CHANNELS, VOCABULARY, random_spans, small_model
from torch import Tensor

import omni
from omni.generation import context
from omni.generation.engine import Engine
from omni.model import Omni
from omni.nn.cache import History
from omni.nn.lora import LoraSpec
from omni.nn.native_library import COMPILERS
from omni.nn.native_step import CompiledStep
from omni.rng import Key
from omni.sequence.layout import LatentSpan, Span

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
SHAPES = {
    "grouped heads": {},
    "odd sizes": {"width": 23, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "mlp_width": 37},
    "latent weights apart": {"latent_weights": "separate"},
    "a generation expert": {"latent_weights": "refine"},
}


def native(model: Omni) -> CompiledStep:
    return CompiledStep(model.transformer, model.token.output_weight)


@torch.inference_mode()
def decode(model: Omni, step: CompiledStep | None, rows: int = 1, most: int = 1, num: int = 8) -> Tensor:
    """Logits (tokens, V) of teacher-forced ids: `num` passes over `rows` histories of different lengths that move as
    they grow, each with 1 to `most` ids of each; the first pass has latents, and half of the later ids are
    discarded."""
    documents: list[list[Span]] = [[text([r] * (1 + 5 * r)), *random_spans(Key(r), 4)] for r in range(rows)]
    histories, logits = histories_of(model, documents), []
    for n in range(num):
        random = Key(n).fold(rows, most).python()
        ids = [[random.randrange(VOCABULARY) for _ in range(random.randint(1, most))] for _ in range(rows)]
        hidden = torch.cat(read(model, histories, [[text(one)] for one in ids], 0, step))
        logits.append(model.token.read(hidden) if step is None else step.read(hidden))
        if n % 3 == 2:
            for one in histories:
                one.truncate(one.length - 1, one.next_position - 1, one.next_block - 1)
    return torch.cat(logits)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "most"), [(1, 1), (3, 1), (7, 1), (1, 5), (3, 4), (7, 9)])
def test_native_steps_equal_the_layers(shape: str, rows: int, most: int) -> None:
    """One or several tokens of one or many histories of different lengths."""
    model = small_model(**SHAPES[shape])
    assert relative(decode(model, native(model), rows, most), decode(model, None, rows, most)) < 1e-5


@needs_compiler
@pytest.mark.parametrize("shape", ["grouped heads", "odd sizes"])
def test_weights_exact_in_bfloat16_are_read_in_bfloat16(shape: str) -> None:
    """Others in float32, never rounded."""
    model, rounded = small_model(**SHAPES[shape]), small_model(**SHAPES[shape])
    rounded.to(torch.bfloat16).to(torch.float32)
    steps = native(model), native(rounded)
    assert [step.stored for step in steps] == [torch.float32, torch.bfloat16]
    wanted = decode(model, None, 3, 2)
    assert relative(decode(model, steps[0], 3, 2), wanted) < 1e-5
    assert relative(decode(rounded, steps[1], 3, 2), decode(rounded, None, 3, 2)) < 1e-5
    assert relative(decode(rounded, steps[1], 3, 2), wanted) > 1e-4  # control: rounded weights differ


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_models_are_computed_at_least_as_exactly_as_by_the_layers(shape: str) -> None:
    """Against the same weights in float64. The layers round after every operation, the native step does not."""
    model, wanted = small_model(**SHAPES[shape]).to(torch.bfloat16), small_model(**SHAPES[shape]).to(torch.bfloat16)
    step, exact = native(model), decode(wanted.double(), None, 3, 2)
    assert step.stored == step.dtype == torch.bfloat16
    ours, layers = decode(model, step, 3, 2), decode(model, None, 3, 2)
    assert ours.dtype == torch.float32 and layers.dtype == torch.bfloat16
    assert relative(ours, exact) < 1.2 * relative(layers, exact) < 0.05
    assert relative(ours, layers.float()) < 0.05


@needs_compiler
@torch.inference_mode()
def test_keys_and_values_are_rounded_to_the_nearest_bfloat16() -> None:
    """Those of the first layer, which depend on the weights alone, to the bit; NaN stays NaN."""
    model = small_model().to(torch.bfloat16)
    model.token.embedding.weight[9] = math.nan
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        step = native(model.to(dtype))
        [history] = histories_of(model, [[]])
        read(model, [history], [[text([*range(40), 9])]], 0, step)
        at = slice(history.start, history.start + 41)
        found.append(torch.stack([history.pool.k[0, :, at], history.pool.v[0, :, at]]))
    assert found[0].dtype == torch.bfloat16 and bool(found[0][:, :, 40].isnan().all())
    assert torch.equal(found[0].nan_to_num(7), found[1].to(torch.bfloat16).nan_to_num(7))


def model_with_loras(dtype: torch.dtype = torch.float32) -> Omni:
    """Two LoRAs of different ranks and targets, one of them in one layer alone."""
    model = small_model()
    fused = ("qkv_proj", "gate_up_proj")
    for spec in (LoraSpec(name="a", rank=5), LoraSpec(name="b", rank=33, alpha=7.0, targets=fused, layers=(1,))):
        lora = model.add_lora(spec)
        with torch.no_grad():
            for name, weight in lora.named_parameters():
                weight.copy_(Key(0).fold(spec.name, name).normal(tuple(weight.shape)) * 0.3)
    return model.to(dtype)


@torch.inference_mode()
def with_loras(model: Omni, step: CompiledStep | None, loras: list[str | None]) -> list[Tensor]:
    """Hidden states (3, W) of each history after a prompt, all in one pass."""
    pool = model.transformer.new_pool()
    histories = [History(pool, lora) for lora in loras]
    for shift in (0, 4):
        found = read(model, histories, [[text([n, 3 + shift, 5 * n])] for n in range(len(loras))], 0, step)
    return found


@needs_compiler
def test_each_history_has_its_own_lora() -> None:
    loras = [None, "a", "a", "b", None, "b"]
    model = model_with_loras()
    step = native(model)
    found, wanted = with_loras(model, step, loras), with_loras(model, None, loras)
    without = with_loras(model, step, [None] * len(loras))
    for n, lora in enumerate(loras):
        assert relative(found[n], wanted[n]) < 1e-5
        assert torch.equal(found[n], without[n]) == (lora is None)
        assert lora is None or relative(found[n], without[n]) > 0.05
    half = model_with_loras(torch.bfloat16)
    both = zip(with_loras(half, native(half), loras), with_loras(half, None, loras), strict=True)
    assert all(one.dtype == other.dtype and relative(one.float(), other.float()) < 0.05 for one, other in both)


@needs_compiler
def test_a_lora_that_was_trained_or_added_is_copied_anew(tiny_model) -> None:  # noqa: ANN001
    model = omni.from_pretrained(tiny_model)
    engine = Engine(model, compile=True)
    common = {"max_tokens": 8, "max_images": 0, "temperature": 1.0}
    before = engine.generate("say", **common).text
    lora = model.add_lora(LoraSpec(name="a"))
    for change in (0.0, 0.3):
        with torch.no_grad():
            for name, weight in lora.named_parameters():
                weight.copy_(Key(0).fold(name).normal(tuple(weight.shape)) * change)
        after = engine.generate("say", lora="a", **common).text
        assert after == Engine(model).generate("say", tokens_per_pass=1, lora="a", **common).text
        assert (after == before) == (change == 0)
    assert engine.generate("say", **common).text == before


@torch.inference_mode()
def native_alone(model: Omni, step: CompiledStep, chosen: list[int]) -> list[Tensor]:
    """Hidden states (3, W) of each after a prompt; every pass is native."""
    histories = histories_of(model, [[]] * len(chosen))
    read(model, histories, [[text(range(r, r + 1 + 2 * r))] for r in chosen], 0, step)
    return read(model, histories, [[text([r, 9, r])] for r in chosen], 0, step)


@needs_compiler
@pytest.mark.parametrize("shape", ["grouped heads", "odd sizes"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_token_does_not_depend_on_the_others_of_its_pass(shape: str, bfloat16: bool) -> None:
    """To the bit: every sum has one order, for any number of tokens."""
    model = small_model(**SHAPES[shape])
    if bfloat16:
        model.to(torch.bfloat16).to(torch.float32)
    step = native(model)
    together = native_alone(model, step, list(range(7)))
    logits = step.read(torch.cat(together)).split(3)
    for r, one in enumerate(together):
        [alone] = native_alone(model, step, [r])
        assert torch.equal(one, alone) and relative(one, together[r - 1]) > 0.1
        assert torch.equal(logits[r], step.read(alone))
        assert torch.equal(logits[r], torch.cat([step.read(token[None]) for token in alone]))


@needs_compiler
def test_threads_change_no_bit() -> None:
    model = small_model()
    step = native(model)
    alone = [torch.cat(native_alone(model, step, chosen)) for chosen in ([3], list(range(7)))]
    torch.set_num_threads(2)
    try:
        threaded = [torch.cat(native_alone(model, step, chosen)) for chosen in ([3], list(range(7)))]
        assert torch.equal(step.read(threaded[1]), step.read(alone[1]))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(alone, threaded, strict=True))


@needs_compiler
def test_short_passes_over_text_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with latents, and long ones, run the layers."""
    model, calls = small_model(), []
    step, call = native(model), CompiledStep.__call__

    def counted(self: CompiledStep, h: Tensor, *arguments) -> Tensor:  # noqa: ANN002
        calls.append(len(h))
        return call(self, h, *arguments)

    monkeypatch.setattr(CompiledStep, "__call__", counted)
    latents = LatentSpan(Key(0).normal((2, CHANNELS)), (1, 1, 2))
    with torch.inference_mode():
        for spans in ([[text([1])], [text([2, 3])]], [[text([1]), latents], [text([2])]], [[text([1] *
        context.NATIVE)]],
                      [[text([1] * context.NATIVE)], [text([1])]]):  # fmt: skip
            read(model, histories_of(model, [[]] * len(spans)), spans, 0, step)
    assert calls == [3, context.NATIVE]


@needs_compiler
def test_a_weight_that_is_not_finite_is_not_hidden() -> None:
    """NaN in the queries or keys: in every hidden state, after any number of positions."""
    for row in (0, 32 + 1):  # of a query, of a key
        model = small_model()
        with torch.no_grad():
            model.get_parameter("transformer.blocks.0.text.qkv.weight")[row, 0] = math.nan
        step = native(model)
        with torch.inference_mode():
            histories = histories_of(model, [[]])
            for ids in ([1], [2, 3], [4] * 20, [5]):
                [hidden] = read(model, histories, [[text(ids)]], 0, step)
                assert bool(hidden.isnan().any(1).all())


@needs_compiler
def test_bundled_model_emits_the_same_text_compiled() -> None:
    model = omni.from_pretrained()
    step = native(model)
    assert step.stored == torch.bfloat16
    with torch.inference_mode():
        wanted = decode_text(model, None)
        assert relative(decode_text(model, step), wanted) < 1e-5
    prompt = "What do you see? Say it in many words."
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        replies = [
            Engine(model, compile=way).generate(prompt, max_tokens=24, max_images=0, **options) for way in (0, 1)
        ]
        assert replies[0].text == replies[1].text != ""


def decode_text(model: Omni, step: CompiledStep | None) -> Tensor:
    """Logits of ten ids, one at a time, beside another history."""
    histories, hidden = histories_of(model, [[text([1])], [text([2, 3])]]), []
    for n in range(10):
        hidden += read(model, histories, [[text([7 * n + 5])], [text([n])]], 0, step)
    return model.token.read(torch.cat(hidden)) if step is None else model.token.cap(step.read(torch.cat(hidden)))


@needs_compiler
def test_native_engines_serve_many_requests(tiny_model) -> None:  # noqa: ANN001
    """Requests of different lengths, with pictures, join the native passes; equal replies without native code."""
    model = omni.from_pretrained(tiny_model)
    prompts = ["a", "say something rather long, please", "b c"]
    options = omni.GenerationOptions(temperature=1.0, max_tokens=16, max_images=1, steps=1, force_image=True,
                                     image_size=(8, 8))  # fmt: skip
    plain, compiled = (Engine(model, compile=way).generate_batch(prompts, options, seeds=[1, 2, 3]) for way in (0, 1))
    for one, other in zip(plain, compiled, strict=True):
        assert one.text == other.text != "" and one.stop_reason == other.stop_reason
        a, b = (torch.tensor(list(reply.images[0].tobytes())) for reply in (one, other))
        assert int((a - b).abs().max()) <= 1


def test_compile_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"this model is torch\.float64 on cpu; load it with dtype=torch\.float32"):
        native(small_model(dtype=torch.float64))


@needs_compiler
def test_a_model_of_another_dtype_is_refused_and_changed_weights_are_copied_anew(tiny_model) -> None:  # noqa: ANN001
    model = omni.from_pretrained(tiny_model)
    engine = Engine(model, compile=True)
    common = {"max_tokens": 8, "max_images": 0, "temperature": 1.0}
    before = engine.generate("say", **common).text
    with torch.no_grad():
        model.get_parameter("transformer.blocks.0.text.qkv.weight").mul_(3)
    after = engine.generate("say", **common).text
    assert after == Engine(model).generate("say", tokens_per_pass=1, **common).text != before
    for dtype, message in ((torch.float64, "serves float32 and bfloat16"), (torch.bfloat16, "its cache torch.float32")):
        model.to(dtype)
        with pytest.raises(ValueError, match=message):
            engine.generate("say", **common)
