"""Groups of particles: their members, their shared values, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clouds import cloud
from gaussian import PLANE, GaussianCall, gaussian_items

from omni.objectives import build_objective
from omni.objectives.base import Items
from omni.objectives.particles import gather, group_items
from omni.objectives.times import BatchNames
from omni.rng import Key


def lists(items: Items, num: int, how: str, **options: bool) -> list[list[int]]:
    return [group for kind in group_items(items, num, how, **options).members for group in kind.tolist()]  # type: ignore[arg-type]


def ragged() -> Items:
    """Documents 4..7, some with two blocks (with different block numbers), of 1 or 2 latents; two copies each."""
    blocks = [(4, 1, 1), (4, 3, 2), (5, 2, 1), (6, 1, 2), (6, 2, 2), (7, 9, 1)]
    names = [(document, block, copy) for document, block, _ in blocks for copy in range(2)]
    sizes = torch.tensor([size for _, _, size in blocks for _ in range(2)])
    item = torch.arange(len(names)).repeat_interleave(sizes)[None]
    return Items(torch.arange(item.numel() * 3.0).view(1, -1, 3), item, names)


def test_copies_of_a_block_are_together() -> None:
    items = gaussian_items(PLANE, num=2, copies=4)
    assert lists(items, 2, "copies") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="has 4 copies of a block, but the objective needs particles=3.*batch.copies"):
        group_items(items, 3, "copies")
    with pytest.raises(ValueError, match="has 1 copies .* particles=4"):
        group_items(cloud(PLANE, 8), 4, "copies")


def test_mixed_groups_are_of_runs_of_documents_by_place_copy_and_size() -> None:
    assert sorted(lists(ragged(), 4, "mixed")) == [[0, 4, 10], [1, 5, 11], [2, 8], [3, 9], [6], [7]]


def test_items_without_condition_are_apart_if_apart() -> None:
    items = replace(gaussian_items(PLANE, num=4), is_null=torch.tensor([False, True, False, True]))
    assert lists(items, 4, "mixed") == [[0, 1, 2, 3]]
    assert lists(items, 4, "mixed", apart=True) == [[0, 2], [1, 3]]


def test_shared_values_of_a_group_do_not_depend_on_the_batch() -> None:
    """Half of the groups alone have the names that they have in the whole."""
    for how in ("copies", "mixed"):
        whole, half = gaussian_items(PLANE, num=8, copies=2), gaussian_items(PLANE, num=4, copies=2)
        late = replace(half, names=list(whole.names)[8:])
        found, alone = group_items(whole, 2, how), group_items(late, 2, how)  # type: ignore[arg-type]
        names = [found.names[int(n)] for n in found.index]
        assert names[8:] == [alone.names[int(n)] for n in alone.index]


@pytest.mark.parametrize(("copies", "how"), [(1, "mixed"), (4, "mixed"), (4, "copies"), (2, "copies")])
def test_batch_names_give_the_same_groups(copies: int, how: str) -> None:
    """The fast path for toy data and the general one give the same groups; the last one is incomplete."""
    items = cloud(PLANE, 7, copies)
    assert isinstance(items.names, BatchNames)
    named = Items(items.latents, items.item, list(items.names))
    fast, slow = group_items(items, 2, how), group_items(named, 2, how)  # type: ignore[arg-type]
    assert sorted(lists(items, 2, how)) == sorted(lists(named, 2, how))
    assert list(fast.names) == list(slow.names) or how == "mixed"
    assert len(fast.names) == len(slow.names) and torch.equal(fast.index, slow.index)


@pytest.mark.parametrize(
    ("name", "options"), [("drifting", {}), ("moment_matching", {"kernel": {"kind": "energy"}, "particles": 1})]
)
def test_items_without_latents_have_no_group(name: str, options: dict) -> None:
    """An absent block of tokens (heads.joint.simplex) is an item without latents."""
    items = Items(Key(0).normal((2, 2, 2), torch.float64), torch.tensor([[0, 0], [-1, -1]]), ((0, 0, 0), (-2, 1, 0)))
    objective = build_objective(name, **options)
    loss = objective.loss(GaussianCall(items, PLANE), objective.draw(items, Key(0)))
    assert torch.isfinite(loss.sum) and loss.count == 2


def test_gather_gives_each_particle_its_latents_in_order() -> None:
    items = ragged()
    for members in group_items(items, 4, "mixed").members:
        found = gather(items, items.latents, members)
        for g, group in enumerate(members.tolist()):
            for m, item in enumerate(group):
                assert torch.equal(found[g, m], items.latents[items.item == item])


def test_spread_puts_values_back() -> None:
    items = ragged()
    groups = group_items(items, 4, "mixed")
    back = groups.spread(torch.zeros(len(items)), [members.float() for members in groups.members])
    assert torch.equal(back, torch.arange(len(items)).float())


def test_time_that_cannot_take_effect_is_refused() -> None:
    from omni.objectives import build_objective

    for name in ("moment_matching", "drifting"):
        with pytest.raises(ValueError, match="time has no effect with pairs='one_step'"):
            build_objective(name, pairs="one_step", time={"kind": "uniform"})


def test_the_particles_of_a_group_share_their_times() -> None:
    from omni.objectives import build_objective

    for how in ("copies", "mixed"):
        items = gaussian_items(PLANE, num=8, copies=4)
        draw = build_objective("moment_matching", groups=how).draw(items, Key(0))
        for group in lists(items, 4, how):
            assert all(len(set(value[group].tolist())) == 1 for value in (draw.t, draw.s, draw.r))
        assert len(set(draw.t.tolist())) == 8
