"""Values of any mode and dtype to uint8 RGB. Every entry point uses this conversion.

    uint8, 8-bit modes         unchanged; palette, CMYK, YCbCr, LAB and a colour profile to sRGB
    uint16, "I;16" and alike   by the range of the type: 65535 is white
    bool, mode "1"             True is white
    float, mode "F"            1 is white; every value must be in [0, 1]
    other integers, mode "I"   ValueError: their white value is unknown

Arrays are (H, W), (H, W, C) or (C, H, W) with C 1 grey, 2 grey and alpha, 3 RGB or 4 RGBA; a last axis of 3 is always
RGB. Transparency is composited on white.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from omni.media.files import check_pixels

_PHOTOMETRIC = 262  # the TIFF tag


def is_array(value: Any) -> bool:
    """Whether `value` is a tensor or an array of numbers."""
    return isinstance(value, torch.Tensor) or hasattr(value, "__array_interface__") and not is_pil(value)


def is_pil(value: Any) -> bool:
    """Whether `value` is a PIL picture."""
    return isinstance(value, Image.Image)


def check_tensor(pixels: torch.Tensor, ndim: int, shape: str) -> None:
    """ValueError unless `pixels` is uint8 RGB, not empty, of `ndim` axes (`shape` in words)."""
    good = isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == ndim
    if not good or pixels.shape[-1] != 3 or pixels.numel() == 0:
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"pixels must be a uint8 tensor {shape}, got {got}")


def upright(pixels: torch.Tensor, matrix: tuple[int, int, int, int]) -> torch.Tensor:
    """(H, W, 3) rotated and mirrored by a display matrix, to the nearest of the eight orientations.

    matrix: (a, b, c, d) of ISO/IEC 14496-12: the pixel at column p, row q is shown at column a*p + c*q, row b*p + d*q,
    up to scale and offset. Singular matrices are ignored, as in players.
    """
    a, b, c, d = matrix
    if a * d == b * c:
        return pixels
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.transpose(0, 1), c, b
    return pixels.flip([axis for axis, sign in ((0, d), (1, a)) if sign < 0]).contiguous()


# --------------------------------------------------------------------------------------------- arrays


def array_to_rgb(value: Any, max_pixels: int) -> torch.Tensor:
    """A tensor or array of one picture to uint8 (H, W, 3). Raises ValueError that names its dtype, shape or values."""
    shape = tuple(value.shape)
    name = f"the {str(value.dtype).removeprefix('torch.')} array {shape}"
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{name} is no picture; give one of shape (H, W, 3), (H, W, C), (C, H, W) or (H, W)")
    channels_last = _channels_last(shape, name)
    height, width = shape[:2] if channels_last else shape[1:]
    check_pixels((width, height), 1, name, max_pixels)
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and len(shape) == 3 and shape[-1] == 3:
        return value.detach().cpu()
    array = _to_8_bits(_to_numpy(value, name), name)
    array = array if channels_last else np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return image_to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)


def _channels_last(shape: tuple[int, ...], name: str) -> bool:
    """Whether the channels are the last axis, from the shape alone. ValueError if both axes or neither can be."""
    if len(shape) == 2 or shape[-1] == 3:
        return True
    last, first = shape[-1] in (1, 2, 4), shape[0] in (1, 3, 4)
    if last and first:
        raise ValueError(f"{name} can be (H, W, C) or (C, H, W); give it as uint8 (H, W, 3)")
    if not last and not first:
        raise ValueError(f"{name} has no axis of 1 to 4 channels; give (H, W, 3), (H, W, C), (C, H, W) or (H, W)")
    return last


def _to_numpy(value: Any, name: str) -> np.ndarray:
    """The numbers on the CPU; bfloat16 as float32. ValueError for anything but numbers."""
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} holds no plain numbers ({error}); give uint8 (H, W, 3)") from None


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    """To uint8, by the table at the head of this file."""
    kind = array.dtype
    if kind == np.uint8:
        return array
    if kind == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if kind.kind == "u" and kind.itemsize == 2:
        quotient, rest = np.divmod(array.astype(np.uint16, copy=False), np.uint16(257))
        return (quotient + (rest > 128)).astype(np.uint8)  # round(value * 255 / 65535)
    if kind.kind == "f":
        low, high = float(array.min()), float(array.max())  # NaN where one value is NaN
        if not (low >= 0 and high <= 1):
            why = f"values from {low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinite values"
            raise ValueError(f"{name} holds {why}; give floats in [0, 1], where 1 is white, or uint8")
        scaled = array.astype(np.float32)
        scaled *= 255
        return np.rint(scaled, out=scaled).astype(np.uint8)
    raise ValueError(f"{name} has no known white value; give uint8, uint16, or floats in [0, 1]")


# --------------------------------------------------------------------------------------------- PIL pictures


def image_to_rgb(image: Image.Image, name: str) -> torch.Tensor:
    """A loaded PIL picture of any mode to uint8 (H, W, 3), composited on white. Raises ValueError."""
    image = _to_8_bit_mode(image, name)
    try:
        image = _to_srgb(image.convert("LA") if image.mode == "La" else image)
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} of mode {image.mode!r} cannot become RGB: {error}; convert it first") from None
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3)


def _to_8_bit_mode(image: Image.Image, name: str) -> Image.Image:
    """Modes of more than 8 bits to 8-bit grey, with alpha if the file names a transparent value."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "I":
        # Some versions and files give 16-bit PNG and PPM in mode I; otherwise the range is unknown.
        if image.format not in ("PNG", "PPM") or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{name} has 32-bit integers (mode 'I') without a known white value; convert it to 8 or 16 bits first"
            )
        values = values.astype(np.uint16)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:  # a TIFF whose zero is white; Pillow inverts only 8 bits
        values = (1 if image.mode == "F" else 65535) - values
    clear = image.info.get("transparency")
    grey = Image.fromarray(_to_8_bits(values, f"{name} of mode {image.mode!r}"))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert the colours of an embedded ICC profile to sRGB; an unreadable profile is ignored, as in viewers."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "RGBA", "P", "PA", "L", "LA", "CMYK"):
        return image
    try:
        from PIL import ImageCms
    except ImportError:  # a build of Pillow without it
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "sRGB" in ImageCms.getProfileDescription(profile):
            return image
        has_alpha = "A" in image.mode or "transparency" in image.info
        whole = image.convert("RGBA") if has_alpha else image
        base = whole.convert("L" if image.mode in ("L", "LA") else "RGB") if image.mode != "CMYK" else whole
        out = ImageCms.profileToProfile(base, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert out is not None  # None only with inPlace
        if has_alpha:
            out.putalpha(whole.getchannel("A"))
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return image
    out.info.pop("transparency", None)
    return out
