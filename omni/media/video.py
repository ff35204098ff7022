"""Video files by PyAV: frames as a player shows them, and H.264 in MP4. PyAV converts the colours.

Legend: H, W pixels; T frames.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from omni.document import check_fps
from omni.media import files
from omni.media.files import MAX_PIXELS, TimedBytes, check_pixels
from omni.media.pixels import check_tensor, upright

# Containers that hold their own data. Others (playlists, ffconcat) would open further files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,av1,ivf,flv,ogg,asf,mxf,"
    "yuv4mpegpipe"
)
# Values of ITU-T H.273 in files, and PyAV's names of the matrices.
_MATRICES = {1: "ITU709", 4: "FCC", 5: "ITU601", 6: "ITU601", 7: "SMPTE240M", 9: "BT2020", 10: "BT2020"}
_BT709, _UNSPECIFIED = 1, 2
_LIMITED, _FULL = 1, 2


DEFAULT_FPS = 8.0  # of a clip without a frame rate


@dataclass(frozen=True)
class TimedFrame:
    """A frame: shown from `start` for `duration` (seconds); its size (W, H); its pixels (H, W, 3)."""

    start: float
    duration: float
    size: tuple[int, int]
    pixels: Callable[[], torch.Tensor]


def video_frames(data: TimedBytes, name: str, max_seconds: float) -> Generator[TimedFrame]:
    """The frames of the first video stream. ValueError if the header gives more than `max_seconds`."""
    av = _import_av()
    limit = {"max_pixels": str(2 * MAX_PIXELS)}  # of a frame, with the decoder's own margins
    more = {"options": {"format_whitelist": FORMATS, **limit}, "metadata_errors": "replace", "io_open": _open_no_other}
    with _named_errors(av, name), av.open(data, mode="r", **more) as container:
        stream = next((s for s in container.streams.video if not _is_cover(s)), None)
        if stream is None:
            return
        if stream.codec_context is None:
            raise ValueError(f"cannot decode {name}: its codec is not known here; encode it as H.264")
        check_pixels((stream.width, stream.height), 1, name, MAX_PIXELS)
        seconds = _declared_seconds(stream, container)
        if seconds > max_seconds:
            bound = f"max_seconds={max_seconds:g}"
            raise ValueError(f"{name} has {seconds:g} seconds by its header, above {bound}; cut it or raise the bound")
        stream.thread_count = 1
        stream.codec_context.options = limit
        step = 1 / float(stream.average_rate or DEFAULT_FPS)
        before: TimedFrame | None = None
        for index, frame in enumerate(container.decode(stream)):
            start = frame.time if frame.time is not None else index * step
            size = _square_size(frame, stream.sample_aspect_ratio)
            check_pixels(size, 1, name, MAX_PIXELS)
            if before is not None:
                yield replace(before, duration=max(start - before.start, 0.0))
            before = TimedFrame(start, step, size, partial(_pixels, frame, size, name))
        if before is not None:
            yield before


@contextmanager
def _named_errors(av: Any, name: str) -> Iterator[None]:
    """Turns PyAV's errors for damaged files into a ValueError that names the file."""
    try:
        yield
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise ValueError(f"cannot decode {name}: {files.reason(error)}; the file is cut off or no clip") from None


def _open_no_other(url: str, *rest: Any) -> Any:
    """Refuses every further file that a container names."""
    raise OSError(f"{url!r:.100} is another file")


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is the cover picture of an audio file."""
    return "attached_pic" in str(getattr(stream, "disposition", ""))


def _declared_seconds(stream: Any, container: Any) -> float:
    """The header's duration of the stream, else of the file (stored in microseconds); 0 if it has none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def _square_size(frame: Any, aspect: Fraction | None) -> tuple[int, int]:
    """(W, H) with square pixels: the shorter side of a pixel is stretched, so no detail is lost."""
    if not aspect or aspect <= 0:
        return frame.width, frame.height
    if aspect >= 1:
        return round(frame.width * aspect), frame.height
    return frame.width, round(frame.height / aspect)


def _pixels(frame: Any, size: tuple[int, int], name: str) -> torch.Tensor:
    """uint8 (H, W, 3): colour space of the frame, or by its size; square pixels; orientation applied."""
    options: dict[str, Any] = {"format": "rgb24", "dst_colorspace": "ITU601", "dst_color_range": "JPEG"}
    if not frame.format.is_rgb and len(frame.format.components) >= 3:
        matrix = _MATRICES.get(frame.colorspace)
        if matrix is None and frame.colorspace == _UNSPECIFIED:
            matrix = "ITU709" if frame.height >= 720 or frame.width >= 1280 else "ITU601"
        full = frame.format.name.startswith("yuvj") or frame.color_range == _FULL
        options |= {"src_colorspace": matrix, "src_color_range": "JPEG" if full else "MPEG"}
    if size != (frame.width, frame.height):
        options["interpolation"] = "BICUBIC"
    with _named_errors(_import_av(), name):
        pixels = frame.reformat(*size, **options).to_ndarray()
    return upright(torch.from_numpy(np.ascontiguousarray(pixels)), _display_matrix(frame))


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) as in pixels.upright."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
            return a, b, c, d
    return 1, 0, 0, 1


def save_video(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as H.264 in MP4, in BT.709 colours with their tag. Lossy.

    Odd sides use full colour resolution (4:4:4), which some players do not show. ImportError without PyAV; ValueError
    for sizes that H.264 cannot encode.
    """
    check_tensor(frames, 4, "(T, H, W, 3)")
    rate = Fraction(check_fps(fps)).limit_denominator(1001)
    av = _import_av()
    _, height, width, _ = frames.shape

    def write(file: IO[bytes]) -> None:
        with av.open(file, mode="w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuv420p" if height % 2 == 0 and width % 2 == 0 else "yuv444p"  # 4:2:0 needs even sides
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            colours = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG", "src_color_range": "JPEG"}
            for pixels in frames.cpu().contiguous().numpy():
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, **colours)))
            container.mux(stream.encode(None))

    try:
        files.write_whole(path, write)
    except av.error.FFmpegError as error:
        why = files.reason(error)
        raise ValueError(f"cannot write {width} x {height} pixels: {why}; H.264 takes sides up to 16,384") from None


def _import_av() -> Any:
    """PyAV. ImportError names the extra where it is missing."""
    try:
        import av
    except ImportError:
        raise ImportError("reading and writing video files needs PyAV: pip install 'omni-flow[video]'") from None
    return av
