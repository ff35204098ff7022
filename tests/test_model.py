"""Transformer and model: backends agree, cached = uncached = training, text is bit-identical, files load strictly."""

from __future__ import annotations

import pytest
import torch
from layouts import VOCABULARY, random_batch, small_model

import omni
from omni.generation.contract import verify
from omni.nn.attention.backends import choose_backend
from omni.nn.layer import Operations
from omni.nn.transformer import TransformerConfig
from omni.objectives import build_objective
from omni.rng import Key
from omni.sequence.layout import Stream


@pytest.mark.parametrize("weights", ["shared", "separate", "refine"])
def test_contract_cached_uncached_training(weights: str) -> None:
    checks = verify(small_model(latent_weights=weights))
    assert len([c for c in checks if c.name.startswith("float64")]) == 8
    assert sum(c.name.startswith("float32") for c in checks) >= 9  # and one of the compiled step
    for check in checks:
        assert check.holds, check


def test_generation_weights_change_only_the_refine_stream() -> None:
    """Its weights change F; hidden states of the context (text and finished latents) keep every bit."""
    model, batch = small_model(latent_weights="refine"), random_batch(Key(5).fold("expert"))
    with torch.inference_mode():
        before = everything(model, batch)
        for name, parameter in model.named_parameters():
            if ".latent." in name:
                parameter.mul_(1.5)
        after = everything(model, batch)
    assert bool(batch.is_latent.any())
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1], atol=1e-3)


