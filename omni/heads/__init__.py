"""Heads embed blocks into hidden states and compute predictions from them. Only heads depend on channels and ids."""

from omni.heads.flow import FlowHead, FlowHeadConfig
from omni.heads.token import TokenHead

__all__ = ["FlowHead", "FlowHeadConfig", "TokenHead"]
