"""The flow map on the simplex against an exact one, integrated in small steps.

The exact map of a known joint: the posterior of a string given x_t is by Bayes' rule, the diagonal D(x, t, t) is its
marginals, and the path is dx/dt = (x - c D) / t. In y = x / t and a = c (1 - t) / t that is dy/da = D, integrated by
Runge-Kutta in float64.

Legend: B blocks of tokens, K tokens, V ids, N strings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eval.experiments.joint.training import uniforms
from omni.heads.joint import LossInputs, build_head
from omni.heads.joint.simplex import Clock, Simplex, build_targets, decoding_error, semigroup_target, terms_of
from omni.rng import Key
from omni.sequence.placeholders import Blocks

K, V = 2, 3
STRINGS = torch.cartesian_prod(torch.arange(V), torch.arange(V))
POINTS = torch.nn.functional.one_hot(STRINGS, V).double()  # (N, K, V)
DISTRIBUTION = torch.tensor([0.3, 0.02, 0.08, 0.0, 0.25, 0.1, 0.15, 0.0, 0.1], dtype=torch.float64)
Map = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- the exact map of DISTRIBUTION -----------------------------------------------------------------------------------


def posterior(x: Tensor, t: float, scale: float) -> Tensor:
    """(B, K, V): marginals of the posterior over strings, each weighted by its density at x (B, K, V)."""
    distance = (x.unsqueeze(1) - scale * (1 - t) * POINTS).pow(2).sum((-1, -2))
    weights = (DISTRIBUTION.log() - distance / (2 * t * t)).softmax(-1)
    return (weights @ POINTS.flatten(1)).view_as(x)


def carried(x: Tensor, t: float, s: float, scale: float, steps: int) -> Tensor:
    """x at t, mapped to s > 0 along the exact path."""
    start, end = scale * (1 - t) / t, scale * (1 - s) / s
    y, h = x / t, (end - start) / steps

    def rate(y: Tensor, a: float) -> Tensor:
        at = scale / (scale + a)
        return posterior(y * at, at, scale)

    for n in range(steps):
        a = start + n * h
        k1 = rate(y, a)
        k2 = rate(y + h / 2 * k1, a + h / 2)
        k3 = rate(y + h / 2 * k2, a + h / 2)
        k4 = rate(y + h * k3, a + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * s


def exact_endpoint(scale: float, steps: int = 2000) -> Map:
    """D(x, t, s) of the exact map, for times equal in all blocks; s = 0 is integrated to a = 40, where every
    distribution is one-hot to 1e-12, except for paths that start on a border."""

    def endpoint(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        at, to = float(t[0]), float(s[0])
        if at == to:
            return posterior(x, at, scale)
        if to == 0:
            end = scale / (scale + 40)
            return posterior(carried(x, at, end, scale, steps), end, scale)
        return (carried(x, at, to, scale, steps) - to / at * x) / (scale * (1 - to / at))

    return endpoint


class ExactHead(Simplex):
    """A head whose network is a given D."""

    endpoint: Map

    def log_endpoint(self, call, x: Tensor, t: Tensor, s: Tensor) -> Tensor:  # noqa: ANN001
        return self.endpoint(x, t, s).clamp(min=1e-300).log()


def with_endpoint(endpoint: Map | None = None, **options: object) -> ExactHead:
    head = build_head("simplex", options, K, V, 4)
    head.__class__ = ExactHead
    assert isinstance(head, ExactHead)
    head.endpoint = endpoint or exact_endpoint(head.scale)
    return head


def distance(ids: Tensor) -> float:
    frequency = torch.bincount(ids @ torch.tensor([V, 1]), minlength=V**K).double() / len(ids)
    return float((frequency - DISTRIBUTION).abs().sum() / 2)


NOWHERE = None  # never called


@torch.no_grad()
def test_euler_on_the_exact_diagonal_samples_the_joint() -> None:
    """20,000 exact samples have a mean error of .006; 64 Euler steps may have .01."""
    u = uniforms(20000, K, Key(0))
    found = {}
    for steps in (1, 2, 64):
        draft = with_endpoint(sampler="euler").sample(NOWHERE, u, Key(1), steps)
        assert draft.log_q is None and draft.ids.shape == (20000, K)
        found[steps] = distance(draft.ids)
    assert found[64] < 0.016 < 0.06 < found[2] < found[1], found


@torch.no_grad()
def test_the_exact_map_samples_the_joint_in_any_number_of_jumps() -> None:
    """The strings equal those of a fine Euler, except near a border."""
    u = uniforms(2000, K, Key(0))
    endpoint = exact_endpoint(with_endpoint().scale, steps=100)
    once = with_endpoint(endpoint).sample(NOWHERE, u, Key(1), 1).ids
    assert distance(once) < 0.035  # .020 on average for exact samples
    assert (with_endpoint(endpoint).sample(NOWHERE, u, Key(1), 3).ids == once).all(-1).float().mean() > 0.999
    fine = with_endpoint(sampler="euler").sample(NOWHERE, u, Key(1), 200).ids
    assert (fine == once).all(-1).float().mean() > 0.98
    other = with_endpoint(endpoint).sample(NOWHERE, u, Key(2), 1).ids
    assert (other == once).all(-1).float().mean() < 0.6


@torch.no_grad()
def test_scale_changes_the_clock_only() -> None:
    """In the clock of decoding errors, steps in a are equal for every scale, and so are the strings."""
    u = uniforms(1000, K, Key(0))
    first, second = (with_endpoint(sampler="euler", scale=c).sample(NOWHERE, u, Key(1), 5).ids for c in (1.0, 4.0))
    assert torch.equal(first, second)
    uniform = [
        with_endpoint(sampler="euler", scale=c, clock="uniform").sample(NOWHERE, u, Key(1), 5).ids for c in (1.0, 4.0)
    ]
    assert not torch.equal(*uniform)


@torch.no_grad()
def test_two_jumps_of_the_exact_map_equal_one() -> None:
    """Each jump is integrated separately, with an error of about 1e-11."""
    scale, B = 1.5, 20
    head = with_endpoint(exact_endpoint(scale, steps=1000), scale=scale)
    for t, m, s in ((0.9, 0.35, 0.3), (0.95, 0.6, 0.3)):
        noise = Key(0).fold(str(t)).normal((B, K, V), torch.float64)
        ids = STRINGS[torch.multinomial(DISTRIBUTION, B, True, generator=Key(1).generator())]
        x = (1 - t) * scale * torch.nn.functional.one_hot(ids, V) + t * noise
        times = [torch.full((B,), value, dtype=torch.float64) for value in (t, m, s)]
        probs = semigroup_target(head, NOWHERE, x, *times)
        expected, first = head.endpoint(x, times[0], times[2]), head.endpoint(x, times[0], times[1])
        rough = exact_endpoint(scale, steps=750)(x, times[0], times[2])
        assert (expected - rough).abs().max() < 1e-10
        assert (probs - expected).abs().max() < 1e-10
        assert expected.min() > -1e-12 and (expected.sum(-1) - 1).abs().max() < 1e-12, "probabilities again"
        a, b, c = (1 - t, 1 - m, 1 - s)  # the time of arXiv 2604.09784 and 2602.16813: 0 is noise
        share = (b - a) * (1 - c) / ((c - a) * (1 - b))
        landing = carried(x, t, m, scale, 1000)
        convex = share * first + (1 - share) * head.endpoint(landing, times[1], times[2])
        assert (probs - convex).abs().max() < 1e-10
        assert (expected - first).abs().max() > 0.01, "the two jumps have different ends"
    end = torch.zeros(B, dtype=torch.float64)
    probs = semigroup_target(head, NOWHERE, x, times[0], times[1], end)
    assert (probs - head.endpoint(x, times[0], end)).abs().max() < 1e-9, "at s = 0 the first jump has no share"
    near = head.endpoint(x, times[0], times[0] - 1e-6)
    assert (near - posterior(x, float(times[0][0]), scale)).abs().max() < 1e-4, "the diagonal is the limit"


@torch.no_grad()
def test_the_loss_of_the_exact_diagonal_is_its_entropy_and_no_other_is_lower() -> None:
    B = 4000
    ids = STRINGS[torch.multinomial(DISTRIBUTION, B, True, generator=Key(1).generator())]
    blocks = Blocks(ids, torch.ones_like(ids).bool(), tuple((n, 0, 0) for n in range(B)))
    given = LossInputs(blocks, torch.zeros(0), Key(0))

    def each(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The posterior, for blocks whose times differ."""
        return torch.cat([posterior(x[n : n + 1].double(), float(t[n]), head.scale) for n in range(len(x))])

    head = with_endpoint(semigroup_share=0.0)
    head.endpoint = each
    task = build_targets(head, NOWHERE, given)
    right = terms_of(head, NOWHERE, task)["diagonal"]
    log_probs = each(task.x, task.t, task.s)
    entropy = -torch.special.xlogy(log_probs, log_probs).sum()
    assert right.count == B * K
    assert abs(float(right.sum) - float(entropy)) / (B * K) < 0.02, "calibrated: what the posterior says is how often"
    for wrong in (lambda probs: (probs + 0.03) / 1.09, lambda probs: probs**1.3 / (probs**1.3).sum(-1, keepdim=True)):
        head.endpoint = lambda x, t, s, wrong=wrong: wrong(log_probs)
        assert terms_of(head, NOWHERE, task)["diagonal"].sum > right.sum


def test_the_clock_is_linear_in_the_errors_of_argmax() -> None:
    B, V, scale = 40000, 11, 2.0
    clock = Clock("decoding", scale, V)
    noise = Key(0).normal((B, V), torch.float64)
    for u in (0.1, 0.35, 0.8, 1.0):
        t = float(clock.time(torch.tensor([u], dtype=torch.float64)))
        x = t * noise
        x[:, 3] += (1 - t) * scale
        wrong = float((x.argmax(-1) != 3).double().mean())
        assert abs(wrong - u * (V - 1) / V) < 0.01
    times = clock.time(torch.linspace(0, 1, 1000).double())
    assert times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
    middle = decoding_error(torch.tensor([0.0, 30.0], dtype=torch.float64), 50000)
    assert abs(float(middle[0]) - (1 - 1 / 50000)) < 1e-9 and float(middle[1]) < 1e-9
    assert torch.equal(Clock("uniform", scale, V).time(times), times)
