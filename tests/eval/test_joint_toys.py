"""The joint-token experiments at small size: training, measurement, both tasks, their table, the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.experiments.joint.joint_plane import ToysOptions, poker_rows, toys_rows
from eval.experiments.joint.lab import (
    HeadLine,
    LabOptions,
    check_lines,
    draw_ids,
    exact_distributions,
    known_table,
    plain_distances,
    run_group,
    support_scores,
)
from eval.experiments.joint.pictures import LEVELS, pair_frequencies, table_picture
from eval.experiments.joint.training import toy_batch, toy_model
from eval.suite import load_suite, main
from omni.heads.joint import JOINT_HEADS, Draft, JointConfig, JointHead
from omni.heads.joint.training import teacher_log_probs
from omni.objectives.terms import Terms
from omni.rng import Key
from omni.samplers.inverse_cdf import inverse_cdf_sample

ROOT = Path(__file__).parents[2]
SMALL = LabOptions(width=16, depth=1, adapter_rank=2, backbone_steps=3, head_steps=3, rows=16, num_samples=600)
SIZES = [
    "{}.run.width=16", "{}.run.depth=1", "{}.run.adapter_rank=2", "{}.run.backbone_steps=3", "{}.run.head_steps=3",
    "{}.run.rows=16", "{}.run.num_samples=600",
]  # fmt: skip


@JOINT_HEADS.register("listener")
class Listener(JointHead):
    """Emits the ids of its teacher's probabilities; does not learn, but stores the teacher's values."""

    layout, needs_teacher, passes = "causal", True, "divisors"
    lessons: list[torch.Tensor] = []

    def __init__(self, config: object, length: int, vocab_size: int, width: int) -> None:
        super().__init__(config, length, vocab_size, width)
        self.bias = torch.nn.Parameter(torch.zeros(vocab_size))

    def sample(self, call, uniforms, key, passes=1):  # noqa: ANN001, ANN201
        distribution = self.bias.double().expand(*uniforms.shape, -1)
        return Draft(inverse_cdf_sample(distribution, uniforms))

    def loss(self, call, lesson):  # noqa: ANN001, ANN201
        Listener.lessons.append(lesson.teacher)
        return {"listener": Terms(self.bias.square().sum(), 1.0)}


def tiny(name: str, head: str = "product"):  # noqa: ANN201
    joint = known_table(name)
    model = toy_model(JointConfig(head=head, length=joint.length, adapter_rank=2), joint.vocab_size, Key(0), 16, 1)
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            parameter.add_(0.3 * Key(1).fold(n).normal(tuple(parameter.shape)))
    return joint, model.eval()


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_scores_of_the_support_match_the_samples() -> None:
    joint, model = tiny("parity3")
    scores = support_scores(model, joint).exp()
    ids = draw_ids(model, 3, 20_000, Key(0))
    assert torch.equal(ids, draw_ids(model, 3, 20_000, Key(0))) and not torch.equal(
        ids, draw_ids(model, 3, 20_000, Key(1))
    )
    at = joint.find(ids)
    shares = torch.bincount(at[at >= 0], minlength=len(joint.p)) / len(ids)
    assert (shares - scores).abs().max() < 0.015 and scores.max() > 0.05


def test_the_plain_distribution_is_that_of_autoregressive_decoding() -> None:
    joint, model = tiny("parity3")
    ids = torch.tensor([[a, b, c] for a in range(3) for b in range(3) for c in range(3)])  # 2: what starts a string
    with torch.inference_mode():
        batch, starts, blocks = toy_batch(torch.zeros(27, 0, dtype=torch.int64), ids, 2)
        distributions = teacher_log_probs(model, model.context(batch)[0], starts, blocks).exp()
    distribution = distributions.gather(-1, ids.unsqueeze(-1)).squeeze(-1).prod(-1)
    assert float(distribution.sum()) == pytest.approx(1)
    q = torch.tensor([float(distribution[(ids == row).all(-1)]) for row in joint.ids])
    assert plain_distances(model, joint).valid == pytest.approx(float(q.sum()), abs=1e-6)
    assert plain_distances(model, joint).tv == pytest.approx(
        1 - float(torch.minimum(q.double(), joint.p).sum()), abs=1e-6
    )


# ---- training ------------------------------------------------------------------------------------------------------


def test_heads_share_a_backbone_and_depend_on_their_key_alone() -> None:
    lines = {"product": HeadLine(head="product"), "again": HeadLine(head="product", head_steps=6)}
    once = run_group("poker_s6", lines, SMALL, Key(0))
    twice = run_group("poker_s6", {"again": lines["again"]}, SMALL, Key(0))
    assert once.plain == twice.plain and torch.equal(once.heads["again"].ids, twice.heads["again"].ids)
    assert once.heads["again"].distances == twice.heads["again"].distances
    assert once.heads["product"].distances != once.heads["again"].distances
    assert once.heads["product"].exact and once.heads["product"].ids.shape == (600, 2)
    assert run_group("poker_s6", lines, SMALL, Key(1)).plain != once.plain


def test_training_learns_the_marginals() -> None:
    """200 steps: from any start to near the product of marginals, and not below the lower bound of products."""
    options = SMALL.model_copy(update={"backbone_steps": 100, "head_steps": 100, "rows": 64, "rate": 1e-2})
    found = run_group("equal_pairs2", {"product": HeadLine(head="product")}, options, Key(0))
    assert 0.5 < found.heads["product"].distances[1].tv < 0.85
    assert found.plain.tv < 0.4


def test_the_exact_teacher_is_used_and_the_plain_one_is_the_backbone() -> None:
    joint = known_table("parity3")
    for teacher in ("exact", "plain"):
        Listener.lessons.clear()
        run_group("parity3", {"listener": HeadLine(head="listener", teacher=teacher)}, SMALL, Key(0))
        assert len(Listener.lessons) == SMALL.head_steps and Listener.lessons[0].shape == (16, 3, 3)
        last = Listener.lessons[0][:, 2].exp()
        assert (last.sum(-1) - 1).abs().max() < 1e-9
        assert bool((last.max(-1).values == 1).all()) == (teacher == "exact")
    ids = joint.draw(Key(3), 5)
    distributions = exact_distributions(joint, ids)
    assert torch.equal(distributions[..., :2], joint.conditionals(ids)) and (distributions[..., 2] == -torch.inf).all()


@pytest.mark.parametrize(
    ("joints", "line", "message"),
    [
        (("large_bigram4",), {}, "too many strings"),
        (("poker_s6",), {"head": "prodct"}, "did you mean 'product'"),
        (("poker_s6",), {"options": {"rank": 3}}, "rank"),
        (("poker_s6",), {"joints": ("parity8",)}, "not among"),
        (("poker_s6",), {"teacher": "exact"}, "no use for a teacher"),
    ],
)
def test_invalid_options_raise_before_anything_runs(joints: tuple[str, ...], line: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_lines(joints, {"line": HeadLine(**({"head": "product"} | line))}, SMALL)


# ---- the tasks -----------------------------------------------------------------------------------------------------


def rows_of(arguments: list[str]) -> dict[str, float]:
    assert main([*arguments, "--json", "rows.json"]) == 0
    return {row["name"].partition(".")[2]: row["value"] for row in json.loads(Path("rows.json").read_text())}


def write_suite(task: str, joints: str) -> str:
    Path("toys.toml").write_text(
        f'title = "Toys"\ntasks = ["{task}"]\n[{task}]\njoints = {joints}\n'
        f'[{task}.heads.product]\nhead = "product"\n[{task}.heads.listener]\nhead = "listener"\nteacher = "exact"\n'
        "passes = [2]\n"
    )
    return "toys.toml"


def test_a_tiny_run_of_the_toys_gives_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_suite("joint_toys", '["poker_s6", "parity3"]')
    changes = [size.format("joint_toys") for size in SIZES] + ["joint_toys.seeds=2"]
    rows = rows_of([path, *changes])
    options = load_suite(path, changes).joint_toys
    assert set(rows) == set(toys_rows(options)) and all(value is not None for value in rows.values())
    assert "poker_s6_listener_tv_2" in rows and "parity3_listener_tv_2" not in rows  # 2 does not divide 3
    assert rows["poker_s6_floor_tv"] == pytest.approx(0.488, abs=2e-3)
    assert rows["poker_s6_floor_marginals"] == pytest.approx(0.722, abs=1e-3)
    assert rows["parity3_floor_kl"] == pytest.approx(0.693, abs=1e-3) and rows["poker_s6_product_spread"] > 0
    for joint in ("poker_s6", "parity3"):
        assert rows[f"{joint}_product_tv"] >= rows[f"{joint}_floor_tv"] - 1e-3
        assert 1 - rows[f"{joint}_product_valid"] <= rows[f"{joint}_product_tv"] + 1e-9


def test_a_tiny_run_of_poker_gives_all_rows_and_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_suite("poker", '["poker_s6"]')
    changes = [size.format("poker") for size in SIZES]
    rows = rows_of([path, *changes])
    assert set(rows) == set(poker_rows(load_suite(path, changes).poker))
    assert rows["floor_tv"] == pytest.approx(0.488, abs=2e-3) and rows["product_tv"] > 0.4
    assert 2_000 < Path("runs/eval/poker.png").stat().st_size < 100_000
    assert "high pair" in Path("runs/eval/toys.html").read_text()
    with pytest.raises(ValueError, match="pairs of words"):
        load_suite(path, [*changes, 'poker.joints=["parity2"]'])
    with pytest.raises(ValueError, match="did you mean 'product'"):
        load_suite(path, [*changes, 'poker.only=["prodct"]'])


def test_the_committed_tables_name_what_exists() -> None:
    suite = load_suite(ROOT / "eval" / "suites" / "joint_toys.toml", [])
    options: ToysOptions = suite.joint_toys
    for joint in options.joints:
        assert options.of(joint) and known_table(joint).name == joint
    assert set(options.bars) <= set(toys_rows(options))
    check_lines(options.joints, options.chosen, options.run)
    hands = load_suite(ROOT / "eval" / "suites" / "poker.toml", []).poker
    check_lines(hands.joints, hands.chosen, hands.run)
    assert all(set(line.joints) <= set(options.joints) for line in options.heads.values())


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_legal_pairs_are_blue_illegal_ones_red_and_absent_ones_white() -> None:
    joint = known_table("poker_s6")
    ids = torch.tensor([[0, 1], [0, 3], [10, 3]])  # "high card", "high pair", and no word
    distribution = pair_frequencies(ids, 10)
    assert float(distribution.sum()) == pytest.approx(2 / 3) and float(distribution[0, 1]) == pytest.approx(1 / 3)
    pixels = table_picture(distribution, joint.full() > 0, joint.words)
    assert pixels.dtype == torch.uint8 and pixels.shape[0] == pixels.shape[1]

    def cell(i: int, j: int) -> list[int]:
        return pixels[58 + 22 * i + 11, 58 + 22 * j + 11].tolist()

    assert cell(0, 1)[2] > cell(0, 1)[0] + 50 and cell(0, 3)[0] > cell(0, 3)[2] + 50
    assert cell(5, 5) == [255, 255, 255] and LEVELS > 1
