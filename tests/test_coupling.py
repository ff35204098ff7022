"""A coupling divides the noise of a group's answers into cells of equal mass, and leaves all of it standard normal."""

import pytest
import torch

from omni.coupling import Coupling, into_cells, potentials
from omni.document import Choice
from omni.rng import Key

SIZE = (6, 4)  # positions, channels


def families() -> dict[str, dict[str, torch.Tensor]]:
    """A family of two groups, and another whose answers differ along some of the same directions."""
    members, places = Key(1).normal((12, *SIZE)), Key(2).normal((5, *SIZE))
    return {
        "member": {"fruit": members[:7], "tool": members[7:] * 2},
        "places": {"two": places + 0.5 * members[0]},
    }


COUPLING = Coupling(families(), dims=4, key=Key(0), local=("places",))


def masses(choice: Choice, num: int, noise: torch.Tensor) -> torch.Tensor:
    cells = [COUPLING.cell(Choice(choice.family, choice.group, i)) for i in range(num)]
    codes = noise @ cells[0].directions.T
    return torch.stack([cell.holds(codes) for cell in cells]).float()


@pytest.mark.parametrize("choice, num", [(Choice("member", "fruit", 0), 7), (Choice("places", "two", 0), 5)])
def test_cells_divide_the_noise_evenly(choice: Choice, num: int) -> None:
    inside = masses(choice, num, Key(5).normal((40_000, 24)))
    assert torch.equal(inside.sum(0), torch.ones(40_000))
    assert float((inside.mean(1) * num - 1).abs().max()) < 0.12


def test_potentials_give_room_to_points_in_the_midst_of_others() -> None:
    points, codes = torch.tensor([[2.0, 0], [-1, 1.7], [-1, -1.7], [0.1, 0.1]]), Key(5).normal((40_000, 2))
    alone, balanced = (
        ((codes @ points.T + g).argmax(1).bincount(minlength=4) / 10_000) for g in (0, potentials(points, Key(0)))
    )
    assert float(alone[3]) < 0.01 and float((balanced - 1).abs().max()) < 0.12


def test_noise_is_moved_into_its_cells_and_stays_standard_normal() -> None:
    """Each answer as often as the other: together they are the noise that a sampler draws."""
    both = [(Choice("member", "fruit", i), Choice("places", "two", j)) for i in range(7) for j in range(5)]
    moved, inside = [], []
    for number in range(4200):
        cells = [COUPLING.cell(choice) for choice in both[number % len(both)]]
        found = into_cells(Key(7).fold(number).normal(SIZE), cells, Key(8).fold(number))
        inside += [bool(cell.holds(cell.directions @ found.flatten())) for cell in cells]
        moved.append(found.flatten())
    assert all(inside)
    noise = torch.stack(moved)
    assert float(noise.mean(0).abs().max()) < 4.5 / 4200**0.5
    assert float((noise.T.cov() - torch.eye(24)).abs().max()) < 7 / 4200**0.5
    kurtosis = (noise @ COUPLING.cell(both[0][0]).directions.T).pow(4).mean(0)
    assert float((kurtosis - 3).abs().max()) < 0.75


def test_what_is_in_its_cell_stays_and_what_is_across_the_directions_too() -> None:
    noise = Key(3).normal(SIZE)
    cells = [COUPLING.cell(Choice("member", "fruit", i)) for i in range(7)]
    results = [into_cells(noise, [cell], Key(4)) for cell in cells]
    assert sum(torch.equal(found, noise) for found in results) == 1
    V = cells[0].directions
    for found in results:
        across = (found - noise).flatten()
        torch.testing.assert_close(across - across @ V.T @ V, torch.zeros(24), atol=1e-5, rtol=0)
    assert torch.equal(results[0], into_cells(noise, [cells[0]], Key(4)))


def test_directions_are_orthonormal_also_between_families() -> None:
    both = torch.cat([COUPLING.cell(c).directions for c in (Choice("member", "fruit", 0), Choice("places", "two", 0))])
    torch.testing.assert_close(both @ both.T, torch.eye(len(both)), atol=1e-5, rtol=0)


def test_points_are_where_the_answers_are() -> None:
    """Means of answers along the directions, in one unit for all groups of the family."""
    for group in ("fruit", "tool"):
        answers = families()["member"][group].mean(1)
        cell = COUPLING.cell(Choice("member", group, 0))
        across = cell.directions.view(-1, *SIZE)
        torch.testing.assert_close(across, across.mean(1, keepdim=True).expand_as(across))  # alike at all positions
        codes = (answers - answers.mean(0)) @ across[:, 0].T
        spread = (codes / cell.points).nanmedian(0).values
        torch.testing.assert_close(codes / spread, cell.points, atol=1e-4, rtol=1e-4)


def test_local_families_see_where_things_are() -> None:
    """Answers that differ in places alone have one mean."""
    picture = Key(3).normal((4,))
    answers = torch.zeros(6, *SIZE)
    answers[torch.arange(6), torch.arange(6)] = picture
    cell = Coupling({"places": {"one": answers}}, 8, Key(0), local=("places",)).cell(Choice("places", "one", 0))
    assert len(cell.directions) == 5 and float(cell.points.std(0).min()) > 0.5
    with pytest.raises(ValueError, match="answers of 'places' do not differ; where they differ in places alone, make"):
        Coupling({"places": {"one": answers}}, 8, Key(0))


@pytest.mark.parametrize(
    "choice, said",
    [
        (Choice("member", "frut", 0), "no group 'frut' of 'member' in the coupling; it has: fruit, tool"),
        (Choice("place", "two", 0), "it has: none"),
        (Choice("member", "fruit", 7), "answer 7 of 'fruit', which has 7"),
    ],
)
def test_unknown_choices_are_named(choice: Choice, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        COUPLING.cell(choice)


def test_noise_chooses_the_answer_whose_cell_it_is_in() -> None:
    noise = Key(6).normal((50, *SIZE))
    chosen = COUPLING.chosen("member", "fruit", noise)
    assert torch.equal(masses(Choice("member", "fruit", 0), 7, noise.flatten(1)).argmax(0), chosen)
    with pytest.raises(ValueError, match="no group 'frut'"):
        COUPLING.chosen("member", "frut", noise)


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="n at least 2"):
        Coupling({"a": {"b": torch.zeros(1, 4, 2)}}, 2, Key(0))
    with pytest.raises(ValueError, match=r"answers of sizes \[\(4, 2\), \(5, 2\)\]"):
        Coupling({"a": {"b": torch.zeros(3, 4, 2)}, "c": {"d": torch.zeros(3, 5, 2)}}, 2, Key(0))
    with pytest.raises(ValueError, match="noise of 20 numbers for answers of 24"):
        into_cells(torch.zeros(5, 4), [COUPLING.cell(Choice("member", "fruit", 0))], Key(0))
