"""Guidance equals the formula of three separate passes; block noise depends on picture, block and jump alone."""

from __future__ import annotations

import pytest
import torch
from histories import histories_of
from scripted import follow, living
from torch import Tensor

import omni
from omni.codecs.pixels import PixelCodec, PixelConfig
from omni.document import Document, Image, Role, Segment, Text, Video
from omni.generation.context import block_runs
from omni.generation.denoise import block_noise
from omni.generation.engine import Engine
from omni.generation.events import BlockStep
from omni.generation.options import GenerationOptions
from omni.rng import Key
from omni.samplers import SAMPLERS, Call, Noise, Sampling, State
from omni.sequence.guidance import Drop, drop, null_documents, open_turn, reduce
from omni.sequence.layout import LatentSpan, TokenSpan

PIXELS = torch.arange(8 * 12 * 3, dtype=torch.uint8).reshape(8, 12, 3)
FORCED = {
    "force_image": True, "image_size": (8, 12), "max_images": 1, "max_tokens": 1, "sampler": "spy", "steps": 2
}  # fmt: skip
TIMES = (0.9, 0.3)


@pytest.fixture(scope="module")
def model(tiny_model) -> omni.Omni:  # noqa: ANN001
    """Random weights; no part is at its zero start."""
    return living(tiny_model)


class Spy:
    """A sampler that records the start, F at TIMES, and the noise of two jumps, for every block, in the order in which
    the blocks begin."""

    def __init__(self) -> None:
        self.starts: list[Tensor] = []
        self.velocities: list[Tensor] = []
        self.noises: list[list[Tensor]] = []

    def __call__(self, start: Tensor, times: list[float], noise: Noise | None = None) -> Sampling:
        assert noise is not None
        number = len(self.starts)
        self.starts.append(start.float())
        self.noises.append([noise(0), noise(1)])
        self.velocities.append(torch.empty(0))
        self.velocities[number] = (yield Call(start, *TIMES)).float()
        yield State(1, 2, 0.5, start / 2)
        yield State(2, 2, 0.0, start / 4)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    monkeypatch.setitem(SAMPLERS._items, "spy", spy)
    return spy


# ---- guidance ------------------------------------------------------------------------------------------------------

HISTORIES: list[tuple[Segment, ...]] = [
    (Text("draw the same"), Image(PIXELS), Text("in red")),
    (Text("a"), Text("Here:", Role.ASSISTANT), Image(PIXELS.flip(0), Role.ASSISTANT), Text("another one, please")),
]


PICTURE = Image(torch.zeros(8, 12, 3, dtype=torch.uint8), Role.ASSISTANT, supervise=True)


def branch(
    model: omni.Omni, history: tuple[Segment, ...], what: Drop | None, x: Tensor, beta: float = 1.0,
    target: Image | Video = PICTURE, finished: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    """F of one history alone; its context is composed from the document of training. Blocks of the target before the
    next one have the finished latents."""
    document = Document((*open_turn(history, Role.ASSISTANT), target))
    reduced = drop(document, what) if what else document
    assert reduced is not None
    spans, count = model.spans(reduced), len(model.encode_media([target])[0])
    blocks = [i for i, span in enumerate(spans) if isinstance(span, LatentSpan)][-count:]
    for i, latents in zip(blocks, finished, strict=False):
        spans[i] = LatentSpan(latents, spans[i].grid)  # type: ignore[union-attr]
    block = spans[blocks[len(finished)]]
    assert isinstance(block, LatentSpan) and x.shape == block.latents.shape
    with torch.inference_mode():
        [history] = histories_of(model, [spans[: blocks[len(finished)]]])
        t, s = (torch.tensor([time]) for time in TIMES)
        stream, runs = block_runs([(history, block.grid)], torch.device("cpu"))
        return model.velocity(x[None], t, s, torch.tensor([beta]), stream, None, runs)[0]


@pytest.mark.parametrize(
    ("w_text", "w_image", "evaluations"),
    [(1.0, 1.0, 1), (3.0, 1.0, 2), (2.0, 2.0, 2), (3.0, 1.5, 3), (1.0, 2.0, 3), (0.0, 1.0, 2), (1.0, 0.0, 3)],
)
def test_guidance_is_its_formula(model: omni.Omni, spy: Spy, w_text: float, w_image: float, evaluations: int) -> None:
    """F_all + w_images (F_text - F_all) + w (F - F_text), of two requests in one pass; a branch of weight 0 is not
    run."""
    options = GenerationOptions(guidance=w_text, image_guidance=w_image, guidance_embedding=2.0, **FORCED)
    documents = [Document(history) for history in HISTORIES]
    replies = Engine(model).generate_batch(documents, options, seeds=[1, 2])
    assert [reply.evaluations for reply in replies] == [evaluations] * 2
    start, found = spy.starts, spy.velocities
    assert [one.shape for one in found] == [(6, 48)] * 2
    for row, history in enumerate(HISTORIES):
        full, text, everything = (branch(model, history, what, start[row]) for what in (None, "text", "all"))
        embedded = branch(model, history, None, start[row], 0.5)  # beta = 1 / 2; 1 for reduced histories
        assert min(float((a - b).abs().max()) for a, b in ((full, text), (text, everything), (full, embedded))) > 1e-3
        wanted = everything + w_image * (text - everything) + w_text * (embedded - text)
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-4)


