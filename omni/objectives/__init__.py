"""Training objectives, one file each, registered by name. An objective depends on a callable, never on a model."""

from omni.objectives import (  # noqa: F401  (registration)
    alpha_flow,
    consistency,
    consistency_trajectory,
    continuous_consistency,
    drifting,
    flow_matching,
    improved_mean_flow,
    joint_tokens,
    mean_flow,
    moment_matching,
    next_token,
    progressive_distillation,
    shortcut,
    straight,
    terminal_velocity,
)
from omni.objectives.base import OBJECTIVES, FlowObjective, Objective, Terms, build_objective

__all__ = ["OBJECTIVES", "FlowObjective", "Objective", "Terms", "build_objective"]
