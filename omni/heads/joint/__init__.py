"""Joint-token heads, one file each, registered by name. See `base` for the contract."""

from omni.heads.joint.base import JOINT_HEADS, After, Draft, JointCall, JointHead, Lesson, LogProb, build_head
from omni.heads.joint.tokens import JointConfig, JointTokens

__all__ = ["JOINT_HEADS", "After", "Draft", "JointCall", "JointConfig", "JointHead", "JointTokens", "Lesson"]
__all__ += ["LogProb", "build_head"]
