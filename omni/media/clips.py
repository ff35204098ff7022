"""Clips: a path or encoded bytes to frames, and frames to animated pictures. video.py reads and writes video files.

Legend: H, W pixels; T frames. Kept frames and decoded frames are counted separately.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from omni.document import check_fps
from omni.media import files
from omni.media.files import MAX_PIXELS, TIMEOUT_SECONDS, TimedBytes, TimeLimitError, check_pixels
from omni.media.pictures import decode, open_header, to_pil
from omni.media.pixels import check_tensor
from omni.media.video import DEFAULT_FPS, TimedFrame, video_frames

MAX_CLIP_PIXELS = 500_000_000  # of all kept frames
MAX_CLIP_BYTES = 512 << 20
MAX_FRAMES = 1_000  # kept
MAX_DECODED_FRAMES = 10_000
MAX_DECODED_PIXELS = 2_000_000_000  # about 16 seconds of work


def load_video(
    source: str | Path | bytes,
    *,
    fps: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_seconds: float = 120.0,
    max_pixels: int = MAX_CLIP_PIXELS,
    max_bytes: int = MAX_CLIP_BYTES,
    max_decoded_frames: int = MAX_DECODED_FRAMES,
    max_decoded_pixels: int = MAX_DECODED_PIXELS,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> tuple[torch.Tensor, float]:
    """Decode a clip (a path or encoded bytes) to uint8 (T, H, W, 3) and its frames per second.

    Frames are as a player shows them: oriented by the display matrix or the EXIF orientation, with square pixels, in
    the file's colour space (default: BT.709 from 720 lines or 1280 columns on, else BT.601). A frame of an animated
    picture is repeated if its delay is a multiple of the shortest. `fps` subsamples a faster clip: it keeps the frames
    shown at 0, 1/fps, 2/fps, ...

    max_frames, max_pixels (T*H*W) and max_seconds bound the kept frames; max_decoded_frames and max_decoded_pixels
    bound all decoded frames, dropped ones too; timeout_seconds bounds the time. Beyond a bound ValueError, raised
    before the rest is decoded, and before any decoding if the header gives the value. ImportError without PyAV, which
    GIF, APNG and WebP do not need.
    """
    rate = None if fps is None else check_fps(fps)
    data, name = files.read(source, max_bytes, "clip")
    clock = TimedBytes(data, name, timeout_seconds)
    animated = data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
    shown = _animation_frames(clock, name) if animated else video_frames(clock, name, max_seconds)
    walk = _DecodingBudget(name, max_seconds, max_decoded_frames, max_decoded_pixels)
    frames: list[torch.Tensor] = []
    starts: list[float] = []
    times: list[int] = []  # repeats of a frame at `rate`
    try:
        for frame in shown:
            clock.check_time()
            walk.step(frame)
            num = walk.samples(frame, rate) if rate is not None else 1
            if not num:
                continue
            if len(frames) >= max_frames:
                raise ValueError(f"{name} has more than max_frames={max_frames} frames; cut it, or give a lower fps")
            check_pixels(frame.size, len(frames) + 1, name, max_pixels)
            frames.append(frame.pixels())
            starts.append(walk.start)
            times.append(num)
            if frames[-1].shape != frames[0].shape:
                raise ValueError(f"{name} changes its size at frame {len(frames)}; encode it again at one size")
    finally:
        shown.close()
    if not frames:
        raise ValueError(f"{name} holds no video frame; give a file with a video stream")
    own = _repeats(starts, walk.end) if animated else [1] * len(frames)
    span = starts[-1] - starts[0]
    own_rate = sum(own[:-1]) / span if span > 0 else rate or DEFAULT_FPS
    if rate is None or (walk.num_frames == len(frames) and own_rate <= rate * 1.001):
        times, rate = own, check_fps(own_rate, f"{name}: its frames per second")
    return _repeated(frames, times, name, max_frames, max_pixels), rate


def _repeated(
    frames: list[torch.Tensor], times: list[int], name: str, max_frames: int, max_pixels: int
) -> torch.Tensor:
    """Each frame (H, W, 3) repeated `times` times: (T, H, W, 3). ValueError beyond a bound, before any copy."""
    if sum(times) > max_frames:
        raise ValueError(f"{name} lasts {sum(times)} frames, above max_frames={max_frames}; cut it, or lower fps")
    check_pixels((frames[0].shape[1], frames[0].shape[0]), sum(times), name, max_pixels)
    return torch.stack([frame for frame, num in zip(frames, times, strict=True) for _ in range(num)])


class _DecodingBudget:
    """Counts the decoded frames of a clip, kept or dropped, and checks their bounds. start, end: of the last frame, in
    seconds."""

    def __init__(self, name: str, max_seconds: float, max_frames: int, max_pixels: int) -> None:
        self._name, self._max_seconds = name, max_seconds
        self._max_frames, self._max_pixels = max_frames, max_pixels
        self._first: float | None = None
        self._next_sample = 0
        self.num_frames = self.num_pixels = 0
        self.start = self.end = 0.0  # of the last frame, in seconds after the first frame

    def step(self, frame: TimedFrame) -> None:
        """Count `frame`. Raises ValueError beyond a bound."""
        if self._first is None:
            self._first = frame.start
        self.start = frame.start - self._first
        self.end = self.start + frame.duration
        self.num_frames += 1
        self.num_pixels += frame.size[0] * frame.size[1]
        if self.start > self._max_seconds:
            bound = f"max_seconds={self._max_seconds:g}"
            raise ValueError(f"{self._name} is longer than {bound}; cut it or raise the bound")
        if self.num_frames > self._max_frames:
            bound = f"max_decoded_frames={self._max_frames}"
        elif self.num_pixels > self._max_pixels:
            bound = f"max_decoded_pixels={self._max_pixels}"
        else:
            return
        raise ValueError(f"{self._name} has more to decode than {bound}; cut it, make it smaller or raise the bound")

    def samples(self, frame: TimedFrame, rate: float) -> int:
        """The number of times 0, 1/rate, 2/rate, ... at which the last frame is shown."""
        slack = min(1e-3, frame.duration * rate / 2)  # times in files are rounded
        after = max(math.ceil(self.end * rate - slack), self._next_sample)
        num, self._next_sample = after - self._next_sample, after
        return num


def _repeats(starts: Sequence[float], end: float) -> list[int]:
    """Repeats of each frame at the rate of the shortest delay; 1 if the delays are not multiples of it.

    Writers of animated pictures store equal neighbours as one frame with a longer delay.
    """
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    if not gaps or min(gaps) <= 0:
        return [1] * len(starts)
    lengths = [gap / min(gaps) for gap in [*gaps, max(end - starts[-1], min(gaps))]]
    times = [round(length) for length in lengths]
    if any(num <= 3 and abs(length - num) > 0.15 for length, num in zip(lengths[:-1], times, strict=False)):
        return [1] * len(starts)
    return times


# --------------------------------------------------------------------------------------------- animated pictures


def _animation_frames(data: TimedBytes, name: str) -> Generator[TimedFrame]:
    """The frames of a GIF, PNG or WebP with their times; Pillow seeks each."""
    with open_header(data, name, MAX_PIXELS) as image:
        # The number of frames of a GIF is known only at its end.
        frames = itertools.count() if image.format == "GIF" else range(getattr(image, "n_frames", 1))
        shortest = 20 if image.format == "GIF" else 1  # browsers show shorter delays for 1/10 s
        start = 0.0
        for index in frames:
            check_pixels(image.size, 1, name, MAX_PIXELS)
            try:
                image.seek(index)
            except TimeLimitError:
                raise
            except EOFError:
                if image.format == "GIF" and index:
                    return
                raise ValueError(f"cannot decode {name}: frame {index + 1} is missing; the file is cut off") from None
            except Exception as error:  # Pillow's parsers raise anything on damaged files
                why = files.reason(error)
                raise ValueError(f"cannot decode {name}: {why}; the file is cut off or damaged") from None
            delay = float(image.info.get("duration", 0))
            duration = (delay if delay >= shortest else 100.0) / 1000
            yield TimedFrame(start, duration, image.size, lambda: decode(image, name, MAX_PIXELS))
            start += duration


def save_gif(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as an endless GIF of at most 256 colours a frame; delays are whole 1/100 s.

    Equal neighbours become one frame with a longer delay; load_video restores them unless all frames are equal.
    Raises ValueError for rates outside the format: above 50, or below 1/655.
    """
    delay = round(100 / check_fps(fps))
    if not 2 <= delay <= 65_535 or fps > 50:
        raise ValueError(f"a GIF shows from 1/655 to 50 frames per second, got fps={fps}; write an APNG or MP4")
    _save_animation(frames, path, "GIF", duration=10 * delay)


def save_apng(frames: torch.Tensor, path: str | Path, fps: float = 8.0) -> None:
    """Write uint8 (T, H, W, 3) as an endless animated PNG, without loss."""
    # Pillow merges equal neighbours unless they differ in `blend`, which has no effect on opaque frames.
    blend = [index % 2 for index in range(len(frames))]
    _save_animation(frames, path, "PNG", duration=1000 / check_fps(fps), blend=blend)


def _save_animation(frames: torch.Tensor, path: str | Path, kind: str, **options: Any) -> None:
    """Write all frames by Pillow; the file appears whole or not at all."""
    check_tensor(frames, 4, "(T, H, W, 3)")
    first, *rest = [to_pil(frame) for frame in frames]
    options = {"save_all": True, "append_images": rest, "loop": 0, **options}
    try:
        files.write_whole(path, lambda file: first.save(file, format=kind, **options))
    except struct.error:  # raised by older versions of Pillow
        raise ValueError(f"frames of {options['duration']:g} ms are too long for {kind}; give a higher fps") from None
