"""Drafts beside a frozen language model: predictions from costs, refusals by name, and every row on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import omni
from eval.experiments.imports.training import imported
from eval.suite import load_suite, main
from eval.task import TASKS, Context
from eval.tasks.drafts.costs import Costs, best_round
from eval.tasks.drafts.decoding import Replies
from eval.tasks.drafts.smol_drafts import rows_of
from omni.generation.events import Drafted
from omni.heads.joint import JointConfig
from omni.model import Omni
from omni.rng import Key

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "eval/suites/smol_drafts.toml"


def test_costs_between_and_beyond_measured_numbers() -> None:
    costs = Costs({1: 1.0, 4: 2.5, 8: 3.5})
    assert [costs(1), costs(2), costs(4), costs(6), costs(8), costs(16)] == [1.0, 1.5, 2.5, 3.0, 3.5, 7.0]


def test_the_best_number_of_drafted_tokens() -> None:
    """Flat costs: all of them; costs in proportion: the fewest; nothing accepted: the fewest."""
    flat, steep, none = Costs({1: 1.0, 8: 1.0}), Costs({1: 1.0, 8: 8.0}), Costs({1: 0.0, 7: 0.0})
    shares = [0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    best = best_round(shares, flat, none)
    assert best.num_drafted == 7 and best.emitted == pytest.approx(3.9) and best.rate == pytest.approx(3.9)
    assert best_round(shares, steep, none).num_drafted == 2
    assert best_round([0.0] * 7, Costs({1: 1.0, 8: 1.1}), none).num_drafted == 2
    assert best_round(shares, flat, none, per_position=1.0, batch=4).num_drafted == 2


def test_acceptance_counts_rounds_that_drafted_as_many() -> None:
    rounds = [Drafted(3, 3, 1), Drafted(3, 1, 1), Drafted(2, 2, 1), Drafted(1, 0, 1)]
    replies = Replies(["x"], rounds, 2.0, 10)
    assert replies.acceptance(4) == [0.75, pytest.approx(2 / 3), 0.5, 0.0]
    assert replies.per_pass == 2.5 and replies.rate == 5


def test_what_is_absent_is_refused_by_name(tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("x")
    own = [f"smol_drafts.text={text}", f"smol_drafts.heads.masked={tmp_path}/none"]
    options = load_suite(SUITE, own).smol_drafts
    with pytest.raises(
        ValueError, match=r"heads\.product = '.*' holds no model; train it with train/recipes/smol/drafts"
    ):
        options.model_copy(update={"heads": {"product": tmp_path / "none"}}).measured  # noqa: B018
    with pytest.raises(ValueError, match="only has 'tree', which heads does not name; its names: product, sequential"):
        options.model_copy(update={"only": ("tree",)}).measured  # noqa: B018
    given = [*own, "smol_drafts.bars.masked_speedup_bf16_t0=>= 1", 'smol_drafts.only=["product"]']
    with pytest.raises(ValueError, match="no row 'masked_speedup_bf16_t0'"):
        load_suite(SUITE, given)
    assert main([str(SUITE), *own, 'smol_drafts.only=["masked"]']) == 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two heads beside one tiny decoder, and one beside another."""
    root = tmp_path_factory.mktemp("drafts")
    plain = omni.from_pretrained(imported(root, "llama", tie_word_embeddings=True))
    found = {}
    for name, head in (("product", "product"), ("masked", "masked"), ("other", "product")):
        options = {"trains": "drafts"} if head == "masked" else {}
        joint = JointConfig(head=head, length=4, depth=1, adapter_rank=2, vocabulary=64, options=options)
        model = Omni(plain.config.model_copy(update={"joint": joint}), Key(0)).eval()
        model.load_state_dict(plain.state_dict(), strict=False)
        model.tokenizer, model.published = plain.tokenizer, plain.published
        if name == "other":
            torch.nn.init.zeros_(model.transformer.norm.weight)
        model.save_pretrained(root / name)
        found[name] = root / name
    return found


def options_of(folders: dict[str, Path], tmp_path: Path, *names: str, **changes: object):  # noqa: ANN201
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"some words of line {n} that go on for a while" for n in range(4)))
    given = {"text": text, "min_words": 6, "opening": 3, "prompts": 2, "tokens": 8, "repeats": 1, "batches": (2,)}
    return TASKS.get("smol_drafts").options(heads={name: folders[name] for name in names}, **{**given, **changes})


def test_every_row_is_measured(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = options_of(folders, tmp_path, "product", "masked")
    outcome = TASKS.get("smol_drafts").run(Context(report=lambda _: None), options)
    rows = [measure.name for measure in outcome.measures]
    only_coupled = {f"{name}_identical_{mode}_t1" for name in ("product", "masked") for mode in options.modes}
    assert set(rows) == set(rows_of(options)) - only_coupled and len(rows) == len(set(rows))
    assert outcome.value("product_identical_native_t0") == outcome.value("masked_identical_native_t0") == 100
    assert all(measure.value > 0 for measure in outcome.measures if measure.unit in ("x", "tokens/s", "ms"))


def test_heads_of_different_models_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    options = options_of(folders, tmp_path, "product", "other", modes=("bf16",), peers=False)
    with pytest.raises(ValueError, match="heads.other and heads.product are of different models"):
        TASKS.get("smol_drafts").run(Context(report=lambda _: None), options)
