"""Joint-token heads, one per file; importing this package registers them. See `base` for the contract."""

from omni.heads.joint import circuits, latent_mixture, masked, product, push_forward, sequential, simplex  # noqa: F401
from omni.heads.joint.base import JOINT_HEADS, After, Draft, JointCall, JointHead, Lesson, LogProb, build_head
from omni.heads.joint.tokens import JointConfig, JointTokens

__all__ = ["JOINT_HEADS", "After", "Draft", "JointCall", "JointConfig", "JointHead", "JointTokens", "Lesson"]
__all__ += ["LogProb", "build_head"]
