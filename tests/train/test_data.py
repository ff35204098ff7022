"""Sources are pure and endless, mixtures exact, a batch depends on the cursor alone, a corrupt record is skipped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.data.emoji import CLIP_NAMES
from omni.data.source import SOURCES, CorruptRecord, FiniteSource, Source, build_source
from omni.document import Document, Image, Role, Text, Video
from omni.media import save_apng, save_png
from omni.rng import Key
from omni.sequence.layout import lay_out
from train.data import loader as loader_module
from train.data.batch import TooManyCorrupt
from train.data.latents import LatentMemo
from train.data.mixture import GROUP_SIZE, Mixture
from train.loop import Run

MakeRun = Callable[..., Run]


def picture(number: int, side: int = 32) -> torch.Tensor:
    return (Key(number).uniform((side, side, 3)) * 255).byte()


def write_jsonl(folder: Path, count: int = 7) -> dict[str, Any]:
    documents = [
        Document((Text(f"picture {n}", Role.USER), Image(picture(n), Role.ASSISTANT, True))) for n in range(count)
    ]
    (folder / "d.jsonl").write_text("\n".join(d.to_json() for d in documents) + "\n")
    return {"path": str(folder / "d.jsonl")}


def write_messages(folder: Path) -> dict[str, Any]:
    save_png(picture(1, 40), folder / "cat.png")
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a <|image|> cat"},
        ]
    }
    (folder / "m.jsonl").write_text(json.dumps(record) + "\n")
    return {"path": str(folder / "m.jsonl")}


def write_llava(folder: Path) -> dict[str, Any]:
    save_png(picture(1, 40), folder / "cat.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "a cat, not an <image>"},
    ]
    (folder / "l.json").write_text(json.dumps([{"id": "7", "image": "cat.png", "conversations": turns}]))
    return {"path": str(folder / "l.json")}


def write_parquet(folder: Path) -> dict[str, Any]:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    save_png(picture(1, 40), folder / "cat.png")
    data = (folder / "cat.png").read_bytes()
    parquet.write_table(pyarrow.table({"image": [data] * 3, "caption": ["a", "b", "c"]}), folder / "p.parquet")
    return {"path": str(folder / "p.parquet")}


def write_text(folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text("= A heading =\n\nThe cat sat on\nthe mat .\n\n \nA dog barked twice at night .\n")
    return {"path": str(folder / "text.txt"), "min_words": 6, "opening": 2, "request": "Go on."}


OPTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "emoji_world": lambda folder: {},
    "moving_emoji": lambda folder: {"num_frames": 4},
    "jsonl": write_jsonl,
    "text": write_text,
    "messages": write_messages,
    "llava": write_llava,
    "image_caption": write_parquet,
}


@pytest.mark.parametrize("name", SOURCES.names())
def test_every_source_is_pure_endless_and_learnable(name: str, tmp_path: Path) -> None:
    """A source that is not in OPTIONS is built with its defaults, or skipped where it has none."""
    options = OPTIONS[name](tmp_path) if name in OPTIONS else {}
    if any(field.is_required() and key not in options for key, field in SOURCES.get(name).Options.model_fields.items()):
        pytest.skip(f"{name} has options without defaults; give them in OPTIONS")
    one, two = (build_source(name, options, Key(5), "test") for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    far = {index: two.document(index).to_json() for index in (1000, 3, 0)}  # another order of calls
    for index, expected in far.items():
        document = one.document(index)
        assert document.to_json() == expected
        assert any(segment.supervise for segment in document.segments)


def test_moving_clips_are_distinct_and_their_prompt_may_leave_them_open() -> None:
    options = {"num_clips": 100, "num_frames": 3, "side": 16, "sprite": 8}
    source = build_source("moving_emoji", options, Key(0), "test")
    shown = [(d.meta["name"], d.meta["direction"]) for d in map(source.document, range(100))]
    assert len(set(shown)) == 100 and source.identity(0) == source.identity(100)
    first = len(source.names)  # type: ignore[attr-defined]
    assert all(name in CLIP_NAMES for name, _ in shown[: 4 * first])
    assert all(name not in CLIP_NAMES for name, _ in shown[4 * first :])
    text = source.document(3).segments[0]
    assert isinstance(text, Text) and text.text == f"a {shown[3][0]} moves {shown[3][1]}"
    plain = build_source("moving_emoji", {**options, "prompt": "{direction}! {brace}"}, Key(0), "test")
    assert plain.document(3).segments[0].text == f"{shown[3][1]}! {{brace}}"  # type: ignore[union-attr]


def test_a_text_is_cut_at_blank_lines_or_at_every_line(tmp_path: Path) -> None:
    options = write_text(tmp_path)
    source = build_source("text", options, Key(0), "t")
    found = {tuple(segment.text for segment in source.document(n).segments) for n in range(2)}  # type: ignore[union-attr]
    assert found == {("Go on.\n\nThe cat", "sat on\nthe mat ."), ("Go on.\n\nA dog", "barked twice at night .")}
    lines = build_source("text", {"path": options["path"], "unit": "line"}, Key(0), "t")
    whole = {source.segments[0].text for source in map(lines.document, range(4))}  # type: ignore[union-attr]
    assert whole == {"= A heading =", "The cat sat on", "the mat .", "A dog barked twice at night ."}
    assert all(segment.supervise for segment in lines.document(0).segments)
    for changes, message in (
        ({"min_words": 40}, "has no paragraph of at least 40 words; lower min_words"),
        ({"opening": 9}, "opening = 9 words leave nothing of a document of min_words = 6"),
        ({"opening": 0}, "request has no effect where opening is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_source("text", {**options, **changes}, Key(0), "t")


def test_messages_and_llava_give_the_same_document_shape(tmp_path: Path) -> None:
    for name, text in (("messages", "a <|image|> cat"), ("llava", "a cat, not an <image>")):
        picture_, question, answer = build_source(name, OPTIONS[name](tmp_path), Key(0), "t").document(0).segments
        assert isinstance(picture_, Image) and picture_.pixels.shape == (40, 40, 3) and not picture_.supervise
        assert isinstance(question, Text) and question.text == "what?" and not question.supervise
        assert isinstance(answer, Text) and answer.text == text and answer.supervise


def test_pictures_outside_the_folder_raise(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_png(picture(1), tmp_path / "secret.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "in" / "l.json").write_text(json.dumps([{"image": "../secret.png", "conversations": turns}]))
    source = build_source("llava", {"path": str(tmp_path / "in" / "l.json")}, Key(0), "t")
    with pytest.raises(CorruptRecord, match="outside"):
        source.document(0)


def test_clips_are_read_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    frames = torch.stack([picture(n, 40) for n in range(4)])
    for folder in (tmp_path, tmp_path / "in"):
        save_apng(frames, folder / "clip.png")
    for name, message in (("clip.png", ""), ("../clip.png", "outside"), (str(tmp_path / "clip.png"), "outside")):
        content = [{"type": "video", "path": name}, {"type": "text", "text": "what?"}]
        record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "noise"}]}
        (tmp_path / "in" / "m.jsonl").write_text(json.dumps(record) + "\n")
        source = build_source("messages", {"path": str(tmp_path / "in/m.jsonl")}, Key(0), "t")
        if message:
            with pytest.raises(CorruptRecord, match=message):
                source.document(0)
        else:
            [clip, *_] = source.document(0).segments
            assert isinstance(clip, Video) and clip.frames.shape == (4, 40, 40, 3)


def test_other_words_change_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    from omni.data.emoji_world import phrases

    same = [build_source("emoji_world", {}, Key(5), "t").fingerprint() for _ in range(2)]
    monkeypatch.setitem(phrases.TEMPLATES, "draw", tuple(t + " now" for t in phrases.TEMPLATES["draw"]))
    assert same[0] == same[1] != build_source("emoji_world", {}, Key(5), "t").fingerprint()


def test_finite_sources_visit_every_record_once_per_epoch(tmp_path: Path) -> None:
    source = build_source("jsonl", write_jsonl(tmp_path, 7), Key(0), "t")
    assert isinstance(source, FiniteSource)
    seen = [source.document(index).segments[0].text for index in range(21)]  # type: ignore[union-attr]
    epochs = [seen[0:7], seen[7:14], seen[14:21]]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(epochs[0])) == 7
    assert epochs[0] != epochs[1]


class Counting(Source):
    def document(self, index: int) -> Document:
        return Document((Text(str(index)),))


def test_mixture_shares_are_exact_and_each_source_is_walked_in_order() -> None:
    weights = [5.0, 3.0, 1.0, 0.5, 0.02]
    mixture = Mixture([Counting(None, Key(0)) for _ in weights], weights, Key(1))
    total = 4 * GROUP_SIZE
    where = [mixture.locate(index) for index in range(total)]
    for source, weight in enumerate(weights):
        positions = [position for s, position in where if s == source]
        assert positions == list(range(len(positions)))  # exactly once, in order
        assert abs(len(positions) - total * weight / sum(weights)) <= 1
    assert [mixture.locate(index) for index in reversed(range(total))] == where[::-1]
    with pytest.raises(ValueError, match="mixture"):
        Mixture([Counting(None, Key(0))] * 2, [1.0, 1e-6], Key(0))


def batches_of(run: Run, count: int, cursor: int = 0) -> list[tuple[Any, ...]]:
    found = []
    for _ in range(count):
        packed = run.loader.next(cursor)
        parts = [(b.ids, b.latents, b.target, b.refine_latents, b.item) for b in packed.batches]
        found.append((packed.documents, packed.cursor, [t for part in parts for t in part]))
        cursor = packed.cursor
    return found


def equal(one: list[tuple[Any, ...]], two: list[tuple[Any, ...]]) -> bool:
    same = [a[:2] == b[:2] and all(map(torch.equal, a[2], b[2])) for a, b in zip(one, two, strict=True)]
    return all(same)


def test_batches_depend_on_the_cursor_alone(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = batches_of(make_run(), 8)
    fresh = make_run()
    jumped = [batches_of(fresh, 1, straight[n - 1][1] if n else 0)[0] for n in (5, 2, 0, 2)]
    assert equal(jumped, [straight[n] for n in (5, 2, 0, 2)])
    forgetful = make_run()
    forgetful.loader.memo.max_bytes = 0
    monkeypatch.setattr(loader_module, "LOOKAHEAD", 5)
    assert equal(batches_of(forgetful, 8), straight)
    assert forgetful.loader.memo.num_bytes == 0


def test_documents_are_consumed_once_in_order(make_run: MakeRun) -> None:
    found = batches_of(make_run("drop.text=0", "drop.images=0", "drop.all=0"), 10)
    consumed = [index for documents, _, _ in found for index in documents]
    assert consumed == sorted(set(consumed)) and len(consumed) >= 0.9 * found[-1][1]


@pytest.mark.parametrize("trim", [0.0, 1.0])
def test_a_batch_ends_where_a_document_has_no_room(make_run: MakeRun, trim: float) -> None:
    """Not where the loader stopped reading: more documents fit where pictures are left out of the context."""
    run = make_run(f"batch.trim={trim}", "drop.text=0", "drop.images=0", "drop.all=0")
    shapes = run.recipe.batch.shapes
    cursor = 0
    for _ in range(6):
        packed = run.loader.next(cursor)
        [composed] = run.loader._read(packed.cursor).pieces
        one = lay_out(composed.spans, 0, trim_tail=trim == 1.0)
        copies = run.recipe.batch.copies * sum(len(span.latents) for _, span, _ in one.blocks)
        for batch, shape in zip(packed.batches, shapes, strict=True):
            context = (batch.context.document >= 0).sum(1)
            refine = (batch.refine.copy >= 0).sum(1)
            fits = (context + len(one.ids) <= shape.budget) & (refine + copies <= shape.refine_budget)
            rows_left = shape.rows - len(context)
            assert not fits.any() and not rows_left
        cursor = packed.cursor


def test_drop_reduces_a_keyed_share(make_run: MakeRun) -> None:
    run = make_run("drop.text=0.3", "drop.images=0.3", "drop.all=0.3")
    drawn = [run.loader._with_dropped_conditions(i, run.loader.document(i)) for i in range(300)]
    with_pictures = [d for d in drawn if any(s.supervise for s in d.segments if not isinstance(s, Text))]
    kinds = Counter(d.meta.get("dropped") for d in with_pictures)
    total = sum(kinds.values())
    assert all(abs(kinds[what] / total - 0.3) < 0.1 for what in ("text", "images", "all"))


def test_the_memo_is_exact_and_bounded() -> None:
    from omni.codecs import codecs

    codec = codecs.get("pixels").from_config({"kind": "pixels", "patch": 8, "frames_per_chunk": 2}, "test")
    segments: list[Image | Video] = [Image(picture(n)) for n in range(5)]
    segments.append(Video(torch.stack([picture(n) for n in range(4)])))
    one = LatentMemo(codec.encode_media)
    first, second = one.encode(segments), one.encode(segments)
    assert (one.num_misses, one.num_hits) == (6, 6)
    size = one.num_bytes // 9  # of a picture; the clip has four frames
    small = LatentMemo(codec.encode_media, max_bytes=2 * size)
    other = [small.encode([segment])[0] for segment in segments]
    assert small.num_bytes <= 2 * size
    for a, b, c in zip(first, second, other, strict=True):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c, strict=True))
    assert first[0][0].shape == (1, 4, 4, 192) and [block.shape[0] for block in first[5]] == [2, 2]


def damaged_jsonl(folder: Path) -> str:
    path = Path(write_jsonl(folder, 60)["path"])
    lines = path.read_text().splitlines()
    lines[4] = "not json"
    lines[20] = lines[20][: len(lines[20]) // 2]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_corrupt_record_skips_one_record(make_run: MakeRun, tmp_path: Path) -> None:
    path = damaged_jsonl(tmp_path)
    source = f'data=[{{name="jsonl",options={{path="{path}"}}}}]'
    one, two = make_run(source), make_run(source)
    skipped: list[tuple[int, str]] = []
    cursor = 0
    while cursor < 60:
        packed, again = one.loader.next(cursor), two.loader.next(cursor)
        assert packed.documents == again.documents and packed.skipped == again.skipped
        skipped += packed.skipped
        cursor = packed.cursor
    names = {reason.split(":")[0] for index, reason in skipped if index < 60}
    assert names == {"d.jsonl record 5", "d.jsonl record 21"}
    assert one.loader.counts["skipped"] == len(skipped)


def test_a_clip_that_is_too_long_skips_one_record(make_run: MakeRun, tmp_path: Path) -> None:
    """A clip with too many chunks, and a line with damaged compressed pixels, among twenty good ones."""
    documents = [Document((Text("look", Role.USER), Image(picture(n), Role.ASSISTANT, True))) for n in range(20)]
    long = Video(picture(0)[None].expand(17, -1, -1, -1), role=Role.ASSISTANT, supervise=True)
    odd = Document((Text("odd", Role.USER), long))
    lines = [document.to_json() for document in (*documents, odd)]
    at = lines[7].index('"zlib"') + 40
    lines[7] = lines[7][:at] + ("A" if lines[7][at] != "A" else "B") + lines[7][at + 1 :]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n")
    run = make_run(f'data=[{{name="jsonl",options={{path="{tmp_path / "d.jsonl"}"}}}}]')
    cursor, skipped = 0, {}
    while cursor < 21:
        packed = run.loader.next(cursor)
        cursor = packed.cursor
        skipped |= dict(packed.skipped)
    assert len({why for why in skipped.values()}) == 2
    assert any(why.startswith("unusable: a clip of 17 frames makes 9 chunks of 2") for why in skipped.values())
    assert any("record 8" in why for why in skipped.values())


ODD = [(33, 40), (100, 75), (17, 90), (1, 1), (64, 64), (31, 31), (300, 20), (128, 200)]


def write_odd_media(folder: Path) -> str:
    """A folder of pictures of odd sizes and clips of 5 frames, and a record of messages for each."""
    lines = []
    for number, (height, width) in enumerate(ODD):
        pixels = (Key(number).uniform((height, width, 3)) * 255).byte()
        save_png(pixels, folder / f"{number}.png")
        save_apng(torch.stack([pixels.roll(n, 0) for n in range(5)]), folder / f"clip-{number}.png")
        for kind, name in (("image", f"{number}.png"), ("video", f"clip-{number}.png")):
            asked = {"role": "user", "content": f"{kind} {number}"}
            lines.append({"messages": [asked, {"role": "assistant", "content": [{"type": kind, "path": name}]}]})
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f'data=[{{name="messages",options={{path="{folder / "m.jsonl"}"}}}}]'


@pytest.mark.parametrize("rules", [[], ["preparation.resize=stride", "preparation.tail=cut"]])
def test_odd_sizes_and_short_clips_train(make_run: MakeRun, tmp_path: Path, rules: list[str]) -> None:
    """No document of a folder of odd sizes, with chunks of 2 frames, is skipped, and a step runs."""
    from train import loop

    shapes = "batch.shapes=[{rows=2, budget=480, refine_budget=480}]"  # 64 latents, 6 frames
    objectives = 'objectives=[{name="next_token"}, {name="flow_matching"}]'
    run = make_run(write_odd_media(tmp_path), *rules, shapes, "batch.copies=1", objectives)
    seen: list[int] = []
    while run.progress.cursor < 2 * len(ODD):
        packed = run.next()
        assert packed.skipped == []
        run.progress.cursor, seen = packed.cursor, [*seen, *packed.documents]
    assert seen == list(range(len(seen))) and len(seen) >= 2 * len(ODD)
    assert math.isfinite(loop.train_step(run, packed)["loss"])


def test_mostly_corrupt_data_stop_the_run(make_run: MakeRun, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("nonsense\n" * 50)
    run = make_run(f'data=[{{name="jsonl",options={{path="{path}"}}}}]')
    with pytest.raises(TooManyCorrupt, match="could not be used"):
        run.loader.next(0)


def test_other_data_raise_on_resume(make_run: MakeRun, tmp_path: Path) -> None:
    from train import loop

    path = write_jsonl(tmp_path)["path"]
    source = f'data=[{{name="jsonl",options={{path="{path}"}}}}]'
    loop.save(make_run(source))
    Path(path).write_text(Path(path).read_text() + "\n" + Path(path).read_text())
    with pytest.raises(ValueError, match="data"):
        loop.resume(make_run(source), print)
