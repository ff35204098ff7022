"""The longest context of a model: `max_context` of its config.json, in positions of the context stream.

A prompt is counted before any pass over it; a reply ends (reason "length") before it would grow past the limit. A text
token is one position, and so is every id of a header; a block has as many as it has latents.
"""

from __future__ import annotations

import warnings

WARN_SHARE = 0.9


class ContextWarning(UserWarning):
    """A context fills at least WARN_SHARE of the model's longest."""


def require_room(num: int, limit: int, what: str = "the prompt has") -> None:
    """ValueError unless `num` positions leave room for a reply."""
    if num >= limit:
        raise ValueError(
            f"{what} {num:,} positions, and this model's longest context is {limit:,}, the reply included; "
            "shorten the prompt, give fewer pictures, or begin a new conversation (/reset in omni chat)"
        )


def warn_if_nearly_full(num: int, limit: int) -> bool:
    """A ContextWarning where `num` positions fill at least WARN_SHARE of `limit`; whether there was one."""
    full = num >= WARN_SHARE * limit
    if full:
        warnings.warn(
            f"the context holds {num:,} positions of at most {limit:,}; a longer conversation will be refused: "
            "begin a new one soon (/reset in omni chat)",
            ContextWarning,
            stacklevel=2,
        )
    return full
