"""Pictures and clips in and out of files: bounded, checked, and nothing decoded before its size is known.

Legend: H, W pixels; T frames. Pixels are uint8 RGB tensors, (H, W, 3) or (T, H, W, 3), on the CPU.
Unreadable, oversized or unsupported input is a one-line ValueError that names it. Files appear whole or not at all.
Clips other than GIF, APNG and WebP go through PyAV: pip install 'omni-flow[video]'. Nothing is fetched from a network.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000  # of one picture; of all the frames of one clip: MAX_CLIP_PIXELS
MAX_CLIP_PIXELS = 500_000_000
MAX_BYTES = 64 << 20  # of one encoded picture; of one encoded clip: MAX_CLIP_BYTES
MAX_CLIP_BYTES = 512 << 20
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs a program (EPS, PDF)
ANIMATED = ("GIF", "PNG", "WEBP")

Source = str | Path | bytes | Image.Image


# --------------------------------------------------------------------------------------------- pictures


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """Decode a picture (a path, encoded bytes, or a PIL image) to uint8 (H, W, 3).

    The size is read from the header and refused before decoding. The EXIF orientation is applied; transparency is
    laid on white; 16-bit grey is scaled to 8; of an animation the first frame is taken. Raises ValueError.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the PIL picture", max_pixels)
    data, name = _read(source, max_bytes, "picture")
    with _open(data, name, max_pixels) as image:
        return _decode(image, name, max_pixels)


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """Read the header only."""
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size: _check_pixels decides, in one place
            return Image.open(io.BytesIO(data), formats=[kind for kind in FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large for max_pixels={max_pixels}: {error}; make it smaller first") from None
    except Exception as error:  # Pillow's parsers raise anything on damaged files
        known = ", ".join(FORMATS)
        reason = "unknown or damaged format" if isinstance(error, Image.UnidentifiedImageError) else _reason(error)
        raise ValueError(f"cannot read {name}: {reason}; give a whole file, one of {known}") from None


def _decode(image: Image.Image, name: str, max_pixels: int) -> torch.Tensor:
    _check_pixels(image.size, 1, name, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _to_tensor(_flatten(ImageOps.exif_transpose(image)))
    except Exception as error:  # as above
        raise ValueError(f"cannot decode {name}: {_reason(error)}; the file is cut off or damaged") from None


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB, on white where transparent."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 256) + 0).convert("L")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    width, height = image.size
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, 3)


def to_pil(pixels: torch.Tensor) -> Image.Image:
    """uint8 (H, W, 3) to a PIL picture."""
    _check_tensor(pixels, 3, "(H, W, 3)")
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.cpu().contiguous().numpy().tobytes())


def encode_png(pixels: torch.Tensor) -> bytes:
    """uint8 (H, W, 3) to the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(pixels: torch.Tensor | Image.Image, path: str | Path) -> None:
    """Write a PNG; the file appears whole or not at all. Raises OSError where the folder cannot be written."""
    picture = pixels if isinstance(pixels, Image.Image) else to_pil(pixels)
    _write_whole(path, lambda file: picture.save(file, format="PNG"))


# --------------------------------------------------------------------------------------------- clips


def load_video(
    source: str | Path | bytes,
    *,
    fps: float | None = None,
    max_frames: int = 1_000,
    max_seconds: float = 120.0,
    max_pixels: int = MAX_CLIP_PIXELS,
    max_bytes: int = MAX_CLIP_BYTES,
) -> tuple[torch.Tensor, float]:
    """Decode a clip (a path or encoded bytes) to uint8 (T, H, W, 3) and its frames per second.

    `fps` drops frames down to at most that rate. Bounds count the kept frames (`max_pixels`: T*H*W) and the clip's
    own seconds; beyond one of them ValueError, raised before the rest is decoded. ImportError without PyAV.
    """
    if fps is not None and not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    data, name = _read(source, max_bytes, "clip")
    animated = data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    timed = _animation_frames(data, name) if animated else _av_frames(data, name)
    frames: list[torch.Tensor] = []
    kept: list[float] = []
    try:
        for seconds, size, decode in timed:
            if seconds > max_seconds:
                raise ValueError(f"{name} is longer than max_seconds={max_seconds:g}; cut it or raise the bound")
            if fps is not None and kept and seconds < kept[0] + (len(kept) - 1e-3) / fps:
                continue
            if len(frames) >= max_frames:
                raise ValueError(f"{name} has more than max_frames={max_frames} frames; cut it, or give a lower fps")
            _check_pixels(size, len(frames) + 1, name, max_pixels)
            frames.append(decode())
            kept.append(seconds)
            if frames[-1].shape != frames[0].shape:
                raise ValueError(f"{name} changes its size at frame {len(frames)}; encode it again at one size")
    finally:
        timed.close()
    if not frames:
        raise ValueError(f"{name} holds no video frame; give a file with a video stream")
    span = kept[-1] - kept[0]
    return torch.stack(frames), (len(kept) - 1) / span if span > 0 else fps or 8.0


def save_video(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as H.264 in MP4. Lossy. ImportError without PyAV."""
    _check_tensor(frames, 4, "(T, H, W, 3)")
    av = _import_av()
    _, height, width, _ = frames.shape

    def write(file: IO[bytes]) -> None:
        with av.open(file, mode="w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"  # 4:2:0 needs even sides
            for frame in frames.cpu().contiguous().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))

    _write_whole(path, write)


