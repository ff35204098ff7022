"""Lower bounds: the least distance of product distributions, mixtures and few-step samplers from a joint.

    kl          forward divergence. Of a product: the total correlation, at the product of marginals. Of a sampler that
                reveals sets S_1, S_2, .. and samples each as a product, exact otherwise: the sum of
                E[total correlation of S_i given the sets before it]
    tv          total variation. Least over products by linear programmes over one factor at a time: overlap is
                sum_x min(p(x), a(x_k) w(x)), concave in a, piecewise linear and a sum over the ids of x_k, so that
                filling the steepest pieces first is the exact optimum of each; starts are keyed
    mixtures    least forward divergence at a rank, by expectation-maximisation (of many restarts: an upper bound)
    ranks       how many products, or states of a chain, are needed to be exact

Only the support is visited. Legend: N strings of the support, K tokens, V ids, R restarts or rank, L steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.experiments.joint.joints import Table, codes
from omni.rng import Key

# ---- products ------------------------------------------------------------------------------------------------------


def total_correlation(joint: Table) -> float:
    """sum_k H(X_k) - H(X): the least forward divergence of any product."""
    m = joint.marginals()
    return float(-torch.special.xlogy(m, m).sum()) - joint.entropy()


def marginal_product(joint: Table) -> Tensor:
    """(N,): probabilities of the strings of the support under the product of marginals."""
    return joint.marginals()[torch.arange(joint.length), joint.ids].prod(-1)


def marginals_tv(joint: Table) -> float:
    """Total variation of the product of marginals."""
    return 1 - float(torch.minimum(joint.p, marginal_product(joint)).sum())


def least_product_tv(joint: Table, key: Key, restarts: int = 32, rounds: int = 60) -> float:
    """The least total variation of a product found from keyed starts; the product of marginals is one of them.

    Half of the starts use the linear programmes at once, half first ascend a smoothed overlap: a search over one factor
    at a time stops at edges that only several factors together can leave.
    """
    K, V = joint.length, joint.vocab_size
    start = -key.fold("start").uniform((restarts, K, V), torch.float64).clamp(min=1e-12).log()
    shape = 3 * key.fold("sparse").uniform((restarts, 1, 1), torch.float64)  # from uniform starts to nearly single ids
    allowed = joint.marginals() > 0
    start = torch.where(allowed, start ** (1 + shape), 0.0)
    factors = start / start.sum(-1, keepdim=True)
    factors[0] = joint.marginals()
    half = restarts // 2
    factors[half:] = _climb(joint, factors[half:])
    best, seen = 0.0, 0.0
    for n in range(rounds):
        for k in range(K):
            ties = key.fold("ties", n, k).uniform((restarts, len(joint.p)), torch.float64)
            factors[:, k] = _fill(joint, _others(joint, factors, k), k, ties)
        overlap = torch.minimum(joint.p, _others(joint, factors, None)).sum(-1)
        best = max(best, float(overlap.max()))
        if n % 10 == 9:
            if best - seen < 1e-6:
                break
            seen = best
    return 1 - best


def _climb(joint: Table, factors: Tensor, steps: int = 240) -> Tensor:
    """Factors (R, K, V) after Adam on log-factors, with less and less smoothing of min(p, q)."""
    log_a = factors.clamp(min=1e-4).log().requires_grad_()
    allowed = joint.marginals() > 0
    optimiser = torch.optim.Adam([log_a], lr=0.1, betas=(0.8, 0.98))
    scale = float(joint.p.mean())
    for step in range(steps):
        done = step / steps
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - done) + 1e-3
        current = log_a.masked_fill(~allowed, -math.inf).softmax(-1)
        gap = _others(joint, current, None) - joint.p
        rounded = ((gap / scale).square() + 10 ** (-2 - 6 * done)).sqrt() * scale
        optimiser.zero_grad()
        (rounded - gap).sum().backward()  # 2 (p - min(p, q)), rounded
        optimiser.step()
    return log_a.detach().masked_fill(~allowed, -math.inf).softmax(-1)


def _others(joint: Table, factors: Tensor, without: int | None) -> Tensor:
    """(R, N): the product of the factors (R, K, V) at the strings of the support, without one place."""
    found = factors.new_ones(len(factors), len(joint.p))
    for k in range(joint.length):
        if k != without:
            found = found * factors[:, k, joint.ids[:, k]]
    return found


def _fill(joint: Table, weight: Tensor, k: int, ties: Tensor) -> Tensor:
    """(R, V): the factor a of place k that maximises sum_x min(p(x), a(x_k) weight(x)), weight (R, N).

    String x gains weight(x) per unit of a(x_k) until a(x_k) = p(x) / weight(x). The slope of id v on a piece is the
    sum of the weights that have not run out; pieces are filled from the steepest until the sum is 1, equal slopes in
    the order of `ties` (R, N). A remainder without slope is spread evenly over the ids.
    """
    V, place = joint.vocab_size, joint.ids[:, k]
    end = torch.where(weight > 0, joint.p / weight.clamp(min=1e-300), math.inf)
    order = end.argsort(dim=-1, stable=True)
    order = order.gather(-1, place[order].argsort(dim=-1, stable=True))  # by id, and within one by where pieces end
    ids, ends, slopes = place[order], end.gather(-1, order), weight.gather(-1, order)
    fresh = torch.ones_like(ids, dtype=torch.bool)
    fresh[:, 1:] = ids[:, 1:] != ids[:, :-1]
    before = torch.where(fresh, 0.0, ends.roll(1, -1))
    length = torch.where(ends.isinf(), 0.0, ends - before.clamp(max=1e300)).clamp(max=2.0)
    total = torch.zeros(len(weight), V, dtype=weight.dtype).scatter_add_(-1, ids, slopes)
    used = slopes.cumsum(-1) - slopes
    base = torch.where(fresh, used, -math.inf).cummax(-1).values
    slope = total.gather(-1, ids) - (used - base)  # of the piece that ends at this string's end
    steep = (slope * (1 + 1e-9 * ties)).masked_fill(length == 0, -1.0).argsort(-1, descending=True)
    length_in_turn = length.gather(-1, steep)
    room = (1 - (length_in_turn.cumsum(-1) - length_in_turn)).clamp(min=0)
    spent = torch.minimum(length_in_turn, room)
    factor = torch.zeros(len(weight), V, dtype=weight.dtype).scatter_add_(-1, ids.gather(-1, steep), spent)
    return factor + (1 - factor.sum(-1, keepdim=True)).clamp(min=0) / V


def accepted_by_marginals(joint: Table) -> float:
    """Mean number of accepted tokens of a block drafted from the product of marginals, under rejection verification:
    the sum over prefixes of prod_j min(p(x_j | x_<j), q_j(x_j)) (arXiv 2211.17192)."""
    marginals, total = joint.marginals(), 0.0
    reach = {0: 1.0}
    for k, (known, mass) in enumerate(joint.prefixes):
        probs = mass / mass.sum(-1, keepdim=True)
        going = torch.tensor([reach[int(code)] for code in known], dtype=torch.float64).unsqueeze(-1)
        accepted = going * torch.minimum(probs, marginals[k])
        total += float(accepted.sum())
        if k + 1 < joint.length:
            after = known.unsqueeze(-1) * joint.vocab_size + torch.arange(joint.vocab_size)
            alive = probs > 0
            reach = dict(zip(after[alive].tolist(), accepted[alive].tolist(), strict=True))
    return total


# ---- several steps -------------------------------------------------------------------------------------------------


def subset_entropies(joint: Table) -> np.ndarray:
    """(2^K,) float64: the entropy of every subset of the tokens, by bit mask (bit k is token k)."""
    K = joint.length
    if K > 16:
        raise ValueError(f"{joint.name}: 2^{K} subsets are too many; bounds of several steps are for up to 16 tokens")
    found = np.zeros(1 << K)
    powers, ids = joint.vocab_size ** torch.arange(K), joint.ids
    for mask in range(1, 1 << K):
        chosen = torch.tensor([(mask >> k) & 1 for k in range(K)])
        _, place = (ids * (powers * chosen)).sum(-1).unique(return_inverse=True)
        mass = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, joint.p)
        found[mask] = float(-(mass * mass.log()).sum())
    return found


def best_step_bounds(joint: Table, most: int | None = None) -> list[float]:
    """For L = 1 .. K (or `most`): the least forward divergence of L factorised steps, over all ordered partitions.

    Exact, by recursion over the revealed set. Revealing S after P costs
    sum over k in S of H(P + k) - H(P), less H(P + S) - H(P).
    """
    H, K = subset_entropies(joint), joint.length
    steps = min(most or K, K)
    alone = np.zeros((K, 1 << K))
    for k in range(K):
        masks = np.arange(1 << K)
        alone[k] = H[masks | (1 << k)] - H[masks]
    cost = np.full((steps + 1, 1 << K), np.inf)
    cost[0, 0] = 0.0
    for now in range(1, 1 << K):
        bits = [k for k in range(K) if (now >> k) & 1]
        before = np.zeros(1, dtype=np.int64)
        for k in bits:  # subsets of `now`; tokens outside a subset are revealed after it
            before = np.concatenate([before, before | (1 << k)])
        apart = np.zeros(len(before))
        for k in bits:
            apart += np.where((before >> k) & 1, 0.0, alone[k, before])
        price = apart - (H[now] - H[before])
        whole = before != now
        for step in range(1, steps + 1):
            cost[step, now] = np.min((cost[step - 1, before] + price)[whole])
    return [max(0.0, float(value)) for value in np.minimum.accumulate(cost[1:, -1])]


def random_step_bounds(joint: Table) -> list[float]:
    """The same for L = 1 .. K sets of equal size (the first ones larger by one where K leaves a rest), in random order:
    the mean depends only on h(m), the mean entropy of m tokens."""
    H, K = subset_entropies(joint), joint.length
    sizes = np.array([bin(mask).count("1") for mask in range(1 << K)])
    h = [float(H[sizes == m].mean()) for m in range(K + 1)]
    found = []
    for steps in range(1, K + 1):
        at, total = 0, 0.0
        for part in np.array_split(np.arange(K), steps):
            size = len(part)
            total += size * (h[at + 1] - h[at]) - (h[at + size] - h[at])
            at += size
        found.append(max(0.0, total))
    return found


# ---- mixtures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """weights (R,), factors (R, K, V), and the forward divergence of the joint from it."""

    weights: Tensor
    factors: Tensor
    kl: float

    def at(self, ids: Tensor) -> Tensor:
        """(N,) probabilities of strings (N, K)."""
        return self.factors[:, torch.arange(ids.shape[1]), ids].prod(-1).T @ self.weights


def best_mixture(joint: Table, rank: int, key: Key, restarts: int = 64, rounds: int = 200) -> Mixture:
    """The best mixture of `rank` products by forward divergence, by expectation-maximisation from keyed starts."""
    K, V, N = joint.length, joint.vocab_size, len(joint.p)
    starts = key.fold("responsibilities").uniform((restarts, rank, N), torch.float64).clamp(min=1e-12)
    share = starts**4 / (starts**4).sum(1, keepdim=True)
    onehot = torch.nn.functional.one_hot(joint.ids, V).double().flatten(1)  # (N, K V)
    log_q = torch.empty(restarts, N)
    weights, factors = torch.empty(0), torch.empty(0)
    for _ in range(rounds):
        mass = share * joint.p  # (S, R, N)
        weights = mass.sum(-1)
        factors = ((mass @ onehot) / weights.clamp(min=1e-300).unsqueeze(-1)).view(restarts, rank, K, V)
        scores = weights.log().unsqueeze(-1) + _log_products(factors, joint.ids)
        log_q = scores.logsumexp(1)
        share = (scores - log_q.unsqueeze(1)).exp()
    found = -(joint.p * log_q).sum(-1) - joint.entropy()
    best = int(found.argmin())
    return Mixture(weights[best], factors[best], max(0.0, float(found[best])))


def _log_products(factors: Tensor, ids: Tensor) -> Tensor:
    """(S, R, N): sum_k log f_k(x_k) for factors (S, R, K, V)."""
    found = factors.new_zeros(*factors.shape[:2], len(ids))
    for k in range(ids.shape[1]):
        found = found + factors[:, :, k].log()[..., ids[:, k]]
    return found


# ---- ranks ---------------------------------------------------------------------------------------------------------


def cp_rank(joint: Table) -> int | None:
    """The number of products in an exact mixture, where it is easy to determine; else None.

    For two tokens it is the rank of their matrix, if that is at most 2 or the number of ids of either token. Where no
    two strings differ in exactly one place, every product inside the support is a single string, and the rank is the
    number of strings.
    """
    if joint.length == 2:
        return _pair_rank(joint)
    return len(joint.p) if _isolated(joint.ids) else None


def _pair_rank(joint: Table) -> int | None:
    """The rank where it equals the nonnegative rank (at most 2, or full), else None: unknown."""
    rank = int(torch.linalg.matrix_rank(joint.full()))
    rows, columns = (len(joint.ids[:, k].unique()) for k in (0, 1))
    return rank if rank <= 2 or rank == min(rows, columns) else None


def _isolated(ids: Tensor) -> bool:
    """Whether no two rows (N, m) differ in exactly one place: rows stay distinct without any one place."""
    m = ids.shape[1]
    base = int(ids.max()) + 1
    rest = [codes(ids[:, [j for j in range(m) if j != k]], base) for k in range(m)]
    return all(len(code.unique()) == len(code) for code in rest)


def cut_rank(joint: Table) -> int:
    """The greatest rank of the matrix of prefixes and suffixes over all cuts: no chain with fewer states is exact, for
    any emissions."""
    ranks = []
    for k in range(1, joint.length):
        _, rows = codes(joint.ids[:, :k], joint.vocab_size).unique(return_inverse=True)
        _, columns = codes(joint.ids[:, k:], joint.vocab_size).unique(return_inverse=True)
        matrix = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.float64)
        matrix[rows, columns] = joint.p
        ranks.append(int(torch.linalg.matrix_rank(matrix / joint.p.max())))
    return max(ranks, default=1)


def emitting_states(joint: Table) -> tuple[int, int]:
    """(lower bound, sufficient number) of states of a hidden Markov chain whose token depends on its state alone, as in
    the head "hmm". More than the cut rank: the state at place k must make prefix, token and suffix independent.

    Lower bound: equivalent prefixes, tokens and suffixes are merged into classes; where no two of the remaining triples
    differ in one place alone, each needs its own state (see `cp_rank`), else the bound is the cut rank. Sufficient: one
    state for every class of prefixes with every token that may follow it.
    """
    least, enough = cut_rank(joint), 1
    for k in range(joint.length):
        before, after = _classes(joint, k)[0], _classes(joint, k + 1)[1]
        triples = torch.stack([before, joint.ids[:, k], after], 1).unique(dim=0)
        if _isolated(triples):
            least = max(least, len(triples))
        enough = max(enough, len(triples[:, :2].unique(dim=0)))
    return least, enough


def _classes(joint: Table, k: int) -> tuple[Tensor, Tensor]:
    """(N,) twice: the class of every string's first k tokens, equal if the distribution of the rest given them is
    equal; and of the rest, equal if the distribution of the prefix given it is equal."""
    _, rows = codes(joint.ids[:, :k], joint.vocab_size).unique(return_inverse=True)
    _, columns = codes(joint.ids[:, k:], joint.vocab_size).unique(return_inverse=True)
    matrix = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1, dtype=torch.float64)
    matrix[rows, columns] = joint.p
    found = []
    for m, at in ((matrix, rows), (matrix.T, columns)):
        probs = (m / m.sum(-1, keepdim=True)).mul(1e9).round()
        found.append(probs.unique(dim=0, return_inverse=True)[1][at])
    return found[0], found[1]
