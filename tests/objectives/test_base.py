"""What an objective declares is checked when it is registered; two of one class are refused."""

from __future__ import annotations

from typing import ClassVar

import pytest
from layouts import random_batch, small_model

from omni.objectives import OBJECTIVES, Objective, build_objective
from omni.objectives.base import target_decay_of
from omni.rng import Key
from train.optim.target import build_target


class Silent(Objective):
    """An objective that declares no input."""


class Guessing(Objective):
    reads: ClassVar = "logit"


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (Silent, "objective 'odd': Silent.reads = None; set it to one of 'logits', 'flow', 'placeholders'"),
        (Guessing, "objective 'odd': Guessing.reads = 'logit'; set it to one of"),
        (int, "objective 'odd' must be a subclass of omni.objectives.Objective, got <class 'int'>"),
        (lambda: None, "objective 'odd' must be a subclass of"),
    ],
)
def test_an_objective_declares_its_input(thing: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.register("odd")(thing)
    assert "odd" not in OBJECTIVES


def test_two_objectives_of_one_class_are_refused() -> None:
    """Their losses would have one name, and one of them would be lost."""
    model, batch = small_model(), random_batch(Key(0))
    two = [build_objective("next_token"), build_objective("next_token", z_loss=1e-4)]
    with pytest.raises(ValueError, match=r"two objectives of one class in \['NextToken', 'NextToken'\].*make a sub"):
        model(batch, two, Key(1))
    assert model(batch, two[:1], Key(1)).keys() == {"NextToken"}


def test_two_decays_of_one_class_are_refused() -> None:
    model = small_model()
    first, second = (build_objective("shortcut", target_decay=decay) for decay in (0.9, 0.99))
    with pytest.raises(ValueError, match=r"different target_decay: Shortcut 0.9, Shortcut 0.99; give them one"):
        build_target(model, [first, second])
    target = build_target(model, [first, build_objective("next_token")])
    assert target is not None and target.decay == 0.9
    assert target_decay_of(build_objective("next_token")) is None and not build_objective("next_token").needs_null
