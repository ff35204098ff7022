"""The text experiments at small size: lossless decoding, likelihoods, rows, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.experiments.joint.decode import decode_plain, decode_rounds
from eval.experiments.joint.heads_on_text import (
    Text,
    TextLine,
    TextOptions,
    contexts_of,
    held_out,
    measure_plain,
    train_and_measure,
    train_backbone,
    train_head,
    windows,
)
from eval.experiments.joint.text_tasks import _text
from eval.experiments.joint.training import head_of
from eval.suite import load_suite, main
from eval.task import Context
from omni.rng import Key

ROOT = Path(__file__).parents[2]
SMALL = TextOptions(
    length=4, width=16, depth=2, adapter_rank=2, window=24, rows=4, blocks=3, backbone_steps=150, head_steps=3,
    rate=1e-2, contexts=5, num_tokens=14, scored=6,
)  # fmt: skip
SIZES = [f"joint_text.run.{name}={getattr(SMALL, name)}" for name in (
    "length", "width", "depth", "adapter_rank", "window", "rows", "blocks", "backbone_steps", "head_steps", "contexts",
    "num_tokens", "scored", "rate",
)]  # fmt: skip
WORDS = "".join(
    f"the {a} {b}s the {c}\n" for a in ("cat", "dog", "owl") for b in ("see", "want") for c in ("sun", "sea")
)
OTHERS = "".join(
    f"the {a} {b}s a {c}\n" for a in ("cat", "dog", "owl") for b in ("see", "want") for c in ("sun", "sea")
)
TEXT = Text.of(WORDS, OTHERS)


@pytest.fixture(scope="module")
def backbone():  # noqa: ANN201
    return train_backbone(TEXT, SMALL, Key(0))


def test_windows_are_pieces_of_the_text() -> None:
    found = windows(TEXT.train, 200, 7, Key(1))
    pieces = {bytes(row.tolist()).decode() for row in found}
    assert all(piece in WORDS for piece in pieces) and len(pieces) > 50
    with pytest.raises(ValueError, match="no windows of 5000"):
        windows(TEXT.train, 1, 5000, Key(0))


@pytest.mark.parametrize("head", ["product", "push_forward", "sequential"])
def test_coupled_rounds_emit_the_autoregressive_tokens(backbone, head: str) -> None:  # noqa: ANN001
    model = train_head(backbone, TextLine(head=head), TEXT, SMALL, Key(2))
    contexts = contexts_of(TEXT, SMALL, Key(3))
    plain = decode_plain(backbone, contexts, SMALL, Key(4))
    rounds = decode_rounds(model, contexts, "coupled", SMALL, Key(4))
    assert torch.equal(plain.ids, rounds.ids)
    assert len(rounds.positions) == 4 and rounds.positions[0] == 1 and 1 <= rounds.accepted <= 4
    assert list(rounds.positions) == sorted(rounds.positions, reverse=True)


def test_no_line_is_in_both_texts() -> None:
    suite = load_suite(str(ROOT / "eval/suites/joint_tokens.toml"), ["joint_text.documents=300"])
    text = _text(Context(), suite.joint_text)  # type: ignore[attr-defined]
    train, test = (bytes(part.tolist()).decode().splitlines() for part in (text.train, text.test))
    assert len(test) > 100 and not set(train) & set(test)


def test_block_verification_drafts_every_round_anew(backbone, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    model = train_head(backbone, TextLine(head="product"), TEXT, SMALL, Key(2))
    head, seen = head_of(model), []
    sample = head.sample
    monkeypatch.setattr(
        head, "sample", lambda call, u, key: seen.append(set(u.flatten().tolist())) or sample(call, u, key)
    )
    for kind in ("block", "rejection"):
        seen.clear()
        decode_rounds(model, contexts_of(TEXT, SMALL, Key(3)), kind, SMALL, Key(4))
        assert bool(seen[0] & seen[1]) == (kind == "rejection")


def test_likelihoods_are_of_the_blocks(backbone) -> None:  # noqa: ANN001
    """A hardly trained product head reads the start at every position, which fits the first token alone."""
    model = train_head(backbone, TextLine(head="product"), TEXT, SMALL, Key(2))
    scores, plain = held_out(model, TEXT, SMALL, Key(5)), measure_plain(backbone, TEXT, SMALL, Key(5)).scores
    assert scores.kind == "exact" and scores.positions and plain.positions
    assert abs(scores.positions[0] - plain.positions[0]) < 1e-2
    assert abs(sum(scores.positions) / 4 - scores.mean) < 1e-6
    assert scores.positions[2] > plain.positions[2] + 0.1


def test_a_line_is_measured_under_every_verification_that_it_allows(backbone) -> None:  # noqa: ANN001
    line = TextLine(head="push_forward", log_q_options={"mode": "categorical"}, passes=(2, 4))
    found, again = (train_and_measure(backbone, line, TEXT, SMALL, Key(6)) for _ in range(2))
    assert set(found.rounds) == {"coupled", "greedy", "rejection", "block"} and set(found.free) == {1, 2, 4}
    assert found.scores.kind == "bound" and found.scores.positions is None
    assert found.free == again.free and all(torch.equal(found.rounds[k].ids, again.rounds[k].ids) for k in found.rounds)
    assert set(train_and_measure(backbone, TextLine(head="push_forward"), TEXT, SMALL, Key(6)).rounds) == {
        "coupled",
        "greedy",
    }


def test_the_task_names_its_rows_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(WORDS)
    Path("b.txt").write_text(OTHERS)
    options = ["tasks=joint_text", "joint_text.train_text=a.txt", "joint_text.test_text=b.txt", "joint_text.workers=1"]
    options += ["joint_text.bars={}", 'joint_text.only=["product","push_forward","sequential"]', *SIZES]
    options += ["joint_text.heads.push_forward.passes=[2]"]
    suite = str(ROOT / "eval/suites/joint_tokens.toml")
    assert main([suite, *options, "--json", "rows.json"]) == 0
    rows = {row["name"].partition(".")[2]: row["value"] for row in json.loads(Path("rows.json").read_text())}
    assert {"plain_nll", "dependence", "push_forward_free_2", "sequential_rejection_gain", "product_block"} <= set(rows)
    assert rows["sequential_coupled_gain"] == pytest.approx(rows["sequential_coupled"] / rows["product_coupled"])
    assert main([suite, *options, "joint_text.train_text=none.txt"]) == 2


def test_invalid_options_raise_before_anything_runs() -> None:
    suite = str(ROOT / "eval/suites/joint_tokens.toml")
    for change, message in (
        ('joint_text.only=["prodct"]', "did you mean 'product'"),
        ("joint_text.train_text=a.txt", "both train_text and test_text"),
        ("joint_text.heads.cp_8.options.num_stats=3", "num_stats"),
    ):
        with pytest.raises(ValueError, match=message):
            load_suite(suite, [change])
