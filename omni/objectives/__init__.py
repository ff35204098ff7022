"""Training objectives, one file each, registered by name. An objective depends on a callable, never on a model."""

from omni.objectives.base import OBJECTIVES, FlowObjective, Objective, Terms, build_objective

__all__ = ["OBJECTIVES", "FlowObjective", "Objective", "Terms", "build_objective"]
