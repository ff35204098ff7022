"""The held-out loss: of documents outside training, comparable between steps, without effect on the run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omni.data.digests import document_digest
from omni.data.source import HeldOutRecord
from omni.document import Document, Image, Role, Text
from omni.objectives import OBJECTIVES, FlowObjective, build_objective
from omni.rng import Key
from train import loop
from train.__main__ import main
from train.loop import Run
from train.metrics import Tracker, read_metrics

MakeRun = Callable[..., Run]
FLOW = [name for name in OBJECTIVES.names() if issubclass(OBJECTIVES.get(name), FlowObjective)]


def pictures(folder: Path, count: int = 60, name: str = "d.jsonl") -> Path:
    """Captioned pictures; each occurs twice in the file."""
    documents = [
        Document((
            Text(f"picture {n // 2}", Role.USER),
            Image((Key(n // 2).uniform((32, 32, 3)) * 255).byte(), Role.ASSISTANT, True),
        ))
        for n in range(count)
    ]  # fmt: skip
    (folder / name).write_text("".join(one.to_json() + "\n" for one in documents))
    return folder / name


def source(path: Path) -> str:
    return f'data=[{{name="jsonl",options={{path="{path}"}}}}]'


def go(run: Run, until: int) -> str:
    stream = io.StringIO()
    tracker = Tracker(run.out, run.progress.step, stream=stream)
    loop.train(run, tracker, lambda: run.progress.step >= until)
    tracker.close()
    return stream.getvalue()


def held_out(run: Run) -> set[str]:
    return {document_digest(document) for document in run.loader.document.__self__.held_out.documents}  # type: ignore[attr-defined]


def trained_on(run: Run, steps: int) -> set[str]:
    """Digests of the sources' documents at the indices of the steps, unfiltered."""
    mixture, found = run.loader.document.__self__, set()  # type: ignore[attr-defined]
    for _ in range(steps):
        packed = run.next()
        run.progress.advance(packed.cursor, packed.worker)
        for index in packed.documents:
            number, position = mixture.locate(index)
            found.add(document_digest(mixture.sources[number].document(position)))
    return found


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_no_held_out_document_is_trained_on(make_run: MakeRun, tmp_path: Path, workers: int) -> None:
    """Two epochs of a file with every picture twice; all other documents are trained on."""
    run = make_run(source(pictures(tmp_path)), "validation.share=0.2", f"workers={workers}")
    kept, seen = held_out(run), trained_on(run, 12)
    assert 2 <= len(kept) <= 12 and len(seen) == 30 - len(kept) and not kept & seen
    assert run.loader.counts["held_out"] >= 2 * len(kept) and not run.loader.counts["skipped"]


def test_generated_data_are_held_out_too(make_run: MakeRun) -> None:
    run = make_run("validation.share=0.1", "validation.documents=40")
    mixture = run.loader.document.__self__  # type: ignore[attr-defined]
    assert len(mixture.held_out.documents) > 30
    clips = [document for document in mixture.held_out.documents if document.meta.get("task") == "clip"]
    assert clips and not held_out(run) & trained_on(run, 3)  # the twelve clips repeat
    with pytest.raises(HeldOutRecord):
        for index in range(400):
            mixture.document(index)


def test_separate_validation_data_are_never_trained_on(make_run: MakeRun, tmp_path: Path) -> None:
    """Also where the training file contains them."""
    lines = pictures(tmp_path).read_text().splitlines()
    (tmp_path / "v.jsonl").write_text("\n".join(lines[:6]) + "\n")
    own = source(tmp_path / "v.jsonl").replace("data=", "validation.data=")
    run = make_run(source(tmp_path / "d.jsonl"), own)
    assert len(held_out(run)) == 3 and not held_out(run) & trained_on(run, 6)
    (tmp_path / "v.jsonl").write_text("\n".join(lines[:8]) + "\n")
    loop.save(run)
    with pytest.raises(ValueError, match="data.*was"):
        loop.resume(make_run(source(tmp_path / "d.jsonl"), own), print)


