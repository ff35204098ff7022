"""Training of the model's joint-token head, beside other objectives or after them; the head defines the loss."""

from __future__ import annotations

from pydantic import Field

from omni.objectives.base import OBJECTIVES, Objective


@OBJECTIVES.register("joint_tokens")
class JointTokenObjective(Objective):
    """blocks: the number of blocks of placeholders in every packed batch row, at random starts."""

    reads = "placeholders"
    blocks: int = Field(default=8, ge=1)