def test_contract_fails_when_the_mask_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refine copy that attends to its own clean block breaks the contract."""
    import omni.sequence.mask

    def leaky(q_document, q_block, q_copy, q_rank, k_document, k_block, k_copy, k_rank):  # noqa: ANN001, ANN202
        return (q_document == k_document) & torch.where(k_copy == 0, k_block <= q_block, k_copy == q_copy)

    monkeypatch.setattr(omni.sequence.mask, "visible", leaky)
    assert not all(check.holds for check in verify(small_model()))


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
def test_attention_backends_agree(backend: str) -> None:
    batch = random_batch(Key(5).fold("backends"))
    reference, other = small_model(attention="math"), small_model(attention=backend)
    with torch.inference_mode():
        for a, b in zip(everything(reference, batch), everything(other, batch), strict=True):
            assert float((a - b).abs().max()) < 1e-5


def everything(model: omni.Omni, batch) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN001
    hidden, memory = model.transformer.context(model.embed(batch), batch.context, batch.is_latent)
    t = torch.full((batch.num_items,), 0.7)
    flow = model.velocity(batch.refine_latents, t, 0.2 * t, torch.ones_like(t), batch.refine, batch.item, memory)
    return hidden[batch.context.document >= 0], flow[batch.item >= 0]


@pytest.mark.parametrize(
    ("device", "training", "backend"),
    [("cpu", True, "math"), ("cpu", False, "sdpa"), ("cuda", True, "flex"), ("cuda", False, "sdpa")],
)
def test_the_backend_follows_the_device_and_the_use(device: str, training: bool, backend: str) -> None:
    assert choose_backend(None, device, training) == backend
    assert choose_backend(None, device, training, is_long=True) == ("sdpa" if backend == "math" else backend)


def test_long_rows_train_with_sdpa_and_a_named_backend_stays() -> None:
    here, plain = torch.device("cpu"), small_model().transformer
    assert [plain.backend(here, length) for length in (1000, 1001)] == ["math", "sdpa"]
    assert small_model(attention="math").transformer.backend(here, 5000) == "math"


def test_norms_and_powers_in_float32_leave_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast computes these in float32 for any input dtype (its list is longer than the CPU's)."""
    norm, rsqrt = torch.nn.functional.rms_norm, torch.Tensor.rsqrt
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *arguments: norm(*arguments).float())
    monkeypatch.setattr(torch.Tensor, "rsqrt", lambda x: rsqrt(x).float())
    block = small_model().transformer.blocks[0].bfloat16()
    width = block.text.qkv.in_features
    operations = Operations(block.text, None, False, (torch.ones(()), torch.zeros(())))
    x = operations.norm(block.text.attention_norm, torch.ones(1, 4, width, dtype=torch.bfloat16))
    queries_keys, v = operations.heads(block.text, operations.project(block.text, "qkv", x))
    assert {part.dtype for part in (x, queries_keys, v)} == {torch.bfloat16}
    assert block.normalise(torch.ones(2, 6, width, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_device_that_is_not_here_is_named(tiny_model) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="device 'gpu' is not available; use cpu"):
        omni.from_pretrained(tiny_model, device="gpu")


def test_unknown_or_impossible_backends_raise() -> None:
    with pytest.raises(ValueError, match="attention = 'turbo': Input should be 'math', 'sdpa', 'flex' or 'flash'"):
        TransformerConfig(attention="turbo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown attention backend 'turbo'; known: math, sdpa, flex, flash"):
        choose_backend("turbo", "cpu")
    with pytest.raises(ValueError, match="needs CUDA"):
        small_model(attention="flash").transformer.backend(torch.device("cpu"))


def test_flex_training_on_cpu_raises() -> None:
    model = small_model(attention="flex").train()
    with pytest.raises(ValueError, match="no backward on the CPU"):
        model(random_batch(Key(1)), [build_objective("next_token")], Key(0))


def test_text_logits_are_bit_identical_to_a_plain_decoder() -> None:
    """A plain decoder (token head + transformer) equals the whole model with flow head and codec."""
    model = small_model()
    ids = torch.tensor([[Key(0).fold(i).integer() % VOCABULARY for i in range(20)]])
    index = torch.arange(20)[None]
    stream = Stream(torch.zeros_like(index), index, torch.zeros_like(index), index[..., None].expand(1, 20, 3))
    with torch.inference_mode():
        plain, _ = model.transformer.context(model.token.embed(ids), stream, torch.zeros_like(index).bool())
        latents = torch.zeros(1, 20, model.config.flow.channels)
        full, _ = model.transformer.context(
            model.embed_context(ids, latents, torch.zeros(1, 20, dtype=torch.bool)), stream, torch.zeros(1, 20).bool()
        )
        assert torch.equal(model.token.read(plain), model.token.read(full))


def test_missing_modalities_give_zero_terms_not_errors() -> None:
    from omni.sequence.layout import Shape, TokenSpan, pack

    model = small_model()
    objectives = [build_objective("next_token"), build_objective("flow_matching")]
    [text_only], _ = pack([[TokenSpan([1, 2], [False, False])]], [Shape(1, 4, 4)], channels=4, pad_id=0)
    terms = model(text_only, objectives, Key(0))
    assert terms["NextToken"].count == terms["FlowMatching"].count == 0
    assert float(terms["NextToken"].sum.detach()) == float(terms["FlowMatching"].sum.detach()) == 0


def test_initialisation_is_keyed_by_name() -> None:
    shallow, deep = small_model(depth=1), small_model(depth=2)
    assert torch.equal(shallow.transformer.blocks[0].text.qkv.weight, deep.transformer.blocks[0].text.qkv.weight)
    assert not torch.equal(small_model(seed=1).flow.clean.weight, small_model(seed=2).flow.clean.weight)


def test_saved_model_loads_strictly_and_verifies_every_byte(tiny_model, tmp_path) -> None:  # noqa: ANN001
    import json
    import shutil

    loaded = omni.from_pretrained(tiny_model)
    again = omni.from_pretrained(tiny_model)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True)
    )
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        omni.from_pretrained(copy)
    state = {name: value for name, value in loaded.state_dict().items() if "velocity" not in name}
    with pytest.raises(ValueError, match="missing weights"):
        loaded.load_weights(state, "here")
    assert json.loads((tiny_model / "manifest.json").read_text())["files"].keys() >= {
        "config.json",
        "model.safetensors",
    }
    with pytest.raises(ValueError, match="no model directory"):
        omni.from_pretrained(tmp_path / "nowhere")
