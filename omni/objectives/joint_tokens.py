"""Training of the model's joint-token head, beside the ordinary losses or after them; the loss itself is the head's."""

from __future__ import annotations

from pydantic import Field

from omni.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("joint_tokens")
class JointTokenObjective(Objective):
    """blocks: how many blocks of placeholders every packed row carries, at random starts."""

    reads = "placeholders"
    blocks: int = Field(default=8, ge=1)
