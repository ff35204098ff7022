"""Media: bombs and broken files raise one line; orientation and transparency; files appear whole or not at all."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from omni import media

PIXELS = torch.randint(0, 256, (12, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header has that size and whose pixel data is a few zero bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def error(source: object, **bounds: int) -> str:
    with pytest.raises(ValueError) as caught:
        media.load_image(source, **bounds)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(50_000, 50_000), (9_000, 9_000), (12_000, 9_000)])
def test_bombs_raise_before_decoding(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    started = time.process_time()
    message = error(path)
    assert time.process_time() - started < 2
    assert "bomb.png" in message and "max_pixels=50000000" in message


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    media.save_png(PIXELS, path)
    for source in (path, str(path), path.read_bytes(), media.to_pil(PIXELS)):
        assert torch.equal(media.load_image(source), PIXELS)
    media.save_png(media.to_pil(PIXELS.flip(0)), path)
    assert torch.equal(media.load_image(path), PIXELS.flip(0))
    assert os.listdir(tmp_path) == ["a.png"]


def test_no_partial_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media.save_png(PIXELS, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, file: io.BytesIO, **options: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        media.save_png(PIXELS.flip(0), tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


def test_unreadable_files(tmp_path: Path) -> None:
    whole = media.encode_png(PIXELS)
    path = tmp_path / "broken.png"
    for data, expected in (
        (whole[: len(whole) // 2], "cannot decode"),
        (whole[:20], "cannot read"),
        (b"", "is empty"),
        (b"hello", "unknown or damaged format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown or damaged format"),
    ):
        path.write_bytes(data)
        message = error(path)
        assert expected in message and "broken.png" in message
    assert "No such file" in error(tmp_path / "none.png")
    assert "'" + str(tmp_path) + "'" in error(tmp_path)
    assert "got int" in error(3)
    path.write_bytes(whole)
    assert "max_bytes=10" in error(path, max_bytes=10)
    assert "20 x 12 pixels, above max_pixels=239" in error(path, max_pixels=239)
    assert "max_pixels=239" in error(media.to_pil(PIXELS), max_pixels=239)
    assert media.load_image(path, max_pixels=240).shape == (12, 20, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_raises_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "no regular file" in error(tmp_path / "pipe.png")


def test_flipped_bytes_raise_no_other_errors() -> None:
    generator = torch.Generator().manual_seed(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(media.to_pil(PIXELS), kind)
        for _ in range(60):
            data = bytearray(whole)
            at = int(torch.randint(len(data), (1,), generator=generator))
            data[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            try:
                media.load_image(bytes(data), max_pixels=1_000_000)
            except ValueError as caught:
                assert "\n" not in str(caught)


def test_orientation_is_applied_once() -> None:
    image = media.to_pil(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is the right edge: rotate 90 degrees clockwise
    turned = media.load_image(encoded(image, exif=exif))
    assert torch.equal(turned, PIXELS.transpose(0, 1).flip(1))
    assert torch.equal(media.load_image(media.to_pil(turned)), turned)
    assert torch.equal(media.load_image(Image.open(io.BytesIO(encoded(image, exif=exif)))), turned)


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    expected = torch.tensor([[[255, 255, 255], [10, 20, 30]]], dtype=torch.uint8)
    assert torch.equal(media.load_image(encoded(clear)), expected)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([1, 2, 3, 10, 20, 30])
    palette.putpixel((1, 0), 1)
    assert torch.equal(media.load_image(encoded(palette, transparency=0)), expected)
    assert media.load_image(encoded(Image.new("LA", (1, 1), (0, 0)))).unique().tolist() == [255]


def test_other_modes() -> None:
    grey16 = Image.new("I;16", (3, 2), 128 * 256)
    assert media.load_image(encoded(grey16)).unique().tolist() == [128]
    for mode in ("1", "L", "CMYK", "YCbCr"):
        assert media.load_image(encoded(Image.new(mode, (3, 2)), "TIFF")).shape == (2, 3, 3)


def test_animations() -> None:
    frames = torch.stack([PIXELS, PIXELS.flip(0), PIXELS.flip(1)])
    buffer = io.BytesIO()
    pictures = [media.to_pil(f) for f in frames]
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:])
    assert torch.equal(media.load_image(buffer.getvalue()), PIXELS)


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_animated_pictures(kind: str, tmp_path: Path) -> None:
    base = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    for index in range(5):
        base[index, index : index + 3, 2:9] = torch.tensor([250, 40 * index, 10])
    path = tmp_path / f"clip.{kind}"
    (media.save_gif if kind == "gif" else media.save_apng)(base, path, fps=10)
    frames, fps = media.load_video(path)
    assert torch.equal(frames, base) and fps == pytest.approx(10)
    assert os.listdir(tmp_path) == [path.name]
    assert len(media.load_video(path, fps=5)[0]) == 3
    for bounds, message in (
        ({"max_frames": 4}, "max_frames=4"),
        ({"max_seconds": 0.2}, "max_seconds=0.2"),
        ({"max_pixels": 16 * 16 * 4}, "16 x 16 pixels x 5 frames, above max_pixels=1024"),
        ({"max_bytes": 5}, "max_bytes=5"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            media.load_video(path, **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", [32, 33])
def test_video_files(side: int, tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = torch.full((6, 32, side, 3), 40, dtype=torch.uint8)
    for index in range(6):
        frames[index, 4 * index : 4 * index + 8] = 200
    path = tmp_path / "clip.mp4"
    media.save_video(frames, path, fps=8)
    loaded, fps = media.load_video(path)
    assert loaded.shape == frames.shape and fps == pytest.approx(8)
    assert (loaded.float() - frames.float()).abs().mean() < 4
    assert os.listdir(tmp_path) == ["clip.mp4"]
    with pytest.raises(ValueError, match="max_frames=3"):
        media.load_video(path.read_bytes(), max_frames=3)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="clip.mp4"):
        media.load_video(path)


def test_video_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x" * 99)
    with pytest.raises(ImportError, match=r"pip install 'omni-flow\[video\]'"):
        media.load_video(tmp_path / "a.mp4")
    with pytest.raises(ImportError, match=r"pip install 'omni-flow\[video\]'"):
        media.save_video(PIXELS[None], tmp_path / "b.mp4")
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_wrong_tensors(tmp_path: Path) -> None:
    for wrong in (PIXELS.float(), PIXELS[..., 0], PIXELS[:0], 3):
        with pytest.raises(ValueError, match="uint8 tensor"):
            media.save_png(wrong, tmp_path / "a.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(T, H, W, 3\)"):
        media.save_gif(PIXELS, tmp_path / "a.gif")
    assert os.listdir(tmp_path) == []