def test_a_refining_request_keeps_its_own_history(model: omni.Omni, spy: Spy) -> None:
    """Fewer blocks than requests: the second request refines, the first has no picture."""
    plain = GenerationOptions(max_tokens=1, max_images=1)
    mine = GenerationOptions(guidance=2.0, image_guidance=1.0, **FORCED)
    Engine(model).generate_batch(["something else", Document(HISTORIES[0])], [plain, mine], seeds=[1, 2])
    [start], [found] = spy.starts, spy.velocities
    full, text = (branch(model, HISTORIES[0], what, start) for what in (None, "text"))
    torch.testing.assert_close(found, text + 2 * (full - text), rtol=1e-4, atol=1e-4)
    Engine(model).generate_batch(["something else", Document(HISTORIES[0])], [plain, GenerationOptions(**FORCED)])
    wanted = branch(model, HISTORIES[0], None, spy.starts[1])
    torch.testing.assert_close(spy.velocities[1], wanted, rtol=1e-4, atol=1e-4)


def test_segments_dropped_for_guidance() -> None:
    """By hand: a turn that loses all its segments stays as empty text of its role."""
    picture, clip = Image(PIXELS), Video(PIXELS[None], 4.0, Role.ASSISTANT)
    history = (Text("system", Role.SYSTEM), Text("a"), picture, Text("b"), clip, Text("c", Role.ASSISTANT))
    roles = (Role.SYSTEM, Role.USER, Role.ASSISTANT)
    assert reduce(history, "text") == (Text("", Role.SYSTEM), picture, clip)
    assert reduce(history, "images") == (history[0], history[1], history[3], history[5])
    assert reduce(history, "all") == tuple(Text("", role) for role in roles)
    assert reduce((picture, clip), "images") == (Text("", Role.USER), Text("", Role.ASSISTANT))


def test_a_turn_opens_once() -> None:
    history = [Text("a"), Text("b", Role.ASSISTANT)]
    assert open_turn(history, Role.ASSISTANT) == history
    assert open_turn(history[:1], Role.ASSISTANT) == [Text("a"), Text("", Role.ASSISTANT)]
    assert open_turn([], Role.USER) == [Text("", Role.USER)]


def test_only_the_last_supervised_picture_is_the_target() -> None:
    def answer(number: int, supervise: bool = True) -> Image:
        return Image(PIXELS + number, Role.ASSISTANT, supervise)

    unsupervised = answer(3, False)
    segments = (Text("a", Role.ASSISTANT, True), answer(1), Text("b"), answer(2), Text("tail"), unsupervised)
    document = Document(segments, {"name": "x"})
    reduced = drop(document, "text")
    assert reduced is not None and reduced.meta == {"name": "x", "dropped": "text"}
    first, turn, last, target = reduced.segments
    assert isinstance(first, Image) and torch.equal(first.pixels, PIXELS + 1) and not first.supervise
    assert (turn, last) == (Text(""), Text("", Role.ASSISTANT)) and target is segments[3]
    nulls = null_documents(document)
    assert [null.segments[-1] for null in nulls] == [segments[1], segments[3]]
    assert nulls[0].segments[:-1] == (Text("", Role.ASSISTANT),)
    assert nulls[1].segments[:-1] == (Text("", Role.ASSISTANT), Text(""), Text("", Role.ASSISTANT))
    assert [null.meta["dropped"] for null in nulls] == ["all", "all"]
    assert drop(Document((Text("a"), unsupervised)), "all") is None and null_documents(Document((unsupervised,))) == []


# ---- noise of blocks -----------------------------------------------------------------------------------------------


def scripted(model: omni.Omni, scripts: list[list[int]]) -> Engine:
    """An engine whose requests emit the ids of their scripts, and the end."""
    engine = Engine(model)
    follow(engine, lambda request: [*scripts[request.number], engine.control.end])
    return engine


def picture(engine: Engine) -> list[int]:
    c = engine.control
    return [c.image, c.size(2), c.size(3)]


def test_every_block_and_jump_has_its_own_noise(model: omni.Omni, spy: Spy) -> None:
    """Two pictures of one reply, each with its start and two jumps: six different tensors."""
    engine = Engine(model)
    scripted(model, [picture(engine) * 2]).generate("draw", sampler="spy", steps=2, seed=5)
    assert len(spy.starts) == 2
    drawn = [spy.starts[0], *spy.noises[0], spy.starts[1], *spy.noises[1]]
    for number, one in enumerate(drawn):
        assert one.shape == (6, 48) and abs(float(one.mean())) < 0.3 and 0.8 < float(one.std()) < 1.2
        assert all(float((one - other).abs().max()) > 0.5 for other in drawn[:number])


