"""LoRA in peft's format: what peft saved is computed alike here, what is written here opens in peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import read, text
from layouts import VOCABULARY, small_model

from omni.importers.peft import read_lora, write_lora
from omni.model import Omni
from omni.nn.cache import History
from omni.nn.lora import LoraSpec
from omni.rng import Key

IDS = [3, 1, 4, 1, 5, 9]


def llama(model: Omni) -> Any:
    """A LlamaForCausalLM with the text weights of a small model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config.transformer
    config = LlamaConfig(
        hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.num_heads, rms_norm_eps=c.norm_eps,
        num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, intermediate_size=c.hidden, tie_word_embeddings=True,
        vocab_size=VOCABULARY + 9, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    found = LlamaForCausalLM(config).double().eval()
    state = {
        "model.embed_tokens.weight": model.token.embedding.weight,
        "model.norm.weight": model.transformer.norm.weight,
    }
    state["lm_head.weight"] = model.token.embedding.weight
    heads, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for i, block in enumerate(model.transformer.blocks):
        w, at = block.text, f"model.layers.{i}."
        q, k, v = w.qkv.weight.split([heads, keys, keys])
        gate, up = w.gate_up.weight.chunk(2)
        state |= {f"{at}self_attn.{n}_proj.weight": x for n, x in (("q", q), ("k", k), ("v", v), ("o", w.out.weight))}
        state |= {f"{at}mlp.{n}_proj.weight": x for n, x in (("gate", gate), ("up", up), ("down", w.down.weight))}
        state |= {f"{at}input_layernorm.weight": w.attention_norm.weight}
        state |= {f"{at}post_attention_layernorm.weight": w.mlp_norm.weight}
    found.load_state_dict(state)
    return found


def logits(model: Omni, lora: str | None) -> torch.Tensor:
    with torch.no_grad():
        return model.token.read(read(model, [History(model.transformer.new_pool(), lora)], [[text(IDS)]])[0])


def test_an_adapter_of_peft_gives_its_logits(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = small_model(dtype=torch.float64, qk_norm="none")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(llama(model), LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_rslora=True))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(Key(1).fold(name).normal(tuple(parameter.shape)) * 0.3)
        wanted = theirs(torch.tensor([IDS])).logits[0]
    theirs.save_pretrained(tmp_path / "mine")
    before = logits(model, None)
    assert read_lora(model, tmp_path / "mine") == "mine"
    torch.testing.assert_close(logits(model, "mine"), wanted, rtol=1e-5, atol=1e-5)  # peft computes norms in float32
    assert torch.equal(logits(model, None), before) and (wanted - before).abs().max() > 1e-2
    saved = model.save_pretrained(tmp_path / "model", dtype=torch.float64)
    from omni import from_pretrained

    assert torch.equal(logits(from_pretrained(saved, dtype=torch.float64), "mine"), logits(model, "mine"))
    model.merge_lora("mine")
    torch.testing.assert_close(logits(model, None), wanted, rtol=1e-5, atol=1e-5)
    assert not model.config.transformer.loras


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "gate_proj"), ("v_proj",)])
def test_a_written_adapter_opens_in_peft(tmp_path: Path, targets: tuple[Any, ...]) -> None:
    from peft import PeftModel

    model = small_model(dtype=torch.float64, qk_norm="none")
    lora = model.add_lora(LoraSpec(name="new", rank=2, alpha=3.0, targets=targets, layers=(1,)))
    assert torch.equal(logits(model, "new"), logits(model, None))  # B starts at zero
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            parameter.copy_(Key(2).fold(name).normal(tuple(parameter.shape)) * 0.3)
    write_lora(model, "new", tmp_path / "new")
    theirs = PeftModel.from_pretrained(llama(model), str(tmp_path / "new")).double().eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(model, "new"), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - logits(model, None)).abs().max() > 1e-2
    other = small_model(dtype=torch.float64, qk_norm="none")
    read_lora(other, tmp_path / "new")
    assert torch.equal(logits(other, "new"), logits(model, "new"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not implemented"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = {'q_proj': 4} is not implemented"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not implemented"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"something_new": 1}, "something_new = 1 is not implemented"),
        ({"r": 5}, "lora_A of v_proj in layer . has shape .2, 32., this model needs .5, 32."),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = small_model()
    model.add_lora(LoraSpec(name="x", rank=2, targets=("v_proj",)))
    folder = write_lora(model, "x", tmp_path / "x")
    model.drop_lora("x")
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_lora(model, folder)
    assert not model.config.transformer.loras


def test_damaged_and_missing_files_are_refused(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ValueError, match="adapter_config.json' is missing"):
        read_lora(model, tmp_path)
    model.add_lora(LoraSpec(name="x", targets=("v_proj",)))
    folder = write_lora(model, "x", tmp_path / "x")
    with pytest.raises(ValueError, match="already exists"):
        write_lora(model, "x", folder)
    with pytest.raises(ValueError, match="two LoRAs are called 'x'"):
        read_lora(model, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_lora(model, folder, "y")
