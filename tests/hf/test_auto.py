"""Omni models through transformers' AutoModel: the same files, the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from histories import read, text
from layouts import small_model

from omni.nn.cache import History


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model().save_pretrained(tmp_path_factory.mktemp("hf") / "model", dtype=torch.float32)


@torch.no_grad()
def test_auto_model_reads_the_same_files_and_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    import omni.hf  # noqa: F401

    assert AutoConfig.from_pretrained(folder).omni == omni.from_pretrained(folder).config
    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    ids, plain = [3, 1, 4, 1, 5], omni.from_pretrained(folder, dtype=torch.float64)
    wanted = plain.token.read(read(plain, [History(plain.transformer.new_pool())], [[text(ids)]])[0])
    torch.testing.assert_close(model(torch.tensor([ids])).logits[0], wanted, rtol=1e-12, atol=1e-12)
    padded, mask = torch.tensor([[9, 9, *ids], [*ids, 9, 9]]), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 5 + [0] * 2])
    left, right = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(left[2:], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(right[:5], wanted, rtol=1e-12, atol=1e-12)
    model.save_pretrained(tmp_path / "copy")
    again = omni.from_pretrained(tmp_path / "copy", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_what_has_no_meaning_is_refused(folder: Path) -> None:
    from transformers import AutoModel

    import omni.hf  # noqa: F401

    with pytest.raises(ValueError, match="device_map = 'auto': an Omni model is on one device"):
        AutoModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(ValueError, match="'quantization_config' has no meaning"):
        AutoModel.from_pretrained(folder, quantization_config={})
    with pytest.raises(ValueError, match="trust_remote_code = True is not possible"):
        omni.hf.OmniModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="'no/such' is no local path, and the hub does not give it"):
        omni.hf.OmniModel.from_pretrained("no/such", local_files_only=True)
