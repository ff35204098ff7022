"""Heads embed a block into hidden states and read a prediction out of them: the only place that knows channels, ids."""

from omni.heads.flow import FlowHead, FlowHeadConfig
from omni.heads.token import TokenHead

__all__ = ["FlowHead", "FlowHeadConfig", "TokenHead"]
