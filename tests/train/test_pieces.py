"""A document too long for a row is split at allowed places, or dropped and counted apart; never counted as damaged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.document import Document, Image, Role, Segment, Text, Video
from omni.rng import Key
from omni.sequence.layout import LatentSpan, TokenSpan
from train import loop
from train.__main__ import EXIT_CORRUPT, main
from train.data import loader as loader_module
from train.data.batch import PIECES, TooManyCorrupt
from train.data.pieces import Size, Splitter, cut_before, largest_fitting
from train.loop import Run
from train.metrics import Tracker, read_metrics

MakeRun = Callable[..., Run]
LONGEST = 64


def words(count: int, role: Role, supervise: bool = False) -> Text:
    return Text(" ".join(f"w{n}" for n in range(count)), role, supervise)


def picture(n: int, role: Role = Role.ASSISTANT, side: int = 32) -> Image:
    return Image((Key(n).uniform((side, side, 3)) * 255).byte(), role, role is Role.ASSISTANT)


# ---- where it is cut -----------------------------------------------------------------------------------------------


def measure(segment: Segment) -> Size:
    """A text has one position per character, a picture 16 and its header; a supervised picture has two noisy copies."""
    if isinstance(segment, Text):
        return Size(len(segment.text), 0)
    latents = 16 * (segment.frames.shape[0] if isinstance(segment, Video) else segment.pixels.shape[0] // 32)
    return Size(latents + 4, 2 * latents * segment.supervise)


def splitter(context: int = LONGEST, refine: int = 64) -> Splitter:
    return Splitter(measure, lambda size: size.context <= context and size.refine <= refine)


def shown(segments: tuple[Segment, ...]) -> str:
    """U: text of the user, A: supervised text, a: other text of the assistant, S: of the system; I and i: pictures."""
    letters = {Role.USER: "U", Role.SYSTEM: "S"}
    return "".join(
        ("I" if s.supervise else "i") if isinstance(s, Image) else letters.get(s.role, "A" if s.supervise else "a")
        for s in segments
    )


def document(*segments: Segment) -> Document:
    return Document(segments, {"id": 7})


def ask(length: int = 8) -> Text:
    return Text("q" * length, Role.USER)


def answer(length: int = 8) -> Text:
    return Text("a" * length, Role.ASSISTANT, True)


@pytest.mark.parametrize(
    ("segments", "found"),
    [
        ([ask(), answer()] * 6, ["UAUA"] * 3),  # 1 + 2 (10 + 10) = 41 each; three of them would be 61
        ([Text("s" * 9, Role.SYSTEM), *[ask(), answer()] * 4], ["SUAUA", "SUAUA"]),
        ([ask(), picture(0), ask(), picture(1), ask(), picture(2)], ["UI", "UI", "UI"]),
        ([ask(), picture(0), answer(), picture(1), answer()], ["UIA", "UIA"]),
        ([picture(0, Role.USER), ask(), *[answer(19)] * 3], ["iUA"] * 3),
        ([ask(), answer(20), ask(), answer(20), ask(60), answer(60)], ["UA", "UA"]),
    ],
)
def test_cuts_are_between_exchanges_then_between_segments(segments: list[Segment], found: list[str]) -> None:
    limits = splitter(context=52, refine=32)
    pieces, _ = limits.split(document(*segments))
    assert [shown(one.document.segments) for one in pieces] == found
    assert all(limits.fits(one.document.segments) and one.document.meta == {"id": 7} for one in pieces)


def test_a_piece_records_whether_replies_begin_and_end_with_it() -> None:
    parts = [ask(), picture(0), answer(), picture(1), answer(), ask(), picture(2)]
    pieces, problem = splitter(refine=32).split(document(*parts))
    assert [(shown(p.document.segments), p.begins, p.ends) for p in pieces] == [
        ("UIA", True, False), ("UIA", False, True), ("UI", True, True),
    ]  # fmt: skip
    assert not problem


def test_a_long_text_is_cut_at_words_and_nothing_of_it_is_lost() -> None:
    text = words(60, Role.ASSISTANT, True)
    pieces, problem = splitter().split(document(ask(), text))
    parts = [one.document.segments[-1] for one in pieces]
    assert "".join(part.text for part in parts if isinstance(part, Text)) == text.text and not problem
    assert all(isinstance(part, Text) and part.supervise and part.text[:1] == " " for part in parts[1:])
    assert [(one.begins, one.ends) for one in pieces] == [
        (True, False),
        *[(False, False)] * (len(pieces) - 2),
        (False, True),
    ]
    assert all(shown(one.document.segments) == "UA" and splitter().fits(one.document.segments) for one in pieces)


def test_text_of_no_turn_is_cut_too() -> None:
    """A document of pretraining: one supervised text without a request."""
    pieces, problem = splitter().split(document(words(100, Role.USER, True)))
    assert len(pieces) > 5 and not problem and all(one.document.segments[0].supervise for one in pieces)


def test_only_the_part_that_fits_in_no_row_is_left_out() -> None:
    """A picture that is too large, and a request that leaves no room: the other exchanges stay."""
    large = picture(1, side=32 * 8)
    pieces, problem = splitter().split(document(ask(), answer(), ask(), large, answer(), ask(), answer(40)))
    assert [shown(one.document.segments) for one in pieces] == ["UA", "UA"]
    assert problem == "picture that needs 145 context and 256 refine positions with its request"
    pieces, problem = splitter().split(document(ask(60), words(40, Role.ASSISTANT, True)))
    assert not pieces and problem.startswith("text that needs")
    clip = Video(torch.zeros((9, 32, 32, 3), dtype=torch.uint8), 8.0, Role.ASSISTANT, True)
    pieces, problem = splitter().split(document(ask(), clip))
    assert not pieces and problem.startswith("clip that needs")
    assert splitter().split(document(ask(200))) == ([], "")  # nothing in it is supervised


@settings(max_examples=30)
@given(st.text(max_size=60), st.integers(1, 60))
def test_a_cut_separates_no_character_from_its_marks(text: str, end: int) -> None:
    end = min(end, len(text))
    at = cut_before(text, end)
    assert 0 <= at <= end and (at > 0 or end == 0)


def test_the_places_of_cuts() -> None:
    assert cut_before("one two. three\n\nfour five", 20) == len("one two. three\n\n")
    assert cut_before("one two. three four", 14) == len("one two.")
    assert cut_before("one two three four", 16) == len("one two three")
    assert cut_before("x" * 30, 20) == 20
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert cut_before("ab" + family, 4) == 2 and cut_before("abe\u0301", 3) == 2
    assert [largest_fitting(1000, lambda n, m=m: n <= m) for m in (0, 1, 63, 64, 65, 700, 1000)] == [
        0,
        1,
        63,
        64,
        65,
        700,
        1000,
    ]


SEGMENTS = st.lists(
    st.tuples(st.sampled_from(["s", "u", "U", "a", "A", "i", "I"]), st.integers(0, 90)), min_size=1, max_size=12
)


@given(SEGMENTS)
def test_any_document_gives_pieces_that_fit_and_keep_order(given_segments: list[tuple[str, int]]) -> None:
    roles = {"s": Role.SYSTEM, "u": Role.USER, "i": Role.USER}
    segments = tuple(
        picture(n, roles.get(kind, Role.ASSISTANT), 32 * (1 + length // 30)) if kind in "iI"
        else Text(f"{n:02}" * length, roles.get(kind.lower(), Role.ASSISTANT), kind in "UA")
        for n, (kind, length) in enumerate(given_segments)
    )  # fmt: skip
    limits = splitter()
    pieces, problem = limits.split(Document(segments))
    order = {id(s): n for n, s in enumerate(segments)}
    supervised: list[int] = []
    for piece in pieces:
        assert limits.fits(piece.document.segments) and any(s.supervise for s in piece.document.segments)
        places = [order[id(s)] for s in piece.document.segments if id(s) in order]
        assert places == sorted(places)
        supervised += [order[id(s)] for s in piece.document.segments if id(s) in order and s.supervise]
    assert len(supervised) == len(set(supervised))  # nothing is supervised twice
    whole = {n for n, s in enumerate(segments) if s.supervise and isinstance(s, Image)}
    assert problem or whole <= set(supervised)


# ---- in the loader -------------------------------------------------------------------------------------------------


def write(folder: Path, documents: list[Document]) -> str:
    """The override for data of these documents."""
    path = folder / "long.jsonl"
    path.write_text("".join(one.to_json() + "\n" for one in documents))
    return f'data=[{{name="jsonl",options={{path="{path}"}}}}]'


def mixed(count: int = 12) -> list[Document]:
    """Short ones, chats that are too long, long stories of four pictures, and texts of two thousand bytes."""
    out = []
    for n in range(count):
        request = Text(f"draw {n}", Role.USER)
        story = [s for k in range(13) for s in (picture(30 * n + k), Text(f"{k} and then", Role.ASSISTANT, True))]
        chat = [
            s for k in range(14) for s in (Text(f"what is {k}", Role.USER), Text(f"it is {n}", Role.ASSISTANT, True))
        ]
        kinds = [[request, picture(n)], story, [request, *story], chat, [request, words(500, Role.ASSISTANT, True)]]
        out.append(Document(tuple(kinds[n % 5])))
    return out


PLAIN = ("drop.text=0", "drop.images=0", "drop.all=0", "batch.trim=0")


def taught(run: Run, documents: int) -> list[Any]:
    """The packed steps of the first documents."""
    steps, cursor = [], 0
    while cursor % PIECES < documents:
        steps.append(run.loader.next(cursor))
        cursor = steps[-1].cursor
    return steps


def test_too_long_documents_are_split_and_none_is_corrupt(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(write(tmp_path, mixed()), *PLAIN, FOUR)
    steps = taught(run, 12)
    assert not any(step.skipped or step.dropped for step in steps)
    counts = run.loader.counts
    assert counts["documents"] >= 12 and counts["split"] >= 8 and counts["pieces"] > 24 and not counts["dropped"]
    uids = [uid for step in steps for batch in step.batches for uid in batch.documents]
    assert len(uids) == len(set(uids)) == counts["pieces"]
    names = [name for step in steps for batch in step.batches for name in batch.item_names]
    assert len(names) == len(set(names))  # every noisy copy has noise of its own


def test_every_picture_of_a_split_document_is_trained_once(make_run: MakeRun, tmp_path: Path) -> None:
    story = [s for k in range(24) for s in (picture(k), Text(f"and {k}", Role.ASSISTANT, True))]
    run = make_run(write(tmp_path, [Document((Text("a story", Role.USER), *story))]), *PLAIN)
    read = run.loader._read(0)
    latents = [span for one in read.pieces for span in one.spans if isinstance(span, LatentSpan)]
    wanted = run.loader.memo.encode([s for s in story if isinstance(s, Image)])
    assert len(read.pieces) > 1 and len(latents) == 24
    assert all(torch.equal(span.latents, one.flatten(0, 2)) for span, [one] in zip(latents, wanted, strict=True))
    tokenizer = run.model.tokenizer
    for number, one in enumerate(read.pieces):
        ids = [token for span in one.spans if isinstance(span, TokenSpan) for token in span.ids]
        flags = [flag for span in one.spans if isinstance(span, TokenSpan) for flag in span.supervise]
        control = tokenizer.control
        request = [control.begin, control.role(Role.USER), *tokenizer.encode("a story"), control.end]
        assert ids[: len(request)] == request and ids[-1] == control.end
        assert flags[-1] == (number == len(read.pieces) - 1)  # the story does not end before
        header = ids.index(control.image)
        assert flags[header : header + 3] == [number == 0, True, True]  # nor begin with its ninth picture


def test_split_off_or_on_the_short_ones_are_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    source = write(tmp_path, mixed(10))
    split, dropped = make_run(source, *PLAIN), make_run(source, *PLAIN, "batch.too_long=drop")
    for index in range(10):
        one, other = split.loader._read(index), dropped.loader._read(index)
        assert other.what == "dropped" or len(one.pieces) == len(other.pieces) == 1
        if other.pieces:
            assert [getattr(s, "ids", None) for s in one.pieces[0].spans] == [
                getattr(s, "ids", None) for s in other.pieces[0].spans
            ]
        else:
            assert other.why.startswith("too long: ") and "the longest row holds 256 and 192" in other.why


def go(run: Run, until: int) -> str:
    stream = io.StringIO()
    tracker = Tracker(run.out, run.progress.step, stream=stream)
    try:
        loop.train(run, tracker, lambda: run.progress.step >= until)
    finally:
        tracker.close()
    return stream.getvalue()


def rows(out: Path) -> list[dict[str, object]]:
    found = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "load_seconds")} for row in found]


FOUR = "batch.copies=4"  # a row has room for twelve pictures then
PLAIN_LOSS = 'objectives=[{name="next_token"},{name="flow_matching"}]'


@pytest.mark.parametrize(
    "workers", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_resume_in_the_middle_of_a_document_is_exact(make_run: MakeRun, tmp_path: Path, workers: int) -> None:
    """Here most steps end inside a document."""
    recipe = (write(tmp_path, mixed()), f"workers={workers}", PLAIN_LOSS, FOUR)
    go(make_run(*recipe, out="straight"), 5)
    inside = 0
    for until in (3, 5):
        run = make_run(*recipe, out="broken")
        if until > 3:
            loop.resume(run, lambda line: None)
        go(run, until)
        inside += any(cursor >= PIECES for cursor in run.progress.cursors or [run.progress.cursor])
    assert inside and rows(tmp_path / "broken") == rows(tmp_path / "straight")
    states = [tmp_path / name / "state/step-00000005/model.safetensors" for name in ("straight", "broken")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_one_worker_gives_the_same_numbers_as_none(make_run: MakeRun, tmp_path: Path) -> None:
    source = write(tmp_path, mixed())
    for workers in (0, 1):
        go(make_run(source, f"workers={workers}", PLAIN_LOSS, FOUR, out=f"by{workers}"), 3)
    assert rows(tmp_path / "by0") == rows(tmp_path / "by1")


def test_three_workers_give_the_same_pieces(make_run: MakeRun, tmp_path: Path) -> None:
    source = write(tmp_path, mixed())
    plain, run = make_run(source, *PLAIN, FOUR).loader, make_run(source, *PLAIN, FOUR, "workers=3")
    uids = {uid for _ in range(6) for batch in run.next().batches for uid in batch.documents}
    for uid in uids:
        assert uid // PIECES < len(plain._read(uid % PIECES).pieces)
    assert len({uid % PIECES for uid in uids if uid >= PIECES}) > 2
    assert run.loader.counts["split"] > 2


# ---- counts and messages -------------------------------------------------------------------------------------------


SMALL_ROWS = "batch.shapes=[{rows=2,budget=256,refine_budget=100}]"  # two copies of 8 x 8 latents are more


@pytest.mark.parametrize("too_long", ["split", "drop"])
def test_a_picture_that_no_row_holds_is_dropped_counted_and_reported_once(
    make_run: MakeRun, tmp_path: Path, too_long: str
) -> None:
    good = [Document((Text(f"draw {n}", Role.USER), picture(n))) for n in range(6)]
    large = [Document((Text("all", Role.USER), picture(n, side=320))) for n in range(3)]
    recipe = (f"batch.too_long={too_long}", "batch.min_corrupt=1", SMALL_ROWS, *PLAIN)
    run = make_run(write(tmp_path, good + large), *recipe)
    output = go(run, 3)
    assert output.count(" dropped, in part or whole: too long") == 1 and "skipped" not in output
    counts = run.loader.counts
    assert counts["dropped"] >= 3 and counts["skipped"] == 0
    assert f"{counts['dropped']} dropped in part or whole, longer than a row" in output.splitlines()[-1]
    events = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("event") == "document dropped" for row in events) == counts["dropped"]


def test_data_that_never_fit_raise_in_one_line(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "MAX_UNUSABLE_IN_ROW", 40)
    source = write(tmp_path, [Document((Text("all", Role.USER), picture(0, side=320)))])
    assert main([str(recipe_file), source, SMALL_ROWS, "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert "40 documents in a row are unusable; the last: too long: a picture" in output


def broken(folder: Path, good: int, bad: int) -> str:
    lines = [Document((Text(f"draw {n}", Role.USER), picture(n))).to_json() for n in range(good)] + ["no"] * bad
    (folder / "some.jsonl").write_text("\n".join(lines) + "\n")
    return f'data=[{{name="jsonl",options={{path="{folder / "some.jsonl"}"}}}}]'


def test_the_limit_of_corrupt_documents_is_in_the_recipe(make_run: MakeRun, tmp_path: Path) -> None:
    source = broken(tmp_path, 30, 10)
    with pytest.raises(TooManyCorrupt, match=r"could not be used, and batch.max_corrupt = 0.05; the last: some.jsonl"):
        go(make_run(source, "batch.min_corrupt=5"), 50)
    go(make_run(source, "batch.min_corrupt=5", "batch.max_corrupt=0.6", out="more"), 4)
    with pytest.raises(TooManyCorrupt):
        go(make_run(source, "batch.min_corrupt=1", "batch.max_corrupt=0", out="none"), 50)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_stops_at_the_limit_saves_first(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    """The damaged tenth of the data begins after about the third step; the run continues with a higher limit."""
    out = ["--out", str(tmp_path / "out"), f"workers={workers}"]
    recipe = [str(recipe_file), broken(tmp_path, 60, 12), "batch.min_corrupt=4", "max_steps=30"]
    assert main([*recipe, *out]) == EXIT_CORRUPT
    output = capsys.readouterr().err
    assert "saved at step" in output and output.splitlines()[-1].startswith("error: ")
    assert list((tmp_path / "out/state").glob("step-*/manifest.json"))
    more = ["batch.max_corrupt=0.5", "max_steps=3", "optimiser.decay=none"]
    assert main([*recipe, *out, *more, "--resume"]) == 0
    assert "batch.max_corrupt was 0.05, now 0.5" in capsys.readouterr().err
