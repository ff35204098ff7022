"""Modules declare initial weights and optimiser groups: each parameter once; random values are keyed by full name."""

from __future__ import annotations

import pytest
import torch
from layouts import small_model
from torch import nn

from omni.heads.joint import JOINT_HEADS, JointConfig
from omni.model import Omni
from omni.nn.declare import EMBEDDING, FAN_IN, HIDDEN, ONE, Declared, declarations, hidden_names, initialise, of_linear
from omni.rng import Key


class Two(nn.Module):
    def __init__(self, renamed: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.extra = nn.Parameter(torch.zeros(5))
        self.renamed = renamed

    def declare(self) -> dict[str, Declared]:
        second = Declared("fan_in", divisor=2.0, drawn_as="old.weight" if self.renamed else None)
        return of_linear("first", self.first, HIDDEN) | {"second.weight": second, "extra": ONE}


def test_initial_weights_are_as_declared() -> None:
    two = Two()
    initialise(two, Key(0))
    assert not two.first.bias.any() and torch.equal(two.extra, torch.ones(5))
    draws = Key(0).fold("initialise", "second.weight").normal((2, 4))
    torch.testing.assert_close(two.second.weight, draws / 4)
    assert hidden_names(two) == {"first.weight"}
    renamed = Two(renamed=True)
    initialise(renamed, Key(0))
    torch.testing.assert_close(renamed.second.weight, Key(0).fold("initialise", "old.weight").normal((2, 4)) / 4)


class Declares(nn.Module):
    """One parameter of some shape."""

    def __init__(self, shape: tuple[int, ...], declared: Declared) -> None:
        super().__init__()
        self.own, self.declared = nn.Parameter(torch.zeros(shape)), declared

    def declare(self) -> dict[str, Declared]:
        return {"own": self.declared}


def test_the_fan_in_of_a_convolution_counts_its_window() -> None:
    module = Declares((64, 8, 3, 3), FAN_IN)
    initialise(module, Key(0))
    draws = Key(0).fold("initialise", "own").normal((64, 8, 3, 3))
    torch.testing.assert_close(module.own, draws / 72**0.5)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_a_vector_has_no_fan_in(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'own' of shape .* has no fan-in; declare it as a constant or an embedding"):
        initialise(Declares(shape, FAN_IN), Key(0))
    module = Declares(shape, EMBEDDING)
    initialise(module, Key(0))
    assert module.own.abs().max() > 0


def test_an_unknown_start_or_group_raises() -> None:
    with pytest.raises(ValueError, match="start = 'embeding'; did you mean 'embedding'"):
        Declared("embeding")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group = 'muon'; known: .'hidden', 'other'"):
        Declared("fan_in", group="muon")  # type: ignore[arg-type]


def test_undeclared_parameter_raises() -> None:
    with pytest.raises(ValueError, match="no module declares the initialisation of '0.extra'"):
        module = nn.Sequential(Two())
        module[0].declare = lambda: of_linear("first", module[0].first) | {"second.weight": EMBEDDING}  # type: ignore
        initialise(module, Key(0))
    wrong = Two()
    wrong.declare = lambda: {"third": ONE}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Two declares 'third', which is no parameter"):
        declarations(wrong)


@pytest.mark.parametrize("weights", ["shared", "separate", "refine"])
def test_the_model_declares_all_of_its_weights(weights: str) -> None:
    model = small_model(latent_weights=weights)
    assert declarations(model).keys() == dict(model.named_parameters()).keys()
    hidden = hidden_names(model)
    assert all(name.rsplit(".", 2)[1] in ("qkv", "out", "gate_up", "down") for name in hidden)
    assert len(hidden) == 4 * 2 * (1 if weights == "shared" else 2)


@pytest.mark.parametrize("head", JOINT_HEADS.names())
def test_a_joint_head_changes_no_other_weight(head: str) -> None:
    plain = small_model()
    config = plain.config.model_copy(update={"joint": JointConfig(head=head, length=2)})
    joint, bare = Omni(config, Key(3)), Omni(plain.config, Key(3))
    for name, weight in bare.state_dict().items():
        assert torch.equal(joint.state_dict()[name], weight), name
