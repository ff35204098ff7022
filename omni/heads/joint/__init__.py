"""Joint-token heads, one file each, registered by name. See `base` for the contract."""

from omni.heads.joint.base import (
    JOINT_HEADS,
    Draft,
    ExtendedCall,
    JointCall,
    JointHead,
    LogProb,
    LossInputs,
    build_head,
)
from omni.heads.joint.tokens import JointConfig, JointTokens

__all__ = ["JOINT_HEADS", "ExtendedCall", "Draft", "JointCall", "JointConfig", "JointHead", "JointTokens", "LossInputs"]
__all__ += ["LogProb", "build_head"]
