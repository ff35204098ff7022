"""The token head: new ids in tables of their own give what one table gives; a scale multiplies embeddings."""

from __future__ import annotations

import pytest
import torch

from omni.heads.token import TokenHead
from omni.model import OmniConfig
from omni.rng import Key


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_new_rows_equal_one_table(tied: bool) -> None:
    one, apart = TokenHead(12, 8, tied, 3.0, 2.5), TokenHead(12, 8, tied, 3.0, 2.5, new_rows=4)
    for name in ("embedding", "unembedding"):
        whole, old, new = (getattr(*pair) for pair in ((one, name), (apart, name), (apart, f"new_{name}")))
        if whole is not None:
            whole.weight.copy_(Key(0).fold(name).normal((12, 8)))
            old.weight.copy_(whole.weight[:8])
            new.weight.copy_(whole.weight[8:])
    ids, hidden = torch.tensor([[0, 7, 8, 11, 3]]), Key(1).normal((2, 3, 8))
    assert torch.equal(apart.embed(ids), one.embed(ids))
    torch.testing.assert_close(one.embed(ids), one.embedding.weight[ids] * 2.5)
    torch.testing.assert_close(apart.read(hidden), one.read(hidden))
    assert torch.equal(apart.output_weight, one.output_weight)


def test_old_tables_stay_while_new_ids_train() -> None:
    head = TokenHead(12, 8, tied=True, new_rows=4)
    head.embedding.requires_grad_(False)
    head.read(head.embed(torch.tensor([[1, 9]]))).pow(2).sum().backward()
    assert head.embedding.weight.grad is None and head.new_embedding is not None
    assert (head.new_embedding.weight.grad[1] != 0).any()  # type: ignore[index]


def test_new_rows_must_leave_others() -> None:
    with pytest.raises(ValueError, match="new_rows = 9 leaves no other id of vocab_size = 9"):
        OmniConfig(vocab_size=9, new_rows=9)
