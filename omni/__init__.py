"""Omni: one transformer for interleaved text, images and video.

`import omni` reads this file only; the names below load their module on first use, so that a program pays for torch
when it touches the model and not before. Heavy optional packages (diffusers, av, ...) load inside the functions
that need them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from omni.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from omni.document import Document, Image, Role, Text, Video
    from omni.generation.engine import Engine
    from omni.generation.options import GenerationOptions
    from omni.generation.reply import Reply
    from omni.model import Omni
    from omni.pretrained import from_pretrained
    from omni.rng import Key

__all__ = [
    "Document",
    "Engine",
    "GenerationOptions",
    "Image",
    "Key",
    "Omni",
    "Reply",
    "Role",
    "Text",
    "Video",
    "__version__",
    "from_pretrained",
]

_MODULE_OF = {
    "Document": "omni.document",
    "Engine": "omni.generation.engine",
    "GenerationOptions": "omni.generation.options",
    "Image": "omni.document",
    "Key": "omni.rng",
    "Omni": "omni.model",
    "Reply": "omni.generation.reply",
    "Role": "omni.document",
    "Text": "omni.document",
    "Video": "omni.document",
    "from_pretrained": "omni.pretrained",
}


def __getattr__(name: str) -> Any:
    """Load the module of a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'omni' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
