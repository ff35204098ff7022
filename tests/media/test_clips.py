"""Clips are as a player shows them: oriented, with square pixels, in their colours. Bounds are checked before work."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni import media
from omni.media import video

COLOUR = torch.tensor([220, 40, 30])
ONE = 1 << 16
# Display matrix (a, b, c, d) of ISO/IEC 14496-12: column p, row q is shown at column a*p + c*q, row b*p + d*q.
MATRICES: dict[tuple[int, int, int, int], Callable[[torch.Tensor], torch.Tensor]] = {
    (1, 0, 0, 1): lambda f: f,
    (0, 1, -1, 0): lambda f: f.rot90(-1, (1, 2)),  # written by an upright phone: 90 degrees clockwise
    (-1, 0, 0, -1): lambda f: f.flip(1, 2),
    (0, -1, 1, 0): lambda f: f.rot90(1, (1, 2)),
    (-1, 0, 0, 1): lambda f: f.flip(2),
    (1, 0, 0, -1): lambda f: f.flip(1),
    (0, 1, 1, 0): lambda f: f.transpose(1, 2),
    (0, -1, -1, 0): lambda f: f.transpose(1, 2).flip(1, 2),
}


@pytest.fixture(scope="module")
def av() -> Any:
    return pytest.importorskip("av")


def scene(width: int = 48, height: int = 32, frames: int = 2) -> torch.Tensor:
    """A dark picture with a light corner and a half-light one: its eight orientations differ."""
    clip = torch.full((frames, height, width, 3), 30, dtype=torch.uint8)
    clip[:, : height // 2, : width // 4] = 220
    clip[:, : height // 4, width // 2 :] = 120
    return clip


def mp4(
    av: Any,
    frames: torch.Tensor,
    matrix: str | None = None,
    times: list[int] | None = None,
    title: str = "",
    **fields: Any,
) -> bytes:
    """An MP4 as other programs write it: colours by `matrix`, without a tag unless `fields` of the stream set it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        container.metadata["title"] = title
        span = "JPEG" if fields.get("color_range") == 2 else "MPEG"
        for index, pixels in enumerate(frames.numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=span)
            frame.pts = times[index] if times else index
            frame.time_base = Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def with_display_matrix(data: bytes, matrix: tuple[int, ...]) -> bytes:
    """The nine numbers in the track header: version 0, so 40 bytes after the version."""
    a, b, c, d = (value * ONE for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at : at + 36]) == (ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def centre(frames: torch.Tensor) -> torch.Tensor:
    return frames[-1, frames.shape[1] // 2, frames.shape[2] // 2].int()


# --------------------------------------------------------------------------------------------- as players show them


def test_display_matrices(av: Any) -> None:
    data = mp4(av, scene())
    plain, _ = media.load_video(data)
    assert (plain.int() - scene().int()).abs().float().mean() < 3
    for matrix, turn in MATRICES.items():
        frames, _ = media.load_video(with_display_matrix(data, matrix))
        assert torch.equal(frames, turn(plain)), matrix
    quarter, _ = media.load_video(with_display_matrix(data, (0, 1, -1, 0)))
    assert quarter.shape == (2, 48, 32, 3)
    assert quarter[0, 2, 29].tolist() == pytest.approx([220] * 3, abs=9)  # the light corner, now at the top right
    assert torch.equal(media.load_video(with_display_matrix(data, (0, 0, 0, 0)))[0], plain)


def test_pixels_that_are_not_square(av: Any) -> None:
    for aspect, shape in ((Fraction(4, 3), (32, 64)), (Fraction(2, 3), (48, 48)), (Fraction(1, 1), (32, 48))):
        data = mp4(av, scene(), sample_aspect_ratio=aspect)
        frames, _ = media.load_video(data)
        assert frames.shape[1:3] == shape
        corner = frames[0, shape[0] // 4, shape[1] // 8]
        assert corner.tolist() == pytest.approx([220] * 3, abs=9)
    turned, _ = media.load_video(with_display_matrix(mp4(av, scene(), sample_aspect_ratio=Fraction(2)), (0, 1, -1, 0)))
    assert turned.shape[1:3] == (96, 32)


@pytest.mark.parametrize(("width", "height"), [(48, 32), (1280, 720), (49, 33), (1, 1), (2, 1)])
def test_colours_round_trip(av: Any, width: int, height: int, tmp_path: Path) -> None:
    frames = COLOUR.byte().expand(2, height, width, 3).contiguous()
    media.save_video(frames, tmp_path / "a.mp4")
    loaded, fps = media.load_video(tmp_path / "a.mp4")
    assert loaded.shape == frames.shape and fps == 8
    assert (loaded.int() - COLOUR).abs().max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert tuple(map(int, tags)) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("size", "matrix", "tags"),
    [
        ((1280, 720), "ITU709", {}),
        ((1280, 64), "ITU709", {}),
        ((64, 720), "ITU709", {}),
        ((48, 32), "ITU601", {}),
        ((640, 480), "ITU601", {}),
        ((48, 32), "ITU709", {"colorspace": 1, "color_range": 1}),
        ((48, 32), "ITU709", {"colorspace": 1, "color_range": 2}),
        ((1280, 720), "ITU601", {"colorspace": 5, "color_range": 1}),
        ((1280, 720), "ITU601", {"colorspace": 6, "color_range": 2}),
    ],
)
def test_colours_of_other_writers(av: Any, size: tuple[int, int], matrix: str, tags: dict[str, int]) -> None:
    data = mp4(av, COLOUR.byte().expand(1, size[1], size[0], 3).contiguous(), matrix, **tags)
    assert (centre(media.load_video(data)[0]) - COLOUR).abs().max() <= 3


# --------------------------------------------------------------------------------------------- rates and writers


WRITERS = [media.save_gif, media.save_apng, media.save_video]


@pytest.mark.parametrize("write", WRITERS)
def test_invalid_rates_and_sizes_raise(write: Callable[..., None], tmp_path: Path) -> None:
    for fps in (0, -1, float("nan"), float("inf"), 1e9, 1e-9, "8", None, True):
        with pytest.raises(ValueError, match="fps must be a number above 0, got "):
            write(scene(), tmp_path / "a", fps)
        if fps is not None:
            with pytest.raises(ValueError, match="fps must be a number above 0, got "):
                media.load_video(b"GIF89a", fps=fps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"uint8 tensor \(T, H, W, 3\), got torch.uint8 \(0, 32, 48, 3\)"):
        write(scene()[:0], tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_rates_round_trip(av: Any, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for fps in (0.0015, 0.5, 8, 23.976, 24, 60, 144, Fraction(30000, 1001), np.float32(12.5)):
        for write in (media.save_apng, media.save_video):
            write(scene(frames=3), path, fps)
            assert media.load_video(path, max_seconds=1e4)[1] == pytest.approx(float(fps), rel=1e-3)
    with pytest.raises(ValueError, match=r"a GIF shows from 1/655 to 50 frames per second, got fps=60; write"):
        media.save_gif(scene(), path, 60)
    media.save_gif(torch.cat([scene(frames=1), scene(frames=1).flip(1)]), path, 50)
    assert media.load_video(path)[1] == pytest.approx(50)
    with pytest.raises(ValueError, match="cannot write 2 x 17000 pixels"):
        media.save_video(scene(2, 17_000, 1), path)


def test_equal_frames_are_kept(tmp_path: Path) -> None:
    """Writers of animated pictures merge equal neighbours into one frame with a longer delay."""
    still = scene(frames=5)
    moving = torch.stack([scene()[0], scene()[0], scene()[0].flip(0), scene()[0], scene()[0]])
    media.save_apng(still, tmp_path / "a.png", fps=10)
    frames, fps = media.load_video(tmp_path / "a.png")
    assert torch.equal(frames, still) and fps == pytest.approx(10)
    for write in (media.save_apng, media.save_gif):
        write(moving, tmp_path / "b", fps=10)
        frames, fps = media.load_video(tmp_path / "b")
        assert torch.equal(frames, moving) and fps == pytest.approx(10)
    frames, fps = media.load_video(tmp_path / "b", fps=5)
    assert torch.equal(frames, moving[::2]) and fps == 5
    with pytest.raises(ValueError, match="lasts 5 frames, above max_frames=4"):
        media.load_video(tmp_path / "b", max_frames=4)
    assert torch.equal(media.load_video(gif([100, 100, 1000]))[0][:, 0, 0, 0], torch.tensor([0, 60] + [120] * 10))
    assert len(media.load_video(gif([70, 110, 70, 90]))[0]) == 4  # no common rate: no repeats


def gif(delays: list[int], side: int = 4) -> bytes:
    from PIL import Image

    first, *rest = [Image.new("RGB", (side, side), (60 * index % 251,) * 3) for index in range(len(delays))]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, duration=delays)
    return buffer.getvalue()


def test_delays_that_players_change() -> None:
    assert media.load_video(gif([10, 10, 10]))[1] == pytest.approx(10)
    assert media.load_video(gif([0, 0, 0]))[1] == pytest.approx(10)
    assert media.load_video(gif([20, 20, 20]))[1] == pytest.approx(50)


# --------------------------------------------------------------------------------------------- bounds


def test_bounds_include_dropped_frames() -> None:
    data = gif([20] * 50, side=10)
    assert len(media.load_video(data, fps=0.1)[0]) == 1
    for bounds in ({"max_decoded_frames": 49}, {"max_decoded_pixels": 49 * 100}, {"timeout_seconds": 0}):
        (name, value), *_ = bounds.items()
        with pytest.raises(ValueError, match=f"bytes .*{name}={value}"):
            media.load_video(data, fps=0.1, **bounds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout_seconds=0; make it smaller"):
        media.load_image(data, timeout_seconds=0)


def test_no_frame_is_decoded_beyond_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import GifImagePlugin

    seen: list[int] = []
    seek = GifImagePlugin.GifImageFile.seek
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "seek", lambda self, n: (seen.append(n), seek(self, n))[1])
    with pytest.raises(ValueError, match="max_decoded_frames=3"):
        media.load_video(gif([20] * 50), fps=0.1, max_decoded_frames=3)
    assert seen == [0, 1, 2, 3]


def test_the_headers_length_is_checked_first(av: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mp4(av, scene(), times=[0, 8 * 36_000])
    monkeypatch.setattr(video, "_square_size", lambda *_: pytest.fail("a frame was decoded"))
    with pytest.raises(ValueError, match=r"has 36000\.\d+ seconds by its header, above max_seconds=120; cut it"):
        media.load_video(data, fps=0.001)


def test_video_bounds(av: Any) -> None:
    data = mp4(av, scene(frames=20))
    assert len(media.load_video(data, fps=1)[0]) == 3
    for bounds in ({"max_decoded_frames": 19}, {"max_decoded_pixels": 19 * 48 * 32}, {"timeout_seconds": 0}):
        (name, value), *_ = bounds.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            media.load_video(data, fps=1, **bounds)  # type: ignore[arg-type]
    late = mp4(av, scene(), times=[8 * 200, 8 * 200 + 1])  # clips cut from longer ones begin late
    assert media.load_video(late)[1] == 8


@pytest.mark.parametrize("bare", [True, False])
def test_a_clip_opens_no_other_file(av: Any, bare: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mp4").write_bytes(mp4(av, scene()))
    monkeypatch.chdir(tmp_path)
    at = "secret.mp4" if bare else str(tmp_path / "secret.mp4")
    for text in (
        f"ffconcat version 1.0\nfile '{at}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{at}\n#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(ValueError, match="cannot decode the clip's bytes"):
            media.load_video(text.encode())


def test_a_cut_animation_raises(tmp_path: Path) -> None:
    media.save_apng(torch.cat([scene(), scene().flip(1)]), tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for end in (data.index(b"fdAT") + 4, data.rindex(b"fcTL") - 4, len(data) - 40):
        with pytest.raises(ValueError, match="cannot decode the clip's bytes.*cut off"):
            media.load_video(data[:end])


def test_flipped_bytes_of_clips_raise_one_line(av: Any) -> None:
    data = mp4(av, scene(), title="a title")
    at = data.index(b"a title")
    assert len(media.load_video(data[:at] + b"\xff\xe9" + data[at + 2 :])[0]) == 2  # invalid UTF-8 in unused text
    unknown = data.replace(b"avc1", b"none")
    with pytest.raises(ValueError, match="its codec is not known here; encode it as H.264"):
        media.load_video(unknown)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        flipped = bytearray(data)
        for place in torch.randint(len(data), (3,), generator=generator).tolist():
            flipped[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        try:
            media.load_video(bytes(flipped), max_pixels=10_000_000)
        except ValueError as caught:
            assert type(caught) is ValueError and "\n" not in str(caught)
