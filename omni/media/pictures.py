"""Pictures: a path, encoded bytes, an array or a PIL picture to pixels, and pixels to PNG."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFile

from omni.media import files
from omni.media.files import MAX_BYTES, MAX_PIXELS, TIMEOUT_SECONDS, TimedBytes, TimeLimitError
from omni.media.pixels import array_to_rgb, check_tensor, image_to_rgb, is_array, is_pil, upright

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs a program (EPS, PDF)
_ORIENTATION = 0x0112  # the EXIF tag; its values as display matrices, see pixels.upright
_MATRICES = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
# libjpeg decodes every scan of a file over the whole picture; small pieces let TimedBytes check the time in between.
_JPEG_PIECE = 1024


def load_image(
    source: Any,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> torch.Tensor:
    """Decode a picture (a path, encoded bytes, a PIL image, a numpy array or a tensor) to uint8 (H, W, 3).

    The header's size is checked before decoding. The EXIF orientation is applied, also that of a PIL image; an embedded
    colour profile is converted to sRGB; transparency is composited on white; an animation gives its first frame.
    omni/media/pixels.py converts other modes and dtypes: 16-bit values and floats in [0, 1] are scaled to 8 bits, other
    integers and floats raise ValueError.
    """
    if is_pil(source):
        return decode(source, "the PIL picture", max_pixels)
    if is_array(source):
        return array_to_rgb(source, max_pixels)
    data, name = files.read(source, max_bytes, "picture")
    with open_header(TimedBytes(data, name, timeout_seconds), name, max_pixels) as image:
        return decode(image, name, max_pixels)


def open_header(data: TimedBytes, name: str, max_pixels: int) -> Image.Image:
    """Read the header only."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the size; check_pixels checks it
            return Image.open(data, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large for max_pixels={max_pixels}: {error}; make it smaller first") from None
    except TimeLimitError:
        raise
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        known = ", ".join(FORMATS)
        reason = "unknown or damaged format" if isinstance(error, Image.UnidentifiedImageError) else files.reason(error)
        raise ValueError(f"cannot read {name}: {reason}; give a whole file, one of {known}") from None


def decode(image: Image.Image, name: str, max_pixels: int) -> torch.Tensor:
    """The picture, or its current frame, with its orientation applied."""
    files.check_pixels(image.size, 1, name, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(image, ImageFile.ImageFile) and image.format == "JPEG":
                image.decodermaxblock = _JPEG_PIECE
            image.load()
            orientation = _orientation(image)
    except TimeLimitError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"cannot decode {name}: {files.reason(error)}; the file is cut off or damaged") from None
    return upright(image_to_rgb(image, name), _MATRICES.get(orientation, (1, 0, 0, 1)))


def _orientation(image: Image.Image) -> Any:
    """1 to 8, or None; unreadable EXIF data is ignored, as in viewers."""
    try:
        return image.getexif().get(_ORIENTATION)
    except TimeLimitError:
        raise
    except Exception:  # as above
        return None


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """uint8 (H, W, 3) to a PIL picture."""
    check_tensor(pixels, 3, "(H, W, 3)")
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.cpu().contiguous().numpy().tobytes())


def encode_png(pixels: torch.Tensor) -> bytes:
    """uint8 (H, W, 3) to the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(pixels: torch.Tensor | Image.Image, path: str | Path) -> None:
    """Write a PNG; the file appears whole or not at all. Raises OSError if the folder cannot be written."""
    picture = pixels if isinstance(pixels, Image.Image) else to_pil(pixels)
    files.write_whole(path, lambda file: picture.save(file, format="PNG"))
