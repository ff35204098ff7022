"""The longest context of a model: `max_context` of its config.json, in positions of the context stream.

A prompt is counted before any pass over it. A reply ends (reason "length") before it exceeds the limit. A text token is
one position, as is every id of a header; a block has one position per latent.
"""

from __future__ import annotations

import warnings

WARN_SHARE = 0.9  # of the longest context


class ContextWarning(UserWarning):
    """A context fills at least WARN_SHARE of the model's longest."""


def require_room(num: int, limit: int, what: str = "the prompt has") -> None:
    """ValueError unless a prompt of `num` positions leaves room for a reply."""
    if num >= limit:
        raise ValueError(
            f"{what} {num:,} positions, and this model's longest context is {limit:,}, the reply included; "
            "shorten the prompt, give fewer pictures, or start a new conversation (/reset in omni chat)"
        )


def warn_if_nearly_full(num: int, limit: int) -> bool:
    """Whether `num` positions fill at least WARN_SHARE of `limit`; if so, warns with ContextWarning."""
    full = num >= WARN_SHARE * limit
    if full:
        warnings.warn(
            f"the context holds {num:,} positions of at most {limit:,}; a longer conversation is refused:  "
            "start a new one soon (/reset in omni chat)",
            ContextWarning,
            stacklevel=2,
        )
    return full
