"""Pictures and clips from and to files and arrays, with limits that are checked before large input is decoded.

Pixels are uint8 RGB tensors, (H, W, 3) or (T, H, W, 3), on the CPU. Unreadable, oversized or unsupported input raises a
one-line ValueError that names it. Files appear whole or not at all. Nothing is fetched from a network; a file cannot
open another file.

    pixels.py     values of any mode and dtype to uint8 RGB: the only conversion
    pictures.py   files, bytes, PIL pictures and arrays to pixels; writes PNG
    clips.py      clips to frames; reads and writes animated pictures
    video.py      MP4 and other video files, by PyAV: pip install 'omni-flow[video]'
    files.py      bounded reading, atomic writing, the time limit
"""

from omni.media.clips import MAX_CLIP_BYTES, MAX_CLIP_PIXELS, MAX_FRAMES, load_video, save_apng, save_gif
from omni.media.files import MAX_BYTES, MAX_PIXELS, TIMEOUT_SECONDS
from omni.media.pictures import encode_png, load_image, save_png, to_pil
from omni.media.video import save_video

__all__ = [
    "MAX_BYTES",
    "MAX_CLIP_BYTES",
    "MAX_CLIP_PIXELS",
    "MAX_FRAMES",
    "MAX_PIXELS",
    "TIMEOUT_SECONDS",
    "encode_png",
    "load_image",
    "load_video",
    "save_apng",
    "save_gif",
    "save_png",
    "save_video",
    "to_pil",
]