@pytest.fixture
def clips(model: omni.Omni, monkeypatch: pytest.MonkeyPatch) -> Video:
    """Two frames are one block of (2, 2, 3) latents; the clip has two blocks."""
    monkeypatch.setattr(model, "codec", PixelCodec(PixelConfig(patch=4, frames_per_chunk=2)))
    return Video(torch.zeros(4, 8, 12, 3, dtype=torch.uint8), 8.0, Role.ASSISTANT, supervise=True)


def header(model: omni.Omni, clip: Video) -> list[int]:
    [ids] = [span.ids for span in model.spans(Document((clip,)))[:1] if isinstance(span, TokenSpan)]
    return ids[ids.index(Engine(model).control.video) :]


def test_the_blocks_of_a_clip_have_their_own_noise(model: omni.Omni, spy: Spy, clips: Video) -> None:
    noise = [block_noise(Key(5), 0, block, (12, 48)) for block in (0, 1)]
    assert float((noise[0] - noise[1]).abs().max()) > 0.5
    scripted(model, [header(model, clips)]).generate("move", sampler="spy", steps=2, seed=5)
    assert len(spy.starts) == 2  # one call per block
    for block in (0, 1):
        assert torch.equal(spy.starts[block], noise[block])
        for jump in (0, 1):
            assert torch.equal(spy.noises[block][jump], block_noise(Key(5), 0, block, (12, 48), jump))


def test_every_guidance_branch_reads_finished_blocks(model: omni.Omni, spy: Spy, clips: Video) -> None:
    options = {"sampler": "spy", "steps": 2, "guidance": 3.0, "image_guidance": 1.5}
    scripted(model, [header(model, clips)]).generate(Document(HISTORIES[0]), **options)
    finished = spy.starts[0] / 4  # the end of the spy's jumps
    for number, known in enumerate(((), (finished,))):
        start, found = spy.starts[number], spy.velocities[number]
        full, text, everything = (
            branch(model, HISTORIES[0], what, start, target=clips, finished=known) for what in (None, "text", "all")
        )
        wanted = everything + 1.5 * (text - everything) + 3 * (full - text)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    without = branch(model, HISTORIES[0], "all", spy.starts[1], target=clips)
    assert float((without - everything).abs().max()) > 1e-3


def test_noise_does_not_depend_on_the_batch(model: omni.Omni, spy: Spy) -> None:
    """The second picture of seed 5: alone, and beside requests of other seeds, one of which refines its first."""
    engine, options = Engine(model), GenerationOptions(sampler="spy", steps=2)
    text = engine.tokenizer.encode("hello")
    two, late = picture(engine) * 2, [*text, *picture(engine)]
    scripted(model, [two]).generate_batch(["draw"], options, seeds=[5])
    alone = [(start, *noise) for start, noise in zip(spy.starts, spy.noises, strict=True)]
    assert len(alone) == 2
    spy.starts.clear(), spy.noises.clear()
    scripted(model, [late, two, two]).generate_batch(["a", "draw", "c"], options, seeds=[6, 5, 7])
    rows = [(start, *noise) for start, noise in zip(spy.starts, spy.noises, strict=True)]
    assert len(rows) == 5
    for wanted in alone:
        same = [all(torch.equal(a, b) for a, b in zip(wanted, row, strict=True)) for row in rows]
        assert sum(same) == 1
    assert all(not torch.equal(a[0], b[0]) for i, a in enumerate(rows) for b in rows[:i])


def test_step_events_come_block_by_block(model: omni.Omni, spy: Spy) -> None:
    engine = Engine(model)
    events = list(scripted(model, [picture(engine) * 2]).stream("draw", sampler="spy", steps=2, seed=5))
    steps = [event for event in events if isinstance(event, BlockStep)]
    assert [(e.index, e.step, e.steps) for e in steps] == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]
    for event, start, share in zip(steps, [spy.starts[0]] * 2 + [spy.starts[1]] * 2, [2, 4] * 2, strict=True):
        assert event.latents.dtype == torch.float32 and torch.equal(event.latents, start / share)


DIFFERENT: list[dict[str, object]] = [
    {}, {"steps": 3}, {"guidance": 2.0}, {"image_guidance": 2.0}, {"guidance_embedding": 2.0}, {"sampler": "heun"},
    {"sampler": "gamma", "gamma": 0.3}, {"sampler": "gamma", "gamma": 0.9}, {"image_size": (8, 8)}, {"shift": 3.0},
]  # fmt: skip


def test_requests_keep_their_own_options(model: omni.Omni) -> None:
    """Options may differ between requests that refine together: each reply equals that of its options alone."""
    plain = GenerationOptions(**{**FORCED, "sampler": None, "steps": 2})
    options = [plain.changed(change) for change in DIFFERENT]
    prompt = Document(HISTORIES[0])
    together = model.generate_batch([prompt] * len(options), options, seeds=[5] * len(options))
    pictures = [torch.tensor(list(reply.images[0].tobytes())) for reply in together]
    for one, found in zip(options, pictures, strict=True):
        [alone] = model.generate_batch([prompt], one, seeds=[5])
        assert int((torch.tensor(list(alone.images[0].tobytes())) - found).abs().max()) <= 1
    for number, found in enumerate(pictures):
        for other in pictures[:number]:
            assert found.shape != other.shape or int((found - other).abs().max()) > 1
