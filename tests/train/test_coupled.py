"""Coupled training: pictures with choices are trained from noise of their own, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from omni.layout import LatentSpan
from omni.rng import Key
from train.loop import Run, train_step
from train.recipe import Recipe

MakeRun = Callable[..., Run]
OPEN = ("data.0.options.mixture.open=1.0", "data.0.options.mixture.draw=1.0")
COUPLED = (*OPEN, "coupling.dims=4", 'coupling.local=["places"]')
STRAIGHT = ("objectives.1.name=straight", "objectives.1.options.velocity=0.0", "objectives.1.options.jumps=[1]")


def cells_of(run: Run) -> list[tuple]:
    packed = run.next()
    return [cells for batch in packed.batches for cells in batch.item_cells]


def test_pictures_with_choices_have_cells_and_others_none(make_run: MakeRun) -> None:
    assert not cells_of(make_run(*OPEN))
    run = make_run(*COUPLED)
    for batch in run.loader.next(0).batches:
        assert len(batch.item_cells) in (0, batch.num_items)
        for (uid, _, _), cells in zip(batch.item_names, batch.item_cells, strict=False):
            segments = run.loader.document(uid).images()
            [picture] = [s for s in segments if s.supervise] or [None]
            assert len(cells) == (len(picture.choices) if picture else 0)
            assert [cell.index for cell in cells] == ([c.index for c in picture.choices] if picture else [])


def test_cells_are_of_the_latents_and_do_not_depend_on_the_seed(make_run: MakeRun) -> None:
    one, two = (make_run(*COUPLED, f"seed={seed}", out=str(seed)).loader.coupling for seed in (3, 4))
    for name, parts in one._groups.items():
        assert all(torch.equal(a, b) for a, b in zip(parts, two._groups[name], strict=True))


def test_lanes_send_the_same_cells(make_run: MakeRun) -> None:
    run, plain = make_run(*COUPLED, "workers=2"), make_run(*COUPLED).loader
    plain.stride = 2
    other = [cells for batch in plain.next(0).batches for cells in batch.item_cells]
    for a, b in zip(cells_of(run), other, strict=True):
        assert [c.index for c in a] == [c.index for c in b]
        assert all(torch.equal(x.directions, y.directions) for x, y in zip(a, b, strict=True))


def test_a_step_trains_from_noise_in_the_cells(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = make_run(*COUPLED, *STRAIGHT), []
    objective = run.objectives[1]
    draw = type(objective).draw

    def spy(self, items, key: Key):  # noqa: ANN001, ANN202
        found = draw(self, items, key)
        seen.append((items, found.x))
        return found

    monkeypatch.setattr(type(objective), "draw", spy)
    assert train_step(run, run.next())["loss"] > 0
    inside = [
        bool(cell.holds(cell.directions @ x[items.item == number].flatten()))
        for items, x in seen
        for number, cells in enumerate(items.cells)
        for cell in cells
    ]
    assert len(inside) > 3 and all(inside)


def test_what_cannot_be_coupled_is_said(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="no family 'place'; the sources have"):
        make_run(*OPEN, 'coupling.local=["place"]')
    with pytest.raises(ValueError, match="no source of this recipe says what the right answers are"):
        make_run("coupling.dims=4", "data.0.name=moving_emoji", "data.0.options={}")


def test_the_recipe_knows_its_coupling(make_run: MakeRun) -> None:
    coupled, plain = make_run(*COUPLED), make_run(*OPEN, out="plain")
    assert isinstance(coupled.recipe, Recipe) and coupled.recipe.identity() != plain.recipe.identity()
    spans = [s for s in coupled.loader._composed(0).spans if isinstance(s, LatentSpan)]
    assert spans


def test_copies_are_of_other_right_answers_with_cells_of_their_own(make_run: MakeRun) -> None:
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
            assert [cell.index for cell in batch.item_cells[number]] == [choice.index for choice in other.choices]
            differing += 1
    assert differing > 3 and same > 3


def test_other_answers_are_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"others of grids \[\(1, 1, 2\)\] for a block of \(1, 2, 2\)"):
        LatentSpan(torch.zeros(4, 3), (1, 2, 2), others=(LatentSpan(torch.zeros(2, 3), (1, 1, 2)),))
