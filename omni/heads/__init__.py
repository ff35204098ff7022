"""Heads: embed a block into hidden states, read a prediction out of them. The only place that knows channels and ids."""

from omni.heads.flow import FlowHead, FlowHeadConfig
from omni.heads.token import TokenHead

__all__ = ["FlowHead", "FlowHeadConfig", "TokenHead"]
