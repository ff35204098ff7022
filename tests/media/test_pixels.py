"""Every mode and dtype to uint8 RGB: scaled by its range or rejected; oriented, in sRGB, at all entry points."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from omni import media
from omni.document import Image as Picture
from omni.document import Video
from omni.media.files import TimedBytes
from omni.text.chat import messages_to_document

RGB = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
GREY = RGB[..., 0]
TURNS = {  # EXIF orientation -> the transform that undoes it
    1: lambda p: p,
    2: lambda p: p.flip(1),
    3: lambda p: p.flip(0, 1),
    4: lambda p: p.flip(0),
    5: lambda p: p.transpose(0, 1),
    6: lambda p: p.transpose(0, 1).flip(1),
    7: lambda p: p.transpose(0, 1).flip(0, 1),
    8: lambda p: p.transpose(0, 1).flip(0),
}


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def through_chat(value: Any) -> torch.Tensor:
    segment = messages_to_document([{"role": "user", "content": [{"type": "image", "image": value}]}]).segments[0]
    assert isinstance(segment, Picture)
    return segment.pixels


def error(value: Any) -> str:
    with pytest.raises(ValueError) as caught:
        media.load_image(value)
    with pytest.raises(ValueError, match="message 0: ") as again:
        through_chat(value)
    assert "\n" not in str(caught.value) and str(again.value).endswith(str(caught.value))
    return str(caught.value)


def shown(value: Any) -> torch.Tensor:
    """Pixels of `load_image`, equal to those of a part of a message."""
    pixels = media.load_image(value)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, through_chat(value))
    return pixels


@pytest.mark.parametrize(
    ("value", "white"),
    [
        (np.full((2, 3), 0.5, np.float32), 128),
        (np.full((2, 3, 3), 0.25, np.float64), 64),
        (np.ones((2, 3), np.float16), 255),
        (torch.full((3, 2, 6), 0.5), 128),
        (torch.full((2, 6, 3), 0.5, dtype=torch.bfloat16), 128),
        (torch.zeros(2, 6, dtype=torch.float64), 0),
        (np.full((2, 3), 30000, np.uint16), 117),
        (np.full((2, 3), 65535, ">u2"), 255),
        (np.full((2, 3), 128, np.uint16), 0),  # 0.498: the dtype gives the scale, not the values
        (np.full((2, 3), 129, np.uint16), 1),
        (torch.full((2, 3), 65535, dtype=torch.uint16), 255),
        (np.ones((2, 3), bool), 255),
        (torch.tensor([[True, True]]), 255),
        (np.full((2, 3, 1), 9, np.uint8), 9),
        (Image.new("F", (3, 2), 0.5), 128),
        (Image.new("I;16", (3, 2), 30000), 117),
        (Image.new("1", (3, 2), 1), 255),
        (Image.new("L", (3, 2), 9), 9),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 0)), 255),
        (Image.new("LA", (3, 2), (9, 255)), 9),
        (Image.new("La", (3, 2), (9, 255)), 9),
        (Image.new("RGBa", (3, 2), (9, 9, 9, 255)), 9),
        (Image.new("PA", (3, 2)), 255),
        (Image.new("YCbCr", (3, 2), (9, 128, 128)), 9),
        (Image.new("HSV", (3, 2), (0, 0, 9)), 9),
        (encoded(Image.new("F", (3, 2), 0.5), "TIFF"), 128),
        (encoded(Image.new("I;16", (3, 2), 30000), "TIFF"), 117),
        (encoded(Image.new("I;16", (3, 2), 30000), "PNG"), 117),
        (b"P5 3 2 65535\n" + np.full(6, 30000, ">u2").tobytes(), 117),
    ],
)
def test_values_are_scaled_by_the_range_of_the_dtype(value: Any, white: int) -> None:
    assert shown(value).unique().tolist() == [white]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full((2, 3), 200, np.int32), r"int32 array \(2, 3\) has no known white value; give uint8"),
        (np.full((2, 3), 200, np.int64), "int64 array"),
        (torch.full((2, 3, 3), 200), r"int64 array \(2, 3, 3\) has no known"),
        (np.zeros((2, 3), np.int8), "int8 array"),
        (np.zeros((2, 3), np.int16), "int16 array"),
        (np.zeros((2, 3), np.uint32), "uint32 array"),
        (np.zeros((2, 3), np.complex64), "complex64 array"),
        (np.full((2, 3), 30000.0, np.float32), r"values from 30000 to 30000; give floats in \[0, 1\]"),
        (np.array([[-1.0, 1.0]]), "values from -1 to 1"),
        (torch.tensor([[0.0, 255.0]]), "values from 0 to 255"),
        (np.array([[0.5, np.nan]]), "float64 array .* holds NaN or infinite values"),
        (np.array([[0.5, np.inf]], np.float32), "holds NaN or infinite values"),
        (Image.new("F", (3, 2), 30000), "mode 'F' holds values from 30000"),
        (encoded(Image.new("F", (3, 2), 255), "TIFF"), "bytes of mode 'F' holds values from 255"),
        (Image.new("I", (3, 2), 200), "32-bit integers .*without a known white value"),
        (encoded(Image.new("I", (3, 2), 200), "TIFF"), "32-bit integers"),
        (np.array(["a"]), "array"),
        (np.zeros((), np.uint8), "is no picture"),
        (np.zeros((0, 3), np.uint8), "is no picture"),
        (np.zeros((1, 2, 3, 3), np.uint8), r"\(1, 2, 3, 3\) is no picture; give one of shape \(H, W, 3\)"),
        (np.zeros((5, 7, 9), np.uint8), r"no axis of 1 to 4 channels; give \(H, W, 3\)"),
        (np.zeros((3, 5, 4), np.uint8), r"can be \(H, W, C\) or \(C, H, W\)"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "9000 x 9000 pixels, above max_pixels=50000000"),
    ],
)
def test_ambiguous_inputs_are_named(value: Any, message: str) -> None:
    assert re.search(message, error(value))


@pytest.mark.parametrize("make", [torch.Tensor.numpy, lambda t: t, lambda t: t.numpy()[::-1, ::-1][::-1, ::-1]])
def test_layouts_of_arrays(make: Any) -> None:
    rgba = torch.cat([RGB, torch.full((5, 7, 1), 255, dtype=torch.uint8)], -1)
    clear = torch.cat([RGB, torch.zeros(5, 7, 1, dtype=torch.uint8)], -1)
    for layout in (RGB, RGB.permute(2, 0, 1), rgba, rgba.permute(2, 0, 1)):
        assert torch.equal(shown(make(layout)), RGB)
    assert shown(make(clear)).unique().tolist() == [255]
    grey = GREY[..., None].expand(5, 7, 3)
    for layout in (GREY, GREY[..., None], GREY[None]):
        assert torch.equal(shown(make(layout)), grey)
    assert torch.equal(shown(make(torch.stack([GREY, torch.full_like(GREY, 255)], -1))), grey)


def test_frames_are_converted_like_pictures() -> None:
    frames = RGB[None].expand(2, 5, 7, 3)
    for value in (
        [RGB.numpy(), RGB],
        frames.numpy(),
        frames.permute(0, 3, 1, 2),
        frames.permute(0, 3, 1, 2).double() / 255,
        np.asarray(frames, np.uint16) * 257,
    ):
        (clip,) = messages_to_document([{"role": "user", "content": [{"type": "video", "video": value}]}]).segments
        assert isinstance(clip, Video) and torch.equal(clip.frames, frames)


def test_a_transparent_value_of_16_bits_becomes_white() -> None:
    grey = Image.fromarray(np.array([[1000, 30000]], np.uint16))
    assert shown(encoded(grey, "PNG", transparency=1000))[0, :, 0].tolist() == [255, 117]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_all_orientations(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("a Pillow without AVIF")
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(kind, {})
    scene = RGB // 64 * 32 + 90
    scene = scene[:4, :6].repeat_interleave(8, 0).repeat_interleave(8, 1)
    for value, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = value
        data = encoded(media.to_pil(scene), kind, exif=exif, **lossless)
        plain = media.load_image(encoded(media.to_pil(scene), kind, **lossless))
        for source in (data, Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).copy()):
            assert (media.load_image(source).int() - turn(plain).int()).abs().max() <= 2, (kind, value)
    if kind in ("PNG", "WEBP"):  # animated: every frame
        exif = Image.Exif()
        exif[0x0112] = 5
        more = {"append_images": [media.to_pil(scene.flip(0))], "save_all": True, "duration": 100}
        frames, _ = media.load_video(encoded(media.to_pil(scene), kind, exif=exif, **more, **lossless))
        assert torch.equal(frames, torch.stack([scene.transpose(0, 1), scene.flip(0).transpose(0, 1)]))


def test_unreadable_exif_data_are_ignored() -> None:
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        assert torch.equal(shown(encoded(media.to_pil(RGB), "PNG", exif=exif)), RGB)
    strange = Image.Exif()
    strange[0x0112] = 9
    assert torch.equal(shown(encoded(media.to_pil(RGB), "PNG", exif=strange)), RGB)


def test_a_colour_profile_is_converted() -> None:
    """A profile with sRGB's red and green primaries exchanged: its red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be")))
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    picture = Image.new("RGB", (3, 2), (255, 0, 0))
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    for kind in ("PNG", "TIFF", "JPEG", "WEBP"):
        pixels = shown(encoded(picture, kind, icc_profile=bytes(profile)))
        assert (pixels.int() - torch.tensor([0, 255, 0])).abs().max() <= 3, kind
    assert shown(encoded(clear, "PNG", icc_profile=bytes(profile))).tolist() == [[[255, 255, 255]]]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for harmless in (srgb, b"nonsense", bytes(profile[:200])):
        assert torch.equal(shown(encoded(media.to_pil(RGB), "PNG", icc_profile=harmless)), RGB)


def test_a_tiff_whose_zero_is_white() -> None:
    for mode, value, expected in (("L", 200, 55), ("I;16", 60_000, 22), ("F", 0.8, 51)):
        data = bytearray(encoded(Image.new(mode, (3, 2), value), "TIFF"))
        entry = struct.pack("<HHI", 262, 3, 1)
        at = data.index(entry) + len(entry)
        assert data[at] == 1
        data[at] = 0
        assert shown(bytes(data)).unique().tolist() == [expected], mode


def test_jpeg_scans_are_read_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scan covers the whole picture: 0.3 MB of scans take minutes, so the time limit is checked in between."""
    whole = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    data = whole[:-2] + scan * (20_000 // len(scan)) + whole[-2:]
    sizes: list[int] = []
    read = TimedBytes.read
    monkeypatch.setattr(TimedBytes, "read", lambda self, size=-1: (sizes.append(size), read(self, size))[1])
    assert media.load_image(data).unique().tolist() == [128]
    assert sizes.count(1024) >= 15 and 0 < max(sizes) <= 1024