def test_the_seed_decides_the_held_out_documents_and_the_share_holds(make_run: MakeRun, tmp_path: Path) -> None:
    path = source(pictures(tmp_path, 400))
    more = ("validation.share=0.25", "validation.documents=400")
    kept = [held_out(make_run(path, *more, f"seed={seed}")) for seed in (3, 4)]
    assert kept[0] != kept[1] and all(30 <= len(one) <= 70 for one in kept)  # of 200


RUN = ("validation.share=0.2", "validation.steps=2", "max_steps=5", "autocast=none")


def test_values_are_logged_comparable_and_change_nothing_in_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    path = source(pictures(tmp_path))
    run = make_run(path, *RUN, out="with")
    assert run.validation is not None
    first, again = run.validation(run), run.validation(run)
    assert first == again and set(first) >= {"loss", "loss/NextToken", "loss/FlowMatching", "unweighted/MeanFlow"}
    output = go(run, 5)
    rows = read_metrics(tmp_path / "with/metrics.jsonl")
    assert [row["step"] for row in rows if "validation/loss" in row] == [1, 3, 4]
    assert rows[-1]["validation/loss"] < first["loss"]
    assert "validation at step 4, averaged weights: NextToken " in output
    # Without a measurement the same documents are skipped, and nothing else changes.
    silent = make_run(path, *RUN, out="without")
    silent.validation = None
    go(silent, 5)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("with", "without")]
    assert losses[0] == losses[1]
    states = [tmp_path / name / "state/step-00000005/model.safetensors" for name in ("with", "without")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_the_averaged_weights_are_measured(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(source(pictures(tmp_path)), *RUN)
    assert run.validation is not None
    before = run.validation(run)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.1)
    assert run.validation(run) == before and run.model.training
    for average in run.ema.averages.values():
        average.add_(0.1)
    assert run.validation(run) != before


@pytest.mark.parametrize("name", FLOW)
def test_every_objective_can_be_measured(name: str, make_run: MakeRun, tmp_path: Path) -> None:
    run = measured(make_run, tmp_path)
    options = {"particles": 2, "groups": "copies"} if name in ("moment_matching", "drifting") else {}
    run.objectives = [build_objective(name, **options)]
    assert run.validation is not None
    found = run.validation(run)
    assert f"loss/{type(run.objectives[0]).__name__}" in found and all(math.isfinite(v) for v in found.values())
    assert all(parameter.grad is None for parameter in run.model.parameters())


_MEASURED: list[Run] = []


def measured(make_run: MakeRun, tmp_path: Path) -> Run:
    if not _MEASURED:
        _MEASURED.append(make_run(source(pictures(tmp_path)), *RUN))
    return _MEASURED[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("validation.share=0.00001", "validation: no document can be held out by validation.share = 1e-05; raise it"),
        ("validation.share=0.6", "validation.share = 0.6"),
        ("validation.steps=5", "give a share of the training data, or data of its own"),
        ('validation={share=0.1,data=[{name="emoji_world"}]}', "give a share of the training data, or data of its own"),
        ("validation.shar=0.1", "did you mean 'share'"),
    ],
)
def test_mistakes(
    change: str, message: str, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe_file), source(pictures(tmp_path, 8)), change, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_share_that_leaves_nothing_raises(make_run: MakeRun, tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    seed = next(s for s in range(40) if _holds_all(make_run, tmp_path, s))
    assert seed >= 0


def _holds_all(make_run: MakeRun, tmp_path: Path, seed: int) -> bool:
    try:
        make_run(source(tmp_path / "d.jsonl"), "validation.share=0.5", f"seed={seed}")
    except ValueError as error:
        return "holds out every record of data.0; lower it" in str(error)
    return False


def test_records_are_distinguished_by_their_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    """A record that does not decode has an identity too; reading the identity does not decode it."""
    path = pictures(tmp_path, 40)
    lines = path.read_text().splitlines()
    lines[3] = "not json"
    path.write_text("\n".join(lines) + "\n")
    run = make_run(source(path), "validation.share=0.3")
    mixture = run.loader.document.__self__  # type: ignore[attr-defined]
    identities = [mixture.sources[0].record_identity(position) for position in range(40)]
    assert len(set(identities)) == 21  # nineteen twice, one once, and the broken one
    assert json.dumps(sorted(held_out(run)))
