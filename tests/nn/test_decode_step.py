"""The decoding step of a few tokens: eager and compiled, against Transformer.extend; and the compiled step's
refusals."""

from __future__ import annotations

import shutil

import pytest
import torch
from layouts import VOCABULARY, small_model
from torch import Tensor

import omni
from omni.generation.context import append_ids, append_text
from omni.generation.engine import Engine
from omni.model import Omni
from omni.nn import native_step
from omni.nn.decode_step import TokenStep
from omni.nn.native_step import COMPILERS, CompiledStep, load_library
from omni.rng import Key

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
SHAPES = {
    "grouped heads": {},
    "odd sizes": {"width": 23, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "mlp_width": 37},
    "latent weights apart": {"latent_weights": "separate"},
    "a generation expert": {"latent_weights": "refine"},
}


class Extend(TokenStep):
    """The test oracle: it never serves, so `append_ids` uses Transformer.extend."""

    def supports(self, cache) -> bool:  # noqa: ANN001
        return False


@torch.inference_mode()
def decode(model: Omni, step: TokenStep, rows: int = 1, num: int = 12) -> Tensor:
    """Logits (num, rows, V) of teacher-forced ids, in a cache that starts small and must grow."""
    cache = model.transformer.new_cache(rows, 4)
    ids = [[Key(n).fold(r).integer() % VOCABULARY for r in range(rows)] for n in range(num)]
    return torch.stack([step.read(append_ids(model, cache, one, step)) for one in ids])


def steps(model: Omni, *kinds: type[TokenStep]) -> list[TokenStep]:
    return [kind(model.transformer, model.token.output_weight) for kind in kinds]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_step_equals_extend(shape: str, rows: int) -> None:
    model = small_model(**SHAPES[shape])
    step, extend = steps(model, TokenStep, Extend)
    assert relative(decode(model, step, rows), decode(model, extend, rows)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_many_tokens_at_once_equal_extend(shape: str, rows: int) -> None:
    """Ids in pieces of 1 to 5, in a cache that must grow, also after a truncation."""
    model = small_model(**SHAPES[shape])
    found = []
    for step in steps(model, TokenStep, Extend):
        cache, hidden = model.transformer.new_cache(rows, 4), []
        with torch.inference_mode():
            for n in (3, 1, 5, 2, 4):
                ids = [[Key(n).fold(r, k).integer() % VOCABULARY for k in range(n)] for r in range(rows)]
                hidden.append(append_text(model, cache, ids, step, 0))
                assert hidden[-1].shape == (rows, n, model.config.transformer.width)
                for r in range(rows):
                    cache.truncate(r, *(f[r] - n // 2 for f in (cache.lengths, cache.next_position, cache.next_block)))
        assert cache.lengths == [9] * rows
        found.append(torch.cat(hidden, 1))
    assert relative(*found) < 1e-5


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [True, False])
def test_compiled_step_equals_extend(shape: str, exact: bool) -> None:
    """Weights that are exact in bfloat16 are read in bfloat16; others in float32, never rounded."""
    model = small_model(**SHAPES[shape])
    if exact:
        model.to(torch.bfloat16).to(torch.float32)
    compiled, extend = steps(model, CompiledStep, Extend)
    assert compiled.dtype == (torch.bfloat16 if exact else torch.float32)  # type: ignore[attr-defined]
    assert relative(decode(model, compiled), decode(model, extend)) < 1e-5
    rounded = small_model(**SHAPES[shape])
    rounded.to(torch.bfloat16).to(torch.float32)
    if not exact:  # control: rounded weights fail
        assert relative(decode(rounded, *steps(rounded, CompiledStep)), decode(model, extend)) > 1e-4


@needs_compiler
def test_compiled_step_with_threads_and_with_rows() -> None:
    model = small_model()
    compiled, extend = steps(model, CompiledStep, Extend)
    assert relative(decode(model, compiled, rows=2), decode(model, extend, rows=2)) < 1e-5
    alone = decode(model, compiled)
    torch.set_num_threads(2)
    try:
        assert torch.equal(decode(model, compiled), alone)
    finally:
        torch.set_num_threads(1)


@needs_compiler
def test_bundled_model_emits_the_same_text_compiled() -> None:
    model = omni.from_pretrained()
    compiled, step = steps(model, CompiledStep, TokenStep)
    assert compiled.dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert relative(decode(model, compiled), decode(model, step)) < 1e-5
    prompt = "What do you see? Say it in many words."
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        replies = [
            Engine(model, compile=way).generate(prompt, max_tokens=24, max_images=0, **options) for way in (0, 1)
        ]
        assert replies[0].text == replies[1].text != ""


def test_compile_without_a_compiler_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setattr(native_step.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler .* install one or leave compile out"):
        load_library()


@needs_compiler
def test_compile_error_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # noqa: ANN001
    (tmp_path / "broken.cpp").write_text("int main( {\n")
    load_library.cache_clear()
    monkeypatch.setattr(native_step, "SOURCE", tmp_path / "broken.cpp")
    with pytest.raises(ValueError, match=r"could not compile broken\.cpp") as error:
        load_library()
    assert "\n" not in str(error.value)


def test_compile_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"this model is torch\.bfloat16 on cpu; load it with dtype=torch\.float32"):
        steps(small_model(dtype=torch.bfloat16), CompiledStep)
