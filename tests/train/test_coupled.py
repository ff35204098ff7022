"""Coupled training: pictures with choices are trained from noise of their own, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import omni
from omni.checkpoint import Published, publish
from omni.layout import LatentSpan
from omni.model import read_orders
from omni.rng import Key
from train.loop import Run, train_step
from train.recipe import Recipe

MakeRun = Callable[..., Run]
OPEN = ("data.0.options.mixture.open=1.0", "data.0.options.mixture.draw=1.0")
FAMILIES = 'heads.flow.choices=["member","background","places"]'
COUPLED = (*OPEN, "coupling=true", FAMILIES)
STRAIGHT = ("objectives.1.name=straight", "objectives.1.options.velocity=0.0", "objectives.1.options.jumps=[1]")


def shares_of(run: Run) -> list[tuple]:
    packed = run.next()
    return [shares for batch in packed.batches for shares in batch.item_shares]


def test_pictures_with_choices_have_shares_and_others_none(make_run: MakeRun) -> None:
    assert not shares_of(make_run(*OPEN))
    run = make_run(*COUPLED)
    for batch in run.loader.next(0).batches:
        assert len(batch.item_shares) in (0, batch.num_items)
        for (uid, _, _), shares in zip(batch.item_names, batch.item_shares, strict=False):
            segments = run.loader.document(uid).images()
            [picture] = [s for s in segments if s.supervise] or [None]
            assert len(shares) == (len(picture.choices) if picture else 0)
            assert list(shares) == ([run.loader.coupling.share(c) for c in picture.choices] if picture else [])


def test_shares_and_directions_are_of_the_latents_and_do_not_depend_on_the_seed(make_run: MakeRun) -> None:
    runs = [make_run(*COUPLED, f"seed={seed}", out=str(seed)) for seed in (3, 4)]
    one, two = (run.loader.coupling._shares for run in runs)
    assert one == two and len(one) > 3
    first, second = (run.model.flow.choice.directions for run in runs)
    assert torch.equal(first, second) and bool(first.any(1).all())


def test_directions_and_orders_once_chosen_are_kept(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(*COUPLED)
    choice = run.model.flow.choice
    choice.directions.copy_(torch.eye(choice.directions.shape[1])[: len(choice.directions)])
    order = choice.orders["background"]["any"]
    order.reverse()
    run.model.save_pretrained(tmp_path / "model")
    loaded = omni.from_pretrained(tmp_path / "model").flow.choice
    again = make_run(*COUPLED, f"init_from={tmp_path / 'model'}", out="again").model.flow.choice
    assert torch.equal(again.directions, choice.directions)
    assert again.orders == loaded.orders == choice.orders and again.orders["background"]["any"] == order


def test_a_model_without_choices_can_take_them_up_with_most_of_it_frozen(make_run: MakeRun, tmp_path: Path) -> None:
    """As the bundled model did; other families than it knows are refused, where what is frozen cannot learn them."""
    from_ = f"init_from={tmp_path / 'model'}"
    some = ("init_partial=true", 'train_only=["flow.choice", "flow.noisy"]')
    make_run(*OPEN).model.save_pretrained(tmp_path / "model")
    run = make_run(*COUPLED, from_, *some, out="some")
    assert train_step(run, run.next())["loss"] > 0
    run.model.save_pretrained(tmp_path / "model", replace=True)
    turned = 'heads.flow.choices=["places","background","member"]'
    with pytest.raises(ValueError, match="flow.choices = .*, this recipe has .*; what is frozen cannot adapt"):
        make_run(*OPEN, "coupling=true", turned, from_, *some, out="turned")


def test_orders_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    assert read_orders(Published(publish(tmp_path / "none", {}))) == {}
    odd = publish(tmp_path / "odd", {"choices.json": '{"member": {"fruit": ["a"]}}'})
    with pytest.raises(ValueError, match="choices.json: .*valid integer.*it maps a family and a group to an order"):
        read_orders(Published(odd))


def test_lanes_send_the_same_shares(make_run: MakeRun) -> None:
    run, plain = make_run(*COUPLED, "workers=2"), make_run(*COUPLED).loader
    plain.stride = 2
    found = shares_of(run)
    assert found == [shares for batch in plain.next(0).batches for shares in batch.item_shares] and any(found)


def test_a_step_trains_from_noise_in_the_shares(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = make_run(*COUPLED, *STRAIGHT), []
    objective = run.objectives[1]
    draw = type(objective).draw

    def spy(self, items, key: Key):  # noqa: ANN001, ANN202
        found = draw(self, items, key)
        seen.append((items, found.x))
        return found

    monkeypatch.setattr(type(objective), "draw", spy)
    assert train_step(run, run.next())["loss"] > 0
    choice, inside = run.model.flow.choice, []
    for items, x in seen:
        found = choice.numbers(x, items.item, len(items))
        for item, shares in enumerate(items.shares):
            inside += [int(found[item, share.slot]) in share.numbers(choice.bits) for share in shares]
    assert len(inside) > 3 and all(inside)


def test_what_cannot_be_coupled_is_said(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="'places' has no number in heads.flow.choices, which has: member, background"):
        make_run(*OPEN, "coupling=true", 'heads.flow.choices=["member","background"]')
    with pytest.raises(ValueError, match=r"name the families in the recipe, heads.flow = \{ choices = \['background'"):
        make_run(*OPEN, "coupling=true")
    with pytest.raises(ValueError, match="no source of this recipe says what the right answers are"):
        make_run("coupling=true", FAMILIES, "data.0.name=moving_emoji", "data.0.options={}")


def test_the_recipe_knows_its_coupling(make_run: MakeRun) -> None:
    coupled, plain = make_run(*COUPLED), make_run(*OPEN, out="plain")
    assert isinstance(coupled.recipe, Recipe) and coupled.identity != plain.identity
    spans = [s for s in coupled.loader._read(0).pieces[0].spans if isinstance(s, LatentSpan)]
    assert spans


def test_copies_are_of_other_right_answers_with_shares_of_their_own(make_run: MakeRun) -> None:
    more = "data.0.options.alternatives=3"
    run, plain = make_run(*COUPLED, more, "batch.copies=3"), make_run(*COUPLED, "batch.copies=3")
    differing = same = 0
    packed = [loader.next(start) for loader in (run.loader, plain.loader) for start in (0, 30, 60)]
    pairs = [
        pair for a, b in zip(packed[:3], packed[3:], strict=True) for pair in zip(a.batches, b.batches, strict=True)
    ]
    for batch, alone in pairs:
        assert batch.item_names == alone.item_names and torch.equal(batch.ids, alone.ids)
        by_copy: dict[tuple[int, int], list[torch.Tensor]] = {}
        for number, (uid, block, copy) in enumerate(batch.item_names):
            mine = batch.item == number
            by_copy.setdefault((uid, block), []).append(batch.refine_latents[mine])
            if copy == 0:
                assert torch.equal(batch.refine_latents[mine], alone.refine_latents[mine])
                continue
            pictures = [s for s in run.loader.document(uid).images() if s.supervise]
            if not pictures or not pictures[0].others:
                same += torch.equal(by_copy[uid, block][0], batch.refine_latents[mine])
                continue
            other = pictures[0].others[copy - 1]
            assert torch.equal(batch.refine_latents[mine], run.loader.memo.encode([other])[0][0].flatten(0, 2))
            assert list(batch.item_shares[number]) == [run.loader.coupling.share(c) for c in other.choices]
            differing += 1
    assert differing > 3 and same > 3


def test_other_answers_are_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"others of grids \[\(1, 1, 2\)\] for a block of \(1, 2, 2\)"):
        LatentSpan(torch.zeros(4, 3), (1, 2, 2), others=(LatentSpan(torch.zeros(2, 3), (1, 1, 2)),))