def save_gif(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as an endless GIF of at most 256 colours a frame; delays are whole 1/100 s."""
    _save_animation(frames, path, "GIF", max(10 * round(100 / fps), 20))


def save_apng(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as an endless animated PNG, without loss."""
    _save_animation(frames, path, "PNG", round(1000 / fps))


def _save_animation(frames: torch.Tensor, path: str | Path, kind: str, milliseconds: int) -> None:
    _check_tensor(frames, 4, "(T, H, W, 3)")
    first, *rest = [to_pil(frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": milliseconds, "loop": 0}
    _write_whole(path, lambda file: first.save(file, format=kind, **options))


TimedFrames = Iterator[tuple[float, tuple[int, int], Callable[[], torch.Tensor]]]


def _animation_frames(data: bytes, name: str) -> Any:
    """Generator of (start in seconds, (W, H), decode) of an animated picture."""
    with _open(data, name, MAX_PIXELS) as image:
        seconds = 0.0
        for index in range(getattr(image, "n_frames", 1)):
            _check_pixels(image.size, 1, name, MAX_PIXELS)
            try:
                image.seek(index)
            except Exception as error:  # Pillow's parsers raise anything on damaged files
                raise ValueError(f"cannot decode {name}: {_reason(error)}; the file is cut off or damaged") from None
            yield seconds, image.size, lambda: _decode(image, name, MAX_PIXELS)
            seconds += max(float(image.info.get("duration", 0)), 20.0) / 1000


def _av_frames(data: bytes, name: str) -> Any:
    """Generator of (start in seconds, (W, H), decode) of the first video stream, through PyAV."""
    av = _import_av()
    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.video:
                return
            stream = container.streams.video[0]
            stream.thread_count = 1
            _check_pixels((stream.width, stream.height), 1, name, MAX_PIXELS)
            step = 1 / float(stream.average_rate or 8)
            for index, frame in enumerate(container.decode(stream)):
                seconds = frame.time if frame.time is not None else index * step
                size = (frame.width, frame.height)
                yield seconds, size, lambda frame=frame: torch.from_numpy(frame.to_ndarray(format="rgb24").copy())
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise ValueError(f"cannot decode {name}: {_reason(error)}; the file is cut off or no clip") from None


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ImportError("reading and writing video files needs PyAV: pip install 'omni-flow[video]'") from None
    return av


# --------------------------------------------------------------------------------------------- checks


def _check_pixels(size: tuple[int, int], num_frames: int, name: str, max_pixels: int) -> None:
    width, height = size
    if width * height * num_frames > max_pixels:
        times = f" x {num_frames} frames" if num_frames > 1 else ""
        raise ValueError(f"{name} is {width} x {height} pixels{times}, above max_pixels={max_pixels}; make it smaller")


def _check_tensor(pixels: torch.Tensor, ndim: int, shape: str) -> None:
    good = isinstance(pixels, torch.Tensor) and pixels.dtype == torch.uint8 and pixels.ndim == ndim
    if not good or pixels.shape[-1] != 3 or pixels.numel() == 0:
        got = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"pixels must be a uint8 tensor {shape}, got {got}")


def _read(source: str | Path | bytes, max_bytes: int, kind: str) -> tuple[bytes, str]:
    """Encoded bytes and what to call them in an error."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), f"the {kind}'s bytes"
    elif isinstance(source, str | os.PathLike):
        name = f"{kind} {str(source)!r}"
        try:
            with open(source, "rb", opener=_open_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError(f"{name} is no regular file; give the path of a file")
                data = file.read(max_bytes + 1)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"cannot read {name}: {reason}; give the path of a file that exists") from None
    else:
        raise ValueError(f"a {kind} is a path, bytes or a PIL image, got {type(source).__name__}")
    if len(data) > max_bytes:
        raise ValueError(f"{name} is larger than max_bytes={max_bytes}; make it smaller or raise the bound")
    if not data:
        raise ValueError(f"{name} is empty; give a {kind} with content")
    return data, name


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not block before it is refused


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _write_whole(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside `path` under another name, then rename: readers and crashes never see half a file."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
